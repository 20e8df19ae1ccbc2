"""The draft tokens that give the most accepted tokens per second, over all sequences and nodes.

Each step: n* = argmax E(n) / c(n), with E from the acceptance estimator and c from the cost model
(docs/policies.md). Twice: before drafting, with what drafts are expected to be and what making them costs;
and after, with the trees that came. SmartSpec (Liu et al., 2024) is the case of one length for the batch
and one acceptance rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import compress
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from outpace.policy.acceptance import AcceptanceEstimator
from outpace.policy.allocation import Choice, Costs, Extra, Slots, allocate
from outpace.policy.base import BatchView, Draft, PolicyContext, SpeculationPolicy, StepRecord
from outpace.policy.cost import CostModel

Floats = NDArray[np.float64]

PROBE_SHARE = 0.005  # of all time may be lost on drafts made only to learn
HORIZON = 32  # steps over which what a drafter has to catch up with is written off
PROBE_NODES = 2  # enough to see whether a draft comes and whether it fits
FREE = 0.005  # of a step: drafts that cost no more are made for everyone, and cut once they are seen
COSTS_EVERY = 4  # steps whose costs are learnt together
HOLD = 16  # steps for which a choice made before drafting stands while the sequences are the same
NEARLY = 0.1  # by which the rows of prompts in the step may differ meanwhile
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
        acceptance: What drafts are worth.
    """

    def __init__(self, max_tokens: int, cost: CostModel, stakes: Stakes) -> None:
        """Starts from a profile and from the prior of acceptance.

        Args:
            max_tokens: Most draft tokens of a sequence in a step.
            cost: What steps cost; learns along.
            stakes: What tokens are worth.
        """
        self._max_tokens = max_tokens
        self._stakes = stakes
        self.cost, self.acceptance = cost, AcceptanceEstimator(max_tokens)
        self._view: BatchView | None = None  # of the step at hand, as are these:
        self._ids: list[str] = []
        self._behind: list[int] = []  # tokens computed since each last drafted, all of them if it never did
        self._limits: list[int] = []
        self._drafts: Sequence[Draft] = ()
        self._probe: int | None = None  # index of the sequence that verifies only to learn
        self._choice: list[int] = []  # made before drafting, without probes
        self._held_for: tuple[list[str], int] = ([], 0)  # the sequences and the rows that it was made for
        self._num_held = 0  # steps since then
        self._records: list[tuple[StepRecord, int]] = []  # to learn costs from, with what was caught up with
        self._seen: dict[str, int] = {}  # context of each sequence when it last drafted
        self._rate = 0.0  # expected tokens per second
        self._credit_s = 0.0  # time that probing may take
        self._probe_s = 0.0  # and what the next probe needs of it
        self._asked: set[str] = set()  # sequences that were asked for a draft in the step before
        self._late: set[str] = set()  # those of them for the first time, and there was none

    def limits(self, view: BatchView) -> list[int]:
        """See SpeculationPolicy."""
        self._view, self._drafts, self._probe = view, (), None
        self._ids = [s.id for s in view.sequences]
        seen = self._seen.get
        self._behind = [max(0, s.context_len - seen(s.id, 0)) for s in view.sequences]
        most = [min(s.max_draft, self._max_tokens) for s in view.sequences]
        plain_s = self._plain_s(view)
        if not self.cost.knows_draft or self._draft_s(most, HORIZON) <= FREE * plain_s:
            self._limits = most
        else:
            self._limits = self._worthwhile(view, most)
        self.predicted_s = plain_s + self._draft_s(self._limits)
        return self._limits

    def trim(self, view: BatchView, drafts: Sequence[Draft]) -> list[int] | None:
        """See SpeculationPolicy."""
        self._drafts = drafts
        drafting = [i for i, draft in enumerate(drafts) if draft.parents]
        if not drafting:
            return None
        ids, trees = [self._ids[i] for i in drafting], [drafts[i] for i in drafting]
        survival = self.acceptance.survival(ids, trees)
        contexts = [view.sequences[i].context_len for i in drafting]
        slots = Slots(survival, [[1.0] * len(row) for row in survival], contexts, [0] * len(contexts))
        usual_s = self._draft_s(self._limits, HORIZON)
        choice = self._allocate(view, drafting, slots, lambda _: usual_s)
        self._rate = choice.rate
        self.predicted_s = choice.seconds - usual_s + self._draft_s(self._limits)
        counts = [0] * len(drafts)
        for i, count in zip(drafting, choice.counts, strict=True):
            counts[i] = count
        self._verify_to_learn(view, counts, [i for i in drafting if not counts[i]])
        return counts

    def price(self, num_rows: int, num_more: float) -> float:
        """See SpeculationPolicy."""
        assert self._view is not None, "a step has its limits before it has rows"
        samples = len(self._ids)
        rate = self._rate or samples / self._plain_s(self._view)
        before, after = self.cost.target_s(np.array([num_rows, num_rows + num_more]), samples, 0, 0)
        return rate * float(after - before)

    def observe(self, record: StepRecord) -> None:
        """See SpeculationPolicy."""
        assert record.view is self._view, "a step is observed before the next one is planned"
        limits = record.limits
        self._records.append((record, sum(compress(self._behind, limits))))
        if len(self._records) == COSTS_EVERY:
            self._learn_costs()
        self._seen.update((s.id, s.context_len) for s in compress(record.view.sequences, limits))
        self._stakes.observe(record)
        counted = self._without_late(limits)
        self.acceptance.observe(self._ids, counted, self._drafts, record.num_drafted, record.paths)
        self._credit_s += PROBE_SHARE * record.seconds["total"]
        if self._probe is not None and self._rate:  # what it won pays for the next one
            self._credit_s += len(record.paths[self._probe]) / self._rate

    def release(self, sequence_id: str) -> None:
        """See SpeculationPolicy."""
        self.acceptance.release(sequence_id)
        self._seen.pop(sequence_id, None)
        self._asked.discard(sequence_id)
        self._late.discard(sequence_id)

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
        ids, num_rows = self._held_for
        self._num_held += 1
        if self._num_held >= HOLD or self._ids != ids or abs(view.num_rows - num_rows) > NEARLY * num_rows:
            self._choice, self._num_held = self._choose(view, most), 0
            self._held_for = self._ids, view.num_rows
            self._probe_s = 0.0
        limits = [min(pair) for pair in zip(self._choice, most, strict=True)]
        for i in [i for i, name in enumerate(self._ids) if name in self._late and not limits[i]]:
            limits[i] = min(PROBE_NODES, most[i])
            self._credit_s -= float(self.cost.draft_s(1, PROBE_NODES, PROBE_NODES))
        if self._credit_s >= self._probe_s:
            self._draft_to_learn(view, limits, [i for i, m in enumerate(most) if m and not limits[i]])
        return limits

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
        self, view: BatchView, drafting: list[int], slots: Slots, draft_s: Callable[[Extra], Floats | float]
    ) -> Choice:
        """The argmax over the slots of some of the sequences."""
        weights, waiting = self._stakes.weights(view)
        num_samples, cost = len(view.sequences), self.cost
        is_decoding = view.num_rows == num_samples
        context = view.num_context if is_decoding else sum(s.context_len for s in view.sequences)

        def decoding(extra: Extra) -> Floats:
            rows = num_samples + extra.rows
            target = cost.target_s(rows, rows, context, context + extra.pairs)
            return np.asarray(target + (draft_s(extra) + cost.host_s(num_samples)))

        def whole(extra: Extra) -> Floats:
            rows, samples = view.num_rows + extra.rows, num_samples + extra.rows
            target = cost.target_s(rows, samples, view.num_context, view.num_pairs + extra.pairs)
            return np.asarray(target + (draft_s(extra) + cost.host_s(view.num_scheduled)))

        if weights is not None:
            gain = [[weights[i] * g for g in row] for i, row in zip(drafting, slots.gain, strict=True)]
            slots = slots._replace(gain=gain)
        base = (num_samples if weights is None else sum(weights)) + waiting
        costs = Costs(decoding, None if is_decoding else whole)
        return allocate(slots, base, costs, cost.per_pair_s, view.num_free_slots, self._rate)

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

    def _verify_to_learn(self, view: BatchView, counts: list[int], idle: list[int]) -> None:
        """The same for those who have a draft of which nothing is worth verifying."""
        if self._credit_s <= 0 or not idle or view.num_free_slots < sum(counts) + PROBE_NODES:
            return
        cost_s = self._rows_s(view, view.sequences[idle[0]].context_len)
        self._credit_s = min(self._credit_s, 3 * cost_s)  # quiet hours buy no burst
        if self._credit_s >= cost_s:
            self._credit_s -= cost_s
            self._probe = self._least_known(idle)
            counts[self._probe] = PROBE_NODES

    def _least_known(self, idle: list[int]) -> int:
        return idle[int(np.argmin(self.acceptance.num_verified([self._ids[i] for i in idle])))]

    def _rows_s(self, view: BatchView, context_len: int) -> float:
        """What the rows of a probe add to a step."""
        rows, samples = view.num_rows, len(view.sequences)
        before = self.cost.target_s(rows, samples, 0, 0)
        after = self.cost.target_s(rows + PROBE_NODES, samples + PROBE_NODES, 0, PROBE_NODES * context_len)
        return float(after - before)

    def _plain_s(self, view: BatchView) -> float:
        """Seconds of the step without drafts."""
        num_samples = len(view.sequences)
        target = self.cost.target_s(view.num_rows, num_samples, view.num_context, view.num_pairs)
        return float(target) + self.cost.host_s(view.num_scheduled)

    def _draft_s(self, limits: list[int], horizon: int = 1) -> float:
        """Seconds of drafting; what the drafter has to catch up with is spread over so many steps."""
        behind = sum(compress(self._behind, limits)) / horizon
        num_asked = len(limits) - limits.count(0)
        return float(self.cost.draft_s(num_asked, sum(limits), max(limits, default=0), behind))


def create(context: PolicyContext) -> GoodputPolicy:
    """Builds the policy; measures the machine if it is not known."""
    return GoodputPolicy(context.speculative.num_speculative_tokens, context.cost_model(), Equal())
