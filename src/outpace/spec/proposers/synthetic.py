"""Drafts for benchmarks: they cost nothing to make, and synthetic verification accepts them by chance.

The engine then does all the work of speculation (rows, cache, policy) at acceptance rates of one's choice, as
vLLM does with `rejection_sample_method: synthetic`. Under another rule hardly any of them is accepted.
"""

from __future__ import annotations

import itertools

from outpace.config import SpeculativeConfig
from outpace.request import Sequence
from outpace.spec.proposer import Proposer
from outpace.tree import DraftTree


class Synthetic(Proposer):
    """Repeats the answer's latest tokens: these are tokens that the request allows and that do not end it."""

    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        """See Proposer; always as long as allowed, once there is an answer to repeat."""
        return [_repeat(s, limit) for s, limit in zip(sequences, limits, strict=True)]


def _repeat(sequence: Sequence, num_tokens: int) -> DraftTree:
    latest = sequence.token_ids[max(sequence.num_prompt, len(sequence.token_ids) - num_tokens) :]
    return DraftTree.chain(tuple(itertools.islice(itertools.cycle(latest), num_tokens)))


def create(config: SpeculativeConfig) -> Synthetic:
    """Builds the proposer."""
    return Synthetic()
