"""The draft tokens that give the most accepted tokens per second, over all sequences and nodes.

Each step: n* = argmax E(n) / c(n), with E from the acceptance estimator and c from the cost model
(docs/policies.md). Twice: before drafting, with what drafts are expected to be and what making them costs;
and after, with the trees that came. SmartSpec (Liu et al., 2024) is the case of one length for the batch
and one acceptance rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from outpace.policy.acceptance import AcceptanceEstimator, Forest
from outpace.policy.allocation import Choice, Costs, Extra, Slots, allocate
from outpace.policy.base import BatchView, Draft, PolicyContext, SpeculationPolicy, StepRecord
from outpace.policy.cost import CostModel

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

PROBE_SHARE = 0.005  # of all time may be lost on drafts made only to learn
HORIZON = 32  # steps over which what a drafter has to catch up with is written off
PROBE_NODES = 2  # enough to see whether a draft comes and whether it fits
FREE = 0.005  # of a step: drafts that cost no more are made for everyone, and cut once they are seen
_CHEAP = 0.01  # of a step: for so little those who draft ask for all the nodes they may


class Stakes(Protocol):
    """What tokens are worth: the hook for targets and fairness."""

    def weights(self, view: BatchView) -> tuple[Floats, float]:
        """The worth of a token per sequence, and tokens at stake for requests that do not sample yet."""

    def observe(self, record: StepRecord) -> None:
        """Learns from a finished step."""


class Equal:
    """Every token counts 1; those who wait count nothing."""

    def weights(self, view: BatchView) -> tuple[Floats, float]:
        """See Stakes."""
        return np.ones(len(view.sequences)), 0.0

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
        self._forest = Forest.of(())
        self._limits: list[int] = []
        self._probe: int | None = None  # index of the sequence that drafts only to learn
        self._seen: dict[str, int] = {}  # context of each sequence when it last drafted
        self._rate = 0.0  # expected tokens per second of the step
        self._credit_s = 0.0  # time that probing may take

    def limits(self, view: BatchView) -> list[int]:
        """See SpeculationPolicy."""
        sequences = view.sequences
        self._view, self._ids = view, [s.id for s in sequences]
        most = np.minimum([s.max_draft for s in sequences], self._max_tokens).astype(np.int64)
        present, survival = self.acceptance.before(self._ids)
        slots = Slots(
            gain=present * survival,
            rows=present,
            usable=np.arange(self._max_tokens) < most[:, None],
            context=_contexts(view),
            behind=self._behind(view) / HORIZON,
        )
        choice = self._allocate(
            view, slots, lambda x: self.cost.draft_s(x.sequences, x.nodes, x.depth, x.behind)
        )
        limits = self._generous(choice, most, slots.behind)
        self._rate = choice.rate
        idle = (choice.counts == 0) & (most > 0)
        self._probe = self._choose_probe(view, idle, int(limits.sum()), present[:, :PROBE_NODES].sum(axis=1))
        if self._probe is not None:
            limits[self._probe] = max(limits[self._probe], min(PROBE_NODES, most[self._probe]))
        self.predicted_s = choice.seconds
        self._limits = limits.tolist()
        if not any(self._limits):
            self._forest = Forest.of(())
        return self._limits

    def trim(self, view: BatchView, drafts: Sequence[Draft]) -> list[int] | None:
        """See SpeculationPolicy."""
        if not any(self._limits):
            return None
        self._forest = forest = Forest.of(drafts)
        survival = self.acceptance.survival(self._ids, forest)
        self.acceptance.drafted(self._ids, self._limits, forest, survival)
        contexts, limits, behind = _contexts(view), np.array(self._limits), self._behind(view)
        slots = Slots(survival, np.ones_like(survival), forest.present, contexts, np.zeros_like(contexts))
        usual_s = self._draft_s(limits, behind / HORIZON)
        choice = self._allocate(view, slots, lambda _: np.asarray(usual_s))
        self.predicted_s = choice.seconds - usual_s + self._draft_s(limits, behind)
        if self._probe is not None:
            choice.counts[self._probe] = max(choice.counts[self._probe], PROBE_NODES)
        counts: list[int] = choice.counts.tolist()
        return counts

    def observe(self, record: StepRecord) -> None:
        """See SpeculationPolicy."""
        behind = self._behind(record.view)[np.flatnonzero(record.limits)].sum()
        self.cost.observe(record, float(behind))
        self._stakes.observe(record)
        assert record.view is self._view, "a step is observed before the next one is planned"
        verified = self._forest.cut(record.num_drafted) if any(self._limits) else self._forest
        self.acceptance.observe(self._ids, verified, record.paths)
        self._credit_s += PROBE_SHARE * record.seconds["total"]
        for sequence, limit in zip(record.view.sequences, record.limits, strict=True):
            if limit:
                self._seen[sequence.id] = sequence.context_len
        if self._probe is not None:  # what it won pays for the next one
            self._credit_s += len(record.paths[self._probe]) / self._rate

    def release(self, sequence_id: str) -> None:
        """See SpeculationPolicy."""
        self.acceptance.release(sequence_id)
        self._seen.pop(sequence_id, None)

    def _allocate(self, view: BatchView, slots: Slots, draft_s: DraftSeconds) -> Choice:
        weights, waiting = self._stakes.weights(view)
        num_samples = len(view.sequences)
        context = float(slots.context.sum())

        def decoding(extra: Extra) -> Floats:
            rows = num_samples + extra.rows
            target = self.cost.target_s(rows, rows, context, context + extra.pairs)
            return np.asarray(target + draft_s(extra) + self.cost.host_s(num_samples))

        def whole(extra: Extra) -> Floats:
            rows, samples = view.num_rows + extra.rows, num_samples + extra.rows
            target = self.cost.target_s(rows, samples, view.num_context, view.num_pairs + extra.pairs)
            return np.asarray(target + draft_s(extra) + self.cost.host_s(view.num_scheduled))

        costs = Costs(decoding, whole if view.num_rows > num_samples else None)
        weighted = replace(slots, gain=weights[:, None] * slots.gain)
        base = float(weights.sum()) + waiting
        return allocate(weighted, base, costs, self.cost.per_pair_s, view.num_free_slots, self._rate)

    def _behind(self, view: BatchView) -> Floats:
        """[sequences]: tokens computed since each last drafted, all of them if it never did."""
        seen = self._seen
        behind = (s.context_len - seen.get(s.id, 0) for s in view.sequences)
        return np.maximum(0.0, np.fromiter(behind, np.float64, len(view.sequences)))

    def _generous(self, choice: Choice, most: Ints, behind: Floats) -> Ints:
        """Asks for more than was chosen where that costs next to nothing: `trim` cuts, seeing more."""
        if self._draft_s(most, behind) <= FREE * choice.seconds:
            return most
        longer = np.where(choice.counts > 0, most, 0)
        more_s = self._draft_s(longer, behind) - self._draft_s(choice.counts, behind)
        return longer if more_s <= _CHEAP * choice.seconds else choice.counts

    def _draft_s(self, limits: Ints, behind: Floats) -> float:
        depth, asked = int(limits.max(initial=0)), np.flatnonzero(limits)
        return float(self.cost.draft_s(len(asked), int(limits.sum()), depth, behind[asked].sum()))

    def _choose_probe(self, view: BatchView, idle: Bools, num_asked: int, rows: Floats) -> int | None:
        """The least known of those who verify nothing, if there is time to spare for it to do so.

        Args:
            view: The step.
            idle: [sequences], who could draft and will verify nothing.
            num_asked: Nodes that others may take.
            rows: [sequences], expected rows of a probe.
        """
        if self._credit_s <= 0 or not idle.any() or view.num_free_slots < num_asked + PROBE_NODES:
            return None
        probe = int(np.argmin(np.where(idle, self.acceptance.num_verified(self._ids), np.inf)))
        known, samples = view.num_rows + num_asked, len(view.sequences) + num_asked
        more = np.array([0.0, rows[probe]])
        pairs = view.num_pairs + more * view.sequences[probe].context_len
        before, after = self.cost.target_s(known + more, samples + more, view.num_context, pairs)
        cost_s = float(after - before) + float(self.cost.draft_s(1, PROBE_NODES, PROBE_NODES))
        self._credit_s = min(self._credit_s, 2 * cost_s)  # idle hours buy no burst
        if self._credit_s < cost_s:
            return None
        self._credit_s -= cost_s
        return probe


class DraftSeconds(Protocol):
    """Seconds of drafting for each amount of extra work."""

    def __call__(self, extra: Extra, /) -> Floats: ...


def _contexts(view: BatchView) -> Floats:
    return np.fromiter((s.context_len for s in view.sequences), np.float64, len(view.sequences))


def create(context: PolicyContext) -> GoodputPolicy:
    """Builds the policy; measures the machine if it is not known."""
    return GoodputPolicy(context.speculative.num_speculative_tokens, context.cost_model(), Equal())
