"""Passes padded to buckets, as CUDA graphs need them: which bucket, what padding is, that it is harmless."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from outpace.batch import Batch, Scheduled
from outpace.config import BLOCK_SIZE, EngineConfig
from outpace.engine.engine import Engine
from outpace.request import Request, Sequence
from outpace.runtime.graphs import Bucket, default_sizes, smallest
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.runner import plan_graphs
from outpace.sampling import SamplingParams
from outpace.tree import EMPTY_TREE, DraftTree
from tiny import GREEDY, MODEL, SAMPLED, Guesser, answers, tiny_engine, write_model

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
TREE = DraftTree((-1, 0, 0, 1), (5, 6, 7, 8))


def placed(
    num_sequences: int, tree: DraftTree = EMPTY_TREE, kv: KVCache | None = None
) -> tuple[KVCache, Batch]:
    """A cache and a batch of sequences of different lengths, the first of which only computes its prompt."""
    kv = kv or KVCache(MODEL, 16, torch.float32, enable_prefix_caching=False)
    scheduled = []
    for number in range(num_sequences):
        tokens = tuple(range(10, 13 + number))
        request = Request(str(number), tokens, SamplingParams(temperature=0), seed=0, max_tokens=9)
        sequence = Sequence.start(request)
        kv.blocks.reserve(sequence, len(tokens))
        scheduled.append(Scheduled(sequence, len(tokens), samples=number > 0))
    return kv, kv.place(scheduled, [tree] * (num_sequences - 1))


# --- Buckets --------------------------------------------------------------------------------------------


def test_a_batch_goes_to_the_smallest_bucket_that_holds_it() -> None:
    assert [smallest((1, 2, 4, 8), rows) for rows in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, None]


def test_the_usual_buckets_ascend_to_what_a_step_may_have() -> None:
    sizes = default_sizes(512)
    assert sizes[:5] == (1, 2, 4, 8, 16)
    assert (sizes[-1], len(sizes)) == (512, 51)
    assert list(sizes) == sorted(set(sizes))
    assert default_sizes(20) == (1, 2, 4, 8, 16)
    assert default_sizes(8192)[-1] == 512


# --- Padding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [20, 21, 40])
def test_what_is_missing_to_a_bucket_is_a_sequence_of_its_own_in_the_null_block(num_rows: int) -> None:
    kv, batch = placed(3, TREE)
    bucket = Bucket(num_rows, max_sequences=8, num_blocks=4)
    assert bucket.fits(batch)
    buffer = torch.full((bucket.packing.num_bytes,), 255, dtype=torch.uint8)
    num_bytes = bucket.write(batch, buffer, kv.null_block)
    tokens, samples, rows = bucket.inputs(buffer)

    own, missing = batch.num_rows, num_rows - batch.num_rows
    assert tokens.tolist() == batch.token_ids.tolist() + [0] * missing
    assert samples[: len(batch.sample_rows)].tolist() == batch.sample_rows.tolist()
    for name in ("positions", "slots", "parents"):
        assert torch.equal(getattr(rows, name)[:own], getattr(batch.rows, name))
    assert rows.positions[own:].tolist() == list(range(missing))
    assert rows.parents[own:].tolist() == list(range(-1, missing - 1))
    assert (rows.slots[own:] // BLOCK_SIZE == kv.null_block).all()
    assert rows.row_starts.tolist() == [
        *batch.rows.row_starts.tolist(),
        *[num_rows] * (bucket.num_sequences - 3),
    ]
    assert rows.context_lens[3:].tolist() == [0] * (bucket.num_sequences - 3)
    assert rows.branching.tolist() == [0, 1, 1, *[0] * (bucket.num_sequences - 3)]
    assert (rows.block_tables[3] == kv.null_block).all()
    # what is not copied to the device is not read there
    assert num_bytes == bucket.packing.starts[-1] + 4 * rows.block_tables[0].nbytes


def test_a_batch_with_more_sequences_or_longer_tables_than_a_bucket_has_does_not_fit() -> None:
    _, batch = placed(3)
    assert Bucket(16, max_sequences=3, num_blocks=1).fits(batch)
    assert not Bucket(16, max_sequences=2, num_blocks=1).fits(batch)
    long = Request("long", (1,) * 40, SamplingParams(temperature=0), seed=0, max_tokens=9)
    kv, sequence = KVCache(MODEL, 16, torch.float32, False), Sequence.start(long)
    kv.blocks.reserve(sequence, 40)
    batch = kv.place([Scheduled(sequence, 2, samples=True)], [EMPTY_TREE])
    assert not Bucket(2, max_sequences=8, num_blocks=2).fits(batch)
    assert Bucket(2, max_sequences=8, num_blocks=3).fits(batch)


# --- The whole engine -----------------------------------------------------------------------------------


def padded_passes(engine: Engine) -> list[tuple[int, bool]]:
    """Notes the rows of each pass, and whether it was padded."""
    graphs, passes = engine.runner.graphs, []
    assert graphs is not None
    forward = graphs.forward

    def noting(batch: Batch) -> Any:
        done = forward(batch)
        passes.append((batch.num_rows, done is not None))
        return done

    graphs.forward = noting  # type: ignore[method-assign]
    return passes


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_padded_passes_give_the_same_bytes_with_trees_and_without(
    kernels: str, sampling: SamplingParams
) -> None:
    dtype = "bfloat16" if kernels == "auto" else "float32"
    plain = answers(tiny_engine(kernels=kernels, dtype=dtype), sampling)
    engine = tiny_engine(kernels=kernels, dtype=dtype, buckets=BUCKETS)
    assert answers(engine, sampling) == plain

    engine = tiny_engine(kernels=kernels, dtype=dtype, buckets=BUCKETS, spec_method="prompt_lookup")
    engine.proposer = Guesser({f"{i}-0": known for i, known in enumerate(plain)})
    passes = padded_passes(engine)
    assert answers(engine, sampling, stagger=3) == plain
    assert any(was and rows not in BUCKETS for rows, was in passes)
    assert {was for rows, was in passes if rows <= BUCKETS[-1]} == {True}


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs triton's interpreter",
)
def test_a_padded_pass_has_the_same_bits_with_the_kernels_for_gpus() -> None:
    plain, padded = tiny_engine(kernels="triton"), tiny_engine(kernels="triton", buckets=(24,))
    found = [engine.runner.forward(placed(3, TREE, engine.kv)[1]) for engine in (plain, padded)]
    assert found[0].hidden is not None
    assert found[1].hidden is not None
    assert torch.equal(found[0].hidden, found[1].hidden)
    assert torch.equal(found[0].logits, found[1].logits)


def test_padding_changes_nothing_for_chunked_prompts_and_preempted_sequences() -> None:
    tight: dict[str, Any] = {"num_blocks": 17, "max_num_batched_tokens": 24, "max_num_seqs": 6}
    plain = answers(tiny_engine(**tight), SAMPLED)
    engine = tiny_engine(**tight, buckets=(4, 16, 24))
    assert answers(engine, SAMPLED) == plain
    assert engine.scheduler.num_preemptions > 0


def test_passes_above_the_largest_bucket_are_not_padded() -> None:
    plain = answers(tiny_engine(), GREEDY)
    engine = tiny_engine(buckets=(4,))
    passes = padded_passes(engine)
    assert answers(engine, GREEDY) == plain
    assert {(rows <= 4, was) for rows, was in passes} == {(True, True), (False, False)}


@pytest.mark.parametrize("method", ["draft_model", "self_draft"])
def test_passes_that_draft_are_padded_too_and_change_nothing(method: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"spec_method": method, "spec_tokens": 3}
    if method == "draft_model":
        settings["spec_model"] = str(write_model(tmp_path, noise=0.1))
    plain = answers(tiny_engine(), SAMPLED)
    engine = tiny_engine(**settings, buckets=BUCKETS, max_num_seqs=8)
    proposer: Any = engine.proposer
    drafter = proposer.drafter if method == "draft_model" else proposer._drafter
    # up to two rows of each of eight sequences
    assert drafter._runner.buckets == (1, 2, 4, 8, 16)
    assert answers(engine, SAMPLED) == plain


def test_nothing_is_recorded_on_a_cpu() -> None:
    engine = tiny_engine()
    config = EngineConfig(model="tiny")
    assert plan_graphs(config, engine.runner.decoder, engine.kv) is None
    assert engine.runner.buckets == ()
