"""Several draft methods under the goodput policy: whom to ask for a draft, and whose to verify.

Each method has its own acceptance and its own cost of drafting. Methods that cost next to nothing are asked
for everyone, and the tree is taken whose nodes promise most beyond what their rows cost. A method that costs
is asked where that pays: for each subset of such methods every sequence goes to the one with the highest
expected tokens less what its draft costs at the going rate, if any is above what the free methods give; then
the argmax of expected tokens over predicted step time says how much each is asked for and what comes of the
subset; the best subset stands for some steps. What only the subset as a whole pays for, a pass over a draft
model's weights per depth, is in that step time.

The tokens of a step tell of every draft that was made, verified or not, what would have become of it. So
free methods never starve; the others are probed within the policy's credit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from outpace.policy.acceptance import AcceptanceEstimator
from outpace.policy.allocation import Choice, Extra, Slots
from outpace.policy.base import BatchView, Draft, MethodRecord, StepRecord
from outpace.policy.goodput import FREE, HOLD, HORIZON, NEARLY, PROBE_NODES
from outpace.policy.linear_cost import DraftCost, asked_of, varied

Floats = NDArray[np.float64]

_FIRST_DRAFTS = 16  # steps that draft, before a method's cost counts as known
_FLOOR = 1e-9  # rows of a node that hardly ever comes
_DEEPER_EVERY = 4  # steps, at one of which a node more is asked for, to see whether that pays now
_MOST_PROBES = 3  # that credit is saved for


@dataclass(frozen=True, slots=True)
class Market:
    """What a draft has to be worth in the step at hand.

    Attributes:
        plain_s: Seconds of the step without drafts.
        row_s: What one more row adds.
        weights: What a token of each sequence is worth.
        allocate: The argmax over slots of all sequences, given what drafting takes.
    """

    plain_s: float
    row_s: float
    weights: Sequence[float]
    allocate: Callable[[Slots, Callable[[Extra], Floats | float]], Choice]


class Method:
    """What is known of one draft method.

    Attributes:
        name: What it is called.
        acceptance: What its drafts are worth.
    """

    def __init__(self, name: str, max_tokens: int) -> None:
        """Knows nothing yet."""
        self.name, self.acceptance = name, AcceptanceEstimator(max_tokens)
        self._cost = DraftCost((0.0,) * 5)
        self._num_to_see = _FIRST_DRAFTS
        self._seen: dict[str, int] = {}  # context of each sequence when it last drafted

    @property
    def knows_cost(self) -> bool:
        """Whether drafting was seen often enough to tell its usual cost from that of catching up."""
        return self._num_to_see <= 0

    def to_see(self, limits: list[int]) -> list[int]:
        """Limits for a method that is free. Until its cost is known they vary, to tell its parts apart."""
        return limits if self.knows_cost else varied(limits, self._num_to_see)

    def behind(self, view: BatchView) -> list[int]:
        """Tokens of each sequence that it has not seen yet."""
        return [max(0, s.context_len - self._seen.get(s.id, 0)) for s in view.sequences]

    def seconds(self, sequences: Floats, nodes: Floats, depth: Floats, behind: Floats) -> Floats:
        """What drafting takes; catching up is spread over HORIZON steps."""
        return np.asarray(self._cost.seconds(sequences, nodes, depth, behind / HORIZON), np.float64)

    def own_s(self, nodes: Floats, behind: Floats) -> Floats:
        """What each sequence adds to what all share, likewise."""
        return np.asarray(self._cost.own_s(nodes, behind / HORIZON), np.float64)

    def limits_s(self, view: BatchView, limits: Sequence[int], horizon: float = HORIZON) -> float:
        """The same for given limits."""
        behind = sum(itertools.compress(self.behind(view), limits)) / horizon
        return float(self._cost.seconds(*asked_of(limits), behind))

    def observe(
        self, view: BatchView, ids: Sequence[str], record: MethodRecord, streams_s: float | None = 0.0
    ) -> None:
        """Learns from a step in which it drafted; `streams_s`: what its rows added to the pass, if known."""
        if streams_s is not None:
            behind = sum(itertools.compress(self.behind(view), record.limits))
            self._cost.observe(record.seconds + streams_s, *asked_of(record.limits), behind)
            self._num_to_see -= 1
        asked = itertools.compress(view.sequences, record.limits)
        self._seen.update((s.id, s.context_len) for s in asked)
        self.acceptance.observe(ids, record.limits, record.drafts, record.lengths, record.paths)

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence."""
        self.acceptance.release(sequence_id)
        self._seen.pop(sequence_id, None)


class Curves(NamedTuple):
    """Expected drafts of all sequences.

    Attributes:
        gain: [sequences, nodes], the expected tokens won by each node, weighted.
        rows: [sequences, nodes], the chance that there is such a node.
        lengths: [sequences], nodes that may be asked for.
    """

    gain: Floats
    rows: Floats
    lengths: NDArray[np.int64]

    def worth(self, row_tokens: float) -> tuple[Floats, NDArray[np.int64]]:
        """[sequences] each: the most tokens won beyond what rows cost, and the nodes that win them."""
        net = np.zeros((len(self.gain), self.gain.shape[1] + 1))
        np.cumsum(self.gain - row_tokens * self.rows, axis=1, out=net[:, 1:])
        nodes = net.argmax(axis=1)
        return net[np.arange(len(net)), nodes], nodes

    def where(self, is_own: NDArray[np.bool_], other: Curves) -> Curves:
        """The rows of this one where it says so, else the other's."""
        column = is_own[:, None]
        return Curves(
            np.where(column, self.gain, other.gain),
            np.where(column, self.rows, other.rows),
            np.where(is_own, self.lengths, other.lengths),
        )

    def else_of(self, other: Curves) -> Curves:
        """This draft where there is one, and where there is none the other."""
        absent = 1 - self.rows[:, :1]
        gain, rows = self.gain + absent * other.gain, self.rows + absent * other.rows
        return Curves(gain, rows, np.maximum(self.lengths, other.lengths))


class _Chosen(NamedTuple):
    """Whom to ask: by method that costs, the nodes per sequence; and the rate that this gives."""

    limits: dict[str, list[int]]
    rate: float


class Methods:
    """Chooses among draft methods, sequence by sequence; see the module's text.

    Attributes:
        asked: By method the nodes it is asked for in the step at hand, per sequence.
    """

    def __init__(self, names: Sequence[str], max_tokens: int) -> None:
        """Starts from what any method is expected to be.

        Args:
            names: The methods, in order of preference.
            max_tokens: Most nodes of a draft.
        """
        self._methods = {name: Method(name, max_tokens) for name in names}
        self._max_tokens = max_tokens
        self._turns = list(names)  # whose probe comes next
        self.asked: dict[str, list[int]] = {}
        self._picked: dict[str, Method] = {}  # by sequence, as is the next:
        self._view: BatchView | None = None
        self._chosen: _Chosen | None = None
        self._held_for: tuple[list[str], list[str], int] = [], [], 0  # free methods, sequences and rows
        self._num_held = 0
        self._probe: tuple[str, int] | None = None

    def ask(self, view: BatchView, most: list[int], market: Market) -> float:
        """Decides whom to ask.

        Returns:
            The expected tokens per second, weighted; 0 where every method is free.
        """
        self._view, self._probe = view, None
        allowed = {
            name: [k if s.method in ("", name) else 0 for k, s in zip(most, view.sequences, strict=True)]
            for name in self._methods
        }
        free = [
            name
            for name, method in self._methods.items()
            if not method.knows_cost or method.limits_s(view, allowed[name]) <= FREE * market.plain_s
        ]
        self.asked = {name: self._methods[name].to_see(allowed[name]) for name in free}
        if len(free) == len(self._methods) or not most:
            return 0.0
        chosen = self._held(view, allowed, free, market)
        for name, limits in chosen.limits.items():
            deeper = int(self._num_held % _DEEPER_EVERY == 0)
            asked = (limit + deeper if limit else 0 for limit in limits)
            self.asked[name] = [min(pair) for pair in zip(asked, allowed[name], strict=True)]
        return chosen.rate

    def probe(self, view: BatchView, most: list[int], credit_s: float) -> float:
        """Asks a method that costs for a short draft, if there is time to spare for it.

        Args:
            view: The step.
            most: Most nodes of each sequence.
            credit_s: The time to spare.

        Returns:
            What is left of that.
        """
        for name in self._turns:
            limits, method = self.asked.get(name, [0] * len(most)), self._methods[name]
            idle = [
                i
                for i, (s, m) in enumerate(zip(view.sequences, most, strict=True))
                if m and not limits[i] and s.method in ("", name)
            ]
            if idle:
                break
        else:
            return credit_s
        known = method.acceptance.num_verified([view.sequences[i].id for i in idle])
        index = idle[int(known.argmin())]
        limits = [*limits[:index], min(PROBE_NODES, most[index]), *limits[index + 1 :]]
        cost_s = method.limits_s(view, limits) - method.limits_s(view, self.asked.get(name, []))
        if credit_s < cost_s:
            return credit_s
        self.asked[name], self._probe = limits, (name, index)
        self._turns.remove(name)
        self._turns.append(name)
        return min(credit_s, _MOST_PROBES * cost_s) - cost_s  # quiet hours buy no burst

    def limits(self) -> list[int]:
        """The most nodes that any method is asked for, per sequence."""
        assert self._view is not None
        return [max(column) for column in zip(*self.asked.values(), strict=True)] or [0] * len(
            self._view.sequences
        )

    def asked_s(self, horizon: float) -> float:
        """What drafting takes; what methods have to catch up with is spread over so many steps."""
        assert self._view is not None
        return sum(self._methods[name].limits_s(self._view, x, horizon) for name, x in self.asked.items())

    def pick(self, ids: Sequence[str], drafts: Mapping[str, Sequence[Draft]], row_tokens: float) -> list[str]:
        """Whose tree to take, per sequence: that of the most tokens beyond what its rows cost.

        Args:
            ids: The sequences.
            drafts: By method a tree per sequence.
            row_tokens: Tokens that could be had in the time that a row takes.
        """
        best, names = [(-1.0, -1.0)] * len(ids), [next(iter(drafts))] * len(ids)
        for name, trees in drafts.items():
            some = [i for i, tree in enumerate(trees) if tree.parents]
            of_method = self._methods[name].acceptance
            survival = of_method.survival([ids[i] for i in some], [trees[i] for i in some])
            for i, row in zip(some, survival, strict=True):
                worth = sum(s - row_tokens for s in row if s > row_tokens), sum(row)
                if worth > best[i]:
                    best[i], names[i] = worth, name
        self._picked = {key: self._methods[name] for key, name in zip(ids, names, strict=True)}
        return names

    def survival(self, ids: Sequence[str], drafts: Sequence[Draft]) -> list[list[float]]:
        """For each draft that goes on the chance of each node to be on the accepted path."""
        rows: list[list[float]] = [[]] * len(ids)
        anyone = next(iter(self._methods.values()))  # a grammar also drafts what it forces where nobody did
        picked = [self._picked.get(key, anyone) for key in ids]
        for method in self._methods.values():
            mine = [i for i, of_one in enumerate(picked) if of_one is method]
            known = method.acceptance.survival([ids[i] for i in mine], [drafts[i] for i in mine])
            for i, row in zip(mine, known, strict=True):
                rows[i] = row
        return rows

    def observe(self, record: StepRecord, streams_s: float | None = 0.0) -> float:
        """Learns from a finished step.

        Args:
            record: The step.
            streams_s: Seconds by which rows that only draft made its pass longer; None if not known.

        Returns:
            Tokens that the step's probe would have won beyond what was accepted.
        """
        ids, won = [s.id for s in record.view.sequences], 0.0
        for of_method in record.methods:
            own_s = streams_s if of_method.has_streams else 0.0
            self._methods[of_method.name].observe(record.view, ids, of_method, own_s)
            if self._probe is not None and self._probe[0] == of_method.name:
                index = self._probe[1]
                won = max(0, len(of_method.paths[index]) - len(record.paths[index]))
        asked = [of_method.name for of_method in record.methods]
        for name in (name for name in self._methods if name not in asked):
            self._methods[name].acceptance.observe((), (), (), (), ())  # time goes by for it too
        return won

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence."""
        for method in self._methods.values():
            method.release(sequence_id)

    def _held(
        self, view: BatchView, allowed: Mapping[str, list[int]], free: list[str], market: Market
    ) -> _Chosen:
        """The choice, made anew every few steps: what it rests on changes slowly."""
        ids = [s.id for s in view.sequences]
        self._num_held += 1
        then_free, then_ids, num_rows = self._held_for
        is_same = (free, ids) == (then_free, then_ids)
        is_similar = is_same and abs(view.num_rows - num_rows) <= NEARLY * num_rows
        if self._chosen is None or self._num_held >= HOLD or not is_similar:
            self._chosen, self._num_held = self._choose(view, allowed, free, market), 0
            self._held_for = free, ids, view.num_rows
        return self._chosen

    def _choose(
        self, view: BatchView, allowed: Mapping[str, list[int]], free: list[str], market: Market
    ) -> _Chosen:
        """The best subset of the methods that cost."""
        ids, weights = [s.id for s in view.sequences], np.array(market.weights)
        curves = {name: self._curves(name, ids, allowed[name], weights) for name in self._methods}
        nothing = np.zeros((len(ids), self._max_tokens))
        base = Curves(nothing, nothing, np.zeros(len(ids), np.int64))
        costly = [name for name in self._methods if name not in free]
        for name in free:
            base = curves[name].where(curves[name].worth(0.0)[0] > base.worth(0.0)[0], base)
        best = _Chosen({}, 0.0)
        for size in range(len(costly) + 1):
            for names in itertools.combinations(costly, size):
                row_tokens = best.rate * market.row_s
                tried = self._try(view, names, curves, base, best.rate, row_tokens, market)
                if tried.rate > best.rate:
                    best = tried
        return best

    def _try(
        self,
        view: BatchView,
        names: Sequence[str],
        curves: Mapping[str, Curves],
        base: Curves,
        rate: float,
        row_tokens: float,
        market: Market,
    ) -> _Chosen:
        """What a subset of the methods that cost would give."""
        num_sequences = len(view.sequences)
        of = np.full(num_sequences, -1)  # the method of each sequence, -1: free ones only
        joint, (worth, _) = base, base.worth(row_tokens)
        behind = [np.array(self._methods[name].behind(view), np.float64) for name in names]
        for number, name in enumerate(names):
            mine = curves[name]
            both = base.else_of(mine)
            mine = both.where(both.worth(row_tokens)[0] > mine.worth(row_tokens)[0], mine)
            value, nodes = mine.worth(row_tokens)
            value -= rate * self._methods[name].own_s(nodes.astype(float), behind[number])
            is_better = value > worth
            of[is_better], worth = number, np.maximum(worth, value)
            joint = mine.where(is_better, joint)

        def draft_s(extra: Extra) -> Floats | float:
            total: Floats | float = 0.0
            for number, name in enumerate(names):
                total = total + self._methods[name].seconds(*_amounts(extra, of == number, behind[number]))
            return total

        lengths = joint.lengths.tolist()
        slots = Slots(
            [row[:n] for row, n in zip(joint.gain.tolist(), lengths, strict=True)],
            [row[:n] for row, n in zip(np.maximum(joint.rows, _FLOOR).tolist(), lengths, strict=True)],
            [s.context_len for s in view.sequences],
            [0.0] * num_sequences,
        )
        choice = market.allocate(slots, draft_s)
        limits = {
            name: [count if m == number else 0 for count, m in zip(choice.counts, of.tolist(), strict=True)]
            for number, name in enumerate(names)
        }
        return _Chosen(limits, choice.rate)

    def _curves(self, name: str, ids: Sequence[str], allowed: Sequence[int], weights: Floats) -> Curves:
        """What a method's drafts are expected to be."""
        present, survival = self._methods[name].acceptance.onward(ids)
        lengths = np.array(allowed)
        rows = present * (np.arange(self._max_tokens) < lengths[:, None])
        return Curves(weights[:, None] * rows * survival, rows, lengths)


def _amounts(extra: Extra, mine: NDArray[np.bool_], behind: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """Sequences, nodes, depth and tokens to catch up with of one method, per number of slots taken."""
    owners = np.array(extra.owners, np.int64)
    is_mine = mine[owners]
    is_first = is_mine & (extra.places == 0)
    columns = (is_first, is_mine, is_first * behind[owners])
    sequences, nodes, late = (np.concatenate([[0.0], np.cumsum(column)]) for column in columns)
    depth = np.concatenate([[0.0], np.maximum.accumulate(np.where(is_mine, extra.places + 1.0, 0.0))])
    return sequences, nodes, depth, late
