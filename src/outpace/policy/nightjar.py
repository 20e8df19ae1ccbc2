"""A bandit per batch size with a price on switching speculation on.

Li et al., "Nightjar: Dynamic Adaptive Speculative Decoding for Large Language Models Serving", 2025. The
arms are the lengths 0 … max; the loss of a step is its seconds per token; its batch size is the only
context. For each batch size time is divided in blocks of doubling length and these in bins, during which
the arm is kept; a bin explores with probability 1/b, b the number of bins so far, and else takes

    argmin over k of  mean loss(B, k) + [k > 0 and the last step had none] · C / k

C, the price of rebuilding what a drafter missed while speculation was off, is learnt as the excess of the
first step after a switch over the mean of its arm.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from outpace.policy.base import BatchView, PolicyContext, SpeculationPolicy, StepRecord

_SWITCH_WEIGHT = 0.2  # of the newest measurement of C


@dataclass(slots=True)
class _Bandit:
    """One batch size.

    Attributes:
        totals: Seconds and tokens of each arm in this block.
        block_left, bin_left: Steps until they end.
        num_blocks, num_bins: How many have begun.
        arm: The present choice.
    """

    num_arms: int
    totals: list[list[float]] = field(default_factory=list)
    block_left: int = 0
    bin_left: int = 0
    num_blocks: int = 0
    num_bins: int = 0
    arm: int = 0

    def loss(self, arm: int) -> float | None:
        """Mean seconds per token; None where the arm was not tried."""
        seconds, tokens = self.totals[arm]
        return seconds / tokens if tokens else None


class NightjarPolicy(SpeculationPolicy):
    """One length for the whole batch. The random choices come from a fixed seed."""

    def __init__(self, max_tokens: int) -> None:
        """Starts without knowledge.

        Args:
            max_tokens: Longest draft.
        """
        self._max_tokens = max_tokens
        self._bandits: dict[int, _Bandit] = {}
        self._random = random.Random(0)
        self._last_arm = 0
        self._switch_s = 0.0

    def limits(self, view: BatchView) -> list[int]:
        """See SpeculationPolicy."""
        size = len(view.sequences)
        if not size:
            return []
        bandit = self._bandits.setdefault(size, _Bandit(self._max_tokens + 1))
        if bandit.bin_left == 0:
            self._begin_bin(bandit)
        return [min(bandit.arm, s.max_draft) for s in view.sequences]

    def observe(self, record: StepRecord) -> None:
        """See SpeculationPolicy."""
        size = len(record.view.sequences)
        if not size:
            return
        bandit = self._bandits[size]
        bandit.bin_left -= 1
        bandit.block_left -= 1
        arm, seconds = bandit.arm, record.seconds["total"]
        if arm and not self._last_arm and (usual := bandit.loss(arm)) is not None:
            excess = max(0.0, seconds - usual * record.num_tokens)
            self._switch_s += _SWITCH_WEIGHT * (excess - self._switch_s)
        else:
            bandit.totals[arm][0] += seconds
            bandit.totals[arm][1] += record.num_tokens
        self._last_arm = arm

    def _begin_bin(self, bandit: _Bandit) -> None:
        if bandit.block_left <= 0:  # statistics start anew
            bandit.num_blocks += 1
            bandit.block_left = 2 ** (bandit.num_blocks - 1) * bandit.num_arms
            bandit.totals = [[0.0, 0.0] for _ in range(bandit.num_arms)]
            bandit.num_bins = 0
        bandit.num_bins += 1
        bandit.bin_left = max(1, min(bandit.block_left, int(bandit.block_left**0.5)))
        if self._random.random() < 1 / bandit.num_bins:
            bandit.arm = self._random.randrange(bandit.num_arms)
        else:
            bandit.arm = min(range(bandit.num_arms), key=lambda arm: self._price(bandit, arm))

    def _price(self, bandit: _Bandit, arm: int) -> float:
        loss = bandit.loss(arm)
        if loss is None:
            return float("inf")
        return loss + (self._switch_s / arm if arm and not self._last_arm else 0.0)


def create(context: PolicyContext) -> NightjarPolicy:
    """Builds the policy."""
    return NightjarPolicy(context.speculative.num_speculative_tokens)
