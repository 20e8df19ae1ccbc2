"""Costs that are linear in a few numbers, learnt while running: what drafting takes, and the host."""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul
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
        num_features = len(coefficients)
        self.coefficients = [float(c) for c in coefficients]
        self._ridge = [ridge] * num_features if isinstance(ridge, float) else [*ridge]
        self._num_observed = 0
        self._robust = Robust()
        self._squares = [[0.0] * num_features for _ in range(num_features)]  # discounted Σ x·xᵀ
        self._products = [0.0] * num_features  # and Σ x·seconds

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
        seconds = predicted + self._robust(seconds - predicted)
        for row, x in zip(self._squares, features, strict=True):
            row[:] = [_LINEAR_KEEP * square + x * other for square, other in zip(row, features, strict=True)]
        products = zip(self._products, features, strict=True)
        self._products = [_LINEAR_KEEP * product + x * seconds for product, x in products]
        self._num_observed += 1
        if self._num_observed <= _LINEAR_ALL or self._num_observed % _LINEAR_EVERY == 0:
            self._fit()

    def _fit(self) -> None:
        """Solves the normal equations anew: to cut an old solution off at 0 and go on from there drifts."""
        squares, products = [row[:] for row in self._squares], self._products[:]
        for i, (share, coefficient) in enumerate(zip(self._ridge, self.coefficients, strict=True)):
            ridge = share * squares[i][i] + 1e-12
            squares[i][i] += ridge
            products[i] += ridge * coefficient
        self.coefficients = nonnegative_minimum(squares, products)


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


def nonnegative_least_squares(design: Floats, target: Floats) -> list[float]:
    """The x ≥ 0 that minimises |design·x - target|.

    Args:
        design: [observations, unknowns].
        target: [observations].
    """
    return nonnegative_minimum((design.T @ design).tolist(), (design.T @ target).tolist())


def nonnegative_minimum(squares: list[list[float]], products: list[float]) -> list[float]:
    """The x ≥ 0 that minimises x·squares·x / 2 - products·x, by active sets (Lawson and Hanson, 1974).

    In plain numbers: between passes its code is in no cache, and LAPACK takes milliseconds for five unknowns.

    Args:
        squares: [unknowns, unknowns], symmetric, with no negative eigenvalue.
        products: [unknowns].
    """
    unknowns = range(len(products))
    x = [0.0] * len(products)
    free: list[int] = []
    for _ in range(10 * len(products)):
        falls = {i: products[i] - sum(map(mul, squares[i], x)) for i in unknowns if i not in free}
        best = max(falls, key=falls.__getitem__, default=None)
        if best is None or falls[best] <= 1e-10:
            break
        free.append(best)
        while True:
            wanted = _solution([[squares[i][j] for j in free] for i in free], [products[i] for i in free])
            step = min(
                (x[i] / max(x[i] - w, 1e-300) for i, w in zip(free, wanted, strict=True) if w <= 0),
                default=1.0,
            )
            for i, w in zip(free, wanted, strict=True):
                x[i] += step * (w - x[i])
            free = [i for i in free if x[i] > 1e-15]
            x = [of if i in free else 0.0 for i, of in enumerate(x)]
            if step == 1.0:
                break
    return x


def _solution(squares: list[list[float]], products: list[float]) -> list[float]:
    """Of squares·x = products, by elimination; unknowns that earlier ones leave nothing for are 0."""
    num = len(products)
    rows = [[*row, product] for row, product in zip(squares, products, strict=True)]
    for i in range(num):
        is_left = rows[i][i] > 1e-13 * squares[i][i]
        for below in rows[i + 1 :]:
            share = below[i] / rows[i][i] if is_left else 0.0
            for j in range(i, num + 1):
                below[j] -= share * rows[i][j]
        if not is_left:
            rows[i] = [*(float(i == j) for j in range(num)), 0.0]
    x = [0.0] * num
    for i in reversed(range(num)):
        x[i] = (rows[i][num] - sum(map(mul, rows[i][i + 1 : num], x[i + 1 :]))) / rows[i][i]
    return x
