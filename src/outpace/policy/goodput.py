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
_CURVES_EVERY = 4  # steps, where everyone drafts and expectations decide nothing
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
        self._probe: int | None = None  # index of the sequence that verifies only to learn
        self._seen: dict[str, int] = {}  # context of each sequence when it last drafted
        self._num_steps = 0
        self._is_free = False  # whether everyone drafts, since it costs next to nothing
        self._step_s = 0.0  # expected duration of the step
        self._rate = 0.0  # and its tokens per second
        self._credit_s = 0.0  # time that probing may take

    def limits(self, view: BatchView) -> list[int]:
        """See SpeculationPolicy."""
        self._view, self._ids = view, [s.id for s in view.sequences]
        self._probe, self._num_steps = None, self._num_steps + 1
        most = np.minimum([s.max_draft for s in view.sequences], self._max_tokens).astype(np.int64)
        behind = self._behind(view)
        is_cheap = self._draft_s(most, behind / HORIZON) <= FREE * self._step_s
        self._is_free = is_cheap or not self.cost.knows_draft
        limits = most if self._is_free else self._worthwhile(view, most, behind / HORIZON)
        self._limits = limits.tolist()
        self.predicted_s = self._step_s = self._plain_s(view) + self._draft_s(limits, behind)
        return self._limits

    def trim(self, view: BatchView, drafts: Sequence[Draft]) -> list[int] | None:
        """See SpeculationPolicy."""
        self._forest = Forest.of(drafts if any(draft.parents for draft in drafts) else ())
        forest, limits = self._forest, np.array(self._limits)
        if not limits.any():
            return None
        survival = self.acceptance.survival(self._ids, forest)
        if not self._is_free or self._num_steps % _CURVES_EVERY == 0:
            self.acceptance.drafted(self._ids, self._limits, forest, survival)
        if not forest.present.size:
            return None
        contexts, behind = _contexts(view), self._behind(view)
        slots = Slots(survival, np.ones_like(survival), forest.present, contexts, np.zeros_like(contexts))
        usual_s = self._draft_s(limits, behind / HORIZON)
        choice = self._allocate(view, slots, lambda _: np.asarray(usual_s))
        self._rate = choice.rate
        self._verify_to_learn(view, choice.counts)
        self.predicted_s = choice.seconds - usual_s + self._draft_s(limits, behind)
        counts: list[int] = choice.counts.tolist()
        return counts

    def observe(self, record: StepRecord) -> None:
        """See SpeculationPolicy."""
        assert record.view is self._view, "a step is observed before the next one is planned"
        drafting = [s for s, limit in zip(record.view.sequences, record.limits, strict=True) if limit]
        behind = sum(max(0, s.context_len - self._seen.get(s.id, 0)) for s in drafting)
        self.cost.observe(record, behind)
        self._seen.update((s.id, s.context_len) for s in drafting)
        self._stakes.observe(record)
        self.acceptance.observe(self._ids, self._forest.cut(record.num_drafted), record.paths)
        self._credit_s += PROBE_SHARE * record.seconds["total"]
        if self._probe is not None and self._rate:  # what it won pays for the next one
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
        return np.array([max(0, s.context_len - seen.get(s.id, 0)) for s in view.sequences], np.float64)

    def _worthwhile(self, view: BatchView, most: Ints, behind: Floats) -> Ints:
        """Draft tokens to ask for, from what drafts are expected to be."""
        present, survival = self.acceptance.before(self._ids)
        usable = np.arange(self._max_tokens) < most[:, None]
        slots = Slots(present * survival, present, usable, _contexts(view), behind)
        choice = self._allocate(
            view, slots, lambda x: self.cost.draft_s(x.sequences, x.nodes, x.depth, x.behind)
        )
        self._rate = choice.rate
        # All the nodes there may be, where they cost next to nothing: `trim` cuts, seeing more.
        longer = np.where(choice.counts > 0, most, 0)
        more_s = self._draft_s(longer, behind) - self._draft_s(choice.counts, behind)
        limits = longer if more_s <= _CHEAP * choice.seconds else choice.counts
        self._draft_to_learn(view, limits, most, behind)
        return limits

    def _draft_to_learn(self, view: BatchView, limits: Ints, most: Ints, behind: Floats) -> None:
        """Lets the least known of those who do not draft do so, if there is time to spare for it."""
        idle = (limits == 0) & (most > 0)
        if self._credit_s <= 0 or not idle.any():
            return
        probe = int(np.argmin(np.where(idle, self.acceptance.num_verified(self._ids), np.inf)))
        draft_s = float(self.cost.draft_s(1, PROBE_NODES, PROBE_NODES, behind[probe]))
        if self._credit_s >= draft_s + self._probe_s(view, probe):
            self._credit_s -= draft_s
            limits[probe] = min(PROBE_NODES, most[probe])

    def _verify_to_learn(self, view: BatchView, counts: Ints) -> None:
        """The same for those who have a draft of which nothing is worth verifying."""
        idle = (counts == 0) & self._forest.present[:, 0]
        if self._credit_s <= 0 or not idle.any() or view.num_free_slots < counts.sum() + PROBE_NODES:
            return
        probe = int(np.argmin(np.where(idle, self.acceptance.num_verified(self._ids), np.inf)))
        cost_s = self._probe_s(view, probe)
        self._credit_s = min(self._credit_s, 3 * cost_s)  # quiet hours buy no burst
        if self._credit_s >= cost_s:
            self._credit_s -= cost_s
            self._probe, counts[probe] = probe, PROBE_NODES

    def _probe_s(self, view: BatchView, probe: int) -> float:
        """What the rows of a probe add to a step."""
        more, pairs = np.array([0, PROBE_NODES]), PROBE_NODES * view.sequences[probe].context_len
        rows, samples = view.num_rows + more, len(view.sequences) + more
        before, after = self.cost.target_s(rows, samples, 0, np.array([0, pairs]))
        return float(after - before)

    def _plain_s(self, view: BatchView) -> float:
        """Seconds of the step without drafts."""
        num_samples = len(view.sequences)
        target = self.cost.target_s(view.num_rows, num_samples, view.num_context, view.num_pairs)
        return float(target) + self.cost.host_s(view.num_scheduled)

    def _draft_s(self, limits: Ints, behind: Floats) -> float:
        asked = limits > 0
        num_asked, num_nodes = int(asked.sum()), int(limits.sum())
        return float(self.cost.draft_s(num_asked, num_nodes, int(limits.max(initial=0)), behind @ asked))


class DraftSeconds(Protocol):
    """Seconds of drafting for each amount of extra work."""

    def __call__(self, extra: Extra, /) -> Floats: ...


def _contexts(view: BatchView) -> Floats:
    return np.array([s.context_len for s in view.sequences], np.float64)


def create(context: PolicyContext) -> GoodputPolicy:
    """Builds the policy; measures the machine if it is not known."""
    return GoodputPolicy(context.speculative.num_speculative_tokens, context.cost_model(), Equal())
