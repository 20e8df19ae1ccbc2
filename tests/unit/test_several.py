"""Several draft methods at once: whose tree is taken, and what is learnt from what came."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from outpace.batch import Batch, BatchEntry, Decision, TargetOutput, Verdict
from outpace.request import Request, Sequence, Speculation
from outpace.sampling import SamplingParams
from outpace.spec.proposer import Proposer
from outpace.spec.several import Calibration, Several
from outpace.tree import EMPTY_TREE, DraftTree
from tiny import GREEDY, answers, tiny_engine

SEQUENCE = Sequence.start(Request("a", (1,), SamplingParams(), seed=0, max_tokens=100))


class Constant(Proposer):
    """Always drafts the same."""

    def __init__(self, tree: DraftTree) -> None:
        self.tree = tree
        self.released: list[str] = []
        self.num_observed = 0

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        return [self.tree.cut(limit) for limit in limits]

    def observe(self, batch: Batch, target: TargetOutput, verdict: Verdict) -> None:
        self.num_observed += 1

    def release(self, sequence_id: str) -> None:
        self.released.append(sequence_id)


def several_of(*methods: Proposer) -> Several:
    return Several({f"method_{number}": method for number, method in enumerate(methods)})


def step(several: Several, token_ids: tuple[int, ...], limit: int = 9) -> DraftTree:
    """Proposes, and tells what the target says then."""
    (tree,) = several.propose([SEQUENCE], [limit])
    nothing: Any = None
    batch = Batch((BatchEntry(SEQUENCE, 0, 1, tree, 0),), torch.zeros(1), nothing, nothing)
    several.observe(batch, nothing, Verdict((Decision((), token_ids),)))
    return tree


def test_the_tree_that_promises_most_accepted_tokens_is_taken() -> None:
    sure = DraftTree.chain((1, 2), (0.9, 0.9))  # .9 + .81
    long = DraftTree.chain((3, 4, 5, 6), (0.6, 0.6, 0.6, 0.6))  # .6 + .36 + .216 + .13
    wide = DraftTree((-1, -1, -1), (7, 8, 9), (0.5, 0.3, 0.2))  # 1
    several = several_of(Constant(wide), Constant(long), Constant(sure))
    assert several.propose([SEQUENCE], [9]) == [sure]
    assert several.propose([SEQUENCE], [1]) == [sure.cut(1)]
    assert several.propose([SEQUENCE, SEQUENCE], [9, 0]) == [sure, sure.cut(0)]


def test_among_equals_the_first_method_is_taken() -> None:
    first, second = (DraftTree.chain((token,), (0.5,)) for token in (1, 2))
    assert several_of(Constant(first), Constant(second)).propose([SEQUENCE], [9]) == [first]


def test_a_method_that_is_too_sure_of_itself_loses_to_one_that_keeps_its_word() -> None:
    boasts, modest = DraftTree.chain((1, 2), (1.0, 1.0)), DraftTree.chain((5, 6), (0.6, 0.6))
    several = several_of(Constant(boasts), Constant(modest))
    taken = [step(several, (5, 6, 7) if number % 2 else (9,)) for number in range(20)]
    assert taken[0] == boasts
    assert taken[-1] == modest, "it was measured although its trees were not verified"


def test_confidences_that_are_too_low_are_corrected_upwards() -> None:
    shy, modest = DraftTree.chain((1,), (0.1,)), DraftTree.chain((5,), (0.5,))
    several = several_of(Constant(modest), Constant(shy))
    taken = [step(several, (1, 2)) for _ in range(100)]
    assert taken[0] == modest
    assert taken[-1] == shy


def test_without_confidences_the_observed_acceptance_by_depth_counts() -> None:
    calibration, tree = Calibration(), DraftTree.chain((1, 2, 3))
    for number in range(400):
        calibration.observe(tree, (1, 2, 9) if number % 2 else (1, 8))
    # the first is always right, the second in half of all cases, the third never
    assert calibration.accepted(tree) == pytest.approx(1 + 0.5, abs=0.1)
    assert calibration.accepted(tree.cut(1)) == pytest.approx(1, abs=0.01)
    branches = DraftTree((-1, -1), (1, 7))
    assert calibration.accepted(branches) == pytest.approx(1, abs=0.01), "siblings share it"


def test_nothing_is_concluded_of_nodes_that_the_target_did_not_reach() -> None:
    calibration, deep = Calibration(), DraftTree.chain((1, 2, 3), (0.5, 0.5, 0.5))
    for _ in range(200):
        calibration.observe(deep, (1,))
    shallow = calibration.accepted(deep.cut(1))
    assert shallow == pytest.approx(1, abs=0.05)
    # deeper nodes are thought to be as the last one that was seen
    assert calibration.accepted(deep) == pytest.approx(3 * shallow, rel=0.05)


def test_a_path_through_a_tree_is_followed_to_where_it_leaves_it() -> None:
    calibration = Calibration()
    tree = DraftTree((-1, -1, 1, 1), (1, 2, 3, 4), (0.5, 0.5, 0.4, 0.4))
    calibration.observe(tree, (2, 9))
    assert calibration._expected == [1.0, 0.8]
    assert calibration._actual == [1.0, 0.0]
    calibration.observe(EMPTY_TREE, (2, 9))
    assert calibration._expected == [1.0, 0.8]


def test_a_request_that_names_a_method_gets_drafts_of_that_one_alone() -> None:
    modest, better = DraftTree.chain((1,), (0.5,)), DraftTree.chain((2, 3), (0.9, 0.9))
    request = Request("b", (1,), SamplingParams(), 0, 100, speculation=Speculation(method="method_0"))
    both = [SEQUENCE, Sequence.start(request)]
    assert several_of(Constant(modest), Constant(better)).propose(both, [9, 9]) == [better, modest]


def test_every_method_observes_and_releases() -> None:
    methods = [Constant(EMPTY_TREE), Constant(DraftTree.chain((1,)))]
    several = several_of(*methods)
    step(several, (1, 2))
    several.release("a")
    assert [method.num_observed for method in methods] == [1, 1]
    assert [method.released for method in methods] == [["a"], ["a"]]


@pytest.mark.parametrize(
    "settings", [{"spec_method": "suffix, ngram"}, {"speculative_config": {"method": "suffix,prompt_lookup"}}]
)
def test_a_list_of_methods_is_served_and_changes_no_answer(settings: dict[str, Any]) -> None:
    engine = tiny_engine(**settings)
    assert isinstance(engine.proposer, Several)
    assert answers(engine, GREEDY) == answers(tiny_engine(), GREEDY)
    assert engine.metrics.drafts.num_draft_tokens > 0
