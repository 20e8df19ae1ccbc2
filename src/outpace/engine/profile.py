"""What steps cost on this machine: the real runner on a grid of shapes, once, and then from a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from outpace.batch import Scheduled
from outpace.config import BLOCK_SIZE, EngineConfig, cache_dir, num_cores
from outpace.device import synchronize
from outpace.errors import ConfigError
from outpace.policy.cost import FORMAT, CostModel, Shape
from outpace.request import Request, Sequence
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.runner import ModelRunner
from outpace.sampling import SamplingParams
from outpace.spec.verifier import Verifier
from outpace.tree import EMPTY_TREE, DraftTree

logger = logging.getLogger(__name__)

# Each of the first: a row more in a small step can cost anything.
DECODE_ROWS = (*range(1, 17), 20, 24, 32, 40, 48, 64, 96, 128, 192, 256)
DRAFT_ROWS = (4, 8, 16, 32, 64, 96, 128, 192, 256)  # of sequences with drafts
CHUNK_ROWS = (8, 32, 128, 512)  # of a prompt
LAST_STAIR = 96  # rows; a kernel's tile more costs little beyond
CONTEXT, LONG_CONTEXT = 128, 1024  # cached tokens per sequence
_GREEDY = SamplingParams(temperature=0)
_TREE_ROWS = 4  # of the sequences that stand for drafting ones
_MOST_ALONE = 16  # rows of one sequence, where there are fewer sequences than rows to measure
_LEAST_ROUNDS, _MOST_ROUNDS, _ENOUGH_S = 2, 7, 4.0  # over all shapes; no new round once so long


@dataclass(frozen=True, slots=True)
class Point:
    """A shape to measure: `sequences` times (`known` tokens, then a chain of `drafted`) after `context`."""

    sequences: int
    known: int
    drafted: int
    context: int
    samples: bool = True

    @property
    def shape(self) -> Shape:
        """What the cost model calls it."""
        rows = self.sequences * (self.known + self.drafted)
        samples = self.sequences * (1 + self.drafted) if self.samples else 0
        return Shape(rows, samples, self.sequences * self.context, rows * self.context)


def load_or_measure(
    config: EngineConfig, cache: KVCache, runner: ModelRunner, verifier: Verifier
) -> CostModel:
    """The cost model of --spec-profile, of an earlier start with the same settings, or measured now.

    Raises:
        ConfigError: The given file is of no use.
    """
    if config.spec_profile is not None:
        return CostModel.load(Path(config.spec_profile))
    path = profile_path(config, runner, cache)
    if path.exists():
        try:
            model_of_costs = CostModel.load(path)
        except ConfigError as error:  # of another version, or cut off: as if it were not there
            logger.warning("%s", error)
        else:
            logger.info("Step costs from %s", path)
            return model_of_costs
    return measure_and_keep(config, cache, runner, verifier)


def profile_path(config: EngineConfig, runner: ModelRunner, cache: KVCache) -> Path:
    """Where the profile of these settings is kept."""
    meta = json.dumps(_identity(config, runner, cache), sort_keys=True)
    return cache_dir() / "profiles" / f"{hashlib.blake2b(meta.encode(), digest_size=10).hexdigest()}.json"


def measure_and_keep(
    config: EngineConfig, cache: KVCache, runner: ModelRunner, verifier: Verifier
) -> CostModel:
    """Measures, and keeps the result for later starts."""
    path = profile_path(config, runner, cache)
    measured = measure(config, cache, runner, verifier, _identity(config, runner, cache))
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(measured.to_json(), encoding="utf-8")
    scratch.replace(path)  # whole or not at all, also with two servers starting
    return measured


def measure(
    config: EngineConfig,
    cache: KVCache,
    runner: ModelRunner,
    verifier: Verifier,
    meta: dict[str, object] | None = None,
) -> CostModel:
    """Times the shapes that steps may have, with a progress bar on a terminal.

    Args:
        config: Limits of a step.
        cache: An idle cache; it is idle again afterwards.
        runner: The model over that cache.
        verifier: As steps use it.
        meta: Written into the model.
    """
    from rich.console import Console
    from rich.progress import Progress

    positions = config.max_model_len or runner.decoder.config.max_position_embeddings
    longest = min(cache.blocks.capacity, positions)
    limits = (config.max_num_seqs, config.max_num_batched_tokens, cache.blocks.capacity, longest)
    points = list(grid(*limits, runner.buckets, runner.decoder.kernels.tile_rows))
    console = Console(stderr=True)
    seconds = [math.inf] * len(points)
    begin = time.perf_counter()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("Measuring what steps cost", total=len(points) * _LEAST_ROUNDS)
        for round_ in range(_MOST_ROUNDS):
            if round_ >= _LEAST_ROUNDS and time.perf_counter() - begin > _ENOUGH_S:
                break
            # All shapes in turn, and the fastest of each: what else the machine did belongs to none.
            for index, point in enumerate(points):
                seconds[index] = min(seconds[index], run_point(point, cache, runner, verifier))
                progress.advance(bar)
    logger.info("Measured %d step shapes in %.1f s", len(points), time.perf_counter() - begin)
    return CostModel.fit([point.shape for point in points], seconds, meta, runner.buckets)


def grid(
    max_num_seqs: int,
    max_rows: int,
    capacity: int,
    longest: int,
    buckets: tuple[int, ...] = (),
    tile_rows: int = 1,
) -> Iterator[Point]:
    """Shapes that tell rows, context and sampling apart, within what the engine can run.

    Args:
        max_num_seqs: Most sequences.
        max_rows: Most rows.
        capacity: Tokens that the cache holds.
        longest: Most tokens of a sequence.
        buckets: Row counts that passes are padded to: each is measured full, and of others none below the
            largest, since they cost the same.
        tile_rows: Rows of a kernel's tile: measured are steps that fill their tiles, and that open another.
    """
    if buckets:
        yield from _fitting(_full(buckets, max_num_seqs, max_rows), capacity, longest)
        largest = buckets[-1]
        beyond = [rows for rows in (largest + 1, *CHUNK_ROWS, max_rows) if largest < rows <= max_rows]
        yield from _fitting(
            (Point(1, rows, 0, 0, samples=False) for rows in sorted(set(beyond))), capacity, longest
        )
        # and in some buckets without samples, and with longer contexts, to tell these apart
        some = [bucket for bucket in buckets if bucket in (8, 32, 128) and bucket <= max_rows]
        yield from _fitting((Point(1, rows, 0, 0, samples=False) for rows in some), capacity, longest)
        long = [bucket for bucket in (buckets[0], *some) if bucket <= max_num_seqs]
        yield from _fitting((Point(rows, 1, 0, LONG_CONTEXT) for rows in long), capacity, longest)
        yield from _fitting((Point(1, 1, rows - 1, LONG_CONTEXT) for rows in some), capacity, longest)
        return
    filled = range(tile_rows, LAST_STAIR + 1, tile_rows) if tile_rows > 1 else ()
    edges = {edge for rows in filled for edge in (rows, rows + 1)}
    decode = [rows for rows in sorted({*DECODE_ROWS, *edges}) if rows <= max_num_seqs]
    yield from _fitting((Point(rows, 1, 0, CONTEXT) for rows in decode), capacity, longest)
    most = min(_TREE_ROWS * max_num_seqs, max_rows)
    stairs = {math.ceil(edge / _TREE_ROWS) * _TREE_ROWS for edge in edges if edge > max_num_seqs}
    trees = [rows // _TREE_ROWS for rows in sorted({*DRAFT_ROWS, *stairs}) if rows <= most]
    yield from _fitting((Point(num, 1, _TREE_ROWS - 1, CONTEXT) for num in trees), capacity, longest)
    alone = range(max_num_seqs + 1, min(_MOST_ALONE, max_rows) + 1)
    yield from _fitting((Point(1, 1, rows - 1, CONTEXT) for rows in alone), capacity, longest)
    chunks = [rows for rows in CHUNK_ROWS if rows <= max_rows]
    yield from _fitting((Point(1, rows, 0, 0, samples=False) for rows in chunks), capacity, longest)
    long = [rows for rows in (1, 8, 32) if rows <= max_num_seqs]
    yield from _fitting((Point(rows, 1, 0, LONG_CONTEXT) for rows in long), capacity, longest)
    yield from _fitting((Point(1, 1, rows - 1, LONG_CONTEXT) for rows in (2, 8, 16)), capacity, longest)


def _full(buckets: Iterable[int], max_num_seqs: int, max_rows: int) -> Iterator[Point]:
    """Points that fill buckets exactly: as many sequences as can be, and drafts as long as that leaves."""
    for rows in buckets:
        each = next(n for n in range(1, rows + 1) if rows % n == 0 and rows // n <= max_num_seqs)
        if rows <= max_rows:
            yield Point(rows // each, 1, each - 1, CONTEXT)


def _fitting(points: Iterable[Point], capacity: int, longest: int) -> Iterator[Point]:
    """The points that the cache holds, at a lower context if need be."""
    for point in points:
        most = min(capacity // point.sequences // BLOCK_SIZE * BLOCK_SIZE, longest)
        room = most - point.known - point.drafted
        if room >= 0:
            yield dataclasses.replace(point, context=min(point.context, room))


def run_point(
    point: Point,
    cache: KVCache,
    runner: ModelRunner,
    verifier: Verifier,
    sampling: SamplingParams = _GREEDY,
) -> float:
    """Runs a pass and its verification.

    Returns:
        The seconds that they took.
    """
    sequences = [_sequence(number, point, sampling) for number in range(point.sequences)]
    for sequence in sequences:
        cache.blocks.reserve(sequence, len(sequence.token_ids))
        sequence.num_computed = point.context
    tree = DraftTree.chain((0,) * point.drafted) if point.drafted else EMPTY_TREE
    scheduled = [Scheduled(sequence, point.known, point.samples) for sequence in sequences]
    trees = [tree] * point.sequences if point.samples else []
    begin = time.perf_counter()
    batch = cache.place(scheduled, trees)
    verifier.verify(batch, runner.forward(batch))
    synchronize(runner.decoder.device)  # without samples nothing came back that was waited for
    seconds = time.perf_counter() - begin
    for sequence in sequences:
        cache.blocks.free(sequence)
    return seconds


def _sequence(number: int, point: Point, sampling: SamplingParams) -> Sequence:
    tokens = (0,) * (point.context + point.known)
    request = Request(f"profile-{number}", tokens, sampling, seed=0, max_tokens=1)
    return Sequence.start(request)


def _identity(config: EngineConfig, runner: ModelRunner, cache: KVCache) -> dict[str, object]:
    """All that a profile depends on."""
    from outpace import __version__

    return {
        "format": FORMAT,
        "outpace": __version__,
        "torch": torch.__version__,
        "model": repr(runner.decoder.config),
        "device": f"{cache.keys.device.type}: {_processor(cache.keys.device)}",
        "dtype": str(cache.keys.dtype),
        "threads": config.num_threads or num_cores(),
        "ranks": config.tensor_parallel_size,
        "kernels": runner.decoder.kernels.build,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "cache_tokens": cache.blocks.capacity,
        "grid": [DECODE_ROWS, DRAFT_ROWS, CHUNK_ROWS, LAST_STAIR],
        "buckets": runner.buckets,
    }


def _processor(device: torch.device) -> str:
    """The processor's name and how many there are, or the GPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{os.cpu_count()} x {next(names, platform.processor() or platform.machine())}"
