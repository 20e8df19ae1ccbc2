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

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_MOST_ROUNDS = 4  # the rate converges in two or three
_CONVERGED = 0.01  # tokens by which a slot's rank may be off


@dataclass(frozen=True, slots=True)
class Slots:
    """What may be drafted or verified.

    Attributes:
        gain: [sequences, nodes], expected tokens won by each node, weighted.
        rows: [sequences, nodes], expected rows paid for each node, above 0: 1 where there is one, before
            that the chance that there will be.
        usable: [sequences, nodes], False where a limit forbids the node; a prefix of each row.
        context: [sequences], cached tokens that each of its rows attends to.
        behind: [sequences], tokens that a drafter would have to catch up with first.
    """

    gain: Floats
    rows: Floats
    usable: NDArray[np.bool_]
    context: Floats
    behind: Floats


class Extra:
    """Work that drafts add to a step, one entry per number of slots taken; worked out where it is asked for.

    Attributes:
        order: Flat indices of the slots, best first.
        rows: Expected rows.
    """

    def __init__(self, slots: Slots, order: Ints) -> None:
        """Takes slots in an order."""
        self._slots, self.order = slots, order
        self._row = slots.rows.ravel()[order]
        self._sequence, self._place = np.divmod(order, max(slots.gain.shape[1], 1))
        self.rows = _sums(self._row)

    @property
    def pairs(self) -> Floats:
        """Expected rows times their context."""
        return _sums(self._row * self._slots.context[self._sequence])

    @property
    def sequences(self) -> Floats:
        """Sequences that draft."""
        return _sums(self._place == 0)

    @property
    def behind(self) -> Floats:
        """Tokens that these are behind."""
        return _sums((self._place == 0) * self._slots.behind[self._sequence])

    @property
    def nodes(self) -> Floats:
        """Nodes asked for."""
        return np.arange(len(self.order) + 1.0)

    @property
    def depth(self) -> Floats:
        """The longest prefix."""
        return np.maximum.accumulate(np.concatenate(([0.0], self._place + 1.0)))

    def counts(self, num_slots: int) -> Ints:
        """[sequences], what each takes of the first so many slots."""
        return np.bincount(self._sequence[:num_slots], minlength=len(self._slots.gain))


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
        counts: [sequences], nodes of each.
        rate: Expected (weighted) tokens per second.
        seconds: Expected duration of the step.
    """

    counts: Ints
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
    per_row = np.minimum.accumulate(slots.gain / slots.rows, axis=1)
    usable = np.flatnonzero(slots.usable)
    context_s = pair_s * (slots.context - slots.context.min(initial=np.inf))
    for _ in range(_MOST_ROUNDS):
        key = (per_row - rate * context_s[:, None]).ravel()[usable]
        # stable: with equal keys a sequence's earlier nodes come first
        extra = Extra(slots, usable[np.argsort(-key, kind="stable")])
        expected = base + _sums(slots.gain.ravel()[extra.order])
        seconds = costs.decoding(extra)
        fits = int(np.searchsorted(extra.rows, max_rows, side="right"))
        best = int(np.argmax(expected[:fits] / seconds[:fits]))
        guess, rate = rate, float(expected[best] / seconds[best])
        if abs(rate - guess) * context_s.max(initial=0.0) <= _CONVERGED:
            break
    if costs.whole is not None:
        # prompts in the same step: their rows are paid anyway, a token is worth what it costs without them
        seconds = costs.whole(extra)
        best = int(np.argmax(expected[:fits] - rate * seconds[:fits]))
    return Choice(extra.counts(best), rate, float(seconds[best]))


def _sums(values: NDArray[np.generic]) -> Floats:
    """Sums of the first 0, 1, 2, … values."""
    sums = np.zeros(len(values) + 1)
    np.add.accumulate(values, out=sums[1:])
    return sums
