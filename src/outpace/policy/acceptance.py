"""How likely drafted tokens are to be accepted, learnt from what became of earlier ones.

A node's chance, given that its parent is accepted, is

    p = rate[depth, rank] · factor[request, first or deeper]

rate: exponentially weighted, with the rate one depth above as its prior; factor: what this request accepted
over what the rates had expected, shrunk to 1 by as much as chance explains the difference (empirical Bayes:
how much requests differ beyond chance is learnt too); first nodes and deeper ones apart, since those that
reach deeper ones are a choice. Where the drafter has a confidence q, a logistic fit refines it: logit p' =
w0 + w1·logit p + w2·logit q. S, the chance that a node is on the accepted path, is the product of p along
its path.

Before drafts exist two curves per request stand for them: the chance that a draft has an i-th node, and the
mean S of i-th nodes that there were. They average what was drafted, verified or not, so that cutting does
not bias them.

Steps are gathered and learnt from several at a time: an array operation costs about the same for one step as
for sixteen. Between, tables per request, depth and rank answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, compress, repeat

import numpy as np
from numpy.typing import NDArray

from outpace.policy.base import Draft

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NUM_RANKS = 4  # siblings told apart; later ones count as the last of these
PRIOR_RATE = 0.7  # of a first child, to begin with hope; each later sibling has half of its elder's
PRIOR_WEIGHT = 4.0  # observations that the prior is worth
MEMORY = 512.0  # drafts over which population averages reach back
IDLE_MEMORY = 4096.0  # steps after which what is not observed has mostly gone back to the prior
REQUEST_MEMORY = 16.0  # drafts over which a request's own averages reach back
REQUEST_WEIGHT = 3.0  # drafts that the population is worth to a request
DIFFERENCE = 0.05, 0.005  # variance of requests' factors: at first, and the least that is assumed
LEAST, MOST = 1e-3, 0.995  # bounds of a chance
_CALIBRATION_RIDGE = 5.0  # observations before confidences count for much
LEARN_EVERY = 8, 32  # steps that are learnt from together: at least, and at most
LEARN_DRAFTS = 64  # drafts that are enough between these
_IDLE_STEPS = 256  # without a draft, after which rates are worked out anew
_EDGE = 0.02  # chances and confidences closer to 0 or 1 are taken for this in the logistic fit
_FLOOR = 1e-9  # in place of a zero to divide by


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees side by side. If none branches, one row of parents, depths and ranks stands for all.

    Attributes:
        present: [trees, nodes], where there is a node.
        parents: [trees, nodes], -1 at the first level.
        depths: [trees, nodes], 0 at the first level.
        ranks: [trees, nodes], the number of elder siblings.
        confidence: [trees, nodes], NaN where there is none; None if no node has one.
        is_chain: Whether no tree branches.
    """

    present: Bools
    parents: Ints
    depths: Ints
    ranks: Ints
    confidence: Floats | None
    is_chain: bool

    @classmethod
    def of(cls, drafts: Sequence[Draft]) -> Forest:
        """Lays out trees; the loops below go over depth, not over nodes."""
        lengths = [len(draft.parents) for draft in drafts]
        width = max(lengths, default=0)
        places = np.arange(width)
        present = places < np.array(lengths, np.int64)[:, None]
        confidence = None
        if any(draft.confidence is not None for draft in drafts):
            confidence = np.full(present.shape, np.nan)
            confidence[present] = np.fromiter(chain.from_iterable(map(_confidence, drafts)), np.float64)
        if all(map(_is_chain, drafts)):
            row = places[None]
            return cls(present, row - 1, row, np.zeros_like(row), confidence, True)
        parents = np.zeros(present.shape, np.int64) + places - 1
        parents[present] = np.fromiter(chain.from_iterable(d.parents for d in drafts), np.int64)
        return cls(present, parents, _depths(parents), _ranks(parents, present), confidence, False)

    def cut(self, lengths: Ints) -> Forest:
        """The first nodes of each tree; lengths are [trees]."""
        present = np.arange(self.present.shape[1]) < lengths[:, None]
        return replace(self, present=present & self.present)

    def along_paths(self, chances: Floats) -> Floats:
        """The product of chances from the root to each node; 0 where there is no node."""
        product = chances * self.present
        if self.is_chain:
            return np.multiply.accumulate(product, axis=1)
        trees = np.arange(len(product))
        for column in range(1, product.shape[1]):
            parent = self.parents[:, column]
            product[:, column] *= np.where(parent < 0, 1.0, product[trees, parent])
        return product

    def outcomes(self, paths: Sequence[Sequence[int]]) -> tuple[Bools, Bools]:
        """Which nodes were accepted, and of which that was seen: their parents were accepted too."""
        accepted = np.zeros(self.present.shape, dtype=bool)
        trees = np.arange(len(paths))
        nodes = np.fromiter(chain.from_iterable(paths), np.int64)
        accepted[np.repeat(trees, [len(path) for path in paths]), nodes] = True
        reached = (self.parents < 0) | accepted[trees[:, None], np.maximum(self.parents, 0)]
        return accepted, self.present & reached


def _is_chain(draft: Draft) -> bool:
    return draft.parents == _chain(len(draft.parents))


@cache
def _chain(length: int) -> tuple[int, ...]:
    """The parents of a chain."""
    return tuple(range(-1, length - 1))


def _confidence(draft: Draft) -> Iterable[float]:
    return repeat(math.nan, len(draft.parents)) if draft.confidence is None else draft.confidence


def _depths(parents: Ints) -> Ints:
    depths = np.zeros_like(parents)
    trees = np.arange(len(parents))
    for column in range(1, parents.shape[1]):
        parent = parents[:, column]
        depths[:, column] = np.where(parent < 0, 0, depths[trees, parent] + 1)
    return depths


def _ranks(parents: Ints, present: Bools) -> Ints:
    ranks = np.zeros_like(parents)
    for column in range(1, parents.shape[1]):
        elder = (parents[:, :column] == parents[:, column : column + 1]) & present[:, :column]
        ranks[:, column] = elder.sum(axis=1)
    return np.minimum(ranks, NUM_RANKS - 1)


class _Calibration:
    """The logistic fit of confidences, discounted, a Newton step at a time."""

    def __init__(self) -> None:
        self._weights = np.array([0.0, 1.0, 0.0])  # leaves p as it is
        self._of_confidence = 0.0  # the last of them, as a plain number
        self._information = np.zeros((3, 3))

    def __call__(self, chances: Floats, confidence: Floats | None) -> Floats:
        """Refines chances where there is a confidence; NaN leaves them."""
        if confidence is None:
            return chances
        refined = _sigmoid(self.odds(chances) + self._weights[2] * _logit(confidence))
        return np.where(np.isnan(confidence), chances, np.minimum(np.maximum(refined, LEAST), MOST))

    def odds(self, chances: Floats) -> Floats:
        """What chances have to say, in log odds."""
        return np.asarray(self._weights[0] + self._weights[1] * _logit(chances))

    def chance(self, odds: float, confidence: float) -> float:
        """Refines one chance, given as `odds` has it; the same as for arrays."""
        q = min(max(confidence, _EDGE), 1 - _EDGE)
        refined = 1 / (1 + math.pow(1 / q - 1, self._of_confidence) * math.exp(-odds))
        return min(max(refined, LEAST), MOST)

    def fit(self, chances: Floats, confidence: Floats, accepted: Bools) -> None:
        """Learns from nodes, flat."""
        known = ~np.isnan(confidence)
        p, q = chances[known], confidence[known]
        features = np.stack([np.ones_like(p), _logit(p), _logit(q)], axis=1)
        fitted = _sigmoid(features @ self._weights)
        self._information *= (1 - 1 / MEMORY) ** (len(features) / 2)
        self._information += (features * (fitted * (1 - fitted))[:, None]).T @ features
        gradient = features.T @ (accepted[known] - fitted)
        step = np.linalg.solve(self._information + _CALIBRATION_RIDGE * np.eye(3), gradient)
        self._weights = self._weights + step
        self._weights[1:] = np.maximum(self._weights[1:], 0.0)  # a higher chance never counts against a node
        self._of_confidence = self._weights.item(2)


def _logit(chances: Floats) -> Floats:
    chances = np.minimum(np.maximum(chances, _EDGE), 1 - _EDGE)
    return np.asarray(np.log(chances / (1 - chances)))


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-x)))


# Of the sequences of a step the places, the nodes that each was asked for, the drafts that came, the nodes of
# them that were verified and those that were accepted.
_Outcomes = tuple[Sequence[int], Sequence[int], Sequence[Draft], Sequence[int], Sequence[Sequence[int]]]


class _Requests:
    """Discounted sums per request, one row each; rows are added as requests come and reused as they go.

    Attributes:
        outcomes: [3, rows, 2], hits, expected hits and their variance by chance, each for first nodes and for
            deeper ones.
        curves: [3, rows, nodes], per node drafts that were asked for it, that had it, and their survival.
    """

    def __init__(self, num_nodes: int) -> None:
        self.outcomes, self.curves = np.zeros((3, 0, 2)), np.zeros((3, 0, num_nodes))
        self._places: dict[str, int] = {}
        self._unused: list[int] = []
        self._leaving: list[int] = []
        self._grow(64)

    def __len__(self) -> int:
        return self.outcomes.shape[1]

    def _grow(self, num_rows: int) -> None:
        self._unused.extend(reversed(range(len(self), len(self) + num_rows)))
        more = ((0, 0), (0, num_rows), (0, 0))
        self.outcomes, self.curves = np.pad(self.outcomes, more), np.pad(self.curves, more)

    def places(self, ids: Sequence[str]) -> list[int]:
        """The row of each request; that of a new one holds zeros."""
        known = self._places
        for key in ids:
            if key not in known:
                if not self._unused:
                    self._grow(len(self))
                known[key] = self._unused.pop()
        return list(map(known.__getitem__, ids))

    def release(self, key: str) -> None:
        """Forgets a request; its row is free once `clear` was called."""
        place = self._places.pop(key, None)
        if place is not None:
            self._leaving.append(place)

    def clear(self) -> None:
        """Frees the rows of those who left."""
        if self._leaving:
            self.outcomes[:, self._leaving] = self.curves[:, self._leaving] = 0.0
            self._unused += self._leaving
            self._leaving.clear()

    def add(self, places: Ints, outcomes: Floats, curves: Floats) -> None:
        """Adds drafts to the rows of their requests; several of one request count alike.

        Args:
            places: [drafts], their rows.
            outcomes: [3, drafts, 2], zeros where nothing was verified.
            curves: [3, drafts, nodes].
        """
        of_request = np.equal(np.arange(len(self))[:, None], places).astype(np.float64)  # [rows, drafts]
        keep = 1 - 1 / REQUEST_MEMORY
        decay = keep ** (of_request @ (outcomes[1, :, :1] > 0))
        self.outcomes *= decay
        self.outcomes[2] *= decay  # once more: the variance of a discounted sum
        self.outcomes += of_request @ outcomes
        self.curves *= keep ** (of_request @ curves[0])
        self.curves += of_request @ curves


class AcceptanceEstimator:
    """Estimates survival before and after drafting; see the module's text.

    Sequences are named by request id.
    """

    def __init__(self, max_nodes: int) -> None:
        """Starts from the prior.

        Args:
            max_nodes: Most nodes of a draft.
        """
        self._max_nodes = max_nodes
        self._requests = _Requests(max_nodes)
        self._trials, self._accepted = np.zeros((2, max_nodes, NUM_RANKS))
        self._curves = np.zeros((3, max_nodes))  # of all requests: asked, present, survived
        # Mean squares, for first nodes and deeper ones: what requests differ by beyond chance, and what was
        # expected of them.
        self._surprise, self._square = np.full(2, DIFFERENCE[0]), np.ones(2)
        self._calibration = _Calibration()
        self._outcomes: list[_Outcomes] = []  # to learn from, by step
        self._num_steps = 0  # with drafts
        self._num_idle = self._num_drafts = 0  # steps of all kinds and drafts, since it learnt
        self._refresh()

    def before(self, ids: Sequence[str]) -> tuple[Floats, Floats]:
        """What drafts will be, as far as can be said before they exist.

        Returns:
            [sequences, nodes] each: the chance that a draft has such a node, and the mean survival of such
            nodes, non-increasing along a row.
        """
        places = self._places(ids)
        asked, present, survived = self._requests.curves[:, places]
        weight = asked + REQUEST_WEIGHT
        usual_present, usual_survived = self._usual()
        present = (present + REQUEST_WEIGHT * usual_present) / weight
        survived = (survived + REQUEST_WEIGHT * usual_survived) / weight
        survival = np.minimum.accumulate(np.minimum(survived / present, MOST), axis=1)
        return present, survival

    def onward(self, ids: Sequence[str]) -> tuple[Floats, Floats]:
        """The same for requests that were asked for short drafts only: their deeper nodes go on from there.

        What everyone's drafts lose from one node to the next is the prior of each node, given the one before
        it; `before` takes everyone's nodes as they are, which tells a request that was never asked for its
        fourth node nothing of how good its first ones were.
        """
        places = self._places(ids)
        asked, present, survived = self._requests.curves[:, places]
        usual_present, usual_survived = self._usual()
        usual = usual_survived / usual_present
        chance, survival = np.ones_like(asked), np.ones_like(asked)
        chance_above = survival_above = usual_above = usual_chance_above = np.ones(1)
        for node in range(self._max_nodes):
            prior = chance_above * usual_present[node] / usual_chance_above
            weight = asked[:, node] + REQUEST_WEIGHT
            chance[:, node] = (present[:, node] + REQUEST_WEIGHT * prior) / weight
            expected = prior * survival_above * usual[node] / usual_above
            survival[:, node] = (survived[:, node] + REQUEST_WEIGHT * expected) / weight / chance[:, node]
            chance_above, survival_above = chance[:, node], np.minimum(survival[:, node], MOST)
            usual_chance_above, usual_above = usual_present[node], usual[node]
        return chance, np.minimum.accumulate(np.minimum(survival, MOST), axis=1)

    def survival(self, ids: Sequence[str], drafts: Sequence[Draft]) -> list[list[float]]:
        """For each draft the chance of each node to be on the accepted path."""
        places = self._places(ids)
        return [self._of_draft(place, draft) for place, draft in zip(places, drafts, strict=True)]

    def observe(
        self,
        ids: Sequence[str],
        limits: Sequence[int],
        drafts: Sequence[Draft],
        lengths: Sequence[int],
        paths: Sequence[Sequence[int]],
    ) -> None:
        """Learns what was drafted of what was asked, and what was accepted of what was verified.

        Args:
            ids: The sequences of a step.
            limits: Nodes that each was asked for.
            drafts: What came of that.
            lengths: Nodes of it that were verified.
            paths: Of these the accepted ones, root side first.
        """
        self._num_idle += 1
        if any(limits):
            self._outcomes.append((self._places(ids), limits, drafts, lengths, paths))
            self._num_steps += 1
            self._num_drafts += len(limits) - limits.count(0)
        least, most = LEARN_EVERY
        waits = 1 if self._num_steps <= most else least if self._num_drafts >= LEARN_DRAFTS else most
        if self._num_idle >= (waits if self._outcomes else _IDLE_STEPS):
            self._learn()

    def num_verified(self, ids: Sequence[str]) -> Floats:
        """How much was verified of each sequence: expected first nodes, recent ones counting more."""
        places = self._places(ids)
        return np.asarray(self._requests.outcomes[1, places, 0])

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence."""
        self._requests.release(sequence_id)

    def rates(self) -> Floats:
        """[depth, rank]: acceptance given that the parent is accepted, over all requests."""
        self._learn()
        return self._rates.copy()

    def _learn(self) -> None:
        """Learns from the steps that were gathered."""
        self._forget_slowly()
        if self._outcomes:
            asked = [limit > 0 for _, limits, *_ in self._outcomes for limit in limits]
            steps = zip(*self._outcomes, strict=True)
            columns = (list(compress(chain.from_iterable(column), asked)) for column in steps)
            places, limits, drafts, lengths, paths = columns
            self._outcomes.clear()
            self._num_drafts = 0
            self._learn_from(np.array(places), np.array(limits), Forest.of(drafts), np.array(lengths), paths)
        self._requests.clear()
        self._refresh()

    def _learn_from(
        self, places: Ints, limits: Ints, forest: Forest, lengths: Ints, paths: Sequence[Sequence[int]]
    ) -> None:
        """Learns from drafts that were asked for, side by side."""
        is_verified = lengths > 0
        num_drafts = int(np.count_nonzero(is_verified))
        chances = self._chances(places, forest)
        survival = self._survival(chances, forest)
        accepted, seen = forest.cut(lengths).outcomes(paths)
        if forest.confidence is not None:
            self._calibration.fit(chances[seen], forest.confidence[seen], accepted[seen])
        rates = np.where(seen, self._rates[forest.depths, forest.ranks], 0.0)
        cells = np.broadcast_to(forest.depths * NUM_RANKS + forest.ranks, seen.shape)[seen]
        keep = (1 - 1 / MEMORY) ** num_drafts
        self._trials = keep * self._trials + self._per_cell(cells)
        self._accepted = keep * self._accepted + self._per_cell(cells, accepted[seen])
        curves = np.zeros((3, len(limits), self._max_nodes))
        curves[0] = np.arange(self._max_nodes) < limits[:, None]
        curves[1, :, : seen.shape[1]], curves[2, :, : seen.shape[1]] = forest.present, survival
        self._curves = (1 - 1 / MEMORY) ** len(limits) * self._curves + curves.sum(axis=1)
        outcomes = np.empty((3, *seen.shape))  # [3, drafts, nodes]
        outcomes[0], outcomes[1], outcomes[2] = accepted, rates, rates * (1 - rates)
        by_level = np.empty((3, len(limits), 2))
        by_level[:, :, 0] = (outcomes * (forest.depths == 0)).sum(axis=2)
        by_level[:, :, 1] = outcomes.sum(axis=2) - by_level[:, :, 0]
        self._requests.add(places, by_level, curves)
        if num_drafts:
            self._learn_difference(np.flatnonzero(np.bincount(places[is_verified])), num_drafts)

    def _per_cell(self, cells: Ints, values: Bools | None = None) -> Floats:
        counts = np.bincount(cells, values, self._trials.size)
        return np.asarray(counts.reshape(self._trials.shape), np.float64)

    def _learn_difference(self, places: Ints, num_drafts: int) -> None:
        """By the method of moments: E (hits - expected)² = variance by chance + difference · expected²."""
        hits, expected, variance = self._requests.outcomes[:, places]
        rate = 1 - (1 - 1 / MEMORY) ** num_drafts
        self._surprise += rate * (((hits - expected) ** 2 - variance).mean(axis=0) - self._surprise)
        self._square += rate * ((expected**2).mean(axis=0) - self._square)

    def _forget_slowly(self) -> None:
        """For each step goes a little back to the prior."""
        keep = (1 - 1 / IDLE_MEMORY) ** self._num_idle
        self._num_idle = 0
        for sums in (self._trials, self._accepted, self._curves):
            sums *= keep

    def _refresh(self) -> None:
        """Works out anew what is answered until more is learnt."""
        rates = [[PRIOR_RATE * 0.5**rank for rank in range(NUM_RANKS)]]
        for cells in zip(self._trials.tolist(), self._accepted.tolist(), strict=True):
            above = zip(*cells, rates[-1], strict=True)
            rates.append([(hits + PRIOR_WEIGHT * p) / (num + PRIOR_WEIGHT) for num, hits, p in above])
        self._rates = np.array(rates[1:])
        factors = self._factors()[:, np.minimum(np.arange(self._max_nodes), 1)]  # [requests, depth]
        self._table = np.minimum(np.maximum(self._rates * factors[:, :, None], LEAST), MOST)
        self._all_odds = self._calibration.odds(self._table)
        self._odds: dict[int, list[list[float]]] = {}  # [depth, rank] in plain numbers, of those who draft
        self._of_chains: dict[int, list[float]] = {}  # likewise

    def _usual(self) -> tuple[Floats, Floats]:
        """[nodes] each: present and survived, over all requests."""
        asked, present, survived = self._curves
        weight = asked + PRIOR_WEIGHT
        expected = survived + PRIOR_WEIGHT * np.cumprod(self._rates[:, 0])
        return (present + PRIOR_WEIGHT) / weight, expected / weight

    def _factors(self) -> Floats:
        """[requests, 2]: the least squares estimate of each request's own acceptance over everyone's."""
        hits, expected, variance = self._requests.outcomes
        signal = np.maximum(self._surprise / np.maximum(self._square, _FLOOR), DIFFERENCE[1]) * expected**2
        trust = signal / np.maximum(signal + variance, _FLOOR)
        return np.asarray(1 + trust * (hits / np.maximum(expected, _FLOOR) - 1))

    def _of_draft(self, place: int, draft: Draft) -> list[float]:
        """Survival of a draft's nodes. Plain numbers: a draft has a handful of nodes."""
        parents, confidence = draft.parents, draft.confidence
        if confidence is None and _is_chain(draft):
            if place not in self._of_chains:
                self._of_chains[place] = np.cumprod(self._table[place, :, 0]).tolist()
            return self._of_chains[place][: len(parents)]
        if place not in self._odds:
            self._odds[place] = self._all_odds[place].tolist()
        odds = self._odds[place]
        survival, depths = list[float](), list[int]()
        ranks: dict[int, int] = {}  # by parent, of its next child
        for node, parent in enumerate(parents):
            depth = depths[parent] + 1 if parent >= 0 else 0
            rank = ranks.get(parent, 0)
            ranks[parent] = rank + 1
            cell = min(rank, NUM_RANKS - 1)
            if confidence is None:
                chance = self._table.item(place, depth, cell)
            else:
                chance = self._calibration.chance(odds[depth][cell], confidence[node])
            depths.append(depth)
            survival.append(chance * survival[parent] if parent >= 0 else chance)
        return survival

    def _chances(self, places: Ints, forest: Forest) -> Floats:
        """Rate · factor, [trees, nodes]."""
        return self._table[places[:, None], forest.depths, forest.ranks]

    def _survival(self, chances: Floats, forest: Forest) -> Floats:
        return forest.along_paths(self._calibration(chances, forest.confidence))

    def _places(self, ids: Sequence[str]) -> list[int]:
        """The rows of requests, in the sums and in the table."""
        places = self._requests.places(ids)
        if len(self._table) < len(self._requests):
            self._refresh()
        return places
