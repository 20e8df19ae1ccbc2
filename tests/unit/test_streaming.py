"""Speculative Streaming: the pass with streams beside its rows, what is drafted, its price, and training."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import write_checkpoint
from outpace.batch import Batch, Scheduled
from outpace.config import BLOCK_SIZE, EngineConfig
from outpace.engine.engine import Engine
from outpace.errors import ConfigError
from outpace.models.config import ModelConfig
from outpace.models.draft_checkpoint import read_draft, speculators_section, write_draft
from outpace.models.streams import StreamConfig
from outpace.request import Sequence
from outpace.runtime.streams import StreamPass, reserve
from outpace.spec.proposer import Prices
from outpace.spec.proposers.streaming import KEYS, Streaming, stream_config
from outpace.training.method import Run, TrainBatch, draw
from outpace.training.methods import streaming as training
from outpace.training.trunk import Trunk
from outpace.tree import DraftTree
from tiny import GREEDY, MODEL, SAMPLED, _weights, answers, run, submit, tiny_engine, tokens, write_model

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TREE = DraftTree((-1, -1, 0, 2, 1), (7, 8, 9, 10, 11), (0.5, 0.3, 0.9, 0.9, 0.1))


def write_streams(directory: Path, model: ModelConfig = MODEL, scale: float = 0.1, **settings: Any) -> Path:
    """Writes random streams, as `outpace train streaming` would.

    Args:
        directory: Where to.
        model: The model that they are for.
        scale: Size of the weights.
        **settings: Fields of `StreamConfig` that are not to have the values here.
    """
    shape = {"num_streams": 3, "num_stream_layers": 1, "branching": 2, "lora_rank": 4, "exit_rank": 2}
    config = StreamConfig(**{**shape, **settings})
    generator = torch.Generator().manual_seed(5)
    weights = {
        name: scale * torch.randn(size, generator=generator)
        for name, size in config.weight_shapes(model).items()
    }
    section = speculators_section("streaming", config.num_streams, "tiny", model)
    write_draft(directory, section, asdict(config), weights)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random streams with adapters everywhere."""
    return write_streams(tmp_path_factory.mktemp("streams"), lora_targets=ALL)


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random streams that say other things behind other tokens."""
    return write_streams(tmp_path_factory.mktemp("conditioned"), scale=0.5, token_rank=6)


def streaming(checkpoint: Path, **settings: Any) -> Engine:
    return tiny_engine(spec_method="streaming", spec_model=str(checkpoint), **settings)


def proposer_of(engine: Engine) -> Streaming:
    assert isinstance(engine.proposer, Streaming)
    return engine.proposer


def started(engine: Engine, prompt: list[int], num_computed: int, name: str = "0") -> Sequence:
    """A sequence in the engine's cache, of which the first tokens have been computed."""
    (request,) = engine.admission.requests(name, prompt, GREEDY)
    sequence = Sequence.start(request)
    assert engine.kv.blocks.reserve(sequence, len(prompt))
    if num_computed:
        batch = engine.kv.place([Scheduled(sequence, num_computed, False)], [])
        engine.runner.forward(batch)
        sequence.num_computed = num_computed
    return sequence


def with_streams(engine: Engine, batch: Batch, anchors: list[list[int]]) -> StreamPass:
    """Streams at the given nodes of each entry."""
    streams = proposer_of(engine)._streams
    gamma = streams.config.num_streams
    kept = [
        reserve(engine.kv.blocks, entry, nodes, gamma)
        for entry, nodes in zip(batch.entries, anchors, strict=True)
    ]
    return StreamPass(streams, kept, lambda _: kept)


def trainable(
    checkpoint: Path | None = None, trunk: Trunk | None = None, path: Path = Path(), **settings: Any
) -> training.Streaming:
    """The training module, by default on the model of `tiny_engine`; with the weights of a checkpoint.

    Args:
        checkpoint: Of streams, or None for untrained ones.
        trunk: The model.
        path: Where the model is, which shared mode takes the tokenizer from.
        **settings: Of the method.
    """
    chosen = {
        "num_streams": 3,
        "kl_weight": 0.0,  # a tiny random model is hardly sure of anything
        "layer_share": 0.5,
        "lora_rank": 4,
        "exit_rank": 2,
        "token_rank": 0 if checkpoint else 8,
        "branching": 2,
        **settings,
    }
    trunk = trunk or Trunk(MODEL, _weights())
    module = training.create(trunk, Run("streaming", "tiny", path, 0, 256), training.Settings(**chosen))
    if checkpoint is not None:

        def shapes(raw: dict[str, Any], _: int) -> dict[str, tuple[int, ...]]:
            return stream_config(raw).weight_shapes(trunk.config)

        found = read_draft(str(checkpoint), "streaming", trunk.config, shapes, torch.float32, KEYS)
        for name, weight in found.weights.items():
            module.weights[name.replace(".", "-")].data.copy_(weight)
    return module


def batch_of(module: training.Streaming, rows: list[list[int]], num_prompt: int = 1) -> TrainBatch:
    """Rows of one document each."""
    token_ids = torch.tensor(rows)
    positions = torch.arange(token_ids.shape[1]).expand_as(token_ids).clone()
    documents = torch.zeros_like(token_ids)
    hidden = module._trunk.hidden_states(token_ids, positions, documents, module.hidden_layers)
    return TrainBatch(token_ids, positions, documents, positions >= num_prompt, hidden)


def said_in_training(module: training.Streaming, tokens: list[int]) -> torch.Tensor:
    """[γ, hidden]: what the streams of the last token say."""
    batch = batch_of(module, [tokens])
    main = module._lower(batch)
    streams = module._start(main, torch.tensor([len(tokens) - 1]))
    with torch.no_grad():
        module._upper(batch, main, streams, torch.ones(len(tokens), dtype=torch.bool))
    return module._trunk.norm(streams.hidden)


# --- The pass -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_rows_of_the_batch_have_the_same_bits_with_and_without_streams(
    dtype: str, kernels: str, checkpoint: Path
) -> None:
    engine = streaming(checkpoint, dtype=dtype, kernels=kernels)
    decoding = started(engine, list(range(40)), 39, "a")
    prompt = started(engine, list(range(100, 150)), 0, "b")
    chunk = started(engine, list(range(60)), 0, "c")
    scheduled = [Scheduled(decoding, 1, True), Scheduled(prompt, 50, True), Scheduled(chunk, 30, False)]
    batch = engine.kv.place(scheduled, [TREE, DraftTree()])
    plain = engine.runner.forward(batch)
    cached = engine.kv.keys.clone(), engine.kv.values.clone()
    beside = engine.runner.forward(batch, with_streams(engine, batch, [[-1, 0, 1, 2, 3, 4], [-1], []]))
    assert torch.equal(plain.logits, beside.logits)
    assert plain.hidden is not None
    assert beside.hidden is not None
    assert torch.equal(plain.hidden, beside.hidden)
    slots = batch.rows.slots.long()
    block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    assert torch.equal(cached[0][:, block, :, :, offset], engine.kv.keys[:, block, :, :, offset])
    at = (slice(None), block, slice(None), offset // (g := cached[1].shape[-1]), slice(None), offset % g)
    assert torch.equal(cached[1][at], engine.kv.values[at])


def served_as_trained(engine: Engine, module: training.Streaming) -> None:
    """Compares with the dense computation of the training module, which shares no code with the served."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(20, module._trunk.config.vocab_size, (37,), generator=generator).tolist()
    sequence = started(engine, prompt, 30)
    batch = engine.kv.place([Scheduled(sequence, 7, True)], [TREE])
    said = engine.runner.forward(batch, with_streams(engine, batch, [[-1, *range(len(TREE))]])).streams
    assert said is not None
    for node, path in zip((-1, *range(len(TREE))), [(), *TREE.paths()], strict=True):
        expected = said_in_training(module, [*prompt, *path])
        torch.testing.assert_close(said.hidden[said.places[0, node]], expected, rtol=1e-4, atol=1e-4)


def test_streams_see_their_path_and_the_streams_before_them(checkpoint: Path) -> None:
    engine = streaming(checkpoint, dtype="float32", kernels="native")
    served_as_trained(engine, trainable(checkpoint, adapters="all"))


@pytest.mark.parametrize("variant", ["qwen2-sliding", "qwen3-biases"])
def test_windows_biases_and_norms_of_heads_hold_for_streams_too(variant: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", variant)
    trunk = Trunk.load(model, torch.float32)
    num_layers = max(1, round(0.5 * trunk.config.num_layers))
    streams = write_streams(tmp_path / "streams", trunk.config, num_stream_layers=num_layers)
    config = EngineConfig(
        str(model),
        dtype="float32",
        kernels="reference",
        spec_method="streaming",
        spec_model=str(streams),
        spec_policy="fixed",
        max_num_seqs=4,
    )
    served_as_trained(Engine.from_config(config), trainable(streams, trunk))


def test_what_streams_say_does_not_depend_on_the_batch_nor_on_other_streams(checkpoint: Path) -> None:
    engine = streaming(checkpoint, kernels="native")
    sequences = [started(engine, list(range(n, n + 20)), 19, str(n)) for n in range(3)]
    scheduled = [Scheduled(sequence, 1, True) for sequence in sequences]
    together = engine.kv.place(scheduled, [TREE] * 3)
    every = engine.runner.forward(together, with_streams(engine, together, [[-1, 0, 3]] * 3)).streams
    alone = engine.kv.place(scheduled[2:], [TREE])
    one = engine.runner.forward(alone, with_streams(engine, alone, [[3]])).streams
    assert every is not None
    assert one is not None
    assert torch.equal(every.hidden[every.places[2, 3]], one.hidden[one.places[0, 3]])


def test_streams_take_free_blocks_only_and_give_them_back(checkpoint: Path) -> None:
    engine = streaming(checkpoint, num_blocks=4, max_model_len=64)
    sequence = started(engine, list(range(16)), 15)
    batch = engine.kv.place([Scheduled(sequence, 1, True)], [DraftTree()])
    (entry,) = batch.entries
    other = started(engine, list(range(20)), 0, "b")
    assert engine.kv.blocks.num_free_blocks == 1
    assert reserve(engine.kv.blocks, entry, [-1] * 9, 3) == [-1] * 5  # 16 slots
    assert engine.kv.blocks.num_free_blocks == 0
    engine.kv.blocks.trim(sequence)
    assert len(sequence.block_ids) == 1
    engine.kv.blocks.free(sequence)
    engine.kv.blocks.free(other)


# --- What is drafted ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain() -> dict[str, list[list[int]]]:
    """What is answered without speculation."""
    return {"greedy": answers(tiny_engine(), GREEDY), "sampled": answers(tiny_engine(), SAMPLED)}


@pytest.mark.parametrize(
    ("kind", "num_blocks", "settings"),
    [
        ("sampled", 16, {}),
        ("greedy", None, {"stream_min_prob": 0.3}),
        ("sampled", None, {"draft_branching": 1}),
    ],
)
def test_answers_do_not_depend_on_streams(
    kind: str, num_blocks: int | None, settings: dict[str, Any], checkpoint: Path, plain: Any
) -> None:
    engine = streaming(checkpoint, spec_tokens=6, num_blocks=num_blocks, speculative_config=settings)
    assert answers(engine, SAMPLED if kind == "sampled" else GREEDY, stagger=2) == plain[kind]
    assert engine.metrics.drafts.num_draft_tokens > 100
    assert (engine.scheduler.num_preemptions > 0) == (num_blocks is not None)


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_answers_do_not_depend_on_what_streams_say_behind_a_token(
    kind: str, conditioned: Path, plain: Any
) -> None:
    engine = streaming(conditioned, spec_tokens=6)
    assert answers(engine, SAMPLED if kind == "sampled" else GREEDY, stagger=2) == plain[kind]
    assert engine.metrics.drafts.num_draft_tokens > 100


def test_streams_go_on_beside_other_methods(checkpoint: Path, plain: Any) -> None:
    engine = tiny_engine(spec_method="prompt_lookup,streaming", spec_model=str(checkpoint), spec_tokens=4)
    submit(engine, "0", "x", GREEDY)
    assert tokens(run(engine)["0-0"]) == plain["greedy"][3]
    assert engine.metrics.drafts.num_drafts > 20, "streams draft where nothing is looked up"


def test_a_draft_is_the_most_probable_part_of_the_product_of_all_streams(checkpoint: Path) -> None:
    engine = streaming(checkpoint, spec_tokens=7)
    submit(engine, "0", list(range(20)), GREEDY)
    engine.step()
    proposer, (sequence,) = proposer_of(engine), [e.sequence for e in engine.scheduler._running]
    (tree,) = proposer.propose([sequence], [7])
    hidden, place = proposer._said[sequence.id]
    probs = engine.runner.decoder.logits(hidden[place]).softmax(-1)
    top = [of.topk(2) for of in probs]
    for depth, token_id, confidence in zip(tree.depths(), tree.token_ids, tree.confidence or (), strict=True):
        place = top[depth - 1].indices.tolist().index(token_id)
        assert confidence == pytest.approx(float(top[depth - 1].values[place]), rel=1e-5)
    assert len(tree) == 7
    assert max(tree.parents.count(parent) for parent in tree.parents) == 2
    scores = [1.0]
    for parent, confidence in zip(tree.parents, tree.confidence or (), strict=True):
        scores.append(scores[parent + 1] * confidence)
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_token_is_as_probable_as_its_stream_says_behind_the_one_before(
    temperature: float, conditioned: Path
) -> None:
    engine = streaming(conditioned, spec_tokens=9)
    submit(engine, "0", list(range(20)), replace(GREEDY, temperature=temperature))
    engine.step()
    proposer, (sequence,) = proposer_of(engine), [e.sequence for e in engine.scheduler._running]
    hidden, place = proposer._said[sequence.id]
    said = hidden[place].clone()
    (tree,) = proposer.propose([sequence], [9])
    token_ids = proposer._candidates([sequence])[sequence.id].token_ids
    decoder, weights = engine.runner.decoder, load_file(conditioned / "model.safetensors")

    def behind(state: torch.Tensor, token_id: int) -> torch.Tensor:
        unit = [x / x.square().mean().add(1e-6).sqrt() for x in (state, decoder.embedding[token_id])]
        read = [weights[f"token.{name}.weight"] @ x for name, x in zip(("said", "before"), unit, strict=True)]
        return state + weights["token.up.weight"] @ torch.nn.functional.silu(read[0] + read[1])

    first = decoder.logits(behind(said[0], sequence.token_ids[-1])[None])[0]
    assert float((first - decoder.logits(said[:1])[0]).abs().max()) > 0.1, "a token changes something"
    assert max(tree.depths()) > 1
    paths = tree.paths()
    for path, confidence in zip(paths, tree.confidence or (), strict=True):
        depth, before = len(path) - 1, [sequence.token_ids[-1], *path][-2]
        any_before, with_it = (
            decoder.logits(state[None])[0] / (temperature or 1.0)
            for state in (said[depth], behind(said[depth], before))
        )
        if depth:  # what is not considered counts as it does behind any token
            considered = token_ids[depth][: 2 if temperature else 16]
            any_before[considered] = with_it[considered]
            with_it = any_before
        assert confidence == pytest.approx(float(with_it.softmax(-1)[path[-1]]), rel=1e-3)


def test_a_higher_threshold_leaves_fewer_rows_with_streams_but_one_in_each_sequence(checkpoint: Path) -> None:
    def rows(threshold: float) -> list[float]:
        more = {"stream_min_prob": threshold}
        engine = streaming(checkpoint, spec_tokens=6, speculative_config=more)
        counted, forward = [], engine.runner.forward

        def count(batch: Batch, streams: StreamPass | None = None) -> Any:
            target = forward(batch, streams)
            counted.append(target.streams.num_rows if target.streams else 0.0)
            return target

        engine.runner.forward = count  # type: ignore[method-assign]
        submit(engine, "0", list(range(20)), GREEDY)
        run(engine)
        return counted

    every, some, one = rows(0.0), rows(0.2), rows(1.0)
    per_anchor = 3 * 0.5  # three streams through one of two layers
    assert max(every) == 7 * per_anchor
    assert sum(one) < sum(some) < sum(every)
    assert set(one) == {per_anchor, 0.0}  # none in the last steps


def test_with_limits_of_zero_no_stream_is_computed(
    checkpoint: Path, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = streaming(checkpoint, spec_policy="off")
    submit(engine, "0", "x", GREEDY)

    def fail(*_: object) -> None:
        raise AssertionError("streams ran")

    monkeypatch.setattr(StreamPass, "forward", fail)
    monkeypatch.setattr(Streaming, "_candidates", fail)
    assert tokens(run(engine)["0-0"]) == plain["greedy"][3]


def test_a_sequence_that_may_draft_again_has_its_streams_in_that_step_and_its_draft_in_the_next(
    checkpoint: Path,
) -> None:
    engine = streaming(checkpoint, spec_tokens=4)
    limits, sizes = iter([4, 4, 0, 4, 4]), []
    engine.policy.limits = lambda view: [next(limits)]  # type: ignore[method-assign]
    propose = engine.proposer.propose

    def noted(*args: Any) -> list[DraftTree]:
        trees = propose(*args)
        sizes.append(len(trees[0]))
        return trees

    engine.proposer.propose = noted  # type: ignore[method-assign, assignment]
    submit(engine, "0", list(range(20)), GREEDY)
    for _ in range(5):
        engine.step()
    assert sizes == [0, 4, 0, 0, 4]


def test_dear_rows_leave_streams_only_where_they_pay(checkpoint: Path) -> None:
    engine = streaming(checkpoint, spec_tokens=6)
    proposer = proposer_of(engine)
    sequence = started(engine, list(range(20)), 19)
    batch = engine.kv.place([Scheduled(sequence, 1, True)], [TREE])
    normed = torch.zeros(6, MODEL.hidden_size)
    stops: list[bool] = []

    def kept(prices: Prices) -> int:
        proposer.propose([sequence], [6])
        beside = proposer.streams(batch, prices)
        assert beside is not None
        stops.append(beside.choose is not None)
        return len((beside.choose(normed) if beside.choose else beside.anchors)[0])

    def at(each: float) -> Prices:
        return lambda rows, more: [each * num for num in more]

    counts = [kept(at(each)) for each in (0.0, 0.05, 0.2, 10.0)]
    assert counts[0] == 6
    assert stops == [False, True, False, False], "for what costs nothing, or is not wanted, no pass stops"
    fitting = (15 - batch.num_rows) // proposer._streams.config.num_streams
    assert kept(lambda rows, more: [10.0 * (rows + num > 15) for num in more]) == fitting > 1, (
        "no more than a stair has room for"
    )
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 1
    assert proposer.streams(batch, lambda rows, more: [0.0] * len(more)) is None, (
        "it was not asked for drafts in this step"
    )


def test_streams_that_could_not_be_used_are_not_computed(checkpoint: Path) -> None:
    engine = streaming(checkpoint, spec_tokens=6, max_model_len=24)
    proposer = proposer_of(engine)
    (request,) = engine.admission.requests("0", list(range(20)), replace(GREEDY, max_tokens=4))
    sequence = Sequence.start(request)
    engine.kv.blocks.reserve(sequence, 20)
    proposer.propose([sequence], [3])
    batch = engine.kv.place([Scheduled(sequence, 20, True)], [TREE])
    beside = proposer.streams(batch, lambda rows, more: [0.0] * len(more))
    assert beside is not None
    # after depth 2 one token is left, which the target gives
    assert beside.anchors == [[-1, 0, 1]]
    engine.kv.blocks.free(sequence)


# --- What is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_stream_layers": 2}, "num_stream_layers of streams must be below the model's 2 layers, got 2"),
        ({"lora_rank": 3}, "lora_rank of streams must be even and at least 0, got 3"),
        ({"token_rank": -1}, "token_rank of streams must be at least 0, got -1"),
        ({"num_streams": 0}, "num_streams of streams must be at least 1, got 0"),
        ({"lora_targets": ["x"]}, "lora_targets of streams must be among q_proj, .* got x"),
        ({"lora_rank": 0}, "lora_rank 0 of streams does not go with 4 lora_targets"),
    ],
)
def test_a_shape_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StreamConfig(**{"num_stream_layers": 1, **change}).weight_shapes(MODEL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_rank": "6"}, "token_rank of streaming in config.json must be int, got '6'"),
        ({"num_streams": True}, "num_streams of streaming in config.json must be int, got True"),
        ({"lora_targets": "q_proj"}, "lora_targets of streaming in config.json must be list, got 'q_proj'"),
        ({"lora_targets": [1]}, "lora_targets of streams must be among q_proj, .* got 1"),
    ],
)
def test_a_setting_of_another_type_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_streams(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["streaming"].update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        streaming(tmp_path)


@pytest.mark.parametrize("size", ["hidden_size", "vocab_size", "num_layers"])
def test_streams_of_another_model_are_refused_with_both_values(size: str, tmp_path: Path) -> None:
    write_streams(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["speculators_config"]["verifier"][size] = 1000
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=f"{size} 1000, this target has {getattr(MODEL, size)}"):
        streaming(tmp_path)


# --- Training -------------------------------------------------------------------------------------------


def fit(module: training.Streaming, batch: TrainBatch, num_steps: int = 60) -> dict[str, float]:
    """Trains on one batch; what the last step says."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    for _ in range(num_steps):
        loss, metrics = module(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": loss.item(), **metrics}


def acceptance(engine: Engine) -> float:
    """Accepted tokens per draft of the answer to "x"."""
    submit(engine, "0", "x", GREEDY)
    run(engine)
    return engine.metrics.drafts.num_accepted_tokens / engine.metrics.drafts.num_drafts


@pytest.fixture(scope="module")
def trained(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[training.Streaming, Path]:
    """Streams that know the answer to "x"."""
    module = trainable(lora_rank=16, adapters="all")
    batch = batch_of(module, [[ord("x"), *plain["greedy"][3]]])
    first = module(batch)[0].item()
    last = fit(module, batch)
    assert last["loss"] < first / 4
    assert last["accuracy_1"] > 0.9
    directory = tmp_path_factory.mktemp("trained")
    module.save(directory)
    return module, directory


def test_streams_learn_what_the_model_says_and_are_served_as_they_were_trained(
    trained: tuple[training.Streaming, Path], tmp_path: Path
) -> None:
    assert acceptance(streaming(write_streams(tmp_path), spec_tokens=3)) < 0.5
    assert acceptance(streaming(trained[1], spec_tokens=3)) > 2.0
    served_as_trained(streaming(trained[1]), trained[0])


def test_streams_learn_what_follows_from_a_token_that_they_could_not_know() -> None:
    generator = torch.Generator().manual_seed(3)

    def pairs() -> list[int]:
        """Tokens that nothing foretells, each with the one that always follows on it."""
        first = torch.randint(20, 60, (32,), generator=generator)
        return torch.stack((first, first + 100), 1).flatten().tolist()

    right = {}
    for rank in (0, 16):
        module = trainable(token_rank=rank, num_anchors=60)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for _ in range(60):
            loss, _ = module(batch_of(module, [pairs()]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        right[rank] = module.measure([batch_of(module, [pairs(), pairs()])])["accuracy_1"]
    assert right[0] < 0.1
    assert right[16] == pytest.approx(0.5, abs=0.1), "every other token follows from the one before"


def test_what_the_token_before_changes_is_served_as_it_was_trained(conditioned: Path) -> None:
    engine = streaming(conditioned)
    module, change = (
        trainable(conditioned, token_rank=6, layer_share=0.5),
        proposer_of(engine)._streams.change,
    )
    assert change is not None
    decoder = engine.runner.decoder
    said = torch.randn(4, 3, MODEL.hidden_size, generator=torch.Generator().manual_seed(0))
    before = torch.arange(12).view(4, 3)
    expected = module._behind(said, before).detach()
    changed = said.clone()
    units = decoder.kernels.change_first_(change, changed, decoder.embed(before[:, 0]))
    torch.testing.assert_close(changed[:, 0], expected[:, 0])
    assert torch.equal(changed[:, 1:], said[:, 1:])
    assert float((expected - said).abs().max()) > 0.1
    tokens, probs = (
        torch.arange(20, 70).repeat(4, 3, 1),
        torch.full((4, 3, 50), 0.02),
    )  # nothing else is likely
    tokens[:, 0, 0] = before[:, 1]
    index, chances = decoder.kernels.likeliest_behind(change, units, tokens, probs, torch.full((4,), 0.5), 50)
    logits = decoder.logits(expected[:, 1] - said[:, 1])[:, 20:70] / 0.5
    best = logits.softmax(-1).sort(descending=True)
    torch.testing.assert_close(chances[:, 1, 0], best.values, rtol=1e-4, atol=1e-7)
    assert torch.equal(index[:, 1, 0], best.indices)


def test_embeddings_learn_at_the_size_of_the_states_that_they_are_added_to() -> None:
    module = trainable()
    others, embeddings = module.groups(0.5)
    assert others["lr"] == 0.5
    assert embeddings["params"] == [module.weights["embeddings"]]
    assert len(others["params"]) + 1 == len(list(module.parameters()))
    states = batch_of(module, [list(range(40, 90))]).hidden[module._first]
    usual = states.square().mean(-1).sqrt().median().item()
    assert embeddings["lr"] == pytest.approx(0.5 * usual, rel=0.3)
    size = module.weights["embeddings"].square().mean().sqrt().item()
    assert size == pytest.approx(0.5 * usual, rel=0.5), "at first as well"


def test_the_loss_of_streams_counts_as_much_as_the_run_says() -> None:
    once, twice = (trainable(stream_weight=weight, num_anchors=256) for weight in (0.1, 0.2))
    losses = [module.loss(batch_of(module, [list(range(40, 90))]))[0].item() for module in (once, twice)]
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


@pytest.mark.parametrize("setting", [{"layer_share": 1.0}, {"stream_weight": 0.0}])
def test_training_that_makes_no_sense_is_refused(setting: dict[str, Any]) -> None:
    [(name, value)] = setting.items()
    with pytest.raises(ConfigError, match=f"{name} of streaming must be .*, got {value}"):
        trainable(**setting)
    with pytest.raises(ConfigError, match="tuned_layers streams of streaming needs mode shared"):
        trainable(tuned_layers="streams")


def test_in_lossless_training_the_model_stays_as_it_is(plain: Any) -> None:
    module = trainable(adapters="all")
    before = {name: weight.clone() for name, weight in module._trunk.model.state_dict().items()}
    fit(module, batch_of(module, [[ord("x"), *plain["greedy"][3]]]), num_steps=2)
    after = module._trunk.model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_what_an_anchor_learns_depends_neither_on_other_anchors_nor_on_other_documents(plain: Any) -> None:
    module = trainable(num_anchors=40)
    one, other = [ord("x"), *plain["greedy"][3]], [ord("y"), *plain["greedy"][2]]
    alone = batch_of(module, [one])
    packed = batch_of(module, [one + other])
    packed.positions[0, len(one) :] -= len(one)
    packed.documents[0, len(one) :] = 1
    packed.answer[0, len(one)] = False
    packed.hidden = module._trunk.hidden_states(
        packed.token_ids, packed.positions, packed.documents, module.hidden_layers
    )
    for batch in (alone, packed):
        main = module._lower(batch)
        few = torch.tensor([20]) if batch is alone else torch.tensor([3, 20, len(one) + 5])
        streams = module._start(main, few)
        module._step(1, main, streams)
        said = streams.hidden.unflatten(0, (-1, 3))[0 if batch is alone else 1]
        if batch is alone:
            expected = said
    torch.testing.assert_close(said, expected)
    # valid anchors are those whose next two tokens are answers of the same document
    _, valid = packed.future(1)
    drawn = draw(valid, 40, packed, seed=0)
    assert int(drawn.sum()) == 40
    assert bool(valid[drawn].all())
    assert torch.equal(drawn, draw(valid, 40, packed, seed=0))
    assert not torch.equal(drawn, draw(valid, 40, packed, seed=1))
    one_row = replace(packed, documents=torch.where(packed.documents == 1, -1, 0))
    # padding is left out
    assert [piece.rows for piece in module._lower(one_row).pieces] == [slice(0, len(one))]


@pytest.mark.parametrize(("mode", "tuned"), [("lossless", "all"), ("shared", "all"), ("shared", "streams")])
def test_streams_are_taught_by_what_the_model_says_at_the_tokens_that_they_guess(
    mode: str, tuned: str
) -> None:
    module = trainable(mode=mode, tuned_layers=tuned)
    batch = batch_of(module, [list(range(40, 70))])
    last = module._trunk.config.num_layers
    said = module._trunk.hidden_states(batch.token_ids, batch.positions, batch.documents, (last,))[last][0]
    main, anchors = module._lower(batch), torch.tensor([4, 20])
    module._upper(batch, main, module._start(main, anchors), torch.arange(30) >= 4)
    taught = module._teacher(main, anchors).hidden.view(2, 3, -1)
    torch.testing.assert_close(taught, torch.stack([said[5:8], said[21:24]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["llama-tied", "qwen2-sliding"])
def test_what_the_last_layer_makes_of_prompts_is_not_needed_to_learn_the_same(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = Trunk.load(write_checkpoint(tmp_path, variant), torch.float32)
    options: dict[str, Any] = {"mode": "shared", "tuned_layers": "streams", "adapters": "all"}
    module = trainable(trunk=trunk, layer_share=0.34, **options)
    token_ids = torch.arange(3, 93).view(2, 45)
    places = torch.arange(45).expand(2, 45)
    positions, documents = places % 20, places // 20
    hidden = trunk.hidden_states(token_ids, positions, documents, module.hidden_layers)
    batch = TrainBatch(token_ids, positions, documents, positions >= 12, hidden)  # of the last only prompts

    def learnt() -> dict[str, torch.Tensor]:
        module.zero_grad()
        loss, _ = module.loss(batch)
        loss.backward()
        return {
            name: weight.grad.clone() for name, weight in module.weights.items() if weight.grad is not None
        }

    found, upper = learnt(), module._upper

    def whole(batch: TrainBatch, main: Any, streams: Any, answers: torch.Tensor) -> None:
        upper(batch, main, streams, torch.ones_like(answers))

    monkeypatch.setattr(module, "_upper", whole)
    expected = learnt()
    assert found.keys() == expected.keys()
    assert any(float(gradient.abs().max()) > 0 for name, gradient in found.items() if "lora_B" in name)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_early_exit_learns_which_drafted_tokens_come_true(
    trained: tuple[training.Streaming, Path], plain: Any
) -> None:
    module, directory = trained
    engine = streaming(directory)
    answer = [ord("x"), *plain["greedy"][3]]
    early_exit = proposer_of(engine)._streams.early_exit
    assert early_exit is not None
    states = module._trunk.norm(batch_of(module, [answer]).hidden[module._first][0])
    rows, right = torch.arange(5, 35), torch.tensor(answer[6:36])
    wrong = (right + 7) % 256
    kernels = engine.runner.decoder.kernels
    probs = [
        kernels.exit_probs(early_exit, states, rows, tokens, torch.full((30,), q))
        for tokens, q in ((right, 0.9), (wrong, 0.01))
    ]
    assert probs[0].mean() > 0.8
    assert probs[1].mean() < 0.2


@pytest.mark.parametrize("tuned", ["all", "streams"])
def test_shared_training_writes_a_model_and_streams_that_fit_it(
    tuned: str, plain: Any, tmp_path: Path
) -> None:
    base = write_model(tmp_path / "base")
    trunk = Trunk.load(base, torch.float32)
    options: dict[str, Any] = {"mode": "shared", "lora_rank": 16, "adapters": "all", "tuned_layers": tuned}
    module = trainable(trunk=trunk, path=base, **options)
    wanted = [ord("x"), *plain["greedy"][2]]  # the model itself would say something else
    batch = batch_of(module, [wanted])
    assert fit(module, batch)["next_loss"] < 0.3
    module.save(tmp_path / "tuned")
    before, after = (load_file(of / "model.safetensors") for of in (base, tmp_path / "tuned"))
    changed = {name.split(".")[2] for name, weight in before.items() if not torch.equal(weight, after[name])}
    first = 0 if tuned == "all" else module._first
    assert changed == {str(layer) for layer in range(first, trunk.config.num_layers)}
    settings: dict[str, Any] = {"dtype": "float32", "kernels": "reference", "max_num_seqs": 4}
    streams: dict[str, Any] = {
        "spec_method": "streaming",
        "spec_model": str(tmp_path / "tuned" / "streams"),
        "spec_tokens": 3,
        "spec_policy": "fixed",
    }
    engines = [
        Engine.from_config(EngineConfig(str(tmp_path / "tuned"), **settings)),
        Engine.from_config(EngineConfig(str(tmp_path / "tuned"), **settings, **streams)),
    ]
    submit(engines[0], "0", "x", GREEDY)
    answer = tokens(run(engines[0])["0-0"])
    assert answer[:20] == wanted[1:21]
    assert acceptance(engines[1]) > 1.5
    submit(engines[1], "1", "x", GREEDY)
    assert tokens(run(engines[1])["1-0"]) == answer
