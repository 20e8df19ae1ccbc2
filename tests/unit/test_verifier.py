"""What is accepted of a tree, row by row."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from outpace import sampling
from outpace.batch import Batch, BatchEntry, Decision, TargetOutput
from outpace.kernels.reference import ReferenceKernels
from outpace.request import Request, Sequence
from outpace.sampling import SampleRow, SamplingParams, token_logprobs
from outpace.spec.verifier import MatchVerifier, matched_path, rows_to_sample
from outpace.tree import EMPTY_TREE, DraftTree

KERNELS = ReferenceKernels()
target_logits = functools.partial(sampling.target_logits, kernels=KERNELS)
choose = functools.partial(sampling.choose, kernels=KERNELS)

VOCAB = 20
#      root
#     /    \
#    0:5    1:9
#   /  \      \
# 2:7  3:5    4:7
TREE = DraftTree((-1, -1, 0, 0, 1), (5, 9, 7, 5, 7))


def sequence(token_ids: tuple[int, ...] = (1, 2, 3), **params: object) -> Sequence:
    sampling = SamplingParams(**{"temperature": 0.0, **params})  # type: ignore[arg-type]
    request = Request("r", token_ids[:2], sampling, seed=11, max_tokens=50)
    return Sequence(request, list(token_ids))


def batch_of(*parts: tuple[Sequence, DraftTree | None]) -> Batch:
    """A batch of (sequence, tree), without a tree where the sequence does not sample.

    Verification reads nothing but the entries.
    """
    entries, first_row, first_sample = [], 0, 0
    for seq, tree in parts:
        entry = BatchEntry(seq, first_row, 1, tree or EMPTY_TREE, None if tree is None else first_sample)
        entries.append(entry)
        first_row += 1 + len(entry.tree)
        first_sample += 0 if tree is None else 1 + len(tree)
    return cast(Batch, SimpleNamespace(entries=tuple(entries)))


def choosing(*tokens: int) -> TargetOutput:
    """Logits whose argmax is `tokens`."""
    return TargetOutput(torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).bfloat16())


@pytest.mark.parametrize(
    ("choices", "path"),
    [
        ((1, 0, 0, 0, 0, 0), ()),  # no child has the root's choice
        ((5, 1, 0, 0, 0, 0), (0,)),
        ((9, 7, 1, 0, 0, 0), (1,)),  # 7 is a child of the other node
        ((5, 7, 0, 2, 0, 0), (0, 2)),
        ((5, 5, 0, 0, 2, 0), (0, 3)),
        ((9, 0, 7, 0, 0, 2), (1, 4)),
        ((7, 7, 7, 7, 7, 7), ()),  # 7 is drafted, but not at the root
    ],
)
def test_the_path_goes_to_the_child_that_was_chosen(choices: tuple[int, ...], path: tuple[int, ...]) -> None:
    assert matched_path(TREE, choices) == path
    verdict = MatchVerifier(KERNELS).verify(batch_of((sequence(), TREE)), choosing(*choices))
    accepted = tuple(TREE.token_ids[node] for node in path)
    last = choices[path[-1] + 1 if path else 0]
    assert verdict.decisions == (Decision(path, (*accepted, last)),)


def test_a_child_drafted_twice_is_accepted_once() -> None:
    tree = DraftTree((-1, -1, 0, 1), (5, 5, 6, 7))
    assert matched_path(tree, (5, 6, 7, 0, 0)) == (0, 2)


def test_without_a_draft_each_sequence_gets_one_token() -> None:
    batch = batch_of((sequence(), EMPTY_TREE), (sequence(), EMPTY_TREE))
    verdict = MatchVerifier(KERNELS).verify(batch, choosing(4, 8))
    assert verdict.decisions == (Decision((), (4,)), Decision((), (8,)))


def test_an_entry_that_does_not_sample_gets_no_decision() -> None:
    batch = batch_of((sequence(), None), (sequence(), TREE), (sequence(), None), (sequence(), EMPTY_TREE))
    verdict = MatchVerifier(KERNELS).verify(batch, choosing(9, 0, 7, 0, 0, 2, 13))
    assert verdict.decisions == (None, Decision((1, 4), (9, 7, 2)), None, Decision((), (13,)))


def test_a_batch_in_which_nothing_samples_is_fine() -> None:
    logits = torch.empty(0, VOCAB, dtype=torch.bfloat16)
    verdict = MatchVerifier(KERNELS).verify(batch_of((sequence(), None)), TargetOutput(logits))
    assert verdict.decisions == (None,)


def test_each_node_is_judged_with_its_own_ancestors_and_position() -> None:
    first, second = sequence((1, 2, 3)), sequence((1, 2, 3, 4))
    rows = rows_to_sample(batch_of((first, EMPTY_TREE), (second, None), (second, TREE)))
    assert [row.drafted for row in rows] == [(), (), (5,), (9,), (5, 7), (5, 5), (9, 7)]
    assert [row.position for row in rows] == [3, 4, 5, 5, 6, 6, 6]
    assert [row.sequence for row in rows] == [first] + [second] * 6


def test_a_node_gets_the_token_that_plain_decoding_gets_there() -> None:
    params = {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5}
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16()
    for node in range(-1, 5):
        here = node
        path: tuple[int, ...] = ()
        while here >= 0:
            here, path = TREE.parents[here], (TREE.token_ids[here], *path)
        known = SampleRow(sequence((1, 2, 3, *path), **params))
        drafted = rows_to_sample(batch_of((sequence((1, 2, 3), **params), TREE)))[node + 1]
        row = logits[node + 1 : node + 2]
        expected = target_logits(row, [known])
        assert torch.equal(target_logits(row, [drafted]), expected)
        assert choose(expected, [drafted]) == choose(expected, [known])


def test_logprobs_are_those_of_the_rows_on_the_path() -> None:
    logits = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(1))
    for row, token in enumerate((9, 0, 7, 0, 0, 2)):
        logits[row, token] += 9
    asking = sequence(logprobs=3)
    verdict = MatchVerifier(KERNELS).verify(
        batch_of((asking, TREE), (sequence(), EMPTY_TREE)), TargetOutput(logits)
    )
    decision, other = verdict.decisions
    assert decision is not None
    assert decision.logprobs == tuple(token_logprobs(logits[[0, 2, 5]], (9, 7, 2), 3))
    assert other is not None
    assert other.logprobs is None


def test_logprobs_without_a_top_list_still_give_the_chosen_token() -> None:
    (decision,) = (
        MatchVerifier(KERNELS).verify(batch_of((sequence(logprobs=0), EMPTY_TREE)), choosing(4)).decisions
    )
    assert decision is not None
    assert decision.logprobs is not None
    assert (decision.logprobs[0].token_id, decision.logprobs[0].top) == (4, ())
