"""One forward pass of one model over its own cache."""

from __future__ import annotations

from outpace.batch import Batch, TargetOutput
from outpace.models.decoder import Decoder
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.streams import StreamPass


class ModelRunner:
    """Runs a decoder on batches placed in its cache.

    Attributes:
        decoder: The model.
    """

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder, self._cache = decoder, cache

    def beside(self, decoder: Decoder, cache: KVCache) -> ModelRunner:
        """Runs another decoder in the same process.

        Args:
            decoder: Some layers of this one over the same cache, or a model of its own.
            cache: That it writes.
        """
        return ModelRunner(decoder, cache)

    def close(self) -> None:
        """Ends what was started for it: nothing here."""

    def forward(self, batch: Batch, streams: StreamPass | None = None) -> TargetOutput:
        """Computes every row of the batch and the logits of its sampled rows.

        Args:
            batch: What to compute.
            streams: Rows that go through the last layers beside the batch's own, which they do not change.
        """
        layers, beside = self._cache.layers, None
        if streams is None:
            hidden = self.decoder.forward(batch.token_ids, batch.rows, layers)
        else:
            hidden, beside = streams.forward(self.decoder, batch, layers)
        sampled = hidden if len(batch.sample_rows) == len(hidden) else hidden[batch.sample_rows]
        return TargetOutput(self.decoder.logits(sampled), hidden, beside)
