"""How much of a GPU's memory the KV cache gets: what weights, passes and graphs leave of the allowed share.

Weights lie there by then. Passes and graphs are tried out with a cache of a few blocks: the largest passes
that there can be, and the recording of the two largest graphs, from which the size of all follows. Graphs
share the memory of their passes, so the first pays for that and each further one for its own nodes only.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from outpace.config import BLOCK_SIZE, EngineConfig
from outpace.engine.profile import Point, run_point
from outpace.models.decoder import Decoder
from outpace.models.hub import resolve_draft
from outpace.models.loader import load_config
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.runner import ModelRunner, plan_graphs
from outpace.sampling import SamplingParams
from outpace.spec.verifier import Verifier

logger = logging.getLogger(__name__)

DEFAULT_UTILIZATION = 0.9
_COSTLIEST = SamplingParams(temperature=1.0, top_k=50, top_p=0.9)  # asks for copies of all logits


@dataclass(frozen=True, slots=True)
class Use:
    """Bytes of a GPU's memory.

    Attributes:
        total: All of it.
        used: By weights, the driver and other processes.
        passes: What the largest pass needs for a while.
        graphs: What recorded passes keep.
        drafts: Weights of a draft that are still to come.
    """

    total: int
    used: int
    passes: int
    graphs: int
    drafts: int

    def left(self, utilization: float) -> int:
        """Bytes that the KV cache may have: not below 0."""
        return max(0, int(self.total * utilization) - self.used - self.passes - self.graphs - self.drafts)

    def __str__(self) -> str:
        """In GiB, for the log."""
        names = ("total", "used", "passes", "graphs", "drafts")
        return ", ".join(f"{name} {getattr(self, name) / 2**30:.2f}" for name in names) + " GiB"


def graph_bytes(first: int, second: int, num_graphs: int) -> int:
    """Bytes of all graphs.

    Args:
        first: Of the largest, with the memory of its pass.
        second: What the second largest added.
        num_graphs: How many there will be.
    """
    return max(0, first) + max(0, second) * max(0, num_graphs - 1)


def draft_bytes(config: EngineConfig, dtype: torch.dtype) -> int:
    """Bytes of the weights of a draft.

    Raises:
        ConfigError: They cannot be had.
    """
    speculative = config.speculative
    if speculative.model is None:
        return 0
    path = resolve_draft(speculative.model, speculative.model_method)
    if "draft_model" in speculative.methods:
        shapes = load_config(path).weight_shapes().values()
        return sum(dtype.itemsize * torch.Size(shape).numel() for shape in shapes)
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def measure_use(config: EngineConfig, decoder: Decoder, verifier: Verifier) -> Use:
    """Tries passes and graphs out.

    Args:
        config: Limits of a step.
        decoder: With its weights on the GPU.
        verifier: As steps use it.

    Raises:
        ConfigError: The weights of a draft cannot be had.
    """
    device = decoder.device
    passes = _measure_passes(config, decoder, verifier)
    graphs = _measure_graphs(config, decoder)
    _settle(device)
    free, total = torch.cuda.mem_get_info(device)
    use = Use(total, total - free, passes, graphs, draft_bytes(config, decoder.dtype))
    logger.info("GPU memory: %s", use)
    return use


def _measure_passes(config: EngineConfig, decoder: Decoder, verifier: Verifier) -> int:
    """Bytes that the largest passes need for a while."""
    device = decoder.device
    num_seqs, max_rows = config.max_num_seqs, config.max_num_batched_tokens
    num_blocks = -(-max_rows // BLOCK_SIZE) + num_seqs
    cache = KVCache.of(decoder, num_blocks, False)
    runner = ModelRunner(decoder, cache)
    longest = config.max_model_len or decoder.config.max_position_embeddings
    prompt = Point(1, min(max_rows, longest), 0, 0, samples=False)
    drafts = Point(num_seqs, 1, min(max_rows // num_seqs, longest) - 1, 0)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    for point in (prompt, drafts):
        run_point(point, cache, runner, verifier, _COSTLIEST)
    return torch.cuda.max_memory_allocated(device) - before


def _measure_graphs(config: EngineConfig, decoder: Decoder) -> int:
    """Bytes that all recorded passes will keep."""
    cache = KVCache.of(decoder, 1, False)
    graphs = plan_graphs(config, decoder, cache)
    if graphs is None:
        return 0
    largest, *smaller = sorted(graphs.sizes, reverse=True)
    first = _taken(partial(graphs.record, largest), decoder.device)
    second = _taken(partial(graphs.record, smaller[0]), decoder.device) if smaller else 0
    return graph_bytes(first, second, len(graphs.sizes))


def _taken(act: Callable[[], None], device: torch.device) -> int:
    """Bytes of the GPU's memory that something takes for good."""
    _settle(device)
    before, _ = torch.cuda.mem_get_info(device)
    act()
    _settle(device)
    after, _ = torch.cuda.mem_get_info(device)
    return before - after


def _settle(device: torch.device) -> None:
    """Gives back what nobody holds."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
