"""Goodput that counts requests: tokens are worth more where a latency target hangs on them.

DistServe's goodput (Zhong et al., 2024) is the rate of requests that meet a target for the time to the
first token and one for the time per later token. Two weights bring that into the argmax:

- A sequence at pace ρ (its time per token over the target) weighs min(ρ, 1/ρ), at least LEAST: most on the
  brink, less when it is ahead and has time to spare, less when it is too late.
  A sequence without a target weighs LEAST where others have one.
- Every request that waits for its first token and can still have it in time counts as a token at stake:
  E(n) grows by their number whatever is drafted, so time costs more and steps are kept short while prompts
  queue.

Targets are the server's, or a request's own.
"""

from __future__ import annotations

import math

import numpy as np

from outpace.policy.base import BatchView, PolicyContext, StepRecord
from outpace.policy.goodput import GoodputPolicy

LEAST = 0.1  # weight of a token on which no target hangs: it still counts


class Targets:
    """Weights from latency targets; see the module's text."""

    def __init__(self, ttft_s: float | None, tpot_s: float | None) -> None:
        """Sets the targets of requests that have none of their own.

        Args:
            ttft_s: Time to the first token, or None for no such target.
            tpot_s: Time per token after it, likewise.
        """
        self._ttft_s, self._tpot_s = ttft_s, tpot_s

    def weights(self, view: BatchView) -> tuple[list[float] | None, float]:
        """See Stakes."""
        weights = None
        targets = [self._tpot_s if s.tpot_s is None else s.tpot_s for s in view.sequences]
        if any(targets):
            tpot_s = np.array([target or math.inf for target in targets])
            tokens = np.array([max(s.num_output - 1, 1) for s in view.sequences])
            pace = np.array([s.decode_s for s in view.sequences]) / tokens / tpot_s
            is_early = np.array([s.num_output <= 1 for s in view.sequences])  # too early to tell its pace
            pace = np.where(is_early & np.isfinite(tpot_s), 1.0, pace)
            weights = np.clip(np.minimum(pace, 1 / np.maximum(pace, LEAST)), LEAST, 1.0).tolist()
        return weights, self._num_waiting_in_time(view)

    def observe(self, record: StepRecord) -> None:
        """See Stakes."""

    def _num_waiting_in_time(self, view: BatchView) -> float:
        """Requests that can still meet the first target.

        Those without one of their own are counted as if they had arrived at a steady rate.
        """
        in_time = float(sum(wait.wait_s <= wait.ttft_s for wait in view.own_targets))
        num_others = view.num_waiting - len(view.own_targets)
        if self._ttft_s is None or not num_others:
            return in_time
        return in_time + num_others * min(1.0, self._ttft_s / max(view.oldest_wait_s, 1e-9))


def create(context: PolicyContext) -> GoodputPolicy:
    """Builds the policy; measures the machine if it is not known."""
    targets = context.engine.slo_ttft_ms, context.engine.slo_tpot_ms
    ttft_s, tpot_s = (None if ms is None else ms / 1e3 for ms in targets)
    speculative = context.speculative
    most, methods = speculative.num_speculative_tokens, speculative.methods
    return GoodputPolicy(most, context.cost_model(), Targets(ttft_s, tpot_s), methods)
