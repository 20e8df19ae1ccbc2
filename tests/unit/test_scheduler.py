"""Who runs when, who pays when blocks are short, and how answers end."""

from __future__ import annotations

import random
from typing import Any

import pytest

from outpace.batch import Decision, Verdict
from outpace.config import EngineConfig
from outpace.engine.detokenizer import detokenizer_factory
from outpace.engine.scheduler import Scheduler
from outpace.errors import InvalidRequestError, OverloadedError
from outpace.request import FinishReason, Output, Request
from outpace.runtime.block_manager import BlockManager
from outpace.sampling import SamplingParams
from tiny import EOS, FakeModel, byte_tokenizer, check_idle, hashed_token, run, submit, text, tokens

NEW_DETOKENIZER = detokenizer_factory(byte_tokenizer())


def request(
    id: str, prompt: str | int = 5, max_tokens: int = 8, priority: int = 0, **sampling: Any
) -> Request:
    ids = tuple(prompt.encode()) if isinstance(prompt, str) else tuple(range(prompt))
    return Request(
        id, ids, SamplingParams(**sampling), 0, max_tokens, eos_token_ids=frozenset({EOS}), priority=priority
    )


def scheduler(num_blocks: int = 64, **settings: Any) -> Scheduler:
    return Scheduler(EngineConfig(**settings), BlockManager(num_blocks), NEW_DETOKENIZER)


def step(line: Scheduler, *answers: tuple[int, ...]) -> tuple[dict[str, int], list[Output]]:
    """One step of a model that answers what is given (else 'x'), all of it accepted at once."""
    plan = line.plan()
    given = iter(answers)
    decisions: list[Decision | None] = []
    for item in plan.scheduled:
        new = next(given, (ord("x"),)) if item.samples else ()
        item.sequence.num_computed += item.num_known + max(0, len(new) - 1)
        decisions.append(Decision(tuple(range(len(new) - 1)), new) if new else None)
    rows = {item.sequence.id: item.num_known for item in plan.scheduled}
    return rows, line.advance(plan, Verdict(tuple(decisions)))


def answer(given: tuple[int, ...] | str, **of_request: Any) -> Output:
    """What a request makes of tokens that all arrive in one step."""
    line = scheduler()
    line.add([request("a", **of_request)])
    _, [output] = step(line, tuple(given.encode()) if isinstance(given, str) else given)
    return output


def test_a_long_prompt_is_computed_in_chunks_beside_running_sequences() -> None:
    line = scheduler(max_num_seqs=4, max_num_batched_tokens=16)
    line.add([request("a", 5)])
    assert step(line)[0] == {"a": 5}
    line.add([request("b", 40), request("c", 3)])
    assert step(line)[0] == {"a": 1, "b": 15}
    assert step(line)[0] == {"a": 1, "b": 15}
    assert step(line)[0] == {"a": 1, "b": 10, "c": 3}
    assert step(line)[0] == {"a": 1, "b": 1, "c": 1}


def test_no_more_sequences_run_than_allowed_and_first_come_first_served() -> None:
    line = scheduler(max_num_seqs=2)
    line.add([request(name, 3, max_tokens=2) for name in "abc"])
    assert list(step(line)[0]) == ["a", "b"]
    assert (line.num_running, line.num_waiting) == (2, 1)
    step(line)
    assert list(step(line)[0]) == ["c"]


def test_lower_priorities_run_first_and_ties_by_arrival() -> None:
    line = scheduler(max_num_seqs=1)
    priorities = {"a": 5, "b": 1, "c": 5, "d": -2}
    line.add([request(name, 3, max_tokens=1, priority=p) for name, p in priorities.items()])
    assert [list(step(line)[0]) for _ in range(4)] == [["d"], ["b"], ["a"], ["c"]]


def run_short_of_blocks(*priorities: int) -> tuple[list[str], Scheduler]:
    """Three prompts of one block each in six blocks grow until one of them is preempted: who?"""
    line = scheduler(num_blocks=6)
    line.add([request(name, name * 15, 60, priority=p) for name, p in zip("abc", priorities, strict=True)])
    before = set(step(line)[0])
    assert before == set("abc")
    for _ in range(40):
        now = set(step(line)[0])
        if now != before:
            return sorted(before - now), line
    raise AssertionError("nobody was preempted")


def test_the_newest_sequence_pays_when_blocks_are_short() -> None:
    paid, line = run_short_of_blocks(0, 0, 0)
    assert paid == ["c"]
    assert line.num_preemptions == 1
    assert line.num_waiting == 1


def test_under_priorities_the_least_urgent_pays() -> None:
    assert run_short_of_blocks(3, 7, 1)[0] == ["b"]


def test_a_preempted_sequence_goes_to_the_front_and_is_recomputed() -> None:
    _, line = run_short_of_blocks(0, 0, 0)
    line.add([request("d", 2)])
    line.abort("a")
    line.abort("b")
    rows, _ = step(line)
    assert list(rows) == ["c", "d"], "before one that arrived later"
    assert rows["c"] > 1, "what was not cached is computed again"


def test_a_waiting_prompt_leaves_running_sequences_their_next_blocks() -> None:
    line = scheduler(num_blocks=4)
    line.add([request("a", 16, 40)])
    step(line)
    line.add([request("b", 40, 8)])  # three blocks: would fit now, and be preempted a step later
    assert list(step(line)[0]) == ["a"]
    line.abort("a")
    assert list(step(line)[0]) == ["b"]


def test_a_full_queue_refuses_a_request_whole_and_counts_only_those_that_wait() -> None:
    line = scheduler(max_num_seqs=2, max_num_queued_reqs=1)
    line.add([request("a"), request("b")])
    step(line)
    with pytest.raises(OverloadedError, match="--max-num-queued-reqs"):
        line.add([request("c"), request("d")])
    assert line.num_waiting == 0
    line.add([request("c")])
    with pytest.raises(OverloadedError):
        line.add([request("d")])


def test_a_queue_of_no_length_still_serves_who_can_run_at_once() -> None:
    line = scheduler(max_num_seqs=2, max_num_queued_reqs=0)
    line.add([request("a"), request("b")])
    with pytest.raises(OverloadedError):
        line.add([request("c")])


def test_a_request_that_could_never_fit_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="the KV cache holds 64"):
        scheduler(num_blocks=4).add([request("a", 60, max_tokens=5)])


def test_an_id_cannot_be_used_twice_at_once() -> None:
    line = scheduler()
    line.add([request("a")])
    with pytest.raises(InvalidRequestError, match="in use"):
        line.add([request("a")])


def test_aborting_frees_blocks_whether_waiting_or_running() -> None:
    line = scheduler(num_blocks=8, max_num_seqs=1)
    line.add([request("a", 20), request("b", 20)])
    step(line)
    for name in "ba":
        output = line.abort(name)
        assert output is not None
        assert output.finish_reason == FinishReason.ABORT
    assert not line.has_work
    assert line.abort("a") is None
    assert line.kv_cache_usage == 0


def test_an_abort_hands_out_the_text_that_was_held_back() -> None:
    line = scheduler()
    line.add([request("a", stop=("xyz",))])
    assert step(line)[1][0].text == ""
    output = line.abort("a")
    assert output is not None
    assert output.text == "x"


def test_the_end_of_sequence_token_ends_the_answer_without_text() -> None:
    output = answer((*b"hi", EOS, *b"more"))
    assert (output.text, output.token_ids) == ("hi", (*b"hi", EOS))
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, None)


def test_ignore_eos_goes_on() -> None:
    output = answer((*b"hi", EOS, *b"more"), ignore_eos=True)
    assert (output.text, output.finish_reason) == ("himore", None)


def test_a_stop_token_ends_the_answer_and_is_named() -> None:
    output = answer("hello", stop_token_ids=(ord("l"),))
    assert (output.text, output.token_ids, output.stop_reason) == ("he", tuple(b"hel"), ord("l"))
    assert answer("hello", stop_token_ids=(ord("l"),), include_stop_str_in_output=True).text == "hel"


def test_tokens_after_a_stop_string_in_the_same_step_are_dropped() -> None:
    output = answer("hi END more", max_tokens=20, stop=("END",))
    assert (output.text, output.token_ids) == ("hi ", tuple(b"hi END"))
    assert (output.finish_reason, output.stop_reason) == (FinishReason.STOP, "END")


def test_tokens_beyond_the_length_limit_in_the_same_step_are_dropped() -> None:
    output = answer("abcdef", max_tokens=4)
    assert (output.text, output.finish_reason) == ("abcd", FinishReason.LENGTH)


def test_a_stop_within_the_last_allowed_token_is_a_stop() -> None:
    assert answer("abcd", max_tokens=4, stop=("d",)).finish_reason == FinishReason.STOP


def test_nothing_stops_before_min_tokens() -> None:
    ids = (EOS, *b"ab", EOS)
    assert answer(ids, min_tokens=3).token_ids == ids
    assert answer("abab", min_tokens=2, stop=("ab",)).text == "ab"
    assert answer("aba", min_tokens=3, stop_token_ids=(ord("a"),)).finish_reason is None


def test_answers_that_end_in_a_step_leave_their_blocks() -> None:
    line = scheduler(num_blocks=8)
    line.add([request("a", 20, max_tokens=1), request("b", 20, max_tokens=9)])
    _, outputs = step(line)
    assert [output.finish_reason for output in outputs] == [FinishReason.LENGTH, None]
    line.abort("b")
    assert line.kv_cache_usage == 0


def test_a_view_tells_how_many_drafts_can_be_of_use() -> None:
    line = scheduler(num_blocks=8)
    line.add([request("a", 20, max_tokens=3), request("b", 20, max_tokens=9)])
    view = line.plan().view()
    assert [(s.id, s.context_len, s.max_draft) for s in view.sequences] == [("a", 0, 2), ("b", 0, 8)]
    assert (view.num_rows, view.num_context, view.num_free_slots) == (40, 0, 4 * 16)


def test_a_conversation_reuses_the_blocks_of_its_last_turn() -> None:
    engine = FakeModel().engine()
    submit(engine, "a", "x" * 50, SamplingParams(temperature=0, max_tokens=30))
    first = run(engine)["a-0"]
    submit(engine, "b", [*b"x" * 50, *tokens(first), *b"and then?"], SamplingParams(max_tokens=5))
    assert run(engine)["b-0"][-1].num_cached_tokens == 64  # 79 tokens were computed: four full blocks


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
@pytest.mark.parametrize("caching", [True, False])
def test_answers_are_those_given_alone_whatever_the_load(policy: str, caching: bool) -> None:
    rng = random.Random(f"{policy}{caching}")
    prompts = ["common beginning " * rng.randrange(4) + "abc" * rng.randrange(1, 17) for _ in range(30)]
    model = FakeModel()
    engine = model.engine(
        num_blocks=16,
        max_model_len=160,
        max_num_seqs=6,
        max_num_batched_tokens=20,
        scheduling_policy=policy,
        enable_prefix_caching=caching,
    )
    answers: dict[str, list[Output]] = {}
    for number, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=rng.randrange(1, 60), stop=("qq", "zx"))
        submit(engine, str(number), prompt, sampling, rng.randrange(3) if policy == "priority" else 0)
        for _ in range(rng.randrange(8)):
            for output in engine.step():
                answers.setdefault(output.request_id, []).append(output)
    for name, outputs in run(engine).items():
        answers.setdefault(name, []).extend(outputs)
    assert engine.scheduler.num_preemptions > 0
    for number, prompt in enumerate(prompts):
        got = tokens(answers[f"{number}-0"])
        known = list(prompt.encode())
        for token_id in got:
            assert token_id == hashed_token(known)
            known.append(token_id)


def test_an_abort_storm_loses_no_block() -> None:
    rng = random.Random(1)
    engine = FakeModel().engine(num_blocks=20, max_model_len=120, max_num_seqs=5, max_num_batched_tokens=16)
    ended: dict[str, int] = {}
    for number in range(300):
        prompt = "the same start " * rng.randrange(3) + "z" * rng.randrange(1, 30)
        submit(
            engine,
            str(number),
            prompt,
            SamplingParams(max_tokens=rng.randrange(1, 30), n=rng.choice([1, 1, 2])),
        )
        outputs = [output for _ in range(rng.randrange(6)) for output in engine.step()]
        if rng.random() < 0.4:
            victim = rng.choice(list(engine.scheduler._entries) or [""])
            outputs += filter(None, [engine.abort(victim)])
        for output in outputs:
            ended[output.request_id] = ended.get(output.request_id, 0) + (output.finish_reason is not None)
        engine.kv.blocks.check(entry.sequence for entry in engine.scheduler._entries.values())
    for name, outputs in run(engine).items():
        ended[name] = ended.get(name, 0) + sum(output.finish_reason is not None for output in outputs)
    assert set(ended.values()) == {1}, "each answer ends exactly once"
    check_idle(engine)


def test_text_of_a_fake_answer_is_its_tokens() -> None:
    engine = FakeModel().engine()
    submit(engine, "a", "hello", SamplingParams(max_tokens=10))
    outputs = run(engine)["a-0"]
    assert text(outputs).encode() == bytes(tokens(outputs))
