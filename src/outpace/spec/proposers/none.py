"""No drafts: plain decoding."""

from __future__ import annotations

from outpace.request import Sequence
from outpace.spec.proposer import DraftContext, Proposer
from outpace.tree import EMPTY_TREE, DraftTree


class NoProposer(Proposer):
    """Proposes empty trees."""

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        """One empty tree per sequence."""
        return [EMPTY_TREE] * len(sequences)


def create(context: DraftContext) -> NoProposer:
    """Builds the proposer."""
    return NoProposer()
