"""Drafts by a model: its own cache, its shadow of each sequence, and the trees that a decoder grows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from outpace.batch import Batch, TargetOutput
from outpace.config import BLOCK_SIZE, EngineConfig
from outpace.engine.engine import Engine, cached_models, choose_num_blocks
from outpace.errors import ConfigError
from outpace.request import Sequence
from outpace.runtime.kv_cache import KVCache
from outpace.sampling import SamplingParams
from outpace.spec.proposers.draft_model import DraftModel, check_vocabulary
from tiny import GREEDY, MODEL, SAMPLED, answers, byte_tokenizer, run, tiny_engine, write_model

EVERY = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "penalised": replace(
        SAMPLED, repetition_penalty=1.3, frequency_penalty=0.4, bad_words=("e",), min_tokens=8
    ),
}
Answers = dict[str, list[list[int]]]


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The target itself."""
    return str(write_model(tmp_path_factory.mktemp("same")))


@pytest.fixture(scope="module")
def similar(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that is right about half the time."""
    return str(write_model(tmp_path_factory.mktemp("similar"), noise=0.3))


def drafting(model: str, branching: int = 1, **settings: Any) -> Engine:
    more = {"draft_branching": branching}
    return tiny_engine(spec_method="draft_model", spec_model=model, speculative_config=more, **settings)


@pytest.fixture(scope="module")
def plain() -> Answers:
    """The answers without speculation."""
    return {name: answers(tiny_engine(), sampling) for name, sampling in EVERY.items()}


def proposer_of(engine: Engine) -> DraftModel:
    assert isinstance(engine.proposer, DraftModel)
    return engine.proposer


def running(prompt: list[int], name: str = "0", sampling: SamplingParams = GREEDY) -> Sequence:
    """A sequence that the target has computed and that holds a block of it."""
    (request,) = tiny_engine().admission.requests(name, prompt, sampling)
    sequence = Sequence.start(request)
    sequence.block_ids.append(0)
    return sequence


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each forward pass of any model."""
    from outpace.runtime.runner import ModelRunner

    rows: list[int] = []
    forward = ModelRunner.forward

    def counted(self: ModelRunner, batch: Batch) -> TargetOutput:
        rows.append(batch.num_rows)
        return forward(self, batch)

    monkeypatch.setattr(ModelRunner, "forward", counted)
    return rows


# --- What is accepted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["greedy", "penalised"])
@pytest.mark.parametrize("num_blocks", [None, 16])
def test_a_draft_model_equal_to_the_target_is_always_right(
    kind: str, num_blocks: int | None, same: str, plain: Answers
) -> None:
    engine = drafting(same, spec_tokens=5, num_blocks=num_blocks)
    assert answers(engine, EVERY[kind]) == plain[kind]
    drafts = engine.metrics.drafts
    assert drafts.num_accepted_tokens == drafts.num_draft_tokens > 100
    assert (engine.scheduler.num_preemptions > 0) == (num_blocks is not None)


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_a_branching_draft_that_errs_changes_no_answer(kind: str, similar: str, plain: Answers) -> None:
    engine = drafting(similar, branching=3, spec_tokens=6, num_blocks=16)
    assert answers(engine, EVERY[kind]) == plain[kind]
    assert engine.scheduler.num_preemptions > 0
    drafts = engine.metrics.drafts
    assert 30 < drafts.num_accepted_tokens < drafts.num_draft_tokens
    blocks = proposer_of(engine).drafter.kv.blocks
    blocks.check()
    assert blocks.num_free_blocks == blocks.num_blocks


def test_the_leaves_beside_a_chain_are_what_would_be_chosen_next(same: str) -> None:
    proposer = proposer_of(drafting(same, branching=3))
    sequence = running([1, 2, 3])
    (tree,) = proposer.propose([sequence], [3])
    (chain,) = proposer_of(drafting(same)).propose([sequence], [1])
    engine = tiny_engine()
    engine.add([replace(sequence.request, sampling=replace(GREEDY, logprobs=3, max_tokens=1), max_tokens=1)])
    (entry,) = run(engine)["0-0"][0].logprobs or ()
    best = dict(entry.top)
    roots = [node for node, parent in enumerate(tree.parents) if parent == -1]
    assert [tree.token_ids[node] for node in roots] == list(best)[: len(roots)]
    assert len(roots) > 1
    assert tree.token_ids[0] == chain.token_ids[0]
    for node in roots:
        assert tree.confidence is not None
        assert tree.confidence[node] == pytest.approx(torch.tensor(best[tree.token_ids[node]]).exp().item())


def test_the_best_nodes_of_a_branching_draft_come_first(similar: str) -> None:
    proposer = proposer_of(drafting(similar, branching=2))
    for start in range(20):
        (tree,) = proposer.propose([running([start, 7, start + 1], str(start))], [6])
        scores: list[float] = []
        for parent, confidence in zip(tree.parents, tree.confidence or (), strict=True):
            scores.append(confidence * (scores[parent] if parent >= 0 else 1.0))
        assert scores == sorted(scores, reverse=True)
        assert len(tree) == 6


def test_a_token_that_the_request_filters_out_is_no_leaf(same: str) -> None:
    only_best = replace(SAMPLED, top_k=1)
    (tree,) = proposer_of(drafting(same, branching=3)).propose([running([1, 2], sampling=only_best)], [4])
    assert tree.is_chain()
    assert tree.confidence == (1.0,) * 4


# --- The draft model's own cache ------------------------------------------------------------------------


def test_a_prompt_is_caught_up_with_in_chunks_beside_those_that_draft(same: str, passes: list[int]) -> None:
    proposer = proposer_of(drafting(same, max_num_batched_tokens=8, max_num_seqs=4))
    short, long = running([1, 2], "a"), running(list(range(17)), "b")
    sizes = [[len(tree) for tree in proposer.propose([long, short], [2, 2])] for _ in range(3)]
    assert sizes == [[0, 2], [0, 2], [2, 2]]
    assert max(passes) == 8


def test_after_a_verification_only_what_is_new_is_computed(same: str, passes: list[int]) -> None:
    proposer = proposer_of(drafting(same))
    sequence = running([1, 2, 3, 4])
    (tree,) = proposer.propose([sequence], [3])
    assert passes == [4, 1, 1]
    wrong = (tree.token_ids[1] + 1) % MODEL.vocab_size
    sequence.token_ids += [tree.token_ids[0], wrong]  # one accepted
    passes.clear()
    (tree,) = proposer.propose([sequence], [3])
    assert passes == [1, 1, 1]
    sequence.token_ids += [*tree.token_ids, 5]  # all accepted: the last one was never computed
    passes.clear()
    (after,) = proposer.propose([sequence], [1])
    assert passes == [2]
    (fresh,) = proposer_of(drafting(same)).propose([sequence], [1])
    assert after == fresh


def test_where_another_draft_was_accepted_nothing_of_ones_own_is_kept(same: str, passes: list[int]) -> None:
    proposer, sequence = proposer_of(drafting(same)), running([1, 2, 3])
    (tree,) = proposer.propose([sequence], [5])
    sequence.token_ids += [(token_id + 1) % MODEL.vocab_size for token_id in tree.token_ids[:4]]
    passes.clear()
    (after,) = proposer.propose([sequence], [2])
    assert passes == [4, 1]
    assert [after] == proposer_of(drafting(same)).propose([sequence], [2])


def test_a_token_that_was_cut_from_the_draft_and_came_true_is_computed_for_its_logits(same: str) -> None:
    proposer, sequence = proposer_of(drafting(same)), running([1, 2, 3])
    (tree,) = proposer.propose([sequence], [4])
    sequence.token_ids.append(tree.token_ids[0])
    (after,) = proposer.propose([sequence], [3])
    assert after.token_ids == tree.token_ids[1:]


def test_limits_of_zero_run_no_pass_and_later_drafts_catch_up(same: str, passes: list[int]) -> None:
    proposer, sequence = proposer_of(drafting(same)), running([1, 2, 3])
    assert [len(tree) for tree in proposer.propose([sequence], [0])] == [0]
    assert passes == []
    proposer.propose([sequence], [1])
    sequence.token_ids += [4, 5, 6, 7]
    proposer.propose([sequence, running([8], "b")], [0, 1])
    assert passes == [3, 1]
    proposer.propose([sequence], [1])
    assert passes == [3, 1, 4]


def test_without_a_policy_that_allows_drafts_the_draft_model_never_runs(
    same: str, plain: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = drafting(same, spec_policy="off")

    def fail(*_: object) -> NoReturn:
        raise AssertionError("the drafter was asked")

    monkeypatch.setattr(proposer_of(engine).drafter, "draft", fail)
    assert answers(engine, GREEDY) == plain["greedy"]


def test_those_that_end_or_lose_their_blocks_lose_those_of_the_draft_too(same: str) -> None:
    proposer = proposer_of(drafting(same))
    blocks = proposer.drafter.kv.blocks
    ended, preempted, goes_on = (running([i] * 20, str(i)) for i in range(3))
    proposer.propose([ended, preempted, goes_on], [2, 2, 2])
    assert blocks.num_blocks - blocks.num_free_blocks == 6
    proposer.release(ended.id)
    assert blocks.num_blocks - blocks.num_free_blocks == 4
    preempted.block_ids.clear()
    proposer.propose([goes_on], [2])
    assert blocks.num_blocks - blocks.num_free_blocks == 2
    proposer.release(goes_on.id)
    proposer.release("unknown")
    blocks.check()
    assert blocks.num_free_blocks == blocks.num_blocks


def test_a_prefix_that_was_computed_for_another_request_is_shared(same: str, passes: list[int]) -> None:
    proposer, prompt = proposer_of(drafting(same)), list(range(2 * BLOCK_SIZE + 3))
    proposer.propose([running(prompt, "a")], [1])
    proposer.release("a-0")
    proposer.propose([running(prompt, "b")], [1])
    assert passes == [len(prompt), 3]


def test_a_sequence_that_finds_no_block_has_no_draft(same: str) -> None:
    proposer = proposer_of(drafting(same, num_blocks=2, max_model_len=32))
    sizes = [len(tree) for tree in proposer.propose([running([1] * 30, "a"), running([2] * 20, "b")], [9, 9])]
    assert sizes == [0, 9]  # the shorter rest is computed first


def test_nothing_is_drafted_beyond_the_draft_models_positions(tmp_path: Path, plain: Answers) -> None:
    short = str(write_model(tmp_path, max_position_embeddings=40))
    proposer = proposer_of(drafting(short))
    sizes = [
        len(proposer.propose([running([1] * length, str(length))], [4])[0]) for length in (37, 38, 40, 41)
    ]
    assert sizes == [4, 3, 1, 0]
    assert answers(drafting(short), GREEDY) == plain["greedy"]


# --- What is refused, and memory ------------------------------------------------------------------------


def test_a_draft_model_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    larger = write_model(tmp_path / "larger")
    config = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(ConfigError, match="the target has 259 tokens, the draft model 300"):
        drafting(str(larger))
    renamed = write_model(tmp_path / "renamed")
    tokenizer = renamed / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("<|user|>", "<|human|>"))
    with pytest.raises(ConfigError, match=r"token 257 is '<\|user\|>' for the target and '<\|human\|>' for"):
        drafting(str(renamed))


def test_ids_that_only_one_tokenizer_names_do_not_matter() -> None:
    padded = byte_tokenizer()
    padded.add_tokens(["<|unused|>"])
    for pair in ((byte_tokenizer(), padded), (padded, byte_tokenizer())):
        check_vocabulary(300, 300, *pair)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"spec_method": "draft_model"}, "draft_model needs a model: name one with --spec-model"),
        ({"spec_method": "suffix", "spec_model": "x"}, "model of --speculative-config is for draft_model"),
        (
            {"model": "a/model", "spec_model": "x"},
            "model of --speculative-config is for draft_model, .*--spec-method is none",
        ),
        (
            {"spec_method": "draft_model,medusa", "spec_model": "x"},
            "draft_model and medusa each need a model",
        ),
        ({"spec_method": "draft_model", "spec_model": "x", "speculative_config": {"model": "y"}}, "twice"),
        ({"speculative_config": {"model": 5}}, "model of --speculative-config must be str, got 5"),
        ({"speculative_config": {"draft_branching": 0}}, "draft_branching .* must be at least 1, got 0"),
        ({"speculative_config": {"num_draft_layers": 0}}, "num_draft_layers .* must be at least 1, got 0"),
        ({"speculative_config": {"num_draft_layers": 2}}, "num_draft_layers .* is for self_draft"),
        ({"spec_method": "suffix,ngram,prompt_lookup"}, "must name different methods"),
        ({"spec_method": "none,suffix"}, "must name different methods, got none,suffix"),
    ],
)
def test_settings_of_draft_models_that_make_no_sense_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


def test_a_method_from_outside_may_use_the_model() -> None:
    assert EngineConfig(spec_method="my.method", spec_model="x").speculative.model == "x"


def test_the_memory_of_both_caches_is_planned_together(tmp_path: Path) -> None:
    target = str(write_model(tmp_path / "target"))
    block = KVCache.block_bytes(MODEL, torch.float32)
    settings: Any = {
        "model": target,
        "spec_method": "draft_model",
        "spec_model": target,
        "kernels": "reference",
        "dtype": "float32",
    }
    config = EngineConfig(**settings, kv_cache_memory_bytes=100 * block)
    engine = Engine.from_config(config)
    assert engine.kv.blocks.num_blocks == proposer_of(engine).drafter.kv.blocks.num_blocks == 50
    small = EngineConfig(**settings, kv_cache_memory_bytes=60 * block)
    with pytest.raises(ConfigError, match=f"holds 480 tokens, .* give at least {64 * block}"):
        Engine.from_config(small)
    assert cached_models(EngineConfig(), MODEL) == [MODEL]
    alone = choose_num_blocks(replace(small, spec_method=None, spec_model=None), [MODEL], torch.float32)
    assert alone == 60
