"""Suffix drafts: what followed the latest tokens earlier in the request, or in recent answers of this server.

Oliaro et al., "SuffixDecoding", 2024 (Arctic Inference's `suffix` method). The longer the match, the longer
the draft. It wins where texts repeat: agents, code editing, templates.
"""

from __future__ import annotations

from outpace.request import Sequence
from outpace.spec.proposer import DraftContext, Proposer
from outpace.spec.suffix_index import SuffixIndex
from outpace.tree import EMPTY_TREE, DraftTree


class Suffix(Proposer):
    """An index per running sequence, and one of finished answers in two generations: memory is bounded."""

    def __init__(self, max_depth: int, max_answers: int, max_factor: float, min_prob: float) -> None:
        """Sets the limits.

        Args:
            max_depth: Longest match and longest draft, in tokens.
            max_answers: Finished answers kept, at least half of them always.
            max_factor: Longest draft per token of match.
            min_prob: Least probability of a drafted path.
        """
        self._max_depth, self._max_answers = max_depth, max_answers
        self._max_factor, self._min_prob = max_factor, min_prob
        self._own: dict[str, tuple[Sequence, SuffixIndex]] = {}
        self._recent, self._older = SuffixIndex(), SuffixIndex()
        self._num_recent = 0

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        """See Proposer."""
        return [
            self._draft(s, limit) if limit else EMPTY_TREE for s, limit in zip(sequences, limits, strict=True)
        ]

    def release(self, sequence_id: str) -> None:
        """Keeps the answer for those that come."""
        if sequence_id not in self._own:
            return
        sequence, _ = self._own.pop(sequence_id)
        self._recent.extend(sequence.token_ids[sequence.num_prompt :])
        self._recent.end_text()
        self._num_recent += 1
        if self._num_recent >= -(-self._max_answers // 2):
            self._older, self._recent, self._num_recent = self._recent, SuffixIndex(), 0

    def _draft(self, sequence: Sequence, limit: int) -> DraftTree:
        _, own = self._own.setdefault(sequence.id, (sequence, SuffixIndex()))
        own.extend(sequence.token_ids[len(own) :])
        indexes = (own, self._recent, self._older)
        found = [index.matches(sequence.token_ids, self._max_depth) for index in indexes]
        best = max(range(len(indexes)), key=lambda i: found[i][0])  # equal matches: the nearest text
        length, places = found[best]
        depth = min(self._max_depth, int(self._max_factor * length), limit)
        return indexes[best].tree(length, places, limit, depth, self._min_prob) if depth else EMPTY_TREE


def create(context: DraftContext) -> Suffix:
    """Builds the proposer from the `suffix_decoding_*` settings."""
    config = context.speculative
    return Suffix(
        config.suffix_decoding_max_tree_depth,
        config.suffix_decoding_max_cached_requests,
        config.suffix_decoding_max_spec_factor,
        config.suffix_decoding_min_token_prob,
    )
