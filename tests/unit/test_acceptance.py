"""What is learnt of drafts: rates, requests, confidences, and drafts that do not exist yet."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from outpace.policy.acceptance import MOST, PRIOR_RATE, AcceptanceEstimator, Forest
from outpace.tree import DraftTree

Chance = Callable[[str, int], float]  # of a request's node at a depth, given its parent

DEPTH = 4


def accepted(rng: random.Random, request: str, length: int, chance: Chance) -> tuple[int, ...]:
    """A chain's accepted path."""
    path = []
    for depth in range(length):
        if rng.random() >= chance(request, depth):
            break
        path.append(depth)
    return tuple(path)


def teach(
    estimator: AcceptanceEstimator,
    chance: Chance,
    num_steps: int,
    requests: int = 4,
    coverage: Callable[[str], float] = lambda request: 1.0,
    seed: int = 0,
) -> list[str]:
    """Steps in which every request asks for a chain of DEPTH; gives their ids."""
    rng = random.Random(seed)
    ids = [f"r{i}" for i in range(requests)]
    for _ in range(num_steps):
        drafts = [DraftTree.chain((0,) * DEPTH if rng.random() < coverage(r) else ()) for r in ids]
        paths = [accepted(rng, r, len(d), chance) for r, d in zip(ids, drafts, strict=True)]
        estimator.observe(ids, [DEPTH] * requests, drafts, [len(d) for d in drafts], paths)
    return ids


def test_a_forest_knows_depths_ranks_and_paths_of_chains_and_trees() -> None:
    drafts = [DraftTree.chain((1, 2, 3)), DraftTree((-1, -1, 0, 0, 2), (1, 2, 3, 4, 5)), DraftTree()]
    forest = Forest.of(drafts)
    assert forest.present.sum(axis=1).tolist() == [3, 5, 0]
    assert forest.depths[0, :3].tolist() == [0, 1, 2]
    assert forest.depths[1].tolist() == [0, 0, 1, 1, 2]
    assert forest.ranks[1].tolist() == [0, 1, 0, 1, 0]
    survival = forest.along_paths(np.full((3, 5), 0.5))
    assert survival[0].tolist() == [0.5, 0.25, 0.125, 0, 0]
    assert survival[1].tolist() == [0.5, 0.5, 0.25, 0.25, 0.125]
    taken, seen = forest.outcomes([(0, 1), (1,), ()])
    assert taken.sum(axis=1).tolist() == [2, 1, 0]
    assert seen[0, :3].tolist() == [True, True, True]
    assert seen[1].tolist() == [True, True, False, False, False]


def test_cutting_a_forest_is_cutting_its_trees() -> None:
    drafts = [DraftTree((-1, 0, -1), (1, 2, 3), (0.9, 0.8, 0.1)), DraftTree.chain((1, 2))]
    cut, anew = Forest.of(drafts).cut(np.array([2, 0])), Forest.of([drafts[0].cut(2), drafts[1].cut(0)])
    assert cut.present[:, :2].tolist() == anew.present.tolist()
    chances = np.full((2, 3), 0.5)
    assert cut.along_paths(chances)[:, :2].tolist() == anew.along_paths(chances[:, :2]).tolist()


def test_before_anything_is_seen_it_is_the_prior() -> None:
    estimator = AcceptanceEstimator(DEPTH)
    present, survival = estimator.before(["a"])
    assert present[0].tolist() == [1.0] * DEPTH
    assert survival[0] == pytest.approx([PRIOR_RATE ** (i + 1) for i in range(DEPTH)])


def test_rates_by_depth_are_found_within_three_standard_errors() -> None:
    # Over eight seeds the standard error was 0.02 at the first three depths and 0.03 at the fourth.
    by_depth = [0.8, 0.6, 0.9, 0.5]
    estimator = AcceptanceEstimator(DEPTH)
    teach(estimator, lambda _, depth: by_depth[depth], 800)
    rates = estimator.rates()[:, 0]
    assert rates[:2] == pytest.approx(by_depth[:2], abs=0.06)
    assert rates[2:] == pytest.approx(by_depth[2:], abs=0.09)


def test_a_depth_never_reached_takes_the_rate_above_it() -> None:
    estimator = AcceptanceEstimator(DEPTH)
    ids = ["a"]
    for _ in range(200):
        estimator.observe(ids, [1], [DraftTree.chain((0,))], [1], [(0,)])
    assert estimator.rates()[3, 0] == pytest.approx(estimator.rates()[0, 0])
    assert estimator.rates()[0, 0] > 0.95


def test_a_change_of_all_rates_is_followed_within_two_hundred_steps() -> None:
    estimator = AcceptanceEstimator(DEPTH)
    teach(estimator, lambda *_: 0.9, 300)
    teach(estimator, lambda *_: 0.2, 200, seed=1)
    assert estimator.rates()[0, 0] == pytest.approx(0.3, abs=0.1)


def test_what_is_not_observed_goes_back_to_the_prior() -> None:
    estimator = AcceptanceEstimator(DEPTH)
    teach(estimator, lambda *_: 0.95, 200)
    assert estimator.rates()[0, 0] > 0.92
    for _ in range(40_000):
        estimator.observe(["other"], [0], [DraftTree()], [0], [()])
    assert estimator.rates()[0, 0] < 0.87


def test_equal_requests_are_treated_almost_equally_and_different_ones_are_told_apart() -> None:
    def first_nodes(*chances: float) -> np.ndarray:
        estimator = AcceptanceEstimator(DEPTH)
        ids = teach(estimator, lambda r, _: chances[int(r[1:])], 600)
        return np.array(estimator.survival(ids, [DraftTree.chain((0,))] * 4))[:, 0]

    assert np.ptp(first_nodes(0.7, 0.7, 0.7, 0.7)) < 0.1
    different = first_nodes(0.95, 0.95, 0.2, 0.2)
    assert different[:2].min() > 0.75
    assert different[2:].max() < 0.4


def test_a_request_that_ended_leaves_nothing_to_the_next_one_of_its_name() -> None:
    estimator = AcceptanceEstimator(DEPTH)
    ids = teach(estimator, lambda r, _: 0.95 if r == "r0" else 0.1, 300)
    old = estimator.survival(ids, [DraftTree.chain((0,))] * 4)[0][0]
    estimator.release("r0")
    new = estimator.survival(ids, [DraftTree.chain((0,))] * 4)[0][0]
    assert new < 0.6 < old
    for i in range(1000):  # places are reused
        estimator.before([f"x{i}"])
        estimator.release(f"x{i}")


def test_how_often_drafts_exist_is_learnt_per_request() -> None:
    estimator = AcceptanceEstimator(DEPTH)
    ids = teach(estimator, lambda *_: 0.8, 300, coverage=lambda r: 0.9 if r == "r0" else 0.1)
    present, survival = estimator.before(ids)
    assert present[0, 0] > 0.6
    assert present[1:, 0].max() < 0.4
    # The chance of acceptance is about drafts that exist: the same for all.
    assert survival[:, 0] == pytest.approx([0.8] * 4, abs=0.12)


def test_curves_do_not_increase_and_stay_chances() -> None:
    estimator = AcceptanceEstimator(DEPTH)
    ids = teach(estimator, lambda _, depth: (0.3, 0.99, 0.99, 0.99)[depth], 100)
    present, survival = estimator.before(ids)
    assert (np.diff(survival, axis=1) <= 0).all()
    assert ((present > 0) & (present <= 1) & (survival >= 0) & (survival <= MOST)).all()


def test_confidences_that_tell_are_trusted_and_those_that_do_not_are_not() -> None:
    rng = random.Random(7)
    for informative in (True, False):
        estimator = AcceptanceEstimator(1)
        for _ in range(600):
            confidence = [rng.choice([0.1, 0.9]) for _ in range(8)]
            drafts = [DraftTree.chain((0,), (q,)) for q in confidence]
            chances = confidence if informative else [0.5] * 8
            paths = [(0,) if rng.random() < p else () for p in chances]
            estimator.observe([str(i) for i in range(8)], [1] * 8, drafts, [1] * 8, paths)
        drafts = [DraftTree.chain((0,), (q,)) for q in (0.1, 0.9)]
        low, high = np.array(estimator.survival(["new", "newer"], drafts))[:, 0]
        if informative:
            assert low == pytest.approx(0.1, abs=0.06)
            assert high == pytest.approx(0.9, abs=0.06)
        else:
            assert high - low < 0.1


def test_later_siblings_are_less_likely_from_the_start() -> None:
    estimator = AcceptanceEstimator(DEPTH)
    survival = estimator.survival(["a"], [DraftTree((-1, -1, -1), (1, 2, 3))])[0]
    assert survival[0] > survival[1] > survival[2]


def test_the_survival_of_single_drafts_is_that_of_the_forest() -> None:
    """Plain numbers before verification, arrays when it is learnt from: one and the same estimate."""
    rng = random.Random(3)
    estimator = AcceptanceEstimator(6)
    ids = ["a", "b", "c"]
    for _ in range(60):
        trees = [
            DraftTree((-1, 0, -1, 1, 2), (1, 2, 3, 4, 5), tuple(rng.random() for _ in range(5))),
            DraftTree.chain((1, 2, 3)),
            DraftTree((-1, -1, 0), (1, 2, 3)),
        ]
        paths = [path if rng.random() < 0.6 else () for path in ((0, 1), (0,), (1,))]
        estimator.observe(ids, [6, 6, 6], trees, [5, 3, 3], paths)
        one_by_one = estimator.survival(ids, trees)
        for request, tree, survival in zip(ids, trees, one_by_one, strict=True):
            forest = Forest.of([tree])
            places = np.array(estimator._places([request]))
            expected = estimator._survival(estimator._chances(places, forest), forest)
            assert survival == pytest.approx(expected[0].tolist(), rel=1e-9)
