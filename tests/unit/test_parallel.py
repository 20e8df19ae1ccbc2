"""Two ranks in two processes: one model, the answers of any batch, and what becomes of them when one ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from outpace.batch import Batch, Scheduled, TargetOutput
from outpace.config import EngineConfig
from outpace.engine.engine import Engine, check_device
from outpace.errors import ConfigError, EngineDeadError
from outpace.models.shard import Shard
from outpace.request import Sequence, Speculation
from outpace.runtime import parallel
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.parallel import Part, Ranks, Workers, pack, receive
from outpace.sampling import SamplingParams
from outpace.tree import EMPTY_TREE, DraftTree
from tiny import GREEDY, PROMPTS, SAMPLED, Guesser, answers, run, submit, tiny_engine, tokens, write_model

METHODS = "prompt_lookup,self_draft,draft_model"


def engine_of(model: Path, size: int, **settings: Any) -> Engine:
    settings = {
        "dtype": "float32",
        "kernels": "auto",
        "num_threads": size,
        "max_num_batched_tokens": 256,
        "max_model_len": 256,
        "tensor_parallel_size": size,
        **settings,
    }
    return Engine.from_config(EngineConfig(str(model), **settings))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def similar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is right about half the time."""
    return write_model(tmp_path_factory.mktemp("similar"), noise=0.3)


@pytest.fixture(scope="module")
def pair(model: Path, similar: Path) -> Iterator[Engine]:
    """An engine of two ranks, which the tests share: each leaves it idle."""
    engine = engine_of(
        model, 2, spec_method=METHODS, spec_model=str(similar), spec_tokens=5, spec_policy="fixed"
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plain(pair: Engine) -> dict[str, list[list[int]]]:
    """The answers of two ranks to each prompt alone, without drafts or cached prefixes."""
    return {name: alone(pair, sampling) for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED))}


def ask(engine: Engine, request_id: str, prompt: str, sampling: SamplingParams, method: str) -> None:
    ids = engine.tokenizer.encode(prompt)
    speculation = Speculation(method=method)
    engine.add(engine.admission.requests(request_id, ids, sampling, speculation=speculation))


def alone(engine: Engine, sampling: SamplingParams) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        ask(engine, "only", prompt, sampling, "none")
        found.append(tokens(run(engine)["only-0"]))
    return found


def together(engine: Engine, sampling: SamplingParams, method: str) -> list[list[int]]:
    for number, prompt in enumerate(PROMPTS):
        ask(engine, str(number), prompt, sampling, method)
    outputs = run(engine)
    return [tokens(outputs[f"{number}-0"]) for number in range(len(PROMPTS))]


# --- What is computed -----------------------------------------------------------------------------------


def first_pass(engine: Engine) -> TargetOutput:
    """Runs two prompts, one of them with a branching draft behind it."""
    sequences = []
    for name, prompt in (("a", list(range(60))), ("b", [7, 9, 11])):
        (request,) = engine.admission.requests(name, prompt, GREEDY)
        sequences.append(Sequence.start(request))
        engine.kv.blocks.reserve(sequences[-1], len(prompt))
    tree = DraftTree((-1, -1, 1), (5, 6, 7))
    scheduled = [Scheduled(sequence, len(sequence.token_ids), True) for sequence in sequences]
    output = engine.runner.forward(engine.kv.place(scheduled, [EMPTY_TREE, tree]))
    for sequence in sequences:
        engine.kv.blocks.free(sequence)
    return output


def test_logits_and_states_are_close_to_those_of_one_process(pair: Engine) -> None:
    ours, theirs = first_pass(pair), first_pass(tiny_engine())
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=1e-4, atol=1e-4)


def test_a_rank_has_its_own_heads_and_channels_only(pair: Engine) -> None:
    whole = tiny_engine()
    assert pair.kv.keys.shape[2] == whole.kv.keys.shape[2] // 2
    own, model = pair.runner.decoder.config, whole.model
    assert (own.num_heads, own.intermediate_size) == (model.num_heads // 2, model.intermediate_size // 2)
    assert (pair.model.num_heads, pair.model.num_kv_heads) == (model.num_heads, model.num_kv_heads)


@pytest.mark.parametrize("method", ["none", *METHODS.split(",")])
@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_neither_the_batch_nor_drafts_change_an_answer_of_two_ranks(
    pair: Engine, plain: dict[str, list[list[int]]], method: str, kind: str
) -> None:
    drafted = pair.metrics.drafts.num_draft_tokens
    assert together(pair, {"greedy": GREEDY, "sampled": SAMPLED}[kind], method) == plain[kind]
    assert (pair.metrics.drafts.num_draft_tokens > drafted) == (method != "none")


def test_slots_that_an_accepted_branch_moves_are_moved_on_every_rank(
    pair: Engine, plain: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    guesser = Guesser({f"{number}-0": known for number, known in enumerate(plain["greedy"])})
    monkeypatch.setattr(pair, "proposer", guesser)
    monkeypatch.setattr(pair, "_several", None)
    num_moved = 0
    move = KVCache.move

    def counted(self: KVCache, moves: list[tuple[int, int]]) -> None:
        nonlocal num_moved
        num_moved += len(moves)
        move(self, moves)

    monkeypatch.setattr(KVCache, "move", counted)
    assert answers(pair, GREEDY, stagger=2) == plain["greedy"]
    assert num_moved > 20


def test_sums_are_the_same_bits_whatever_rows_share_them(pair: Engine) -> None:
    """As many rows as one batch has, and one by one: gloo cuts tensors in pieces by their size."""
    runner, prompt = pair.runner, list(range(40))
    states = []
    for chunk in (40, 1):
        (request,) = pair.admission.requests("x", prompt, GREEDY)
        sequence = Sequence.start(request)
        pair.kv.blocks.reserve(sequence, len(prompt))
        rows = []
        for _ in range(0, len(prompt), chunk):
            batch = pair.kv.place([Scheduled(sequence, chunk, False)], [])
            output = runner.forward(batch)
            assert output.hidden is not None
            rows.append(output.hidden)
            sequence.num_computed += chunk
        pair.kv.blocks.free(sequence)
        states.append(torch.cat(rows))
    assert torch.equal(*states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_adds_in_the_order_of_ranks_however_many_rows_there_are(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Three ranks over gloo, in threads: an all-reduce would have to choose an order."""
    size, generator = 3, torch.Generator().manual_seed(0)
    parts = torch.randn(size, 70, 96, generator=generator).to(dtype)
    expected = (parts[0].float() + parts[1].float() + parts[2].float()).to(dtype)

    def sums(rank: int) -> list[torch.Tensor]:
        ranks = Ranks(str(tmp_path / "store"), Shard(rank, size), "cpu")
        ranks.join()
        return [torch.cat([ranks.total(rows) for rows in parts[rank].split(number)]) for number in (1, 7, 70)]

    with ThreadPoolExecutor(size) as pool:
        for found in pool.map(sums, range(size)):
            assert all(torch.equal(total, expected) for total in found)


# --- What goes over the pipe ----------------------------------------------------------------------------


def test_a_pass_arrives_as_it_was_sent() -> None:
    engine = tiny_engine()
    (request,) = engine.admission.requests("a", [1, 2, 3], GREEDY)
    sequence = Sequence.start(request)
    engine.kv.blocks.reserve(sequence, 3)
    batch = engine.kv.place([Scheduled(sequence, 3, True)], [DraftTree((-1, -1), (5, 6))])
    for moves in ([], [(3, 2), (40, 41)]):
        read, write = os.pipe()
        os.write(write, pack(batch, 2, moves))
        arrived = receive(read)
        assert (arrived.moves, arrived.num_layers) == (moves, 2)
        assert_same(arrived.batch, batch)
        os.close(write)
        with pytest.raises(EOFError):
            receive(read)
        os.close(read)


def assert_same(ours: Batch, theirs: Batch) -> None:
    assert torch.equal(ours.token_ids, theirs.token_ids)
    for name in theirs.rows.__dataclass_fields__:
        assert torch.equal(getattr(ours.rows, name), getattr(theirs.rows, name)), name
        assert getattr(ours.rows, name).dtype == torch.int32


# --- Who ends, and what follows -------------------------------------------------------------------------


def process_of(engine: Engine) -> subprocess.Popen[bytes]:
    assert isinstance(engine.runner, parallel.LeadingRunner)
    (process,) = engine.runner._workers._processes
    return process


def test_a_worker_outlives_signals_and_its_death_is_an_error_that_names_it(model: Path) -> None:
    engine = engine_of(model, 2)
    process = process_of(engine)
    for number in (signal.SIGTERM, signal.SIGINT):  # which are for rank 0, and it finishes what runs
        process.send_signal(number)
    submit(engine, "a", "x", replace(GREEDY, max_tokens=4))
    run(engine)
    submit(engine, "b", "Once upon a time", replace(GREEDY, max_tokens=200))
    engine.step()
    process.kill()
    process.wait()
    with pytest.raises(EngineDeadError, match="rank 1 of --tensor-parallel-size ended with exit status -9"):
        engine.step()
    engine.close()
    engine.close()  # a second time is no error


def test_a_worker_that_cannot_load_is_an_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = Workers(Part(str(tmp_path), "float32", "reference", 1), 2)
    is_aborted = threading.Event()  # what waits for it, on a GPU
    monkeypatch.setattr(workers.ranks, "abort", is_aborted.set)
    workers._watch()
    with pytest.raises(EngineDeadError, match=r"rank 1 .* ended with exit status 1"):
        workers.join()
    assert is_aborted.wait(10)
    workers.close()
    assert "config.json" in capfd.readouterr().err


@pytest.mark.parametrize("is_loaded", [False, True])
def test_workers_that_nobody_holds_end_while_they_load_and_while_they_wait(
    model: Path, is_loaded: bool
) -> None:
    workers = Workers(Part(str(model), "float32", "reference", 1), 2)
    (process,) = workers._processes
    if is_loaded:
        assert process.stdout is not None
        process.stdout.read(1)  # now it waits for rank 0, which does not join
    del workers
    gc.collect()
    assert process.returncode == 0


# --- What is refused ------------------------------------------------------------------------------------


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process is started")

    monkeypatch.setattr(subprocess, "Popen", start)


@pytest.mark.usefixtures("no_processes")
def test_more_ranks_than_threads_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"--tensor-parallel-size must be at most 1, the number of threads .*got 2"
    ):
        EngineConfig(num_threads=1, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="--tensor-parallel-size must be at least 1, got 0"):
        EngineConfig(tensor_parallel_size=0)


@pytest.mark.usefixtures("no_processes")
def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="--tensor-parallel-size must be at most 1, the number of GPUs"):
        parallel.check_devices("cuda", 2)
    parallel.check_devices("cuda", 1)
    parallel.check_devices("cpu", 2)


@pytest.mark.usefixtures("no_processes")
def test_graphs_and_a_certain_gpu_with_several_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="--tensor-parallel-size 2 records no CUDA graphs"):
        EngineConfig(num_threads=2, tensor_parallel_size=2, cudagraph_capture_sizes=[1, 2])
    config = EngineConfig(num_threads=2, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size 2 takes the first GPUs: .* cuda:1"):
        check_device(config, torch.device("cuda", 1))
    check_device(config, torch.device("cuda", 0))


@pytest.mark.usefixtures("no_processes")
def test_streams_with_several_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="--spec-method streaming runs on one rank"):
        EngineConfig(spec_method="suffix,streaming", spec_model="x", num_threads=2, tensor_parallel_size=2)


@pytest.mark.usefixtures("no_processes")
def test_a_model_that_does_not_divide_is_refused_before_anything_starts(tmp_path: Path) -> None:
    model = write_model(tmp_path, num_key_value_heads=1, num_attention_heads=1, head_dim=64)
    with pytest.raises(ConfigError, match="does not divide the model's 1 attention heads"):
        engine_of(model, 2)


def test_threads_are_divided_among_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outpace.config.num_cores", lambda: 8)
    assert EngineConfig(tensor_parallel_size=4).threads_per_rank == 2
    assert EngineConfig(tensor_parallel_size=4, num_threads=7).threads_per_rank == 1
    assert EngineConfig(num_threads=7).threads_per_rank == 7
