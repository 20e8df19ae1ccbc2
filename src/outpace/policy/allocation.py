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
_CONVERGED = 0.01


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


@dataclass(frozen=True, slots=True)
class Extra:
    """Work that drafts add to a step, one entry per number of slots taken.

    Attributes:
        rows: Expected rows.
        pairs: Expected rows times their context.
        sequences: Sequences that draft.
        behind: Tokens that these are behind.
        nodes: Nodes asked for.
        depth: The longest prefix.
    """

    rows: Floats
    pairs: Floats
    sequences: Floats
    behind: Floats
    nodes: Floats
    depth: Floats


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
    for _ in range(_MOST_ROUNDS):
        ranked = _Ranked.by(rate, slots, pair_s)
        expected = base + ranked.gains
        rates = np.where(ranked.extra.rows <= max_rows, expected / costs.decoding(ranked.extra), -1.0)
        best = int(np.argmax(rates))
        guess, rate = rate, float(rates[best])
        if pair_s == 0.0 or abs(rate - guess) <= _CONVERGED * rate:
            break
    if costs.whole is None:
        seconds = float(expected[best]) / rate if rate else float(costs.decoding(ranked.extra)[best])
    else:  # prompts in the same step: their rows are paid anyway, a token is worth what it costs without them
        duration = costs.whole(ranked.extra)
        value = np.where(ranked.extra.rows <= max_rows, expected - rate * duration, -np.inf)
        best = int(np.argmax(value))
        seconds = float(duration[best])
    counts = np.bincount(ranked.order[:best] // max(slots.gain.shape[1], 1), minlength=len(slots.gain))
    return Choice(counts, rate, seconds)


@dataclass(frozen=True, slots=True)
class _Ranked:
    """Slots, best first.

    Attributes:
        order: Their flat indices.
        gains: Sum of the gains of the first 0, 1, 2, … of them.
        extra: And their work.
    """

    order: Ints
    gains: Floats
    extra: Extra

    @classmethod
    def by(cls, rate: float, slots: Slots, pair_s: float) -> _Ranked:
        """Ranks by gain per row less what a row's context costs at a rate of tokens per second."""
        width = slots.gain.shape[1]
        per_row = np.minimum.accumulate(slots.gain / slots.rows, axis=1)
        key = per_row - rate * pair_s * slots.context[:, None]
        usable = np.flatnonzero(slots.usable)
        # stable: with equal keys a sequence's earlier nodes come first
        order = usable[np.argsort(-key.ravel()[usable], kind="stable")]
        rows = slots.rows.ravel()[order]
        sequence, place = np.divmod(order, max(width, 1))
        extra = Extra(
            rows=_sums(rows),
            pairs=_sums(rows * slots.context[sequence]),
            sequences=_sums(place == 0),
            behind=_sums((place == 0) * slots.behind[sequence]),
            nodes=np.arange(len(order) + 1, dtype=np.float64),
            depth=np.maximum.accumulate(np.concatenate(([0.0], place + 1.0))),
        )
        return cls(order, _sums(slots.gain.ravel()[order]), extra)


def _sums(values: NDArray[np.generic]) -> Floats:
    """Sums of the first 0, 1, 2, … values."""
    sums = np.zeros(len(values) + 1)
    np.cumsum(values, out=sums[1:])
    return sums
