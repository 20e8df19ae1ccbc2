"""Drafts by the target's own first layers, its final norm and its head: no more weights, no second cache.

Elhoushi et al., "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding", 2024. The first
layers compute for a token the same keys and values as in the target, so the draft reads the target's cache.

Where it does not pay: a model that was not trained for early exit (nearly all published ones) is rarely
right after a quarter of its layers, and each drafted token costs that share of a pass and a whole head. Small
models with large vocabularies spend much of a pass in the head alone.
"""

from __future__ import annotations

from outpace.config import flag
from outpace.errors import ConfigError
from outpace.request import Sequence
from outpace.spec.drafter import Drafter
from outpace.spec.proposer import DraftContext, Proposer
from outpace.tree import EMPTY_TREE, DraftTree


class SelfDraft(Proposer):
    """Keeps nothing between steps.

    Drafted rows need slots before the step places its own: they go to free blocks behind the sequence's,
    which come back before `propose` returns. The only other slot that is written is that of the last known
    token, with the bits that the target writes there in the same step.
    """

    def __init__(self, drafter: Drafter) -> None:
        """Takes the first layers.

        Args:
            drafter: They, over the target's cache.
        """
        self._drafter = drafter

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        """See Proposer. A sequence with more than one token to compute (a prompt's end) has no draft yet."""
        drafted = [
            limit > 0 and s.num_computed == len(s.token_ids) - 1
            for s, limit in zip(sequences, limits, strict=True)
        ]
        wanted = [(s, limit) for s, limit, has in zip(sequences, limits, drafted, strict=True) if has]
        copies = [
            Sequence(s.request, list(s.token_ids), s.num_computed, list(s.block_ids)) for s, _ in wanted
        ]
        trees = iter(self._drafter.draft(copies, [limit for _, limit in wanted]))
        for copy, (sequence, _) in zip(copies, wanted, strict=True):
            self._give_back(copy, sequence)
        return [next(trees) if has else EMPTY_TREE for has in drafted]

    def _give_back(self, copy: Sequence, sequence: Sequence) -> None:
        """Returns the blocks that a draft took behind those of its sequence."""
        del copy.token_ids[len(sequence.token_ids) :]
        copy.num_computed = sequence.num_computed
        self._drafter.kv.blocks.trim(copy)
        assert copy.block_ids == sequence.block_ids, f"{sequence.id} did not get its own blocks back"


def create(context: DraftContext) -> SelfDraft:
    """Builds the proposer from `num_draft_layers`.

    Raises:
        ConfigError: The target has no more layers than that.
    """
    settings, decoder = context.speculative, context.decoder
    most = decoder.config.num_layers
    num_layers = settings.num_draft_layers or max(1, most // 4)
    if num_layers >= most:
        raise ConfigError(
            f"num_draft_layers must be below the target's {most} layers, got {num_layers}: lower it or "
            f"choose another {flag('spec_method')}"
        )
    rows = context.config.max_num_batched_tokens
    runner = context.runner.beside(decoder.first_layers(num_layers), context.kv)
    return SelfDraft(Drafter(runner, context.kv, settings.draft_branching or 1, rows))
