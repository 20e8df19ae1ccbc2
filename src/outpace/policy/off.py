"""No speculation, at any load."""

from __future__ import annotations

from outpace.config import SpeculativeConfig
from outpace.policy.base import BatchView, SpeculationPolicy


class OffPolicy(SpeculationPolicy):
    """Allows no draft token, ever."""

    def limits(self, view: BatchView) -> list[int]:
        """All zero."""
        return [0] * len(view.sequences)


def create(config: SpeculativeConfig) -> OffPolicy:
    """Builds the policy."""
    return OffPolicy()
