"""Passes of fixed shapes, recorded once as CUDA graphs and replayed: a step costs one launch, not hundreds.

A graph computes a fixed number of rows, a bucket; a batch goes to the smallest bucket that holds it. Inside,
sequences are as ragged as ever: what would be missing to the bucket's rows is a sequence of its own, a prompt
of zeros in the null block, which no other sequence reads and which changes nothing for their rows. Sequences
beyond it have no rows.

Everything but the recording works on any device (`Recorder`), so that the rest is tested without a GPU.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable

import numpy as np
import torch

from outpace.batch import Batch
from outpace.config import BLOCK_SIZE
from outpace.device import Packing
from outpace.kernels import Rows
from outpace.models.decoder import Decoder
from outpace.runtime.kv_cache import KVCache

LARGEST = 512  # rows of the largest bucket, unless told otherwise: beyond it launches cost next to nothing
Program = Callable[[], None]
Recorder = Callable[[Program], Program]


def default_sizes(max_rows: int) -> tuple[int, ...]:
    """Rows of the buckets: 1, 2, 4, then in steps of 8, from 256 on of 16, as vLLM has them."""
    sizes = (1, 2, 4, *range(8, 256, 8), *range(256, LARGEST + 1, 16))
    return tuple(size for size in sizes if size <= max_rows)


def smallest(sizes: tuple[int, ...], num_rows: int) -> int | None:
    """The smallest of ascending sizes that is no less than a number of rows; None where none is."""
    place = bisect_left(sizes, num_rows)
    return sizes[place] if place < len(sizes) else None


def run_as_it_is(program: Program) -> Program:
    """Records nothing: padding alone, on any device."""
    return program


class CudaRecorder:
    """Records programs as graphs that share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, program: Program) -> Program:
        """Runs a program once, for all that is compiled or allocated at first use, and records it."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            program()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            program()
        return graph.replay


class Bucket:
    """Inputs of a fixed shape in a buffer of bytes, and how a batch is written there.

    Attributes:
        num_rows: Rows of the pass, those of padding included.
        num_sequences: Most sequences, that of padding included.
        packing: Token ids, the fields of `Rows`, and the rows to sample; block tables come last.
    """

    def __init__(self, num_rows: int, max_sequences: int, num_blocks: int) -> None:
        """Fixes the shape.

        Args:
            num_rows: Of the pass.
            max_sequences: Most sequences of a batch.
            num_blocks: Width of the block tables.
        """
        self.num_rows = num_rows
        self.num_sequences = min(num_rows, max_sequences) + 1
        self._num_blocks = max(num_blocks, -(-num_rows // BLOCK_SIZE))  # that of padding may have all rows
        self._padding = np.arange(num_rows, dtype=np.int32)
        per_row, per_sequence = (torch.int32, (num_rows,)), (torch.int32, (self.num_sequences,))
        self.packing = Packing(
            [
                (torch.int64, (num_rows,)),  # token ids
                (torch.int64, (num_rows,)),  # rows to sample
                *(per_row,) * 3,
                (torch.int32, (self.num_sequences + 1,)),
                *(per_sequence,) * 2,
                (torch.int32, (self.num_sequences, self._num_blocks)),
            ]
        )

    def fits(self, batch: Batch) -> bool:
        """Whether a batch of no more rows can be written here."""
        num_sequences, num_blocks = batch.rows.block_tables.shape
        return num_sequences < self.num_sequences and num_blocks <= self._num_blocks

    def inputs(self, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Rows]:
        """Token ids, rows to sample and where rows stand, as views of a buffer."""
        tokens, samples, positions, slots, parents, starts, contexts, branching, tables = self.packing.views(
            buffer
        )
        return tokens, samples, Rows(positions, slots, parents, starts, contexts, tables, branching)

    def write(self, batch: Batch, buffer: torch.Tensor, null_block: int) -> int:
        """Writes a batch and its padding into a buffer of the host.

        Args:
            batch: No more rows than the bucket has, and it fits.
            buffer: Where to.
            null_block: Of the cache.

        Returns:
            Bytes that matter, from the beginning: tables of sequences without rows are not read.
        """
        tokens, samples, positions, slots, parents, starts, contexts, branching, tables = self.packing.arrays(
            buffer
        )
        theirs, num_rows, num_sequences = batch.rows, batch.num_rows, len(batch.entries)
        num_samples, width = len(batch.sample_rows), theirs.block_tables.shape[1]
        padding = self._padding[: self.num_rows - num_rows]
        tokens[:num_rows], tokens[num_rows:] = batch.token_ids.numpy(), 0
        samples[:num_samples] = batch.sample_rows.numpy()
        positions[:num_rows], positions[num_rows:] = theirs.positions.numpy(), padding
        slots[:num_rows], slots[num_rows:] = (
            theirs.slots.numpy(),
            null_block * BLOCK_SIZE + padding % BLOCK_SIZE,
        )
        parents[:num_rows], parents[num_rows:] = theirs.parents.numpy(), padding - 1
        starts[: num_sequences + 1], starts[num_sequences + 1 :] = theirs.row_starts.numpy(), self.num_rows
        contexts[:num_sequences], contexts[num_sequences:] = theirs.context_lens.numpy(), 0
        branching[:num_sequences], branching[num_sequences:] = theirs.branching.numpy(), 0
        tables[:num_sequences, :width] = theirs.block_tables.numpy()
        tables[num_sequences] = null_block
        return self.packing.starts[-1] + (num_sequences + 1) * int(tables[0].nbytes)


class Graphs:
    """A decoder's passes over its cache, one for each bucket.

    Attributes:
        sizes: Rows of the buckets, ascending.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        sizes: Iterable[int],
        max_sequences: int,
        max_model_len: int,
        recorder: Recorder,
    ) -> None:
        """Lays buffers out; `record` makes the graphs.

        Args:
            decoder: Whose passes.
            cache: That they write.
            sizes: Rows of the buckets, ascending.
            max_sequences: Most sequences of a batch.
            max_model_len: Most tokens of a sequence.
            recorder: Makes a program that does again what one does.
        """
        self.sizes = tuple(sizes)
        self._decoder, self._cache, self._recorder = decoder, cache, recorder
        self._stack = decoder.stack(cache.layers)
        self._limits = max_sequences, max_model_len
        num_blocks = -(-max_model_len // BLOCK_SIZE)
        self._buckets = {size: Bucket(size, max_sequences, num_blocks) for size in self.sizes}
        num_bytes = max(bucket.packing.num_bytes for bucket in self._buckets.values())
        self._pinned = decoder.device.type == "cuda"
        # All buckets share what they read and what they write: only one runs at a time.
        self._inputs = torch.zeros(num_bytes, dtype=torch.uint8, device=decoder.device)
        self._hidden = torch.empty(
            max(self.sizes), decoder.config.hidden_size, dtype=decoder.dtype, device=decoder.device
        )
        self._programs: dict[int, Program] = {}
        self._samples: dict[int, torch.Tensor] = {}

    def beside(self, decoder: Decoder, cache: KVCache) -> Graphs:
        """Passes of a decoder that drafts, recorded: buckets for a row or two of each sequence."""
        max_sequences, max_model_len = self._limits
        largest = smallest(self.sizes, 2 * max_sequences) or self.sizes[-1]
        sizes = [size for size in self.sizes if size <= largest]
        graphs = Graphs(decoder, cache, sizes, max_sequences, max_model_len, self._recorder)
        record_all(graphs)
        return graphs

    def record(self, size: int) -> None:
        """Records the pass of a bucket; the largest first, so that the others find its memory."""
        bucket = self._buckets[size]
        tokens, self._samples[size], rows = bucket.inputs(self._inputs)
        hidden = self._hidden[:size]
        staged = bucket.packing.buffer()
        bucket.write(_nothing(), staged, self._cache.null_block)
        self._inputs[: len(staged)].copy_(staged)

        def program() -> None:
            hidden.copy_(self._decoder.forward(tokens, rows, self._stack))

        self._programs[size] = self._recorder(program)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Computes a batch, if there is a bucket for it.

        Returns:
            [rows, hidden], hidden states after the final norm, and [samples] int64, the rows to sample, on
            the device: until the next pass. None where the batch is too large.
        """
        size = smallest(self.sizes, batch.num_rows)
        if size is None or not self._buckets[size].fits(batch):
            return None
        bucket = self._buckets[size]
        staged = bucket.packing.buffer(pinned=self._pinned)
        num_bytes = bucket.write(batch, staged, self._cache.null_block)
        self._inputs[:num_bytes].copy_(staged[:num_bytes], non_blocking=True)
        self._programs[size]()
        return self._hidden[: batch.num_rows], self._samples[size][: len(batch.sample_rows)]


def _nothing() -> Batch:
    """A batch without sequences: padding alone."""
    none = torch.zeros(0, dtype=torch.int32)
    start = torch.zeros(1, dtype=torch.int32)
    rows = Rows(none, none, none, start, none, torch.zeros(0, 0, dtype=torch.int32), none)
    return Batch((), none.long(), rows, none.long())


def record_all(graphs: Graphs) -> None:
    """Records every bucket, the largest first, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for size in progress.track(sorted(graphs.sizes, reverse=True), description="Recording CUDA graphs"):
            graphs.record(size)
