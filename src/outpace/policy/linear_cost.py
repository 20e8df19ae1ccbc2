"""Costs that are linear in a few numbers, learnt while running: what drafting takes, and the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_LINEAR_KEEP, _LINEAR_RIDGE = 0.99, 0.01  # the draft's and the host's coefficients: memory per step
_SHARED_RIDGE = 1e-4  # of what sequences that draft share: who drafted alone says nothing of what others add
_LINEAR_ALL, _LINEAR_EVERY = 16, 32  # measurements that are learnt from at once, later so many together
_SPREAD_RATE = 0.2  # of the usual size of an error, at which larger ones are clipped: a median, nearly


class Robust:
    """Clips errors to their usual size: a spike counts little, a lasting change soon enough."""

    def __init__(self) -> None:
        self._spread: float | None = None

    def __call__(self, error: float) -> float:
        """The error, or as much of it as counts."""
        usual = abs(error) if self._spread is None else self._spread
        self._spread = usual + _SPREAD_RATE * (abs(error) - usual)
        return max(-usual, min(usual, error))


class LinearCost:
    """Seconds linear in a few features, coefficients at least 0, by recursive least squares that forget.

    A ridge keeps features that always come together from drifting apart: they share an error, those with the
    lesser ridge have the more of it.
    """

    def __init__(self, coefficients: Sequence[float], ridge: float | Sequence[float] = _LINEAR_RIDGE) -> None:
        self.coefficients = [float(c) for c in coefficients]
        self._ridge = np.array(ridge)
        self._num_observed = 0
        self._robust = Robust()
        self._latest: list[tuple[float, ...]] = []  # features and seconds, since coefficients were worked out
        num_features = len(coefficients)
        self._squares: Floats = np.zeros((num_features, num_features))  # discounted Σ x·xᵀ
        self._products: Floats = np.zeros(num_features)  # and Σ x·seconds

    def seconds(self, *features: Any) -> Any:
        """Predicts; features may be arrays of one shape."""
        total: Any = 0.0
        for coefficient, feature in zip(self.coefficients, features, strict=True):
            if coefficient:
                total = total + coefficient * feature
        return total

    def observe(self, seconds: float, *features: float) -> None:
        """Learns from a measurement: at once from the first ones, later from several together."""
        predicted = self.seconds(*features)
        self._latest.append((*features, predicted + self._robust(seconds - predicted)))
        self._num_observed += 1
        if self._num_observed <= _LINEAR_ALL or len(self._latest) == _LINEAR_EVERY:
            self._fit()

    def _fit(self) -> None:
        """Solves the normal equations anew: to cut an old solution off at 0 and go on from there drifts."""
        latest = np.array(self._latest)
        self._latest.clear()
        x, keep = latest[:, :-1], _LINEAR_KEEP ** len(latest)
        self._squares = keep * self._squares + x.T @ x
        self._products = keep * self._products + x.T @ latest[:, -1]
        ridge = self._ridge * np.diag(self._squares) + 1e-12
        root = np.linalg.cholesky(self._squares + np.diag(ridge))
        target = np.linalg.solve(root, self._products + ridge * self.coefficients)
        self.coefficients = nonnegative_least_squares(np.asarray(root.T, np.float64), target).tolist()


class DraftCost:
    """Seconds of drafting, learnt: a part of all that draft in a step, and one of each.

    As long as sequences drafted alone the two look the same, and the time counts as shared: taken for each
    one's it would keep eight from ever drafting together, where a pass over a head's weights serves all.
    """

    def __init__(self, coefficients: Sequence[float]) -> None:
        """Starts from seconds per step that drafts, sequence, node, unit of depth and token behind."""
        shared, own = _SHARED_RIDGE, _LINEAR_RIDGE
        self._linear = LinearCost(coefficients, (shared, own, own, shared, own))

    @property
    def coefficients(self) -> list[float]:
        """As they are now, in the same order."""
        return self._linear.coefficients

    def seconds(self, sequences: Any, nodes: Any, depth: Any, behind: Any) -> Any:
        """Predicts, arrays or numbers: sequences asked, nodes, deepest limit, tokens not seen yet."""
        return self._linear.seconds(sequences > 0, sequences, nodes, depth, behind)

    def own_s(self, nodes: Any, behind: Any) -> Any:
        """What a sequence adds to what all share."""
        _, sequence, node, _, token = self.coefficients
        return sequence + node * nodes + token * behind

    def observe(self, seconds: float, sequences: int, nodes: int, depth: int, behind: float) -> None:
        """Learns from a step that drafted."""
        self._linear.observe(seconds, 1.0, sequences, nodes, depth, behind)


def varied(limits: list[int], number: int) -> list[int]:
    """Limits up to these, another share of them for each number.

    What is always asked for as much looks like a cost of asking at all: short drafts would seem as dear as
    long ones, and where long ones do not pay none would be made any more.
    """
    return [1 + number % limit if limit else 0 for limit in limits]


def asked_of(limits: Sequence[int]) -> tuple[int, int, int]:
    """Sequences, nodes and depth asked for."""
    return len(limits) - limits.count(0), sum(limits), max(limits, default=0)


def nonnegative_least_squares(design: Floats, target: Floats) -> Floats:
    """The x ≥ 0 that minimises |design·x - target|, by active sets (Lawson and Hanson, 1974).

    Args:
        design: [observations, unknowns].
        target: [observations].
    """
    num_unknowns = design.shape[1]
    x = np.zeros(num_unknowns)
    free = np.zeros(num_unknowns, dtype=bool)
    for _ in range(10 * num_unknowns):
        gradient = design.T @ (target - design @ x)
        gradient[free] = -np.inf
        if free.all() or gradient.max() <= 1e-10:
            break
        free[int(np.argmax(gradient))] = True
        while True:
            wanted = np.zeros(num_unknowns)
            wanted[free] = np.linalg.lstsq(design[:, free], target, rcond=None)[0]
            falling = free & (wanted <= 0)
            if not falling.any():
                break
            step = float(np.min(x[falling] / np.maximum(x[falling] - wanted[falling], 1e-300)))
            x = x + step * (wanted - x)
            free &= x > 1e-15
            x[~free] = 0.0
        x = wanted
    return x
