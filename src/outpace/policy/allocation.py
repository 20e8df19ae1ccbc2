"""The choice at the heart of the goodput policy: which draft nodes to verify in a step.

    maximise  E(n) / c(n),   E(n) = base + the sum of the n best gains,   c(n) = seconds of the step with them

over all (sequence, node) slots, each sequence taking a prefix of its own. Where attention makes a row of a long
sequence dearer than one of a short sequence, slots are ranked by gain less what their context costs at the
going rate of tokens per second (Dinkelbach's method for ratios): rank, choose, and rank again at the new rate.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_MOST_ROUNDS = 4  # the rate converges in two or three


@dataclass(frozen=True, slots=True)
class Slots:
    """What may be drafted or verified.

    Attributes:
        gain: [sequences, nodes], expected tokens won by each node, weighted.
        rows: [sequences, nodes], expected rows paid for each node, above 0: 1 for nodes that exist, the chance
            that there is such a node before.
        usable: [sequences, nodes], False where a limit forbids the node; a prefix of each row.
        context: [sequences], cached tokens that each of its rows attends to.
    """

    gain: Floats
    rows: Floats
    usable: NDArray[np.bool_]
    context: Floats


@dataclass(frozen=True, slots=True)
class Extra:
    """Work that drafts add to a step, one entry per number of slots taken.

    Attributes:
        rows: Expected rows.
        pairs: Expected rows times their context.
        sequences: Sequences that draft.
        nodes: Nodes asked for.
        depth: The longest prefix.
    """

    rows: Floats
    pairs: Floats
    sequences: Ints
    nodes: Ints
    depth: Ints


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
    slots: Slots, base: float, seconds: Callable[[Extra], Floats], pair_s: float, max_rows: float
) -> Choice:
    """Chooses the prefixes with the highest rate.

    Args:
        slots: What there is to choose from.
        base: Expected tokens, weighted, without any draft.
        seconds: Duration of the step with each amount of extra work; non-decreasing.
        pair_s: Seconds per row and cached token.
        max_rows: Most rows that drafts may take.
    """
    num_sequences, width = slots.gain.shape
    per_row = np.minimum.accumulate(slots.gain / slots.rows, axis=1).ravel()
    context = np.repeat(slots.context, width)
    usable = np.flatnonzero(slots.usable)
    gain, rows = slots.gain.ravel(), slots.rows.ravel()
    best_order, best, seconds_of, rate = usable[:0], 0, 0.0, -1.0
    for _ in range(_MOST_ROUNDS):
        key = per_row[usable] - max(rate, 0.0) * pair_s * context[usable]
        order = usable[np.argsort(-key, kind="stable")]  # equal keys: a sequence's earlier nodes first
        extra = _accumulate(order, width, rows, context)
        expected = base + np.append(0.0, np.cumsum(gain[order]))
        duration = seconds(extra)
        rates = np.where(extra.rows <= max_rows, expected / duration, -1.0)
        chosen = int(np.argmax(rates))
        if rates[chosen] <= rate:
            break
        best_order, best, rate = order, chosen, float(rates[chosen])
        seconds_of = float(duration[chosen])
        if pair_s == 0.0 or chosen == 0:
            break
    counts = np.bincount(best_order[:best] // width, minlength=num_sequences) if width else None
    return Choice(np.zeros(num_sequences, np.int64) if counts is None else counts, rate, seconds_of)


def _accumulate(order: Ints, width: int, rows: Floats, context: Floats) -> Extra:
    """The work of the first 0, 1, 2, … slots of an order."""
    taken = rows[order]
    place = order % max(width, 1)

    def sums(values: NDArray[np.generic]) -> NDArray[np.generic]:
        return np.append(np.zeros(1, values.dtype), np.cumsum(values))

    return Extra(
        rows=np.asarray(sums(taken), np.float64),
        pairs=np.asarray(sums(taken * context[order]), np.float64),
        sequences=np.asarray(sums((place == 0).astype(np.int64)), np.int64),
        nodes=np.arange(len(order) + 1),
        depth=np.append(0, np.maximum.accumulate(place + 1)),
    )
