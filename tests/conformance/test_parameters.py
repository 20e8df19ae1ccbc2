"""Every parameter of a request composes with speculation: drafts, right and wrong, as trees, change nothing.

Each case is checked to do something: the parameter changes the answer, and drafts are accepted while it does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from outpace.engine.engine import Engine
from outpace.policy.base import BatchView, SpeculationPolicy, StepRecord
from outpace.request import FinishReason, Output, TokenLogprob
from outpace.sampling import SamplingParams
from tiny import EOS, Guesser, run, submit, tiny_engine

PROMPT = "Once upon a time"
BASE = SamplingParams(temperature=0.8, seed=3, max_tokens=40, ignore_eos=True)
LETTERS = replace(BASE, allowed_token_ids=tuple(range(97, 123)))
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.5},
    "min_p": {"min_p": 0.3},
    "presence_penalty": {"presence_penalty": 2.0},
    "frequency_penalty": {"frequency_penalty": 2.0},
    "repetition_penalty": {"repetition_penalty": 2.0},
    "penalties of a greedy answer": {"temperature": 0.0, "frequency_penalty": 1.0, "repetition_penalty": 1.5},
    "logit_bias": {"logit_bias": {101: 4.0, 102: -100.0}},
    "allowed_token_ids": {"allowed_token_ids": LETTERS.allowed_token_ids},
    "logprobs": {"logprobs": 4},
    "n": {"n": 3},
    "max_tokens": {"max_tokens": 17},
}


class AllowFive(SpeculationPolicy):
    """Five nodes for everyone; counts what was accepted."""

    num_accepted = 0

    def limits(self, view: BatchView) -> list[int]:
        return [min(5, sequence.max_draft) for sequence in view.sequences]

    def observe(self, record: StepRecord) -> None:
        self.num_accepted += sum(record.num_accepted)


class Answer(NamedTuple):
    """All that a client sees of an answer, however many steps it came in."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    stop_reason: int | str | None


def answer(outputs: list[Output]) -> Answer:
    return Answer(
        text="".join(output.text for output in outputs),
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(item for output in outputs for item in output.logprobs or ()),
        finish_reason=outputs[-1].finish_reason,
        stop_reason=outputs[-1].stop_reason,
    )


def answers(sampling: SamplingParams, engine: Engine | None = None) -> dict[str, Answer]:
    engine = engine or tiny_engine()
    submit(engine, "a", PROMPT, sampling)
    return {request_id: answer(outputs) for request_id, outputs in run(engine).items()}


def drafted(sampling: SamplingParams, plain: dict[str, Answer]) -> tuple[dict[str, Answer], int]:
    """The answers with drafts that know the plain ones, and how many draft tokens were accepted."""
    engine, policy = tiny_engine(), AllowFive()
    # drafts reach beyond where an answer stops
    engine.proposer = Guesser({name: [*found.token_ids, 7, 7, 7] for name, found in plain.items()})
    engine.policy = policy
    return answers(sampling, engine), policy.num_accepted


@pytest.mark.parametrize("case", CASES)
def test_an_answer_is_the_same_with_drafts_under_every_parameter(case: str) -> None:
    sampling = replace(BASE, **CASES[case])
    plain = answers(sampling)
    if case != "logprobs":
        assert plain != answers(BASE), "the parameter has no effect"
    speculated, num_accepted = drafted(sampling, plain)
    assert speculated == plain
    assert num_accepted > 8


@pytest.mark.parametrize("start", range(4, 9))
def test_a_bad_word_does_not_come_in_by_a_draft(start: int) -> None:
    """Drafts hold it as the answer without the parameter does, at each place relative to their beginnings."""
    free = answers(LETTERS)
    sampling = replace(LETTERS, bad_words=(free["a-0"].text[start : start + 2],))
    plain = answers(sampling)
    assert sampling.bad_words[0] not in plain["a-0"].text
    for known in (free, plain):
        speculated, num_accepted = drafted(sampling, known)
        assert speculated == plain
        assert num_accepted > 0


@pytest.mark.parametrize("end", range(6, 14))
def test_a_stop_inside_an_accepted_path_ends_the_answer_there(end: int) -> None:
    """A stop string, and a stop token, at each place relative to the drafts' beginnings."""
    free = answers(LETTERS)["a-0"]
    for params in (
        replace(LETTERS, stop=(free.text[end - 2 : end],)),
        replace(LETTERS, stop=(free.text[end - 2 : end],), include_stop_str_in_output=True, logprobs=1),
        replace(LETTERS, stop_token_ids=(free.token_ids[end],)),
    ):
        plain = answers(params)
        # what is drafted goes on beyond the stop
        speculated, num_accepted = drafted(params, {"a-0": free})
        assert speculated == plain
        assert plain["a-0"].finish_reason is FinishReason.STOP
        assert len(plain["a-0"].token_ids) <= end + 1
        assert num_accepted >= 1


def test_a_minimum_length_holds_inside_an_accepted_path() -> None:
    """End of sequence and a stop token are made likely; drafts hold them too early."""
    ends = replace(BASE, ignore_eos=False, logit_bias={EOS: 6.0, 101: 6.0}, stop_token_ids=(101,))
    assert len(answers(ends)["a-0"].token_ids) < 4
    sampling = replace(ends, min_tokens=21)
    plain = answers(sampling)
    speculated, num_accepted = drafted(sampling, plain)
    assert speculated == plain
    assert num_accepted > 8
    assert 21 <= len(plain["a-0"].token_ids) < 30
    tempted = {"a-0": plain["a-0"]._replace(token_ids=(EOS, 101) * 20)}
    assert drafted(sampling, tempted)[0] == plain
