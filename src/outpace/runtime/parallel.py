"""Several ranks that compute one model together: each a process with a device and a `Shard` of the weights.

    rank 0      the engine: scheduler, policy, drafts, verification, HTTP; its runner announces each pass
    rank 1 …    `worker.py`: takes a pass from its pipe, runs the same layers, forgets the result

A pass goes over as one message of packed integers. Inside it the ranks meet twice per layer, to add what they
have (`Ranks.total`), always in the order of ranks and whatever the batch: so a row's bits depend on that row
and the number of ranks alone. The pipe is also the lifeline: when rank 0 ends, in whatever way, its end of it
closes, and a worker ends with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed

import outpace
from outpace.batch import Batch, TargetOutput
from outpace.config import EngineConfig, flag
from outpace.device import CPU
from outpace.errors import ConfigError, EngineDeadError
from outpace.kernels import Kernels, Moves, Rows, load_kernels
from outpace.models.config import ModelConfig
from outpace.models.decoder import Decoder, Total
from outpace.models.loader import dummy_weights, load_config, load_weights
from outpace.models.shard import Shard
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.runner import ModelRunner, build_runner
from outpace.runtime.streams import StreamPass

logger = logging.getLogger(__name__)

dist: Any = torch.distributed  # whose types leave out half of what is used here


_LONGEST_WAIT = timedelta(minutes=10)  # for a rank that lives and does not come
_LAST_WORDS_S = 2.0  # in which a process that broke a connection is seen to have ended
_END_S = 5.0  # for a worker to end by itself
_HEADER = 5  # integers


@dataclass(frozen=True, slots=True)
class Part:
    """What every rank must know to load its shard.

    Attributes:
        path: The model's directory or file.
        dtype: Name of the type of weights and cache.
        kernels: As the setting has it.
        num_threads: Of one rank.
        device: Type of the ranks' devices.
        load_format: As the setting has it, as is the next.
        batch_invariant: Whether a GPU's linear layers give a row the same bits in any batch.
    """

    path: str
    dtype: str
    kernels: Literal["auto", "native", "reference", "triton"]
    num_threads: int
    device: str = "cpu"
    load_format: Literal["auto", "dummy"] = "auto"
    batch_invariant: bool = False

    @classmethod
    def of(cls, config: EngineConfig, path: Path, dtype: torch.dtype, device: torch.device) -> Part:
        """The settings' own."""
        name = str(dtype).removeprefix("torch.")
        own_device = device.type if config.tensor_parallel_size > 1 else str(device)
        return cls(
            path=str(path),
            dtype=name,
            kernels=config.kernels,
            num_threads=config.threads_per_rank,
            device=own_device,
            load_format=config.load_format,
            batch_invariant=config.batch_invariant,
        )

    def device_of(self, rank: int) -> torch.device:
        """Of several GPUs each rank has its own."""
        device = torch.device(self.device)
        return torch.device("cuda", rank) if self.device == "cuda" else device

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type itself."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def load(self, shard: Shard, total: Total | None = None) -> Decoder:
        """Loads a shard's decoder.

        Args:
            shard: Which; the whole model may be one.
            total: Adds what the ranks have.

        Raises:
            ConfigError: The model cannot be had.
        """
        path = Path(self.path)
        model = load_config(path)
        own, device = shard.config(model), self.device_of(shard.rank)
        kernels = load_kernels(
            self.kernels,
            self.torch_dtype,
            head_dim=own.head_dim,
            widths=(own.hidden_size, own.intermediate_size),
            num_threads=self.num_threads,
            device=device,
            batch_invariant=self.batch_invariant,
        )
        if self.load_format == "dummy":
            weights = dummy_weights(own, self.torch_dtype, device)
        else:
            weights = load_weights(path, model, self.torch_dtype, device, shard)
        return Decoder(own, weights, self.torch_dtype, kernels, total)


class Ranks:
    """The connection of a rank with all others, made when `join` is called.

    Process groups are used as they are, without `init_process_group`: that one belongs to the user's program.
    """

    def __init__(self, store: str, shard: Shard, device: str) -> None:
        """Remembers where the others will be found.

        Args:
            store: A file in which they leave their addresses.
            shard: Says which rank this is.
            device: Type of the devices: gloo connects CPUs, nccl GPUs.
        """
        self._store, self._shard, self._device = store, shard, device
        self._group: Any = None  # without one this rank is alone, while it measures what it needs

    def join(self) -> None:
        """Connects this rank, once all are there or about to be.

        Raises:
            RuntimeError: Another one did not come.
        """
        rank, size = self._shard.rank, self._shard.size
        store = dist.FileStore(self._store, size)
        if self._device == "cuda":
            torch.cuda.set_device(rank)
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = _LONGEST_WAIT
            self._group = dist.ProcessGroupNCCL(store, rank, size, nccl)
            return
        gloo = dist.ProcessGroupGloo._Options()
        gloo._timeout = _LONGEST_WAIT
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        self._group = dist.ProcessGroupGloo(store, rank, size, gloo)

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of what all ranks have: the same bits on each of them.

        Each rank gets every summand and adds them itself, in float32, in the order of ranks. An all-reduce
        would add in an order that depends on where in the tensor a number lies, hence on the batch.

        Args:
            part: [rows, width], this rank's.

        Returns:
            [rows, width] in the same type.
        """
        rows, width = part.shape
        parts: torch.Tensor = part.new_empty(self._shard.size * rows, width)
        if self._group is not None:
            self._group._allgather_base(parts, part).wait()
        total = parts[:rows].float()
        for other in parts[rows:].split(rows):
            total += other
        return total.to(part.dtype)

    def abort(self) -> None:
        """Ends what waits for another rank, with an error."""
        if self._group is not None:
            self._group.abort()


class Workers:
    """The processes of all ranks but the first. They end with this object, by `close`, or with this process.

    Attributes:
        ranks: This rank's connection with theirs.
    """

    def __init__(self, part: Part, size: int) -> None:
        """Starts them; they load while this process does.

        Args:
            part: What they load.
            size: Ranks, this one included.
        """
        self._directory = tempfile.TemporaryDirectory(prefix="outpace-ranks-")
        store = str(Path(self._directory.name, "store"))
        self.ranks = Ranks(store, Shard(0, size), part.device)
        self._device = part.device
        self._processes: list[subprocess.Popen[bytes]] = []
        self._closing = threading.Event()
        self.close = weakref.finalize(self, _end, self._processes, self._directory, self._closing)
        root = str(Path(outpace.__file__).parents[1])
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        for rank in range(1, size):
            task = json.dumps({"part": asdict(part), "store": store, "rank": rank, "size": size})
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-m", "outpace.runtime.worker", task],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,  # a byte when it is loaded; nothing else is written there
                    env=os.environ | {"PYTHONPATH": paths},
                    bufsize=0,
                )
            )

    def join(self) -> None:
        """Waits until they have loaded, and connects the ranks.

        Raises:
            EngineDeadError: One ended.
        """
        for process in self._processes:
            assert process.stdout is not None
            if not process.stdout.read(1):  # closed: it ends
                process.wait(_END_S)
                self.check(0)
        with self.watched():
            self.ranks.join()
        if self._device == "cuda":
            self._watch()

    def send(self, message: bytes) -> None:
        """Gives all of them the same message."""
        for process in self._processes:
            assert process.stdin is not None
            rest = memoryview(message)
            while rest:
                rest = rest[process.stdin.write(rest) :]

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside it an error that comes from a worker's end says so.

        Raises:
            EngineDeadError: One ended.
        """
        try:
            yield
        except (OSError, RuntimeError):
            self.check(_LAST_WORDS_S)
            raise

    def check(self, timeout: float) -> None:
        """Looks for workers that ended.

        Args:
            timeout: Seconds in which one may still turn out to have.

        Raises:
            EngineDeadError: One has.
        """
        deadline = time.monotonic() + timeout
        while True:
            for rank, process in enumerate(self._processes, start=1):
                if (code := process.poll()) is not None:
                    raise EngineDeadError(
                        f"the process of rank {rank} of {flag('tensor_parallel_size')} ended with exit "
                        f"status {code}, and without it there is no model; what it said stands above"
                    )
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)

    def _watch(self) -> None:
        """Aborts what waits for a worker that ended: gloo notices by itself, nccl does not."""
        outputs = [process.stdout for process in self._processes]
        closing, ranks = self._closing, self.ranks

        def watch() -> None:
            poll = select.poll()
            for output in outputs:
                assert output is not None
                poll.register(output, 0)  # hang-ups are always told
            poll.poll()
            if not closing.is_set():
                ranks.abort()

        threading.Thread(target=watch, name="outpace-ranks", daemon=True).start()


def _end(
    processes: list[subprocess.Popen[bytes]],
    directory: tempfile.TemporaryDirectory[str],
    closing: threading.Event,
) -> None:
    """Ends all workers; called once."""
    closing.set()
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()
    with contextlib.suppress(OSError):  # a worker may have been first
        directory.cleanup()


class LeadingCache(KVCache):
    """The first rank's cache: what is moved in it has to be moved in the others, too.

    Attributes:
        moved: In order, since the last pass.
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
        super().__init__(config, num_blocks, dtype, enable_prefix_caching, device, kernels)
        self.moved: list[tuple[int, int]] = []

    def move(self, moves: Moves) -> None:
        """See KVCache."""
        self.moved += moves
        super().move(moves)


class LeadingRunner(ModelRunner):
    """The first rank's runner: announces each pass to the others before it runs it."""

    def __init__(self, decoder: Decoder, cache: LeadingCache, workers: Workers) -> None:
        """Joins the parts.

        Args:
            decoder: The first rank's shard, or some of its layers.
            cache: Of all layers.
            workers: The other ranks, with caches like this one.
        """
        super().__init__(decoder, cache)
        self._leading, self._workers = cache, workers

    def beside(self, decoder: Decoder, cache: KVCache) -> ModelRunner:
        """See ModelRunner. A decoder with a cache of its own is whole, and this rank's alone."""
        if cache is self._leading:
            return LeadingRunner(decoder, self._leading, self._workers)
        return ModelRunner(decoder, cache)

    def forward(self, batch: Batch, streams: StreamPass | None = None) -> TargetOutput:
        """See ModelRunner.

        Raises:
            EngineDeadError: The process of another rank ended.
            ConfigError: There are streams, whose layers the other ranks do not know.
        """
        if streams is not None:
            raise ConfigError(f"drafts by streams need {flag('tensor_parallel_size')} 1")
        moved, self._leading.moved = self._leading.moved, []
        with self._workers.watched():
            self._workers.send(pack(batch, self.decoder.config.num_layers, moved))
            return super().forward(batch)

    def close(self) -> None:
        """See ModelRunner: the workers."""
        self._workers.close()


@dataclass(frozen=True, slots=True)
class Pass:
    """What a worker does in a step.

    Attributes:
        moves: What it moves in its cache first.
        num_layers: How many layers it runs then, from the first on.
        batch: Of what; nobody's, and nothing is sampled.
    """

    moves: Moves
    num_layers: int
    batch: Batch


def pack(batch: Batch, num_layers: int, moves: Moves) -> bytes:
    """A pass as one message of 32-bit integers: its sizes, then all of its tensors."""
    rows = batch.rows
    sizes = (num_layers, batch.num_rows, *rows.block_tables.shape, len(moves))
    tensors = (
        batch.token_ids,
        rows.positions,
        rows.slots,
        rows.parents,
        rows.row_starts,
        rows.context_lens,
        rows.branching,
        rows.block_tables.flatten(),
    )
    parts = [np.array(sizes), *(tensor.numpy() for tensor in tensors), np.array(moves).ravel()]
    return np.concatenate(parts, dtype=np.int32, casting="unsafe").tobytes()


def receive(pipe: int) -> Pass:
    """The next pass from a pipe, as `pack` has written it.

    Raises:
        EOFError: The other end is closed.
    """
    num_layers, num_rows, num_sequences, num_blocks, num_moves = read_integers(pipe, _HEADER).tolist()
    per_row, per_sequence = (num_rows,) * 4, (num_sequences + 1, num_sequences, num_sequences)
    sizes = [*per_row, *per_sequence, num_sequences * num_blocks, 2 * num_moves]
    fields = read_integers(pipe, sum(sizes)).split(sizes)
    token_ids, positions, slots, parents, starts, contexts, branching, tables, moves = fields
    tables = tables.view(num_sequences, num_blocks)
    rows = Rows(positions, slots, parents, starts, contexts, tables, branching)
    pairs = [(source, target) for source, target in moves.view(-1, 2).tolist()]
    return Pass(pairs, num_layers, Batch((), token_ids.long(), rows, torch.empty(0, dtype=torch.int64)))


def read_integers(pipe: int, number: int) -> torch.Tensor:
    """[number] int32 from a pipe.

    Raises:
        EOFError: The other end is closed.
    """
    buffer = bytearray(4 * number)
    rest = memoryview(buffer)
    while rest:
        if not (num_read := os.readv(pipe, [rest])):
            raise EOFError
        rest = rest[num_read:]
    return torch.frombuffer(buffer, dtype=torch.int32) if number else torch.empty(0, dtype=torch.int32)


def start(
    config: EngineConfig, part: Part, num_blocks: Callable[[Decoder], int]
) -> tuple[ModelRunner, KVCache]:
    """Loads a model on as many ranks as the settings ask for, of which this process is the first.

    Args:
        config: The settings.
        part: What every rank loads.
        num_blocks: Of the cache of each, once the first rank's decoder is there.

    Raises:
        ConfigError: The model cannot be had, does not divide, or there are fewer devices than ranks.
        EngineDeadError: A worker ended while it loaded.
    """
    size, has_prefixes = config.tensor_parallel_size, config.enable_prefix_caching
    check_devices(part.device, size)
    if size == 1:
        decoder = part.load(Shard())
        cache = KVCache.of(decoder, num_blocks(decoder), has_prefixes)
        return build_runner(config, decoder, cache), cache
    workers = Workers(part, size)
    try:
        decoder = part.load(Shard(0, size), workers.ranks.total)
        number = num_blocks(decoder)
        leading = LeadingCache.of(decoder, number, has_prefixes)
        workers.join()
        with workers.watched():
            workers.send(np.array([number], dtype=np.int32).tobytes())
    except BaseException:
        workers.close()
        raise
    logger.info("%d ranks with %d threads each", size, part.num_threads)
    return LeadingRunner(decoder, leading, workers), leading


def check_devices(device: str, size: int) -> None:
    """Makes sure that each rank has a device of its own; on a CPU settings have seen to its threads.

    Raises:
        ConfigError: There are fewer.
    """
    if device == "cuda" and size > torch.cuda.device_count():
        raise ConfigError(
            f"{flag('tensor_parallel_size')} must be at most {torch.cuda.device_count()}, the number of GPUs "
            f"here, since each rank needs one of its own, got {size}"
        )
