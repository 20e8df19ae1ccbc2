"""The choice at the heart of the goodput policy: which draft nodes to verify in a step.

    maximise  E(n) / c(n),   E(n) = base + the sum of the n best gains,   c(n) = seconds of the step with them

over all (sequence, node) slots, each sequence taking a prefix of its own. Where attention makes a row of a
long sequence dearer than one of a short sequence, slots are ranked by gain less what their context costs at
the going rate of tokens per second (Dinkelbach's method for ratios): rank, choose, and rank again at the
new rate.

Where a step also computes prompts, the ratio is that of the step without them, λ, and n maximises E(n) -
λ·c(n) with them. Their rows are paid in any case; counted into the ratio they would make tokens look dear,
and the next steps, which can have the same tokens without waiting for a prompt, would be robbed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, repeat
from operator import truediv
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
T = TypeVar("T")

_MOST_ROUNDS = 4  # the rate converges in two or three
_CONVERGED = 0.01  # tokens by which a slot's rank may be off


class Slots(NamedTuple):
    """What may be drafted or verified. Lists: after a pass of the model numpy comes back to cold caches.

    Attributes:
        gain: For each sequence and each of its nodes the expected tokens won by it, weighted.
        rows: Likewise the expected rows paid for it, above 0: before a draft is there the chance that it
            will be. None: one for each node.
        context: For each sequence the cached tokens that each of its rows attends to.
        behind: For each sequence the tokens that a drafter would have to catch up with first.
    """

    gain: Sequence[Sequence[float]]
    rows: Sequence[Sequence[float]] | None
    context: Sequence[float]
    behind: Sequence[float]

    def keys(self, pair_s: float) -> list[float]:
        """What slots are ranked by, the sequences' one after another: never rising within a sequence.

        Gain per row less what a row's context costs, in tokens per row and cached token.
        """
        gain: Sequence[Sequence[float]] = self.gain
        if self.rows is not None:
            gain = [list(map(truediv, *pair)) for pair in zip(gain, self.rows, strict=True)]
        costs = [pair_s * context for context in self.context]
        return [key - cost for row, cost in zip(gain, costs, strict=True) for key in accumulate(row, min)]


class Extra:
    """Work that drafts add to a step, one entry per number of slots taken; worked out where it is asked for.

    Attributes:
        owners: The slots' sequences, best slot first.
        gains: What each slot wins, in the same order.
    """

    def __init__(self, slots: Slots, pair_s: float) -> None:
        """Ranks slots; see `Slots.keys`. Those of a sequence stay in their order."""
        self._slots = slots
        self._lengths = list(map(len, slots.gain))
        keys = slots.keys(pair_s)
        self._order = sorted(range(len(keys)), key=keys.__getitem__, reverse=True)
        self.owners = self._ranked(map(repeat, range(len(self._lengths)), self._lengths))
        self.gains = self._ranked(slots.gain)

    @cached_property
    def places(self) -> Ints:
        """The place of each slot among those of its sequence, best slot first."""
        return np.array(self._ranked(map(range, self._lengths)), np.int64)

    @property
    def contexts(self) -> list[float]:
        """The context of each slot, best slot first."""
        return list(map(self._slots.context.__getitem__, self.owners))

    @cached_property
    def rows(self) -> Floats:
        """Expected rows."""
        return _sums(self._rows)

    @property
    def pairs(self) -> Floats:
        """Expected rows times their context."""
        return _sums(self._rows * np.array(self.contexts))

    @property
    def sequences(self) -> Floats:
        """Sequences that draft."""
        return _sums(self.places == 0)

    @property
    def behind(self) -> Floats:
        """Tokens that these are behind."""
        return _sums(np.array(self._slots.behind, np.float64)[self.owners] * (self.places == 0))

    @property
    def nodes(self) -> Floats:
        """Nodes asked for."""
        return np.arange(len(self._order) + 1.0)

    @property
    def depth(self) -> Floats:
        """The longest prefix."""
        return np.maximum.accumulate(np.concatenate(([0.0], self.places + 1.0)))

    def num_within(self, max_rows: float) -> int:
        """Entries that take no more rows than that."""
        if self._slots.rows is None:
            return min(len(self._order), int(max_rows)) + 1
        return bisect_right(self.rows, max_rows)

    @cached_property
    def _rows(self) -> Floats:
        rows = self._slots.rows
        return np.ones(len(self._order)) if rows is None else np.array(self._ranked(rows), np.float64)

    def _ranked(self, values: Iterable[Iterable[T]]) -> list[T]:
        """Values by sequence and node, best slot first."""
        return list(map(list(chain.from_iterable(values)).__getitem__, self._order))


@dataclass(frozen=True, slots=True)
class Costs:
    """Durations of the step with each amount of extra work; non-decreasing.

    Attributes:
        decoding: As if it held nothing but decoding sequences, one known row each.
        whole: With the prompts that it also computes; None without such.
    """

    decoding: Callable[[Extra], Iterable[float]]
    whole: Callable[[Extra], Iterable[float]] | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """What to take.

    Attributes:
        counts: Nodes of each sequence.
        rate: Expected (weighted) tokens per second.
        seconds: Expected duration of the step.
    """

    counts: list[int]
    rate: float
    seconds: float


def allocate(
    slots: Slots, base: float, costs: Costs, pair_s: float, max_rows: float, rate: float = 0.0
) -> Choice:
    """Chooses the prefixes with the highest rate.

    Args:
        slots: What there is to choose from.
        base: Expected tokens, weighted, without any draft.
        costs: What each amount of extra work costs.
        pair_s: Seconds per row and cached token.
        max_rows: Most rows that drafts may take.
        rate: A guess of the rate, to rank by at first: that of the step before.
    """
    spread_s = pair_s * (max(slots.context, default=0.0) - min(slots.context, default=0.0))
    for _ in range(_MOST_ROUNDS):
        extra = Extra(slots, rate * pair_s)
        expected = list(accumulate(extra.gains, initial=base))[: extra.num_within(max_rows)]
        seconds = list(costs.decoding(extra))
        rates = list(map(truediv, expected, seconds))
        guess, rate = rate, max(rates)
        best = rates.index(rate)
        if abs(rate - guess) * spread_s <= _CONVERGED:
            break
    if costs.whole is not None:
        # prompts in the same step: their rows are paid anyway, a token is worth what it costs without them
        seconds = list(costs.whole(extra))
        profits = [tokens - rate * spent for tokens, spent in zip(expected, seconds, strict=False)]
        best = profits.index(max(profits))
    counts = [0] * len(slots.gain)
    for i in extra.owners[:best]:
        counts[i] += 1
    return Choice(counts, float(rate), float(seconds[best]))


def take_all(slots: Slots, base: float, seconds: float, steepest_s: float) -> Choice | None:
    """Everything, where even the least gain is worth the dearest row: no need to rank then.

    With λ = E(N)/c(N), no n is better if E(N) - E(n) ≥ λ·(c(N) - c(n)), and so it is if every slot wins at
    least λ times what any row costs.

    Args:
        slots: What there is to choose from, one row each, at least one.
        base: Expected tokens, weighted, without any draft.
        seconds: Of the step with all of them.
        steepest_s: The most that any of their rows costs.
    """
    rate = (base + sum(map(sum, slots.gain))) / seconds
    if min(map(min, slots.gain)) < rate * steepest_s:
        return None
    return Choice(list(map(len, slots.gain)), rate, seconds)


def _sums(values: NDArray[Any]) -> Floats:
    """Sums of the first 0, 1, 2, … values."""
    return np.concatenate(([0.0], np.cumsum(values)))
