"""How likely drafted tokens are to be accepted, learnt from what became of earlier ones.

A node's chance, given that its parent is accepted, is

    p = rate[method, depth, rank] · factor[request, first or deeper]

rate: exponentially weighted, with the rate one depth above as its prior; factor: what this request accepted
over what the rates had expected, shrunk to 1 by as much as chance explains the difference (empirical Bayes:
how much requests differ beyond chance is learnt too); first nodes and deeper ones apart, since those that
reach deeper ones are a choice. Where the drafter has a confidence q, a logistic fit refines it: logit p' =
w0 + w1·logit p + w2·logit q. S, the chance that a node is on the accepted path, is the product of p along
its path.

Before drafts exist two curves per request stand for them: the chance that a draft has an i-th node, and the
mean S of i-th nodes that there were. They average what was drafted, verified or not, so that cutting does
not bias them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat

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
_IDLE_STEPS = 32  # between such decays
REQUEST_MEMORY = 16.0  # drafts over which a request's own averages reach back
REQUEST_WEIGHT = 3.0  # drafts that the population is worth to a request
DIFFERENCE = 0.05, 0.005  # variance of requests' factors: at first, and the least that is assumed
_DIFFERENCE_MEMORY = 128.0  # steps over which it is learnt
LEAST, MOST = 1e-3, 0.995  # bounds of a chance
_CALIBRATION_RIDGE = 20.0  # observations before confidences count for much
_FIT_ALL, _FIT_EVERY = 64, 4  # steps of which each is fitted to, and then one in so many
_START = np.array([0.0, 1.0, 0.0])  # calibration that leaves p as it is


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees side by side.

    Attributes:
        present: [trees, nodes], where there is a node.
        parents: [trees, nodes], -1 at the first level.
        depths: [trees, nodes], 0 at the first level.
        ranks: [trees, nodes], the number of elder siblings.
        confidence: [trees, nodes], NaN where there is none.
        is_chain: Whether no tree branches.
    """

    present: Bools
    parents: Ints
    depths: Ints
    ranks: Ints
    confidence: Floats
    is_chain: bool

    @classmethod
    def of(cls, drafts: Sequence[Draft]) -> Forest:
        """Lays out trees; the loops below go over depth, not over nodes."""
        lengths = np.fromiter((len(draft.parents) for draft in drafts), np.int64, len(drafts))
        width = int(lengths.max(initial=0))
        present = np.arange(width) < lengths[:, None]
        in_chains = np.zeros(present.shape, np.int64) + np.arange(width)
        parents = in_chains - 1
        parents[present] = np.fromiter(chain.from_iterable(d.parents for d in drafts), np.int64)
        is_chain = bool((parents < in_chains).all() and (parents == in_chains - 1).all())
        depths = in_chains if is_chain else _depths(parents)
        ranks = np.zeros_like(parents) if is_chain else _ranks(parents, present)
        confidence = np.full(present.shape, np.nan)
        confidence[present] = np.fromiter(chain.from_iterable(map(_confidence, drafts)), np.float64)
        return cls(present, parents, depths, ranks, confidence, is_chain)

    def cut(self, lengths: Sequence[int]) -> Forest:
        """The first nodes of each tree."""
        if not self.present.size:
            return self
        present = np.arange(self.present.shape[1]) < np.asarray(lengths)[:, None]
        return replace(self, present=present & self.present)

    def along_paths(self, chances: Floats) -> Floats:
        """The product of chances from the root to each node; 0 where there is no node."""
        product = np.where(self.present, chances, 0.0)
        if self.is_chain:
            return np.asarray(np.cumprod(product, axis=1), np.float64)
        trees = np.arange(len(product))
        for column in range(1, product.shape[1]):
            parent = self.parents[:, column]
            product[:, column] *= np.where(parent < 0, 1.0, product[trees, parent])
        return product

    def outcomes(self, paths: Sequence[Sequence[int]]) -> tuple[Bools, Bools]:
        """Which nodes were accepted, and of which that was seen: their parents were accepted too."""
        accepted = np.zeros(self.present.shape, dtype=bool)
        lengths = np.fromiter((len(path) for path in paths), np.int64, len(paths))
        nodes = np.fromiter(chain.from_iterable(paths), np.int64)
        accepted[np.repeat(np.arange(len(paths)), lengths), nodes] = True
        trees = np.arange(len(paths))[:, None]
        reached = (self.parents < 0) | accepted[trees, np.maximum(self.parents, 0)]
        return accepted, self.present & reached


def _confidence(draft: Draft) -> Iterable[float]:
    return repeat(math.nan, len(draft.parents)) if draft.confidence is None else draft.confidence


def _by_level(forest: Forest, values: NDArray[np.generic]) -> Floats:
    """[trees, 2]: sums over first nodes, and over deeper ones."""
    first = np.where(forest.depths == 0, values, 0.0).sum(axis=1)
    return np.stack([first, values.sum(axis=1) - first], axis=1)


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


class _Averages:
    """Per-key arrays of discounted sums that grow as keys come and are reused as they go."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._places: dict[str, int] = {}
        self._unused: list[int] = []
        self._grow(64)

    def _grow(self, size: int) -> None:
        old = len(getattr(self, "hits", ()))
        self._unused.extend(range(size - 1, old - 1, -1))
        for name, shape in (
            ("hits", (size, 2)),
            ("expected", (size, 2)),
            ("variance", (size, 2)),
            ("asked", (size, self.width)),
            ("present", (size, self.width)),
            ("survived", (size, self.width)),
        ):
            grown = np.zeros(shape)
            if old:
                grown[:old] = getattr(self, name)
            setattr(self, name, grown)

    hits: Floats
    expected: Floats
    variance: Floats
    asked: Floats
    present: Floats
    survived: Floats

    def places(self, keys: Sequence[str]) -> Ints:
        """Where each key's sums are; new keys get zeros."""
        known = self._places
        for key in keys:
            if key not in known:
                if not self._unused:
                    self._grow(2 * len(self.hits))
                known[key] = self._unused.pop()
        return np.fromiter((known[key] for key in keys), np.int64, len(keys))

    def release(self, key: str) -> None:
        """Forgets a key."""
        place = self._places.pop(key, None)
        if place is not None:
            self.hits[place] = self.expected[place] = self.variance[place] = 0.0
            self.asked[place] = self.present[place] = self.survived[place] = 0.0
            self._unused.append(place)


class _Method:
    """What is known of one draft method, over all requests."""

    def __init__(self, max_nodes: int) -> None:
        shape = (max_nodes, NUM_RANKS)
        self.trials, self.accepted = np.zeros(shape), np.zeros(shape)
        self.asked, self.present, self.survived = np.zeros((3, max_nodes))
        self._num_idle = self._num_fits = 0
        self._curves: tuple[Floats, Floats] | None = None  # until something is learnt
        self.weights = _START.copy()
        self.information = np.zeros((3, 3))
        self.refresh()

    def refresh(self) -> None:
        """Works the rates out anew."""
        prior = PRIOR_RATE * 0.5 ** np.arange(NUM_RANKS)
        self.rates = np.empty_like(self.trials)
        for depth in range(len(self.rates)):
            posterior = (self.accepted[depth] + PRIOR_WEIGHT * prior) / (self.trials[depth] + PRIOR_WEIGHT)
            self.rates[depth] = prior = posterior
        self._curves = None

    def idle(self) -> None:
        """A step passed."""
        self._num_idle += 1
        if self._num_idle % _IDLE_STEPS:
            return
        keep = (1 - 1 / IDLE_MEMORY) ** _IDLE_STEPS
        for array in (self.trials, self.accepted, self.asked, self.present, self.survived):
            array *= keep
        self._curves = None

    def observe_rates(self, depths: Ints, ranks: Ints, accepted: Bools, num_drafts: int) -> None:
        keep = (1 - 1 / MEMORY) ** num_drafts
        cells = depths * NUM_RANKS + ranks
        size = self.trials.size
        self.trials *= keep
        self.accepted *= keep
        self.trials += np.bincount(cells, minlength=size).reshape(self.trials.shape)
        self.accepted += np.bincount(cells, accepted, size).reshape(self.trials.shape)

    def observe_curves(self, asked: Floats, present: Floats, survived: Floats) -> None:
        keep = (1 - 1 / MEMORY) ** len(asked)
        self.asked = keep * self.asked + asked.sum(axis=0)
        self.present = keep * self.present + present.sum(axis=0)
        self.survived = keep * self.survived + survived.sum(axis=0)
        self._curves = None

    def curves(self) -> tuple[Floats, Floats]:
        """[nodes] each: the chance that a draft has an i-th node; and that times its mean S."""
        if self._curves is None:
            weight = self.asked + PRIOR_WEIGHT
            present = (self.present + PRIOR_WEIGHT) / weight
            survived = (self.survived + PRIOR_WEIGHT * np.cumprod(self.rates[:, 0])) / weight
            self._curves = present, survived
        return self._curves

    def calibrate(self, chances: Floats, confidence: Floats) -> Floats:
        """Refines chances where there is a confidence; NaN leaves them."""
        known = ~np.isnan(confidence)
        if not known.any():
            return chances
        features = _features(chances, np.where(known, confidence, 0.5))
        refined = 1 / (1 + np.exp(-(features @ self.weights)))
        return np.where(known, np.clip(refined, LEAST, MOST), chances)

    def wants_fit(self) -> bool:
        """Whether what is learnt is to be worked out at this step: at each of the first, later at some."""
        self._num_fits += 1
        return self._num_fits <= _FIT_ALL or self._num_fits % _FIT_EVERY == 0

    def fit(self, chances: Floats, confidence: Floats, accepted: Bools) -> None:
        """A Newton step of the discounted logistic regression, nodes flat."""
        known = ~np.isnan(confidence)
        if not known.any():
            return
        features = _features(chances[known], confidence[known])
        fitted = 1 / (1 + np.exp(-(features @ self.weights)))
        self.information *= (1 - 1 / MEMORY) ** (len(features) / 2)
        self.information += (features * (fitted * (1 - fitted))[:, None]).T @ features
        gradient = features.T @ (accepted[known] - fitted)
        step = np.linalg.solve(self.information + _CALIBRATION_RIDGE * np.eye(3), gradient)
        self.weights = self.weights + step
        self.weights[1:] = np.maximum(self.weights[1:], 0.0)  # a higher chance never counts against a node


def _features(chances: Floats, confidence: Floats) -> Floats:
    return np.stack([np.ones_like(chances), _logit(chances), _logit(confidence)], axis=-1)


def _logit(chances: Floats) -> Floats:
    chances = np.clip(chances, 0.02, 0.98)
    return np.asarray(np.log(chances / (1 - chances)))


class AcceptanceEstimator:
    """Estimates survival before and after drafting; see the module's text.

    Sequences are named by request id. Draft methods are told apart by name.
    """

    def __init__(self, max_nodes: int) -> None:
        """Starts from the prior.

        Args:
            max_nodes: Most nodes of a draft.
        """
        self._max_nodes = max_nodes
        self._requests = _Averages(max_nodes)
        self._placed: tuple[Sequence[str], Ints] = ((), np.zeros(0, np.int64))
        # Mean squares, for first nodes and deeper ones: what requests differ by beyond chance, and what was
        # expected of them.
        self._surprise, self._square = np.full(2, DIFFERENCE[0]), np.ones(2)
        self._methods: dict[str, _Method] = {}

    def before(self, ids: Sequence[str], method: str = "") -> tuple[Floats, Floats]:
        """What drafts will be, as far as can be said before they exist.

        Returns:
            [sequences, nodes] each: the chance that a draft has such a node, and the mean survival of such
            nodes, non-increasing along a row.
        """
        places = self._places(ids)
        present, survived = self._method(method).curves()
        weight = self._requests.asked[places] + REQUEST_WEIGHT
        present = (self._requests.present[places] + REQUEST_WEIGHT * present) / weight
        survived = (self._requests.survived[places] + REQUEST_WEIGHT * survived) / weight
        survival = np.minimum.accumulate(np.minimum(survived / present, MOST), axis=1)
        return present, survival

    def survival(self, ids: Sequence[str], forest: Forest, method: str = "") -> Floats:
        """[trees, nodes]: the chance of each node to be on the accepted path."""
        if not forest.present.size:
            return np.zeros((len(ids), 0))
        known = self._method(method)
        chances = known.calibrate(self._chances(ids, forest, known), forest.confidence)
        return forest.along_paths(chances)

    def drafted(
        self, ids: Sequence[str], limits: Sequence[int], forest: Forest, survival: Floats, method: str = ""
    ) -> None:
        """Learns what was drafted of what was asked, whatever is verified of it."""
        limit = np.asarray(limits)
        rows = np.flatnonzero(limit)
        if not len(rows):
            return
        index = np.arange(self._max_nodes)
        asked = (index < limit[rows, None]).astype(np.float64)
        present, survived = np.zeros((2, *asked.shape))
        if width := min(survival.shape[1], self._max_nodes):
            present[:, :width] = forest.present[rows, :width]
            survived[:, :width] = survival[rows, :width]
        self._method(method).observe_curves(asked, present, survived)
        places = self._places(ids)[rows]
        keep = 1 - asked / REQUEST_MEMORY
        own = self._requests
        own.asked[places] = keep * own.asked[places] + asked
        own.present[places] = keep * own.present[places] + present
        own.survived[places] = keep * own.survived[places] + survived

    def observe(
        self, ids: Sequence[str], forest: Forest, paths: Sequence[Sequence[int]], method: str = ""
    ) -> None:
        """Learns what was accepted of what was verified."""
        known = self._method(method)
        known.idle()
        if not (forest.present.size and forest.present.any()):
            return
        accepted, seen = forest.outcomes(paths)
        is_fitting = known.wants_fit()
        if is_fitting:
            expected = self._chances(ids, forest, known)
            known.fit(expected[seen], forest.confidence[seen], accepted[seen])
        num_drafts = int(forest.present[:, 0].sum())
        base = np.where(seen, known.rates[self._cells(forest)], 0.0)
        known.observe_rates(*self._seen_cells(forest, seen), accepted[seen], num_drafts)
        if is_fitting:
            known.refresh()
        rows = np.flatnonzero(forest.present[:, 0])
        places = self._places(ids)[rows]
        keep, own = 1 - 1 / REQUEST_MEMORY, self._requests
        own.hits[places] = keep * own.hits[places] + _by_level(forest, accepted)[rows]
        own.expected[places] = keep * own.expected[places] + _by_level(forest, base)[rows]
        chance = _by_level(forest, base * (1 - base))[rows]
        own.variance[places] = keep**2 * own.variance[places] + chance
        if is_fitting:
            self._learn_difference(places)

    def num_verified(self, ids: Sequence[str]) -> Floats:
        """How much was verified of each sequence: expected first nodes, recent ones counting more."""
        return np.asarray(self._requests.expected[self._places(ids), 0])

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence."""
        self._requests.release(sequence_id)
        self._placed = ((), np.zeros(0, np.int64))

    def rates(self, method: str = "") -> Floats:
        """[depth, rank]: acceptance given that the parent is accepted, over all requests."""
        known = self._method(method)
        known.refresh()
        return known.rates.copy()

    def _places(self, ids: Sequence[str]) -> Ints:
        """Where the sequences' sums are; the same list is asked for several times in a step."""
        if ids is not self._placed[0]:
            self._placed = (ids, self._requests.places(ids))
        return self._placed[1]

    def _learn_difference(self, places: Ints) -> None:
        """By the method of moments: E (hits - expected)² = variance by chance + difference · expected²."""
        own = self._requests
        beyond = (own.hits[places] - own.expected[places]) ** 2 - own.variance[places]
        square = own.expected[places] ** 2
        self._surprise += (beyond.mean(axis=0) - self._surprise) / _DIFFERENCE_MEMORY
        self._square += (square.mean(axis=0) - self._square) / _DIFFERENCE_MEMORY

    def _factors(self, places: Ints) -> Floats:
        """[sequences, 2]: the least squares estimate of each request's own acceptance over everyone's."""
        own = self._requests
        hits, expected = own.hits[places], own.expected[places]
        signal = np.maximum(self._surprise / np.maximum(self._square, 1e-9), DIFFERENCE[1]) * expected**2
        trust = signal / np.maximum(signal + own.variance[places], 1e-9)
        return np.asarray(1 + trust * (hits / np.maximum(expected, 1e-9) - 1))

    def _method(self, name: str) -> _Method:
        if name not in self._methods:
            self._methods[name] = _Method(self._max_nodes)
        return self._methods[name]

    def _cells(self, forest: Forest) -> tuple[Ints, Ints]:
        return np.minimum(forest.depths, self._max_nodes - 1), forest.ranks

    def _seen_cells(self, forest: Forest, seen: Bools) -> tuple[Ints, Ints]:
        depths, ranks = self._cells(forest)
        return depths[seen], ranks[seen]

    def _chances(self, ids: Sequence[str], forest: Forest, known: _Method) -> Floats:
        """Rate · factor, [trees, nodes]."""
        places = self._places(ids)
        rates: Floats = known.rates[self._cells(forest)]
        first, deeper = self._factors(places).T[:, :, None]
        chances: Floats = np.clip(rates * np.where(forest.depths == 0, first, deeper), LEAST, MOST)
        return chances
