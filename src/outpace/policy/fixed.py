"""The same number of draft tokens for every sequence at every step, whatever it costs."""

from __future__ import annotations

from outpace.policy.base import BatchView, PolicyContext, SpeculationPolicy


class FixedPolicy(SpeculationPolicy):
    """Allows `num_speculative_tokens` nodes, or as many as can be of use."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def limits(self, view: BatchView) -> list[int]:
        """The fixed length, cut to what each sequence may still use."""
        return [min(self._num_tokens, s.max_draft) for s in view.sequences]


def create(context: PolicyContext) -> FixedPolicy:
    """Builds the policy from `num_speculative_tokens`."""
    return FixedPolicy(context.speculative.num_speculative_tokens)
