"""One forward pass of one model over its own cache."""

from __future__ import annotations

import time

import torch

from outpace.batch import Batch, TargetOutput
from outpace.models.decoder import Decoder
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.threads import ThreadGovernor


class ModelRunner:
    """Runs a decoder on batches placed in its cache.

    Attributes:
        decoder: The model.
    """

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder, self._cache = decoder, cache
        self._threads = ThreadGovernor(torch.get_num_threads())

    def forward(self, batch: Batch) -> TargetOutput:
        """Computes every row of the batch and the logits of its sampled rows."""
        if torch.get_num_threads() != self._threads.num_threads:
            torch.set_num_threads(self._threads.num_threads)
        begin = time.perf_counter()
        output = self._forward(batch)
        self._threads.observe(batch.num_rows, time.perf_counter() - begin)
        return output

    def _forward(self, batch: Batch) -> TargetOutput:
        hidden = self.decoder.forward(batch.token_ids, batch.rows, self._cache.layers)
        sampled = hidden if len(batch.sample_rows) == len(hidden) else hidden[batch.sample_rows]
        return TargetOutput(self.decoder.logits(sampled), hidden)
