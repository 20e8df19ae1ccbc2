"""The length as a function of the batch size alone, from a table made in advance.

Su et al., "The Synergy of Speculative Decoding and Batching in Serving Large Language Models", 2023:
profile batch sizes in powers of two, keep the length with the least time per token for each, and look the
batch up (the entry at or below it). Their accepted length c·s^γ has about the constants they report; step
times come from the cost model. `num_speculative_tokens_per_batch_size` of --speculative-config, as vLLM has
it, declares the table instead.
"""

from __future__ import annotations

from bisect import bisect_right

from outpace.policy.base import BatchView, PolicyContext, SpeculationPolicy
from outpace.policy.cost import CostModel, Shape

SCALE, EXPONENT = 0.9, 0.55  # accepted drafts for s drafted: SCALE · s^EXPONENT
CONTEXT = 256  # cached tokens of a sequence in the profile


class BatchTablePolicy(SpeculationPolicy):
    """Looks the length up by the number of sequences that sample."""

    def __init__(self, table: dict[int, int]) -> None:
        """Takes the table.

        Args:
            table: Smallest batch size to length; ascending, the first key is 1.
        """
        self._sizes, self._lengths = list(table), list(table.values())

    def limits(self, view: BatchView) -> list[int]:
        """See SpeculationPolicy."""
        place = max(0, bisect_right(self._sizes, len(view.sequences)) - 1)
        return [min(self._lengths[place], s.max_draft) for s in view.sequences]


def profiled_table(cost: CostModel, max_batch: int, max_tokens: int) -> dict[int, int]:
    """The length with the least time per token for each batch size that is a power of two."""
    sizes = [2**e for e in range(max_batch.bit_length()) if 2**e <= max_batch]
    return {
        size: min(range(max_tokens + 1), key=lambda length: _seconds_per_token(cost, size, length))
        for size in sizes
    }


def _seconds_per_token(cost: CostModel, batch: int, length: int) -> float:
    rows = batch * (length + 1)
    seconds = cost.step_s(Shape(rows, rows, batch * CONTEXT, rows * CONTEXT), batch, [length] * batch)
    accepted = min(float(length), SCALE * length**EXPONENT) if length else 0.0
    return seconds / (batch * (1 + accepted))


def create(context: PolicyContext) -> BatchTablePolicy:
    """Builds the policy from the declared table, or else from a profile."""
    config = context.speculative
    declared = config.num_speculative_tokens_per_batch_size
    if declared:
        return BatchTablePolicy({first: length for first, _, length in declared})
    most = config.num_speculative_tokens
    return BatchTablePolicy(profiled_table(context.cost_model(), context.engine.max_num_seqs, most))
