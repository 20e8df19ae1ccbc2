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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MOST_ROUNDS = 4  # the rate converges in two or three
_CONVERGED = 0.01  # tokens by which a slot's rank may be off


class Slots(NamedTuple):
    """What may be drafted or verified. Lists, since most steps have a handful.

    Attributes:
        gain: For each sequence and each of its nodes the expected tokens won by it, weighted.
        rows: Likewise the expected rows paid for it, above 0: 1 where there is one, before that the chance
            that there will be.
        context: For each sequence the cached tokens that each of its rows attends to.
        behind: For each sequence the tokens that a drafter would have to catch up with first.
    """

    gain: Sequence[Sequence[float]]
    rows: Sequence[Sequence[float]]
    context: Sequence[float]
    behind: Sequence[float]

    def ranked(self, pair_s: float) -> list[tuple[int, int]]:
        """(sequence, node), best first, nodes of a sequence in their order.

        By gain per row less what a row's context costs, in tokens per row and cached token.
        """
        keyed = []
        for i, (gains, rows, context) in enumerate(zip(self.gain, self.rows, self.context, strict=True)):
            falling = accumulate((g / r for g, r in zip(gains, rows, strict=True)), min)
            keyed += [(pair_s * context - key, i, node) for node, key in enumerate(falling)]
        keyed.sort()
        return [(i, node) for _, i, node in keyed]


class Extra:
    """Work that drafts add to a step, one entry per number of slots taken; worked out where it is asked for.

    Attributes:
        order: The slots, best first.
        rows: Expected rows.
    """

    def __init__(self, slots: Slots, order: list[tuple[int, int]]) -> None:
        """Takes slots in an order."""
        self._slots, self.order = slots, order
        self._rows = [slots.rows[i][node] for i, node in order]
        self.rows = _sums(self._rows)

    @property
    def pairs(self) -> Floats:
        """Expected rows times their context."""
        context = self._slots.context
        return _sums([rows * context[i] for rows, (i, _) in zip(self._rows, self.order, strict=True)])

    @property
    def sequences(self) -> Floats:
        """Sequences that draft."""
        return _sums([node == 0 for _, node in self.order])

    @property
    def behind(self) -> Floats:
        """Tokens that these are behind."""
        return _sums([0.0 if node else self._slots.behind[i] for i, node in self.order])

    @property
    def nodes(self) -> Floats:
        """Nodes asked for."""
        return np.arange(len(self.order) + 1.0)

    @property
    def depth(self) -> Floats:
        """The longest prefix."""
        return np.array([0.0, *accumulate((node + 1.0 for _, node in self.order), max)])


@dataclass(frozen=True, slots=True)
class Costs:
    """Durations of the step with each amount of extra work; non-decreasing.

    Attributes:
        decoding: As if it held nothing but decoding sequences, one known row each.
        whole: With the prompts that it also computes; None without such.
    """

    decoding: Callable[[Extra], Floats]
    whole: Callable[[Extra], Floats] | None = None


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
        extra = Extra(slots, slots.ranked(rate * pair_s))
        expected = base + _sums([slots.gain[i][node] for i, node in extra.order])
        seconds = costs.decoding(extra)
        fits = bisect_right(extra.rows, max_rows)
        best = int((expected[:fits] / seconds[:fits]).argmax())
        guess, rate = rate, float(expected[best] / seconds[best])
        if abs(rate - guess) * spread_s <= _CONVERGED:
            break
    if costs.whole is not None:
        # prompts in the same step: their rows are paid anyway, a token is worth what it costs without them
        seconds = costs.whole(extra)
        best = int((expected[:fits] - rate * seconds[:fits]).argmax())
    counts = [0] * len(slots.gain)
    for i, _ in extra.order[:best]:
        counts[i] += 1
    return Choice(counts, rate, float(seconds[best]))


def _sums(values: Sequence[float]) -> Floats:
    """Sums of the first 0, 1, 2, … values."""
    return np.array([0.0, *accumulate(values)])
