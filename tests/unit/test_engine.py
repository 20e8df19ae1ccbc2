"""The whole engine on a tiny real model: the answer is a function of prompt, parameters and seed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from outpace.batch import Batch, TargetOutput, Verdict
from outpace.config import EngineConfig
from outpace.engine.admission import Admission, child_seed
from outpace.engine.engine import choose_dtype, choose_num_blocks, max_model_len
from outpace.errors import ConfigError, InvalidRequestError
from outpace.llm import LLM, Prompt
from outpace.models.config import RopeConfig
from outpace.policy.base import BatchView, SpeculationPolicy
from outpace.request import Sequence
from outpace.runtime.kv_cache import KVCache
from outpace.sampling import SamplingParams
from outpace.tree import DraftTree
from tiny import (
    EOS,
    GREEDY,
    MODEL,
    PROMPTS,
    SAMPLED,
    FakeModel,
    Guesser,
    answers,
    byte_tokenizer,
    run,
    submit,
    text,
    tiny_engine,
    tokens,
)


def alone(sampling: SamplingParams) -> list[list[int]]:
    """Each prompt answered by an engine of its own, nothing cached."""
    result = []
    for prompt in PROMPTS:
        engine = tiny_engine(enable_prefix_caching=False)
        submit(engine, "only", prompt, sampling)
        result.append(tokens(run(engine)["only-0"]))
    return result


@pytest.fixture(scope="module", params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def expected(request: pytest.FixtureRequest) -> tuple[SamplingParams, list[list[int]]]:
    return request.param, alone(request.param)


@pytest.mark.parametrize("stagger", [None, 3])
def test_the_batch_around_it_does_not_change_an_answer(expected: Any, stagger: int | None) -> None:
    sampling, alone = expected
    assert answers(tiny_engine(), sampling, stagger) == alone


def test_preemption_does_not_change_an_answer(expected: Any) -> None:
    sampling, alone = expected
    engine = tiny_engine(num_blocks=16, enable_prefix_caching=False)
    assert answers(engine, sampling) == alone
    assert engine.scheduler.num_preemptions > 0


def test_a_cached_prefix_does_not_change_an_answer(expected: Any) -> None:
    sampling, alone = expected
    engine = tiny_engine()
    answers(engine, sampling)
    hits = engine.scheduler.num_prefix_hits
    assert answers(engine, sampling) == alone
    assert engine.scheduler.num_prefix_hits - hits > 200


@pytest.mark.parametrize("chunk", [7, 32, 100])
def test_the_chunk_size_does_not_change_an_answer(expected: Any, chunk: int) -> None:
    sampling, alone = expected
    assert answers(tiny_engine(max_num_batched_tokens=chunk, max_num_seqs=6), sampling) == alone


class AllowFive(SpeculationPolicy):
    """Five nodes for everyone, of which one is cut after drafting now and then."""

    def __init__(self) -> None:
        self.num_accepted = 0

    def limits(self, view: BatchView) -> list[int]:
        return [min(5, sequence.max_draft) for sequence in view.sequences]

    def trim(self, view: BatchView, drafts: Any) -> list[int] | None:
        return None if view.num_rows % 2 else [4] * len(drafts)

    def observe(self, record: Any) -> None:
        self.num_accepted += sum(record.num_accepted)


@pytest.mark.parametrize("num_blocks", [None, 16])
def test_speculation_does_not_change_an_answer(expected: Any, num_blocks: int | None) -> None:
    sampling, alone = expected
    engine = tiny_engine(num_blocks=num_blocks)
    guesser = engine.proposer = Guesser({f"{i}-0": known for i, known in enumerate(alone)})
    policy = engine.policy = AllowFive()
    assert answers(engine, sampling) == alone
    assert policy.num_accepted > 50
    assert sorted(guesser.released) == sorted(guesser.known)


@pytest.mark.parametrize("verification", ["match", "ratio"])
def test_a_greedy_answer_is_the_same_by_either_rule(verification: str) -> None:
    plain = answers(tiny_engine(), GREEDY)
    engine = tiny_engine(verification=verification)
    engine.proposer = Guesser({f"{i}-0": known for i, known in enumerate(plain)})
    policy = engine.policy = AllowFive()
    assert answers(engine, GREEDY) == plain
    assert policy.num_accepted > 50


def test_by_the_ratio_rule_the_same_batch_has_the_same_answers_again() -> None:
    def speculated() -> list[list[int]]:
        engine = tiny_engine(verification="ratio")
        engine.proposer = Guesser({f"{i}-0": list(range(97, 137)) for i in range(len(PROMPTS))})
        engine.policy = AllowFive()
        return answers(engine, SAMPLED)

    assert speculated() == speculated()


class Confident(Guesser):
    """Has a confidence for each node; says of every draft that it was drawn, or does not."""

    says_drawn = False

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        trees = [replace(tree, confidence=(0.1,) * len(tree)) for tree in super().propose(sequences, limits)]
        if not self.says_drawn:
            return trees
        return [replace(tree, probs=torch.ones(len(tree), MODEL.vocab_size)) for tree in trees]


class Trimmer(AllowFive):
    """Notes the confidences that it is shown."""

    def trim(self, view: BatchView, drafts: Any) -> list[int] | None:
        self.shown = [*getattr(self, "shown", []), *(draft.confidence for draft in drafts)]
        return None


@pytest.mark.parametrize("says_drawn", [False, True])
def test_a_policy_that_trims_does_not_see_the_confidence_of_tokens_that_were_drawn(
    expected: Any, says_drawn: bool
) -> None:
    sampling, alone = expected
    engine = tiny_engine()
    proposer = engine.proposer = Confident({f"{i}-0": known for i, known in enumerate(alone)})
    proposer.says_drawn = says_drawn
    trimmer = engine.policy = Trimmer()
    assert answers(engine, sampling) == alone
    assert (set(trimmer.shown) == {None}) is says_drawn


class AllowTooMuch(SpeculationPolicy):
    """Allows the same to all, whatever is left of their answers."""

    def limits(self, view: BatchView) -> list[int]:
        return [5] * len(view.sequences)


class Recorder(Guesser):
    """Also notes the size of each tree that was verified and the length it could use."""

    def observe(self, batch: Batch, target: TargetOutput, verdict: Verdict) -> None:
        for entry in batch.entries:
            left = entry.sequence.request.max_tokens - entry.sequence.num_output
            self.sizes = [*getattr(self, "sizes", []), (len(entry.tree), left - 1)]


def test_a_draft_never_reaches_beyond_the_length_limit_whatever_the_policy_allows(expected: Any) -> None:
    sampling, alone = expected
    engine = tiny_engine()
    recorder = engine.proposer = Recorder({f"{i}-0": [*known, 1, 2, 3] for i, known in enumerate(alone)})
    engine.policy = AllowTooMuch()
    assert answers(engine, sampling) == alone
    assert max(size for size, _ in recorder.sizes) == 5
    assert all(size <= most for size, most in recorder.sizes)


def test_n_answers_differ_and_each_can_be_had_alone() -> None:
    engine = tiny_engine()
    sampling = SamplingParams(n=3, seed=5, max_tokens=12, temperature=1.0)
    submit(engine, "a", "hello", sampling)
    got = {name: tokens(outputs) for name, outputs in run(engine).items()}
    assert len({tuple(answer) for answer in got.values()}) == 3
    submit(engine, "b", "hello", replace(sampling, n=1, seed=child_seed(5, 2)))
    assert tokens(run(engine)["b-0"]) == got["a-2"]


def test_text_logprobs_and_tokens_belong_together() -> None:
    engine = tiny_engine()
    submit(engine, "a", "hello", SamplingParams(seed=1, max_tokens=20, logprobs=3, ignore_eos=True))
    outputs = run(engine)["a-0"]
    assert text(outputs) == engine.tokenizer.decode(tokens(outputs), skip_special_tokens=True)
    logprobs = [item for output in outputs for item in output.logprobs or ()]
    assert [item.token_id for item in logprobs] == tokens(outputs)
    assert all(len(item.top) == 3 for item in logprobs)


# Admission


def admission(**settings: Any) -> Admission:
    return Admission(EngineConfig(**settings), MODEL, byte_tokenizer(), 100)


@pytest.mark.parametrize(
    ("prompt", "sampling", "message", "param"),
    [
        ([], {}, "the prompt is empty", "prompt"),
        ([1] * 100, {}, "the prompt has 100 tokens, the limit is 99", "prompt"),
        ([1, 259], {}, "token ids in \\[0, 259\\), got 259", "prompt"),
        ([1, -1], {}, "got -1", "prompt"),
        ([1], {"logit_bias": {300: 1.0}}, "got 300", "logit_bias"),
        ([1], {"allowed_token_ids": (300,)}, "got 300", "allowed_token_ids"),
        ([1], {"stop_token_ids": (300,)}, "got 300", "stop_token_ids"),
        ([1] * 90, {"min_tokens": 11}, "min_tokens must be at most 10, got 11", "min_tokens"),
        (
            [1] * 90,
            {"max_tokens": 11},
            "max_tokens must be at most 10, got 11: the prompt takes 90",
            "max_tokens",
        ),
        ([1], {"bad_words": ("  ",)}, "more than spaces", "bad_words"),
        ([1], {"n": 5}, "n must be at most 4, got 5", "n"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    prompt: Any, sampling: Any, message: str, param: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as refusal:
        admission(max_num_seqs=3, max_num_queued_reqs=1).requests("a", prompt, SamplingParams(**sampling))
    assert refusal.value.param == param


def test_without_a_limit_an_answer_may_be_as_long_as_the_context_allows() -> None:
    for asked, granted in ((None, 90), (5, 5), (90, 90)):
        [request] = admission().requests("a", [1] * 10, SamplingParams(max_tokens=asked))
        assert request.max_tokens == granted


def test_a_priority_is_refused_where_it_would_mean_nothing() -> None:
    with pytest.raises(
        InvalidRequestError, match="priority must be 0 under --scheduling-policy fcfs, got 2"
    ) as e:
        admission().requests("a", [1], SamplingParams(), priority=2)
    assert e.value.param == "priority"
    [request] = admission(scheduling_policy="priority").requests("a", [1], SamplingParams(), priority=2)
    assert request.priority == 2


def test_children_have_their_own_ids_and_seeds() -> None:
    requests = admission(scheduling_policy="priority").requests(
        "a", [1], SamplingParams(n=4, seed=-3), priority=2
    )
    assert [(r.id, r.index, r.priority) for r in requests] == [(f"a-{i}", i, 2) for i in range(4)]
    assert requests[0].seed == -3
    assert len({r.seed for r in requests}) == 4
    assert all(0 <= r.seed < 2**63 for r in requests[1:])


def test_without_a_seed_one_is_drawn_and_the_draw_can_be_repeated() -> None:
    first, second = admission(seed=1), admission(seed=1)
    draws = [a.requests("a", [1], SamplingParams())[0].seed for a in (first, first, second)]
    assert draws[0] != draws[1]
    assert draws[0] == draws[2]


def test_bad_words_are_tokenised_with_and_without_a_space() -> None:
    [request] = admission().requests("a", [1], SamplingParams(bad_words=("no", " way")))
    assert request.bad_words_ids == (tuple(b"no"), tuple(b" no"), tuple(b"way"), tuple(b" way"))
    assert request.eos_token_ids == {EOS}


# Settings


def test_a_context_longer_than_the_models_is_refused() -> None:
    assert max_model_len(EngineConfig(), MODEL) == 512
    with pytest.raises(ConfigError, match="513 is above the model's limit of 512"):
        max_model_len(EngineConfig(max_model_len=513), MODEL)


def test_a_cache_too_small_for_one_sequence_is_refused_with_the_size_it_needs() -> None:
    block = KVCache.block_bytes(MODEL, torch.float32)
    config = EngineConfig(kv_cache_memory_bytes=31 * block)
    with pytest.raises(ConfigError, match=f"give at least {32 * block}"):
        choose_num_blocks(config, [MODEL], torch.float32)
    assert choose_num_blocks(replace(config, max_model_len=496), [MODEL], torch.float32) == 31


@pytest.mark.parametrize("settings", [{"kv_cache_memory_bytes": 10**18}, {"max_num_seqs": 10**9}])
def test_a_cache_larger_than_the_machines_memory_is_refused(settings: Any) -> None:
    config = EngineConfig(max_num_batched_tokens=10**9, **settings)
    with pytest.raises(ConfigError, match="exceeds this machine's memory of"):
        choose_num_blocks(config, [MODEL], torch.float32)


def test_the_default_cache_holds_what_the_help_says() -> None:
    long = replace(MODEL, max_position_embeddings=100_000, rope=RopeConfig())
    assert choose_num_blocks(EngineConfig(max_num_seqs=2), [long], torch.float32) == 6250
    assert choose_num_blocks(EngineConfig(max_num_seqs=256), [long], torch.float32) == 256 * 64


def test_the_dtype_is_what_is_asked_for() -> None:
    assert choose_dtype(EngineConfig(dtype="float32")) == torch.float32
    assert choose_dtype(EngineConfig(dtype="bfloat16")) == torch.bfloat16
    assert choose_dtype(EngineConfig()) in (torch.float32, torch.bfloat16)


# Offline


def test_generate_answers_one_or_many_prompts_in_their_order() -> None:
    llm = LLM.from_engine(FakeModel().engine(max_num_seqs=2, max_num_queued_reqs=1))
    params = SamplingParams(max_tokens=6)
    [one] = llm.generate("hello", params)
    prompts: list[Prompt] = ["hello", list(b"hello"), "other"]
    many = llm.generate(prompts * 5, params)
    assert one.outputs[0].text == many[0].outputs[0].text == many[1].outputs[0].text
    assert one.outputs[0].token_ids == list(one.outputs[0].text.encode())
    assert many[2].outputs[0].text != many[1].outputs[0].text
    assert (many[2].prompt, many[2].prompt_token_ids) == ("other", list(b"other"))
    assert one.outputs[0].finish_reason == "length"


def test_generate_takes_parameters_per_prompt() -> None:
    llm = LLM.from_engine(FakeModel().engine())
    results = llm.generate(["a", "b"], [SamplingParams(max_tokens=3), SamplingParams(max_tokens=5, n=2)])
    assert [[len(answer.token_ids) for answer in result.outputs] for result in results] == [[3], [5, 5]]
    with pytest.raises(InvalidRequestError, match="1 sampling_params given for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_a_bad_prompt_among_many_starts_none() -> None:
    llm = LLM.from_engine(FakeModel().engine())
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate(["fine", ""])
    assert not llm.engine.has_work


def test_an_interrupted_generate_leaves_the_engine_empty() -> None:
    model = FakeModel()
    llm = LLM.from_engine(model.engine())

    def interrupt() -> None:
        if len(model.passes) == 3:
            model.on_forward = lambda: None
            raise KeyboardInterrupt

    model.on_forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(max_tokens=50))
    assert not llm.engine.has_work
    llm.engine.kv.blocks.check()


def test_chat_lays_conversations_out_by_the_template() -> None:
    llm = LLM.from_engine(FakeModel().engine())
    conversation = [{"role": "user", "content": "hi"}]
    [one] = llm.chat(conversation, SamplingParams(max_tokens=3))
    assert one.prompt_token_ids == [257, *b"hi", 258]
    assert len(llm.chat([conversation, conversation], SamplingParams(max_tokens=3))) == 2
    llm.tokenizer.chat_template = None
    with pytest.raises(InvalidRequestError, match="no chat template"):
        llm.chat(conversation)


def test_progress_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    LLM.from_engine(FakeModel().engine()).generate(["a", "b"], SamplingParams(max_tokens=2), progress=True)
    assert "Generating" in capsys.readouterr().out


def test_a_step_without_work_does_nothing() -> None:
    assert FakeModel().engine().step() == []


def test_an_engine_that_fails_in_a_pass_can_still_abort() -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    engine = FakeModel(on_forward=fail).engine()
    submit(engine, "a", "hello", SamplingParams())
    with pytest.raises(RuntimeError):
        engine.step()
    assert engine.abort("a-0") is not None
    engine.kv.blocks.check()


class Watcher(Guesser):
    """Also notes what it was shown."""

    def observe(self, batch: Batch, target: TargetOutput, verdict: Verdict) -> None:
        assert len(batch.entries) == len(verdict.decisions)
        self.num_seen = getattr(self, "num_seen", 0) + 1


def test_a_proposer_sees_every_step_and_every_end() -> None:
    engine = FakeModel().engine()
    watcher = engine.proposer = Watcher({"a-0": [], "b-0": []})
    submit(engine, "a", "hello", SamplingParams(max_tokens=4))
    submit(engine, "b", "hello", SamplingParams(max_tokens=4))
    engine.step()
    engine.abort("b-0")
    run(engine)
    assert watcher.num_seen == 4
    assert watcher.released == ["b-0", "a-0"]
