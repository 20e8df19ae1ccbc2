"""Stream rows of a pass: where they stand, and the pass itself.

To attention the streams of a row are a chain of tree nodes below it, which is the mask that Speculative
Streaming asks for: prefix, ancestors, the row, and the streams before. So they need a slot each, behind those
of the sequence's own rows; nothing keeps what is written there, and `KVCache.commit` takes the blocks back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from outpace.batch import Batch, BatchEntry, StreamOutput, fields_of
from outpace.config import BLOCK_SIZE
from outpace.device import tensor_of, upload
from outpace.kernels import LayerAttention, LayerStack, Rows
from outpace.models.decoder import Decoder
from outpace.models.streams import Streams
from outpace.runtime.block_manager import BlockManager
from outpace.runtime.kv_cache import slot_of

Anchors = list[list[int]]  # for each entry of a batch the nodes that get streams; -1 is its last known token


def reserve(blocks: BlockManager, entry: BatchEntry, anchors: list[int], num_streams: int) -> list[int]:
    """Takes free blocks for the streams of an entry until the step ends.

    Args:
        blocks: The cache's.
        entry: Whose rows have their slots already.
        anchors: Where streams are wanted, the most wanted first.
        num_streams: Of each.

    Returns:
        The first of `anchors`, as many as there is room for: streams take a block from nobody.
    """
    sequence = entry.sequence
    end = sequence.num_computed + entry.num_known + len(entry.tree)
    room = len(sequence.block_ids) * BLOCK_SIZE + blocks.num_free_slots - end
    kept = anchors[: max(0, room // num_streams)]
    blocks.reserve(sequence, end + len(kept) * num_streams)
    return kept


@dataclass(frozen=True, slots=True)
class StreamPass:
    """A forward pass in which streams start beside some rows before the last layers.

    Attributes:
        streams: Their weights.
        anchors: Where they start, with slots reserved.
        choose: If there is one, of those, given the normed states of all rows where streams begin, [rows,
            hidden], where they do start. The pass stops for it.
    """

    streams: Streams
    anchors: Anchors
    choose: Callable[[torch.Tensor], Anchors] | None = None

    @torch.inference_mode()
    def forward(
        self,
        decoder: Decoder,
        batch: Batch,
        placed: Batch,
        stack: LayerStack,
    ) -> tuple[torch.Tensor, StreamOutput]:
        """Runs all layers. The batch's own rows get the bits that they get without streams.

        Args:
            decoder: The model.
            batch: Its own rows, on the host.
            placed: The same on the decoder's device.
            stack: Its layers.

        Returns:
            [rows, hidden], hidden states of the batch's rows after the final norm, and what streams say.
        """
        config = self.streams.config
        first, num_own = len(stack) - config.num_stream_layers, len(placed.token_ids)

        def laid_out(anchors: Anchors) -> tuple[Layout, torch.Tensor, LayerAttention]:
            layout = lay_out(batch, anchors, config.num_streams).to(decoder.device)
            return layout, layout.order[num_own:], decoder.attention(layout.rows)

        if self.choose is None:  # before the pass: behind it caches are cold
            ready = laid_out(self.anchors)
        residual = decoder.embed(placed.token_ids)
        normed = stack.run(decoder.attention(placed.rows), residual, end=first)
        if self.choose is not None:
            ready = laid_out(self.choose(normed))
        layout, rows, attention = ready
        joined = self.streams.start(residual, layout.sources, rows)
        hidden = self.streams.adapt(stack, rows).run(attention, joined, first)
        if not layout.is_in_order:
            hidden = hidden.index_select(0, layout.order)
        said = hidden[num_own:].view(-1, config.num_streams, hidden.shape[1])
        num_rows = len(said) * config.num_streams * config.num_stream_layers / len(stack)
        return hidden[:num_own], StreamOutput(said, layout.places, num_rows)


@dataclass(frozen=True, slots=True)
class Layout:
    """The rows of the last layers.

    Attributes:
        rows: Where they stand. A sequence with streams is two to attention: its known tokens but the last,
            and what follows on those.
        sources: [rows] int64, for each the batch's row that it is, or where it starts as a stream.
        order: [rows] int64, where the batch's own rows are, then the streams, those of an anchor together.
        is_in_order: Whether they lie so already.
        places: As `StreamOutput` has them.
    """

    rows: Rows
    sources: torch.Tensor
    order: torch.Tensor
    is_in_order: bool
    places: dict[tuple[int, int], int]

    def to(self, device: torch.device) -> Layout:
        """The same with its tensors on a device; on the CPU itself."""
        if device.type == "cpu":
            return self
        sources, order, *fields = upload([self.sources, self.order, *fields_of(self.rows)], device)
        return Layout(Rows(*fields), sources, order, self.is_in_order, self.places)


@dataclass(slots=True)
class _Builder:
    """Rows of the last layers as they are added."""

    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    contexts: list[int] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=list)

    def add(
        self, context: int, blocks: list[int], positions: list[int], slots: list[int], parents: list[int]
    ) -> None:
        """Adds the rows of a sequence."""
        self.positions += positions
        self.slots += slots
        self.parents += parents
        self.starts.append(len(self.positions))
        self.contexts.append(context)
        self.blocks.append(blocks)

    def rows(self) -> Rows:
        """The rows as tensors."""
        tables = np.zeros((len(self.blocks), max(map(len, self.blocks))), dtype=np.int32)
        branching = []
        for index, blocks in enumerate(self.blocks):
            tables[index, : len(blocks)] = blocks
            parents = self.parents[self.starts[index] : self.starts[index + 1]]
            branching.append(int(any(parent != row - 1 for row, parent in enumerate(parents))))
        return Rows(
            positions=tensor_of(self.positions, np.int32),
            slots=tensor_of(self.slots, np.int32),
            parents=tensor_of(self.parents, np.int32),
            row_starts=tensor_of(self.starts, np.int32),
            context_lens=tensor_of(self.contexts, np.int32),
            block_tables=torch.from_numpy(tables),
            branching=tensor_of(branching, np.int32),
        )


def lay_out(batch: Batch, anchors: Anchors, num_streams: int) -> Layout:
    """Puts the streams of each entry behind its own rows.

    Args:
        batch: The rows of the first layers.
        anchors: Where streams start.
        num_streams: How many at each.
    """
    every = (batch.rows.positions.tolist(), batch.rows.slots.tolist(), batch.rows.parents.tolist())
    builder = _Builder()
    own: list[int] = []
    streams: list[int] = []
    sources: list[int] = []
    places: dict[tuple[int, int], int] = {}
    for index, (entry, nodes) in enumerate(zip(batch.entries, anchors, strict=True)):
        sequence, known = entry.sequence, entry.num_known
        num_rows = known + len(entry.tree)
        context, blocks = sequence.num_computed, sequence.block_ids
        positions, slots, parents = (of[entry.first_row : entry.first_row + num_rows] for of in every)
        own += range(len(builder.positions), len(builder.positions) + num_rows)
        sources += range(entry.first_row, entry.first_row + num_rows)
        # Those before the last known token are read from the cache, where the pass has written them: so a
        # long prompt stays a chain, which attention walks in place.
        before = known - 1 if nodes else 0
        if before:
            builder.add(context, blocks, positions[:before], slots[:before], parents[:before])
        parents = [parent - before for parent in parents[before:]]
        positions, slots = positions[before:], slots[before:]
        streams += range(
            len(builder.positions) + len(positions),
            len(builder.positions) + len(positions) + len(nodes) * num_streams,
        )
        for node in nodes:
            places[index, node] = len(places)
            sources += (entry.first_row + known + node,) * num_streams
            parents += [node + 1, *range(len(parents), len(parents) + num_streams - 1)]
            positions += range(positions[node + 1] + 1, positions[node + 1] + 1 + num_streams)
        slots += (slot_of(sequence, context + num_rows + s) for s in range(len(nodes) * num_streams))
        builder.add(context + before, blocks, positions, slots, parents)
    is_in_order = own[-1] < len(own)
    return Layout(builder.rows(), tensor_of(sources), tensor_of(own + streams), is_in_order, places)
