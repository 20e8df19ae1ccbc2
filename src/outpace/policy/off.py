"""No speculation, at any load."""

from __future__ import annotations

from outpace.policy.base import BatchView, PolicyContext, SpeculationPolicy


class OffPolicy(SpeculationPolicy):
    """Allows no draft token, ever."""

    def limits(self, view: BatchView) -> list[int]:
        """All zero."""
        return [0] * len(view.sequences)


def create(context: PolicyContext) -> OffPolicy:
    """Builds the policy."""
    return OffPolicy()
