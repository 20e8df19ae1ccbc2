"""One forward pass of one model over its own cache."""

from __future__ import annotations

import torch

from outpace.batch import Batch, TargetOutput
from outpace.config import EngineConfig
from outpace.models.decoder import Decoder
from outpace.runtime.graphs import CudaRecorder, Graphs, default_sizes, record_all
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.streams import StreamPass


class ModelRunner:
    """Runs a decoder on batches placed in its cache.

    Attributes:
        decoder: The model.
        graphs: Its recorded passes, if there are any; other passes run operation by operation.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, graphs: Graphs | None = None) -> None:
        self.decoder, self.graphs = decoder, graphs
        self._stack = decoder.stack(cache.layers)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Row counts that passes are padded to, ascending; empty where none is."""
        return () if self.graphs is None else self.graphs.sizes

    def forward(self, batch: Batch, streams: StreamPass | None = None) -> TargetOutput:
        """Computes every row of the batch and the logits of its sampled rows.

        Args:
            batch: What to compute.
            streams: Rows that go through the last layers beside the batch's own, which they do not change.
                Which these are is decided in the middle of the pass, so it is never a recorded one.

        Returns:
            Its hidden states are good until the next pass.
        """
        recorded = self.graphs.forward(batch) if self.graphs is not None and streams is None else None
        if recorded is not None:
            hidden, sample_rows = recorded
            return TargetOutput(self._logits(hidden, sample_rows), hidden)
        beside = None
        placed = batch.to(self.decoder.device)
        if streams is None:
            hidden = self.decoder.forward(placed.token_ids, placed.rows, self._stack)
        else:
            hidden, beside = streams.forward(self.decoder, batch, placed, self._stack)
        return TargetOutput(self._logits(hidden, placed.sample_rows), hidden, beside)

    def beside(self, decoder: Decoder, cache: KVCache) -> ModelRunner:
        """A runner for a decoder that drafts: its passes are recorded if those of this one are.

        Args:
            decoder: Some layers of this one over the same cache, or a model of its own.
            cache: That it writes.
        """
        graphs = None if self.graphs is None else self.graphs.beside(decoder, cache)
        return ModelRunner(decoder, cache, graphs)

    def close(self) -> None:
        """Ends what was started for it: nothing here."""

    def _logits(self, hidden: torch.Tensor, sample_rows: torch.Tensor) -> torch.Tensor:
        if len(sample_rows) < len(hidden):
            hidden = hidden.index_select(0, sample_rows)
        return self.decoder.logits(hidden)


def build_runner(config: EngineConfig, decoder: Decoder, cache: KVCache) -> ModelRunner:
    """The runner that the settings ask for: on a GPU with recorded passes, which takes a while."""
    graphs = plan_graphs(config, decoder, cache)
    if graphs is not None:
        record_all(graphs)
    return ModelRunner(decoder, cache, graphs)


def plan_graphs(config: EngineConfig, decoder: Decoder, cache: KVCache) -> Graphs | None:
    """The passes to record, none of them recorded yet; None where there are to be none."""
    # Ranks would have to record the same passes at the same time.
    if decoder.device.type != "cuda" or config.enforce_eager or config.tensor_parallel_size > 1:
        return None
    max_rows = config.max_num_batched_tokens
    sizes = config.cudagraph_capture_sizes or default_sizes(max_rows)
    longest = config.max_model_len or decoder.config.max_position_embeddings
    return Graphs(decoder, cache, sizes, config.max_num_seqs, longest, CudaRecorder())
