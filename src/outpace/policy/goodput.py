"""The draft tokens that give the most accepted tokens per second, over all sequences and nodes.

Each step: n* = argmax E(n) / c(n), with E from the acceptance estimator and c from the cost model
(docs/policies.md). Twice: before drafting, with what drafts are expected to be and what making them costs;
and after, with the trees that came. SmartSpec (Liu et al., 2024) is the case of one length for the batch
and one acceptance rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, compress, repeat
from operator import mul
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from outpace.policy.acceptance import AcceptanceEstimator
from outpace.policy.allocation import Choice, Costs, Extra, Slots, allocate, take_all
from outpace.policy.base import BatchView, Draft, PolicyContext, SpeculationPolicy, StepRecord
from outpace.policy.cost import CostModel

if TYPE_CHECKING:
    from outpace.policy.methods import Methods

Floats = NDArray[np.float64]

PROBE_SHARE = 0.005  # of all time may be lost on drafts made only to learn
HORIZON = 32  # steps over which what a drafter has to catch up with is written off
PROBE_NODES = 2  # enough to see whether a draft comes and whether it fits
FREE = 0.01  # of a step: drafts that cost no more are made for everyone, and cut once they are seen
AHEAD = 2  # nodes beyond those lately worth verifying that drafts may have: more would be made to be cut
COSTS_EVERY = 8  # steps whose costs are learnt together
HOLD = 16  # steps for which a choice made before drafting stands while the batch is nearly the same
NEARLY = 0.1  # share of its sequences that may be new meanwhile, and by which its rows may differ
_CHEAP = 0.01  # of a step: for so little those who draft ask for all the nodes they may


class Stakes(Protocol):
    """What tokens are worth: the hook for targets and fairness."""

    def weights(self, view: BatchView) -> tuple[list[float] | None, float]:
        """The worth of a token per sequence, and tokens at stake for requests that do not sample yet.

        None: each is worth 1.
        """

    def observe(self, record: StepRecord) -> None:
        """Learns from a finished step."""


class Equal:
    """Every token counts 1; those who wait count nothing."""

    def weights(self, view: BatchView) -> tuple[list[float] | None, float]:
        """See Stakes."""
        return None, 0.0

    def observe(self, record: StepRecord) -> None:
        """See Stakes."""


class GoodputPolicy(SpeculationPolicy):
    """Maximises expected accepted tokens over predicted step time.

    Attributes:
        cost: What steps cost.
        acceptance: What drafts are worth, where there is one method to make them.
    """

    def __init__(
        self, max_tokens: int, cost: CostModel, stakes: Stakes, methods: tuple[str, ...] = ()
    ) -> None:
        """Starts from a profile and from the prior of acceptance.

        Args:
            max_tokens: Most draft tokens of a sequence in a step.
            cost: What steps cost; learns along.
            stakes: What tokens are worth.
            methods: The draft methods; of several it also chooses, see policy/methods.py.
        """
        self._max_tokens = max_tokens
        self._stakes = stakes
        self.cost, self.acceptance = cost, AcceptanceEstimator(max_tokens)
        self._view: BatchView | None = None  # of the step at hand, as are these:
        self._ids: list[str] = []
        self._contexts: list[int] = []
        self._behind: list[int] = []  # tokens computed since each last drafted, all of them if it never did
        self._limits: list[int] = []
        self._usual_s = self._drafting_s = 0.0  # of making its drafts: what is behind spread, and all at once
        self._drafts: Sequence[Draft] = ()
        self._probe: int | None = None  # index of the sequence that verifies only to learn
        self._choice: dict[str, int] = {}  # made before drafting, without probes
        self._held_rows = 0  # of the step that it was made for
        self._num_held = 0  # steps since then
        self._records: list[tuple[StepRecord, int]] = []  # to learn costs from, with what was caught up with
        self._seen: dict[str, int] = {}  # context of each sequence when it last drafted
        self._reach: dict[str, int] = {}  # nodes that each sequence is asked for at most
        self._rate = 0.0  # expected tokens per second
        self._credit_s = 0.0  # time that probing may take
        self._probe_s = 0.0  # and what the next probe needs of it
        self._asked: set[str] = set()  # sequences that were asked for a draft in the step before
        self._late: set[str] = set()  # those of them for the first time, and there was none
        self._chooses = False  # whether it says before drafting whom to ask
        self._methods: Methods | None = None
        if len(methods) > 1:
            from outpace.policy.methods import Methods  # not at the top: it imports this module

            self._methods = Methods(methods, max_tokens)

    def limits(self, view: BatchView) -> list[int]:
        """See SpeculationPolicy."""
        self._view, self._drafts, self._probe = view, (), None
        self._ids = [s.id for s in view.sequences]
        self._contexts = [s.context_len for s in view.sequences]
        seen = map(self._seen.get, self._ids, repeat(0))
        self._behind = [c - s if c > s else 0 for c, s in zip(self._contexts, seen, strict=False)]
        reach = map(self._reach.get, self._ids, repeat(self._max_tokens))
        most = [min(s.max_draft, nodes) for s, nodes in zip(view.sequences, reach, strict=False)]
        plain_s = self._plain_s(view)
        if self._methods is not None:
            self._limits = self._ask_several(self._methods, view, most, plain_s)
        elif self.cost.knows_draft:
            self._chooses = self._draft_s(most, HORIZON) > FREE * plain_s
            self._limits = self._worthwhile(view, most) if self._chooses else most
        else:
            self._limits = self.cost.to_see(most)
        self._usual_s = self._draft_s(self._limits, HORIZON)
        self._drafting_s = self._draft_s(self._limits)
        self.predicted_s = plain_s + self._drafting_s
        return self._limits

    def methods(self, view: BatchView) -> Mapping[str, list[int]] | None:
        """See SpeculationPolicy."""
        return None if self._methods is None else self._methods.asked

    def pick(self, view: BatchView, drafts: Mapping[str, Sequence[Draft]]) -> list[str] | None:
        """See SpeculationPolicy."""
        if self._methods is None or not drafts:
            return None
        return self._methods.pick(self._ids, drafts, self._rate * self._row_s(view))

    def trim(self, view: BatchView, drafts: Sequence[Draft]) -> list[int] | None:
        """See SpeculationPolicy."""
        self._drafts = drafts
        drafting = [i for i, draft in enumerate(drafts) if draft.parents]
        if not drafting:
            return None
        ids, trees = [self._ids[i] for i in drafting], [drafts[i] for i in drafting]
        survival = (self._methods or self.acceptance).survival(ids, trees)
        contexts = [self._contexts[i] for i in drafting]
        slots = Slots(survival, None, contexts, [0] * len(contexts))
        choice = self._allocate(view, drafting, slots)
        self._rate = choice.rate
        predicted_s = choice.seconds - self._usual_s + self._drafting_s
        counts = [0] * len(drafts)
        for i, count in zip(drafting, choice.counts, strict=True):
            counts[i] = count
        if (
            self._methods is None
        ):  # several know by themselves how far to draft, and learn without verification
            self._note_reach(drafting, choice.counts)
            predicted_s += self._verify_to_learn(view, counts, [i for i in drafting if not counts[i]])
        self.predicted_s = predicted_s
        return counts

    def _note_reach(self, drafting: list[int], counts: list[int]) -> None:
        """How far the next drafts of these sequences may reach: that falls by a node a step."""
        reach, cap = self._reach, self._max_tokens
        for i, count in zip(drafting, counts, strict=True):
            key = self._ids[i]
            reach[key] = min(cap, max(count + AHEAD, reach.get(key, cap) - 1))

    def prices(self, num_rows: int, more: Sequence[int]) -> list[float]:
        """See SpeculationPolicy."""
        assert self._view is not None, "a step has its limits before it has rows"
        samples = len(self._ids)
        rate = self._rate or samples / self._plain_s(self._view)
        before_s, *seconds = (self.cost.target_s(num_rows + num, samples, 0, 0) for num in (0, *more))
        return [rate * (s - before_s) for s in seconds]

    def observe(self, record: StepRecord) -> None:
        """See SpeculationPolicy."""
        assert record.view is self._view, "a step is observed before the next one is planned"
        limits = record.limits
        self._records.append((record, sum(compress(self._behind, limits))))
        if len(self._records) == COSTS_EVERY:
            self._learn_costs()
        self._seen.update(compress(zip(self._ids, self._contexts, strict=True), limits))
        self._stakes.observe(record)
        self._credit_s += PROBE_SHARE * record.seconds["total"]
        if self._methods is not None:
            won = self._methods.observe(record, self.cost.streams_s(record))
            self._credit_s += won / max(self._rate, 1.0)
            return
        counted = self._without_late(limits) if self._chooses else limits
        self.acceptance.observe(self._ids, counted, self._drafts, record.num_drafted, record.paths)
        if self._probe is not None and self._rate:  # what it won pays for the next one
            self._credit_s += len(record.paths[self._probe]) / self._rate

    def release(self, sequence_id: str) -> None:
        """See SpeculationPolicy."""
        self.acceptance.release(sequence_id)
        self._seen.pop(sequence_id, None)
        self._reach.pop(sequence_id, None)
        self._asked.discard(sequence_id)
        self._late.discard(sequence_id)
        if self._methods is not None:
            self._methods.release(sequence_id)

    def _without_late(self, limits: Sequence[int]) -> list[int]:
        """The limits that say something of how often drafts come.

        A method that drafts for the step after the one it is asked in has nothing yet for a sequence that it
        is asked for anew. That sequence is asked once more, or a probe would never see a draft.
        """
        asked = set(compress(self._ids, limits))
        self._late = {i for i, d in zip(self._ids, self._drafts, strict=True) if not d.parents}
        self._late &= asked - self._asked
        self._asked = asked
        return [0 if name in self._late else limit for name, limit in zip(self._ids, limits, strict=True)]

    def _learn_costs(self) -> None:
        """In one go: code and data that the model's pass has pushed out of the caches come back once."""
        for record, behind in self._records:
            self.cost.observe(record, behind)
        self._records.clear()

    def _worthwhile(self, view: BatchView, most: list[int]) -> list[int]:
        """Draft tokens to ask for, from what drafts are expected to be.

        That changes slowly, so a choice is held for a few steps; probes need not wait for the next one.
        """
        num_new = sum(name not in self._choice for name in self._ids)
        num_rows, self._num_held = self._held_rows, self._num_held + 1
        if (
            self._num_held >= HOLD
            or num_new > NEARLY * len(self._ids)
            or abs(view.num_rows - num_rows) > NEARLY * num_rows
        ):
            self._choice = dict(zip(self._ids, self._choose(view, most), strict=True))
            self._held_rows, self._num_held = view.num_rows, 0
            self._probe_s = 0.0
        limits = [min(self._choice.get(name, 0), m) for name, m in zip(self._ids, most, strict=True)]
        for i in [i for i, name in enumerate(self._ids) if name in self._late and not limits[i]]:
            limits[i] = min(PROBE_NODES, most[i])
            self._credit_s -= float(self.cost.draft_s(1, PROBE_NODES, PROBE_NODES))
        if self._credit_s >= self._probe_s:
            self._draft_to_learn(view, limits, [i for i, m in enumerate(most) if m and not limits[i]])
        return limits

    def _ask_several(self, methods: Methods, view: BatchView, most: list[int], plain_s: float) -> list[int]:
        """Whom to ask for how much, several methods being there; the most that any is asked for."""
        from outpace.policy.methods import Market

        weights, _ = self._stakes.weights(view)
        everyone = list(range(len(most)))
        market = Market(
            plain_s,
            self._row_s(view),
            weights or [1.0] * len(most),
            lambda slots, draft_s: self._allocate(view, everyone, slots, draft_s),
        )
        self._behind = [0] * len(most)  # each method keeps its own account
        self._rate = methods.ask(view, most, market) or self._rate
        self._credit_s = methods.probe(view, most, self._credit_s)
        return methods.limits()

    def _choose(self, view: BatchView, most: list[int]) -> list[int]:
        everyone = list(range(len(most)))
        present, survival = self.acceptance.before(self._ids)
        gain, rows = (present * survival).tolist(), present.tolist()
        slots = Slots(
            [row[:m] for row, m in zip(gain, most, strict=True)],
            [row[:m] for row, m in zip(rows, most, strict=True)],
            [s.context_len for s in view.sequences],
            [tokens / HORIZON for tokens in self._behind],
        )
        choice = self._allocate(
            view, everyone, slots, lambda x: self.cost.draft_s(x.sequences, x.nodes, x.depth, x.behind)
        )
        self._rate, counts = choice.rate, choice.counts
        # All the nodes there may be, where they cost next to nothing: `trim` cuts, seeing more.
        longer = [m if count else 0 for m, count in zip(most, counts, strict=True)]
        more_s = self._draft_s(longer, HORIZON) - self._draft_s(counts, HORIZON)
        return longer if more_s <= _CHEAP * choice.seconds else counts

    def _allocate(
        self,
        view: BatchView,
        drafting: list[int],
        slots: Slots,
        draft_s: Callable[[Extra], Floats | float] | None = None,
    ) -> Choice:
        """The argmax over the slots of some of the sequences; without `draft_s` of drafts that are made."""
        weights, waiting = self._stakes.weights(view)
        num_samples, cost = len(view.sequences), self.cost
        is_decoding = view.num_rows == num_samples
        context = view.num_context if is_decoding else sum(s.context_len for s in view.sequences)
        if weights is not None:
            gain = [[weights[i] * g for g in row] for i, row in zip(drafting, slots.gain, strict=True)]
            slots = slots._replace(gain=gain)
        base = (num_samples if weights is None else sum(weights)) + waiting
        if draft_s is None and is_decoding:
            everything = self._everything(view, slots, base)
            if everything is not None:
                return everything

        def seconds(extra: Extra, rows: int, scheduled: int, context: int, pairs: int) -> list[float]:
            host_s = cost.host_s(scheduled)
            if draft_s is None:
                all_pairs = accumulate(extra.contexts, initial=pairs)
                return cost.growing_s(rows, num_samples, context, all_pairs, self._usual_s + host_s)
            more = extra.rows
            target = cost.target_s(rows + more, num_samples + more, context, pairs + extra.pairs)
            total: list[float] = (target + (draft_s(extra) + host_s)).tolist()
            return total

        def decoding(extra: Extra) -> list[float]:
            return seconds(extra, num_samples, num_samples, context, context)

        def whole(extra: Extra) -> list[float]:
            return seconds(extra, view.num_rows, view.num_scheduled, view.num_context, view.num_pairs)

        costs = Costs(decoding, None if is_decoding else whole)
        return allocate(slots, base, costs, cost.per_pair_s, view.num_free_slots, self._rate)

    def _everything(self, view: BatchView, slots: Slots, base: float) -> Choice | None:
        """All of drafts that are made, if every node is worth its row wherever it stands; see `take_all`."""
        lengths = list(map(len, slots.gain))
        num_nodes, num_samples, cost = sum(lengths), len(view.sequences), self.cost
        if num_nodes > view.num_free_slots:
            return None
        rows, pairs = num_samples + num_nodes, view.num_context + sum(map(mul, lengths, slots.context))
        target_s = cost.target_s(rows, rows, view.num_context, pairs)
        seconds = target_s + (self._usual_s + cost.host_s(num_samples))
        return take_all(slots, base, seconds, cost.steepest_s(num_samples, num_nodes, max(slots.context)))

    def _draft_to_learn(self, view: BatchView, limits: list[int], idle: list[int]) -> None:
        """Lets the least known of those who do not draft do so, if there is time to spare for it."""
        if not idle:
            self._probe_s = math.inf
            return
        probe = self._least_known(idle)
        draft_s = float(self.cost.draft_s(1, PROBE_NODES, PROBE_NODES, self._behind[probe] / HORIZON))
        self._probe_s = draft_s + self._rows_s(view, view.sequences[probe].context_len)
        if self._credit_s >= self._probe_s:
            self._credit_s -= draft_s
            limits[probe] = min(PROBE_NODES, view.sequences[probe].max_draft)

    def _verify_to_learn(self, view: BatchView, counts: list[int], idle: list[int]) -> float:
        """The same for those who have a draft of which nothing is worth verifying; the seconds it takes."""
        if self._credit_s <= 0 or not idle or view.num_free_slots < sum(counts) + PROBE_NODES:
            return 0.0
        cost_s = self._rows_s(view, view.sequences[idle[0]].context_len, sum(counts))
        if cost_s:  # nothing where there is room in a bucket
            self._credit_s = min(self._credit_s, 3 * cost_s)  # quiet hours buy no burst
        if self._credit_s < cost_s:
            return 0.0
        self._credit_s -= cost_s
        self._probe = self._least_known(idle)
        counts[self._probe] = PROBE_NODES
        return cost_s

    def _least_known(self, idle: list[int]) -> int:
        return idle[int(np.argmin(self.acceptance.num_verified([self._ids[i] for i in idle])))]

    def _rows_s(self, view: BatchView, context_len: int, num_drafted: int = 0) -> float:
        """What the rows of a probe add to a step that has so many drafted ones."""
        rows, samples = view.num_rows + num_drafted, len(view.sequences) + num_drafted
        before = self.cost.target_s(rows, samples, 0, 0)
        after = self.cost.target_s(rows + PROBE_NODES, samples + PROBE_NODES, 0, PROBE_NODES * context_len)
        return float(after - before)

    def _row_s(self, view: BatchView) -> float:
        """What one more row adds to a step."""
        rows, samples = view.num_rows, len(view.sequences)
        return float(
            self.cost.target_s(rows + 1, samples + 1, 0, 0) - self.cost.target_s(rows, samples, 0, 0)
        )

    def _plain_s(self, view: BatchView) -> float:
        """Seconds of the step without drafts."""
        num_samples = len(view.sequences)
        target = self.cost.target_s(view.num_rows, num_samples, view.num_context, view.num_pairs)
        return float(target) + self.cost.host_s(view.num_scheduled)

    def _draft_s(self, limits: list[int], horizon: int = 1) -> float:
        """Seconds of drafting; what the drafter has to catch up with is spread over so many steps."""
        if self._methods is not None:
            return self._methods.asked_s(horizon)
        behind = sum(compress(self._behind, limits)) / horizon
        num_asked = len(limits) - limits.count(0)
        return float(self.cost.draft_s(num_asked, sum(limits), max(limits, default=0), behind))


def create(context: PolicyContext) -> GoodputPolicy:
    """Builds the policy; measures the machine if it is not known."""
    speculative = context.speculative
    return GoodputPolicy(
        speculative.num_speculative_tokens, context.cost_model(), Equal(), speculative.methods
    )
