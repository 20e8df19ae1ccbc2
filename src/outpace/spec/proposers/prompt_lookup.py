"""Prompt lookup (n-gram) drafts: what followed the latest tokens earlier in the same sequence.

Saxena, "Prompt Lookup Decoding", 2023. Where the longest match has several continuations on record, they
become a tree.
"""

from __future__ import annotations

from outpace.request import Sequence
from outpace.spec.proposer import DraftContext, Proposer
from outpace.spec.suffix_index import SuffixIndex
from outpace.tree import EMPTY_TREE, DraftTree


class PromptLookup(Proposer):
    """Keeps an index of each sequence's own tokens."""

    def __init__(self, min_match: int, max_match: int) -> None:
        """Sets which matches count.

        Args:
            min_match: Shortest match that gives a draft, in tokens.
            max_match: Longest match looked for.
        """
        self._min_match, self._max_match = min_match, max_match
        self._indexes: dict[str, SuffixIndex] = {}

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        """See Proposer."""
        return [
            self._draft(s, limit) if limit else EMPTY_TREE for s, limit in zip(sequences, limits, strict=True)
        ]

    def release(self, sequence_id: str) -> None:
        """See Proposer."""
        self._indexes.pop(sequence_id, None)

    def _draft(self, sequence: Sequence, limit: int) -> DraftTree:
        index = self._indexes.setdefault(sequence.id, SuffixIndex())
        index.extend(sequence.token_ids[len(index) :])
        length, places = index.matches(sequence.token_ids, self._max_match)
        if length < self._min_match:
            return EMPTY_TREE
        return index.tree(length, places, max_nodes=limit, max_depth=limit)


def create(context: DraftContext) -> PromptLookup:
    """Builds the proposer from `prompt_lookup_min` and `prompt_lookup_max`."""
    config = context.speculative
    return PromptLookup(config.prompt_lookup_min, config.prompt_lookup_max)
