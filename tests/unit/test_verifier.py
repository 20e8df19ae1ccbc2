"""What is accepted of a tree, row by row."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from outpace import sampling
from outpace.batch import Batch, BatchEntry, Decision, TargetOutput
from outpace.config import SpeculativeConfig
from outpace.kernels.reference import ReferenceKernels
from outpace.request import Request, Sequence
from outpace.sampling import SampleRow, SamplingParams, token_logprobs
from outpace.spec.verifier import (
    MatchVerifier,
    RatioVerifier,
    SyntheticVerifier,
    load_verifier,
    matched_path,
    ratio_path,
    rows_to_sample,
)
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


# ---- The ratio rule; its distribution is tested in tests/statistics ----


def test_a_greedy_request_gets_the_same_by_the_ratio_rule() -> None:
    logits = torch.randn(13, VOCAB, generator=torch.Generator().manual_seed(3)).bfloat16()
    for row in range(0, 13, 2):
        logits[row, 9 if row % 4 else 7] += 9
    drawn = replace(TREE, probs=torch.full((5, VOCAB), 1 / VOCAB))
    parts = ((sequence(logprobs=2), TREE), (sequence(), None), (sequence(), drawn), (sequence(), EMPTY_TREE))
    verdict, expected = (
        rule(KERNELS).verify(batch_of(*parts), TargetOutput(logits))
        for rule in (RatioVerifier, MatchVerifier)
    )
    assert verdict == expected
    assert any(decision and decision.path for decision in verdict.decisions)


def path_by_ratio(tree: DraftTree, p: list[float], number: float) -> tuple[tuple[int, ...], list[float]]:
    """What is accepted and left where every row's target is p and every number the same."""
    rows = rows_to_sample(batch_of((sequence(temperature=1.0), tree)))
    wanted = torch.tensor(p).log().expand(len(rows), -1)
    path, left = ratio_path(tree, rows, wanted, [[number] * len(tree)] * len(rows))
    return path, [round(x, 4) for x in left.tolist()]


def test_a_drawn_token_is_accepted_with_p_over_q_and_leaves_what_q_did_not_give() -> None:
    tree = DraftTree((-1,), (0,), probs=torch.tensor([[0.8, 0.1, 0.1]]))
    assert path_by_ratio(tree, [0.4, 0.4, 0.2], 0.49) == ((0,), [0.4, 0.4, 0.2])
    assert path_by_ratio(tree, [0.4, 0.4, 0.2], 0.51) == ((), [0.0, 0.75, 0.25])


def test_a_picked_token_is_accepted_with_p_and_its_sibling_with_its_share_of_the_rest() -> None:
    tree = DraftTree((-1, -1), (0, 1))
    assert path_by_ratio(tree, [0.4, 0.4, 0.2], 0.39)[0] == (0,)
    assert path_by_ratio(tree, [0.4, 0.4, 0.2], 0.65)[0] == (1,)  # 0.4 of 0.6
    assert path_by_ratio(tree, [0.4, 0.4, 0.2], 0.68) == ((), [0.0, 0.0, 1.0])


def test_where_q_is_p_all_is_accepted_and_rounding_leaves_something_to_draw_from() -> None:
    p = [0.5, 0.3, 0.2]
    same = DraftTree((-1,), (0,), probs=torch.tensor([p]))
    assert path_by_ratio(same, p, 0.999999)[0] == (0,)
    more = DraftTree((-1,), (0,), probs=torch.tensor([p]) * 1.01)
    assert path_by_ratio(more, p, 0.999999) == ((), p)


def test_by_the_ratio_rule_a_batch_has_the_same_answers_again_and_other_seeds_others() -> None:
    logits = torch.randn(30, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16()

    def tokens(seed: int) -> list[tuple[int, ...]]:
        request = Request("r", (1, 2), SamplingParams(), seed, 50)
        batch = batch_of(*[(Sequence(request, [1, 2, *[3] * i]), TREE) for i in range(5)])
        decisions = RatioVerifier(KERNELS).verify(batch, TargetOutput(logits)).decisions
        return [decision.token_ids for decision in decisions if decision]

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


# ---- Synthetic verification ----


@pytest.mark.parametrize(("rates", "path"), [((0.0, 0.0), ()), ((1.0, 0.0), (0,)), ((1.0, 1.0), (0, 2))])
def test_synthetic_verification_takes_first_children_and_then_the_targets_choice(
    rates: tuple[float, ...], path: tuple[int, ...]
) -> None:
    batch = batch_of((sequence(), TREE), (sequence(), None), (sequence(), EMPTY_TREE))
    verdict = SyntheticVerifier(KERNELS, rates).verify(batch, choosing(11, 12, 13, 14, 15, 16, 17))
    drafted = tuple(TREE.token_ids[node] for node in path)
    last = (11, 12, 14)[len(path)]
    assert verdict.decisions == (Decision(path, (*drafted, last)), None, Decision((), (17,)))


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, MatchVerifier),
        ({"verification": "ratio"}, RatioVerifier),
        ({"verification": "synthetic"}, SyntheticVerifier),
    ],
)
def test_the_verifier_is_the_one_asked_for(settings: dict[str, str], kind: type) -> None:
    rates = (
        [0.5] * SpeculativeConfig().num_speculative_tokens
        if settings.get("verification") == "synthetic"
        else None
    )
    config = SpeculativeConfig(**settings, synthetic_acceptance_rates=rates)  # type: ignore[arg-type]
    assert type(load_verifier(config, KERNELS)) is kind
