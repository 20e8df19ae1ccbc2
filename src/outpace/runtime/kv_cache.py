"""Keys and values in paged blocks: a slot for each row before the pass, the accepted ones kept after it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from outpace.batch import Batch, BatchEntry, Scheduled, Verdict
from outpace.config import BLOCK_SIZE
from outpace.device import CPU, tensor_of
from outpace.kernels import Kernels, Moves, Rows, move_slots, new_cache
from outpace.models.config import ModelConfig
from outpace.request import Sequence
from outpace.runtime.block_manager import BlockManager
from outpace.tree import EMPTY_TREE, DraftTree

if TYPE_CHECKING:
    from outpace.models.decoder import Decoder


class KVCache:
    """The cache tensors of one model and the blocks they are divided in.

    Attributes:
        blocks: Who owns which block.
        keys: As `new_cache` has them: those of a slot are at [:, block, :, :, offset].
        values: Likewise: at [:, block, :, offset // group, :, offset % group].
        layers: Per layer its keys and values.
        null_block: The last one, which nobody owns: rows that pad a pass are written there.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        dtype: torch.dtype,
        enable_prefix_caching: bool,
        device: torch.device = CPU,
        kernels: Kernels | None = None,
    ) -> None:
        """Makes an empty one.

        Args:
            config: The model's shape.
            num_blocks: Of `BLOCK_SIZE` tokens each.
            dtype: The model's.
            enable_prefix_caching: Whether blocks are found again by what is in them.
            device: Where.
            kernels: Who is to use it; None is kernels that want nothing of it.
        """
        self.blocks = BlockManager(num_blocks, enable_prefix_caching)
        self.null_block = num_blocks
        shape = (config.num_layers, num_blocks + 1, config.num_kv_heads)
        group = 1 if kernels is None else kernels.cache_group
        self.keys, self.values = new_cache(shape, config.head_dim, dtype, device, group)
        self._kernels = kernels
        self.layers = list(zip(self.keys.unbind(0), self.values.unbind(0), strict=True))

    @classmethod
    def of(cls, decoder: Decoder, num_blocks: int, enable_prefix_caching: bool) -> Self:
        """An empty one for a decoder."""
        config, kernels = decoder.config, decoder.kernels
        return cls(config, num_blocks, decoder.dtype, enable_prefix_caching, decoder.device, kernels)

    @staticmethod
    def block_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Memory of one block over all layers."""
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * BLOCK_SIZE * dtype.itemsize

    def place(self, scheduled: list[Scheduled], trees: list[DraftTree]) -> Batch:
        """Gives each known token and draft node a slot and lays out the pass.

        Args:
            scheduled: Who runs; the scheduler has reserved blocks for their known tokens.
            trees: One per scheduled sequence that samples, in that order. Cut where blocks are short: drafts
                never take them from a running sequence.
        """
        remaining = iter(trees)
        entries: list[BatchEntry] = []
        row = sample = 0
        for s in scheduled:
            tree = self._fit(s, next(remaining)) if s.samples else EMPTY_TREE
            entries.append(BatchEntry(s.sequence, row, s.num_known, tree, sample if s.samples else None))
            row += s.num_known + len(tree)
            sample += 1 + len(tree) if s.samples else 0
        return _lay_out(tuple(entries))

    def commit(self, batch: Batch, verdict: Verdict) -> None:
        """Keeps the rows of known tokens and accepted paths, gives the other slots back."""
        moves: list[tuple[int, int]] = []  # physical slots (from, to)
        for entry, decision in zip(batch.entries, verdict.decisions, strict=True):
            sequence, path = entry.sequence, () if decision is None else decision.path
            end = sequence.num_computed + entry.num_known
            moves.extend(
                (slot_of(sequence, end + node), slot_of(sequence, end + depth))
                for depth, node in enumerate(path)
                if node != depth
            )
            sequence.num_computed = end + len(path)
            self.blocks.trim(sequence)
        if moves:
            self.move(moves)

    def _fit(self, scheduled: Scheduled, tree: DraftTree) -> DraftTree:
        if not len(tree):
            return tree
        sequence = scheduled.sequence
        known = sequence.num_computed + scheduled.num_known
        room = len(sequence.block_ids) * BLOCK_SIZE + self.blocks.num_free_slots - known
        tree = tree.cut(room)
        self.blocks.reserve(sequence, known + len(tree))
        return tree

    def move(self, moves: Moves) -> None:
        """Copies physical slots over all layers."""
        of = move_slots if self._kernels is None else self._kernels.move_slots
        of(self.keys, self.values, moves)


def slot_of(sequence: Sequence, logical: int) -> int:
    """The physical slot of a sequence's logical index."""
    return sequence.block_ids[logical // BLOCK_SIZE] * BLOCK_SIZE + logical % BLOCK_SIZE


def _lay_out(entries: tuple[BatchEntry, ...]) -> Batch:
    """Builds the flat tensors of a pass."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    parents: list[int] = []
    samples: list[int] = []
    tables = np.zeros((len(entries), max(len(e.sequence.block_ids) for e in entries)), dtype=np.int32)
    for index, entry in enumerate(entries):
        sequence, known, tree = entry.sequence, entry.num_known, entry.tree
        context = sequence.num_computed
        rows = known + len(tree)
        tables[index, : len(sequence.block_ids)] = sequence.block_ids
        token_ids += sequence.token_ids[context : context + known]
        token_ids += tree.token_ids
        positions += range(context, context + known)
        positions += (context + known - 1 + depth for depth in tree.depths())
        slots += (slot_of(sequence, context + r) for r in range(rows))
        parents += range(-1, known - 1)
        parents += (known + parent for parent in tree.parents)  # a parent of -1 is the last known row
        if entry.first_sample is not None:
            samples += range(entry.first_row + known - 1, entry.first_row + rows)
    ends = itertools.accumulate((e.num_known + len(e.tree) for e in entries), initial=0)
    layout = Rows(
        positions=tensor_of(positions, np.int32),
        slots=tensor_of(slots, np.int32),
        parents=tensor_of(parents, np.int32),
        row_starts=tensor_of(list(ends), np.int32),
        context_lens=tensor_of([e.sequence.num_computed for e in entries], np.int32),
        block_tables=torch.from_numpy(tables),
        branching=tensor_of([int(not e.tree.is_chain()) for e in entries], np.int32),
    )
    return Batch(entries, tensor_of(token_ids), layout, tensor_of(samples))
