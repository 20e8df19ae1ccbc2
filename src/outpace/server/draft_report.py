"""What an answer says of its drafts, in vLLM's shape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from outpace.request import DraftStep
from outpace.server.protocol import RequestMetrics, SpeculativeDecodingMetrics


@dataclass(frozen=True, slots=True)
class DraftReport:
    """How much is said.

    Attributes:
        num_spec_tokens: The server's `num_speculative_tokens`.
        is_detailed: Whether every step is listed.
    """

    num_spec_tokens: int
    is_detailed: bool

    def of(self, steps: Sequence[DraftStep]) -> RequestMetrics:
        """What became of an answer's drafts; without any the mean acceptance length is 1 and the rate 0."""
        drafted = [step.num_drafted for step in steps]
        accepted = [step.num_accepted for step in steps]
        counts = Counter(accepted)
        longest = max([self.num_spec_tokens, *accepted])  # a policy from outside may draft more
        summary = SpeculativeDecodingMetrics(
            mean_acceptance_length=1 + sum(accepted) / max(len(steps), 1),
            draft_acceptance_rate=sum(accepted) / max(sum(drafted), 1),
            acceptance_histogram=[counts[num_accepted] for num_accepted in range(longest + 1)],
            num_spec_steps=len(steps),
            num_accepted_draft_tokens=sum(accepted),
            num_draft_tokens=sum(drafted),
            num_spec_tokens=self.num_spec_tokens,
            per_step_accepted=accepted if self.is_detailed else None,
            per_step_drafted=drafted if self.is_detailed else None,
        )
        return RequestMetrics(speculative_decoding=summary)
