"""Goodput with proportional fairness across clients: a token is worth 1/X, X what its client gets already.

Tran et al., "GoodSpeed", 2025: maximising Σ log X over clients by its gradient, step by step. A client is
the `user` of a request; requests without one share a client. X is a moving average of the client's tokens
per second.
"""

from __future__ import annotations

import math

import numpy as np

from outpace.policy.base import BatchView, PolicyContext, StepRecord
from outpace.policy.goodput import GoodputPolicy

HORIZON_S = 10.0  # over which a client's rate is averaged
_IDLE_S = 60.0  # after which a client that has no request is forgotten


class ProportionalFairness:
    """Weights 1/X, scaled to a mean of 1."""

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}  # tokens per second
        self._idle_s: dict[str, float] = {}

    def weights(self, view: BatchView) -> tuple[list[float] | None, float]:
        """See Stakes."""
        rates = np.array([self._rates.get(s.client, 0.0) for s in view.sequences])
        if not rates.any():
            return None, 0.0
        weights = 1 / np.maximum(rates, 0.01 * rates.max())  # a newcomer does not outweigh everyone
        return (weights / weights.mean()).tolist(), 0.0

    def observe(self, record: StepRecord) -> None:
        """See Stakes."""
        seconds = record.seconds["total"]
        tokens = dict.fromkeys(self._rates, 0.0)
        for sequence, accepted in zip(record.view.sequences, record.num_accepted, strict=True):
            tokens[sequence.client] = tokens.get(sequence.client, 0.0) + accepted + 1
        keep = math.exp(-seconds / HORIZON_S)
        for client, count in tokens.items():
            self._rates[client] = keep * self._rates.get(client, 0.0) + (1 - keep) * count / seconds
            self._idle_s[client] = 0.0 if count else self._idle_s[client] + seconds
            if self._idle_s[client] > _IDLE_S:
                del self._rates[client], self._idle_s[client]


def create(context: PolicyContext) -> GoodputPolicy:
    """Builds the policy; measures the machine if it is not known."""
    speculative = context.speculative
    most, methods = speculative.num_speculative_tokens, speculative.methods
    return GoodputPolicy(most, context.cost_model(), ProportionalFairness(), methods)
