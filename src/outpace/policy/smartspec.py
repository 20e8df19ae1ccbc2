"""SmartSpec as published: one acceptance rate, geometric accepted length, the batch's best length by goodput.

Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput", 2024, with
the constants of the authors' implementation. Every `INTERVAL` steps

    k* = argmax over k of  B·(1 - α^(k+1)) / (1 - α)  /  T(B, k),   T = a·context + g·tokens + d

with α a moving average over all requests. The scan stops at the first fall, and k = 0 has a bonus of 10 %.
For lookup methods, whose drafts are nearly free and often missing, the longest draft is proposed first; the
length to verify is then chosen by the same rule at every step, in which only the requests that have a draft
count for more than one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from outpace.policy.base import BatchView, Draft, PolicyContext, SpeculationPolicy, StepRecord
from outpace.policy.cost import CostModel, Shape
from outpace.policy.linear_cost import nonnegative_least_squares

INTERVAL = 20  # steps between decisions
FIRST_RATE = 0.7  # before anything is observed
WEIGHT = 0.15  # of the newest observation
NO_DRAFT_BONUS = 1.1  # speculation must win by this factor
MOST_MATCHED = 32  # lookup: sequences up to which drafts are proposed
LOOKUP_METHODS = ("prompt_lookup", "suffix")


class SmartSpecPolicy(SpeculationPolicy):
    """One length for the whole batch."""

    def __init__(self, max_tokens: int, cost: CostModel, proposes_first: bool) -> None:
        """Fits the latency regression to a profile, once.

        Args:
            max_tokens: Longest draft.
            cost: The profile.
            proposes_first: The lookup variant: propose the longest draft, then choose what to verify.
        """
        self._max_tokens, self._cost, self._proposes_first = max_tokens, cost, proposes_first
        self._per_context, self._per_token, self._fixed = latency_regression(cost)
        self._rate = FIRST_RATE
        self._length = max_tokens
        self._num_steps = 0

    def limits(self, view: BatchView) -> list[int]:
        """See SpeculationPolicy."""
        if self._proposes_first:
            allowed = self._max_tokens if len(view.sequences) <= MOST_MATCHED else 0
        else:
            if self._num_steps % INTERVAL == 0:
                self._length = self._best(view, len(view.sequences))
            allowed = self._length
        return [min(allowed, s.max_draft) for s in view.sequences]

    def trim(self, view: BatchView, drafts: Sequence[Draft]) -> list[int] | None:
        """See SpeculationPolicy."""
        if not self._proposes_first:
            return None
        length = self._best(view, sum(1 for draft in drafts if draft.parents))
        return [min(length, len(draft.parents)) for draft in drafts]

    def observe(self, record: StepRecord) -> None:
        """See SpeculationPolicy."""
        self._num_steps += 1
        self._cost.observe(record)
        if drafted := sum(record.num_drafted):
            self._rate += WEIGHT * (sum(record.num_accepted) / drafted - self._rate)

    def _best(self, view: BatchView, num_drafting: int) -> int:
        best, best_goodput = 0, 0.0
        num_plain = len(view.sequences) - num_drafting
        for length in range(self._max_tokens + 1):
            seconds = self._seconds(view, num_drafting, length)
            goodput = (num_drafting * accepted_length(self._rate, length) + num_plain) / seconds
            if length == 0:
                goodput *= NO_DRAFT_BONUS
            if goodput < best_goodput:
                break  # it has one maximum
            if goodput > best_goodput:
                best, best_goodput = length, goodput
                self.predicted_s = seconds
        return best

    def _seconds(self, view: BatchView, num_drafting: int, length: int) -> float:
        rows = len(view.sequences) + num_drafting * length  # prompts in the step are not looked at
        num_asked = num_drafting if length else 0
        draft_s = 0.0 if self._proposes_first else self._cost.draft_s(num_asked, num_asked * length, length)
        return self._per_context * view.num_context + self._per_token * rows + self._fixed + float(draft_s)


def accepted_length(rate: float, length: int) -> float:
    """Expected tokens of a step with so long a draft, the target's own included: Σ rate^i, i = 0 … length."""
    return length + 1.0 if rate >= 1.0 else (1 - math.pow(rate, length + 1)) / (1 - rate)


def latency_regression(cost: CostModel) -> tuple[float, float, float]:
    """The published linear model of a step: seconds per cached token, per batched token, and fixed.

    Least squares of the relative error over batch sizes, lengths and contexts such as the paper profiles.
    """
    points = [
        (batch * context, batch * (length + 1), batch)
        for batch in (1, 2, 4, 8, 16, 32, 64)
        for length in (0, 1, 3, 5, 7)
        for context in (128, 512, 1024)
    ]
    shapes = [Shape(rows, rows, context, context * rows / batch) for context, rows, batch in points]
    design = np.array([[context, rows, 1.0] for context, rows, _ in points])
    seconds = np.array([cost.step_s(s, batch) for s, (_, _, batch) in zip(shapes, points, strict=True)])
    relative = design / seconds[:, None]
    per_context, per_token, fixed = nonnegative_least_squares(relative, np.ones(len(points)))
    return per_context, per_token, fixed


def create(context: PolicyContext) -> SmartSpecPolicy:
    """Builds the policy; measures the machine if it is not known."""
    config = context.speculative
    return SmartSpecPolicy(
        config.num_speculative_tokens, context.cost_model(), config.method in LOOKUP_METHODS
    )
