"""Drafts by a decoder: chains of its own choices, for all sequences in one batch per depth."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch

from outpace.batch import Scheduled, Verdict
from outpace.device import Download
from outpace.kernels import Kernels
from outpace.models.draft_vocab import DraftVocab
from outpace.request import Sequence
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.runner import ModelRunner
from outpace.sampling import Chooser, SampleRow, target_logits
from outpace.tree import EMPTY_TREE, DraftTree


class _Node(NamedTuple):
    """A drafted token; `score` falls along every path and orders the tree."""

    parent: int
    token_id: int
    confidence: float
    score: float


@dataclass(slots=True, eq=False)
class _Growing:
    """The draft of one sequence: a chain, and beside each of its nodes the leaves that came next.

    Attributes:
        sequence: What is drafted for; the chain's tokens are appended to it.
        limit: Most nodes of the tree.
        nodes: Those so far.
        end: The chain's last node, or -1.
    """

    sequence: Sequence
    limit: int
    nodes: list[_Node] = field(default_factory=list)
    end: int = -1

    def add(self, candidates: list[tuple[int, float]]) -> None:
        """Adds children of the chain's end, the best first: the chain goes on from that one."""
        parent, score = self.end, self.nodes[self.end].score if self.nodes else 1.0
        self.end = len(self.nodes)
        # A candidate never scores more than those that were chosen before it.
        least = itertools.accumulate((confidence for _, confidence in candidates), min)
        self.nodes += [
            _Node(parent, token_id, confidence, score * share)
            for (token_id, confidence), share in zip(candidates, least, strict=True)
        ]
        self.sequence.token_ids.append(candidates[0][0])

    def has_room(self) -> bool:
        """Whether a child of the chain's end could be among the `limit` best nodes."""
        return sum(node.score >= self.nodes[self.end].score for node in self.nodes) < self.limit

    def tree(self) -> DraftTree:
        """The best nodes."""
        order = sorted(range(len(self.nodes)), key=lambda node: -self.nodes[node].score)
        rank = {node: place for place, node in enumerate(order)} | {-1: -1}
        best = [self.nodes[node] for node in order]
        tree = DraftTree(
            tuple(rank[node.parent] for node in best),
            tuple(node.token_id for node in best),
            tuple(node.confidence for node in best),
        )
        return tree.cut(self.limit)


@final
class Drafter:
    """Continues sequences with a decoder over a cache.

    A token is drafted as the target would choose it: from the same target distribution of this decoder's
    logits, with the same noise of seed and position. So a decoder equal to the target is always right, and
    sampled drafts lose little against the classical ratio rule (Leviathan et al. 2023).

    Attributes:
        kv: The cache that is written.
    """

    def __init__(
        self,
        runner: ModelRunner,
        kv: KVCache,
        branching: int,
        max_rows: int,
        vocab: DraftVocab | None = None,
    ) -> None:
        """Joins the parts.

        Args:
            runner: Who drafts.
            kv: Its cache.
            branching: Nodes at each depth: the chain's, and leaves beside it.
            max_rows: Most rows of a pass.
            vocab: The tokens that its logits are of; None where they are of all.
        """
        self.kv = kv
        self._runner = runner
        self._kernels = runner.decoder.kernels
        self._max_positions = runner.decoder.config.max_position_embeddings
        self._branching, self._max_rows, self._vocab = branching, max_rows, vocab

    def draft(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        """Computes what is known and not computed, then drafts a token of all sequences per pass.

        Where known tokens exceed the rows of a pass the shortest rest goes first; a sequence that is not
        at its end after it has an empty tree this time, as has one that finds no block.

        Args:
            sequences: Their cached beginning is in `kv`. Drafted tokens are appended to `token_ids`, and
                `num_computed` and `block_ids` follow; taking them back is the caller's.
            limits: Most nodes for each, at least 1.
        """
        drafts = [_Growing(*pair) for pair in zip(sequences, limits, strict=True)]
        active = [draft for draft in drafts if self._fits(draft.sequence)]
        while scheduled := self._schedule(active):
            active = [draft for draft, item in scheduled if item.samples]
            self._grow(active, [item for _, item in scheduled])
            active = [draft for draft in active if draft.has_room() and self._fits(draft.sequence)]
        return [draft.tree() if draft.nodes else EMPTY_TREE for draft in drafts]

    def _fits(self, sequence: Sequence) -> bool:
        """Whether the decoder has a position for each token."""
        return len(sequence.token_ids) <= self._max_positions

    def _schedule(self, drafts: list[_Growing]) -> list[tuple[_Growing, Scheduled]]:
        """Shares the rows of a pass out, and reserves their blocks."""
        scheduled: list[tuple[_Growing, Scheduled]] = []
        budget = self._max_rows
        for draft in sorted(drafts, key=lambda d: len(d.sequence.token_ids) - d.sequence.num_computed):
            sequence = draft.sequence
            num_missing = len(sequence.token_ids) - sequence.num_computed
            num_known = min(num_missing, budget)
            if num_known and self.kv.blocks.reserve(sequence, sequence.num_computed + num_known):
                scheduled.append((draft, Scheduled(sequence, num_known, num_known == num_missing)))
                budget -= num_known
        return scheduled

    @torch.inference_mode()
    def _grow(self, drafts: list[_Growing], scheduled: list[Scheduled]) -> None:
        """Runs a pass; adds the next nodes to the drafts that reach their end in it."""
        batch = self.kv.place(scheduled, [EMPTY_TREE] * len(drafts))
        logits = self._runner.forward(batch).logits
        self.kv.commit(batch, Verdict((None,) * len(scheduled)))
        if drafts:
            rows = [SampleRow(draft.sequence) for draft in drafts]
            found = likely_tokens(logits, rows, self._branching, self._kernels, self._vocab)
            for draft, candidates in zip(drafts, found, strict=True):
                draft.add(candidates)


def likely_tokens(
    logits: torch.Tensor,
    rows: Ordered[SampleRow],
    number: int,
    kernels: Kernels,
    vocab: DraftVocab | None = None,
) -> list[list[tuple[int, float]]]:
    """For each row the tokens whose places `best_places` gives, and their probabilities."""
    places, probs, vocab = best_places(logits, rows, number, kernels, vocab or DraftVocab(logits.shape[1]))
    found = Download(places), Download(probs)
    return [  # what the filters left out is chosen when nothing else remains
        [
            pair
            for rank, pair in enumerate(zip(vocab.names(of_row), chances, strict=True))
            if pair[1] or not rank
        ]
        for of_row, chances in zip(*(of.tolist() for of in found), strict=True)
    ]


def best_places(
    logits: torch.Tensor, rows: Ordered[SampleRow], number: int, kernels: Kernels, vocab: DraftVocab
) -> tuple[torch.Tensor, torch.Tensor, DraftVocab]:
    """For each row where the tokens are that would be chosen first, second and so on.

    Args:
        logits: [rows, tokens of `vocab`].
        rows: What each is for.
        number: Most tokens of a row.
        kernels: Who filters and chooses.
        vocab: Which tokens the logits are of.

    Returns:
        [rows, tokens] int64 and their probabilities, [rows, tokens] float32, on the device; and the
        vocabulary that these are places of, `vocab` or the target's.
    """
    if any(row.params.adjusts or not row.params.is_greedy for row in rows):
        # Penalties and noise go by token ids. Where there are none the best of the few is the best of all.
        logits, vocab = vocab.spread(logits), DraftVocab(vocab.target_size)
    wanted = target_logits(logits, rows, kernels=kernels)
    chooser = Chooser(rows, wanted.device, kernels=kernels)
    return *chooser.best(wanted, min(number, wanted.shape[1])), vocab
