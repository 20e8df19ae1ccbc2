"""Where tensors live: one copy in, one copy out, and nothing in between for which the host waits.

Torch's `meta` device stands in for a GPU: its tensors have shapes and no values, so whatever reads one on the
host is an error here as it would be a stall there. `Apart` does the same for what mixes it with the host's.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from outpace import sampling
from outpace.batch import Batch
from outpace.config import EngineConfig
from outpace.device import CPU, Download, Packing, choose_device, indices, upload
from outpace.engine.engine import check_device, choose_dtype
from outpace.errors import ConfigError
from outpace.kernels import Heads, Kernels, LayerAttention, Linear, RopeTable, Rows
from outpace.models.decoder import Decoder
from outpace.models.loader import dummy_weights
from outpace.request import Sequence
from outpace.runtime.graphs import Graphs, record_all, run_as_it_is
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.runner import ModelRunner
from outpace.sampling import SamplingParams
from outpace.spec import drafter
from outpace.spec.verifier import MatchVerifier, SyntheticVerifier, Verifier
from outpace.tree import DraftTree
from tiny import MODEL, tiny_engine

META = torch.device("meta")
TREE = DraftTree((-1, 0, 0, 1), (5, 6, 7, 8))
EVERYTHING = SamplingParams(
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    min_p=0.01,
    presence_penalty=0.1,
    frequency_penalty=0.2,
    repetition_penalty=1.2,
    logit_bias={3: 1.0},
    min_tokens=2,
    allowed_token_ids=(1, 2, 3, 4),
)


# --- Copies ---------------------------------------------------------------------------------------------


def test_packed_tensors_lie_aligned_in_one_buffer_and_do_not_overlap() -> None:
    tensors = [torch.arange(5), torch.arange(3, dtype=torch.int32), torch.ones(2, 3), torch.tensor([True])]
    packing = Packing([(tensor.dtype, tuple(tensor.shape)) for tensor in tensors])
    buffer = packing.buffer()
    views = packing.views(buffer)
    for view, tensor in zip(views, tensors, strict=True):
        view.copy_(tensor)
    for view, tensor, start in zip(views, tensors, packing.starts, strict=True):
        assert torch.equal(view, tensor)
        assert start % 64 == 0
    assert packing.num_bytes == len(buffer) < 4 * 64


def test_on_the_cpu_nothing_is_copied() -> None:
    tensors = [torch.arange(5), torch.ones(2)]
    assert [a is b for a, b in zip(upload(tensors, CPU), tensors, strict=True)] == [True, True]
    batch = a_batch([])
    assert batch.to(CPU) is batch
    assert Download(tensors[0]).tolist() == [0, 1, 2, 3, 4]


def test_an_upload_keeps_types_and_shapes() -> None:
    tensors = [torch.arange(5), torch.ones(2, 3), torch.zeros(0, dtype=torch.int32)]
    for tensor, there in zip(tensors, upload(tensors, META), strict=True):
        assert (there.device, there.dtype, there.shape) == (META, tensor.dtype, tensor.shape)
    assert indices([3, 4], META).shape == (2,)


# --- Choice ---------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error() -> None:
    assert choose_device("auto") == CPU
    assert choose_device("cpu") == CPU
    with pytest.raises(ConfigError, match=r"--device cuda:1: .*; use --device cpu"):
        choose_device("cuda:1")


@pytest.mark.usefixtures("two_gpus")
def test_with_gpus_auto_is_the_first_one_if_there_are_kernels_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("auto") == torch.device("cuda", 0)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_dtype(EngineConfig(), torch.device("cuda", 0)) == torch.bfloat16
    assert choose_dtype(EngineConfig(dtype="float32"), torch.device("cuda", 0)) == torch.float32
    with pytest.raises(ConfigError, match=r"--device cuda:2: there are 2 GPUs"):
        choose_device("cuda:2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_device("auto") == CPU
    with pytest.raises(ConfigError, match=r"--device cuda: its kernels need triton: .* or use --device cpu"):
        choose_device("cuda")


def test_what_is_for_gpus_only_is_refused_on_a_cpu() -> None:
    for settings in ({"gpu_memory_utilization": 0.5}, {"cudagraph_capture_sizes": [1, 8]}):
        config = EngineConfig(**settings)
        check_device(config, torch.device("cuda", 0))
        with pytest.raises(ConfigError, match="is for a GPU, and the model runs on the CPU"):
            check_device(config, CPU)
    check_device(EngineConfig(enforce_eager=True), CPU)  # as it runs there anyway


# --- No waiting in the middle of a step -----------------------------------------------------------------


class Shapes(Kernels):
    """Kernels that give what has the right shape, on any device."""

    name = build = "shapes"

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Linear:
        return lambda x: torch.nn.functional.linear(x, weight, bias)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return x * weight

    def add_rms_norm(
        self, delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        residual += delta
        return residual * weight

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate * up

    def attention(self, heads: Heads, rope: RopeTable, eps: float, rows: Rows) -> LayerAttention:
        assert {getattr(rows, name).device for name in Rows.__slots__} == {rope.cos_sin.device}

        class Attention(LayerAttention):
            def __call__(self, qkv: torch.Tensor, *rest: Any) -> torch.Tensor:
                return qkv[:, : heads.num_heads * heads.head_dim].contiguous()

        return Attention()

    def filter_logits_(self, logits: torch.Tensor, *limits: torch.Tensor) -> None:
        logits.mul_(sum(limit.unsqueeze(1) for limit in limits))

    def noisy_argmax(self, logits: torch.Tensor, *keys: torch.Tensor) -> torch.Tensor:
        return (logits.argmax(dim=1) + sum(keys)).long()


def a_batch(drafts: list[SamplingParams], tree: DraftTree = TREE, kv: KVCache | None = None) -> Batch:
    """A batch of one sequence for each of the given parameters, and one that does not sample."""
    from outpace.batch import Scheduled

    kv = kv or KVCache(MODEL, 32, torch.float32, enable_prefix_caching=False)
    admission = tiny_engine().admission
    scheduled = []
    for number, params in enumerate([SamplingParams(), *drafts]):
        (request,) = admission.requests(str(number), [1, 2, 3], params)
        sequence = Sequence.start(request)
        kv.blocks.reserve(sequence, 3)
        scheduled.append(Scheduled(sequence, 3, samples=number > 0))
    return kv.place(scheduled, [tree] * len(drafts))


class Apart(TorchDispatchMode):
    """Lets no operation mix the host's tensors with others, but copies, and counts those.

    Attributes:
        num_copies: Copies from the host.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        kinds = {tensor.device.type for tensor in tensors if tensor.dim()}
        if func is torch.ops.aten._to_copy.default:
            self.num_copies += kinds == {"cpu"} and torch.device(kwargs.get("device") or "cpu") == META
        elif func is torch.ops.aten.copy_.default:
            self.num_copies += kinds == {"cpu", "meta"}
        else:
            assert len(kinds) <= 1, f"{func} mixes tensors of {kinds}"
        return func(*args, **kwargs)


class ArrivedError(Exception):
    """The host waits for the tokens."""


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What was sent to the host; the first one that it waits for ends the test."""
    sent: list[torch.Tensor] = []

    class Noting(Download):
        def __init__(self, tensor: torch.Tensor) -> None:
            sent.append(tensor)

        def tolist(self) -> list[Any]:
            raise ArrivedError

    monkeypatch.setattr(sampling, "Download", Noting)
    monkeypatch.setattr(drafter, "Download", Noting)
    return sent


@pytest.mark.parametrize("buckets", [(), (64,)], ids=["eager", "padded"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("synthetic", [False, True])
def test_from_the_batch_to_its_tokens_the_host_waits_once(
    downloads: list[torch.Tensor], buckets: tuple[int, ...], masked: bool, synthetic: bool
) -> None:
    kernels = Shapes()
    runner, kv = a_runner(kernels, buckets)
    params = [SamplingParams(temperature=0), EVERYTHING, replace(EVERYTHING, temperature=0)]
    batch = a_batch(params, kv=kv)
    verifier: Verifier = SyntheticVerifier(kernels, [0.5]) if synthetic else MatchVerifier(kernels)
    with Apart() as apart:
        target = runner.forward(batch)
    assert apart.num_copies == 1  # the batch
    assert target.logits.shape == (3 * (1 + len(TREE)), MODEL.vocab_size)
    allowed = torch.ones(target.logits.shape, dtype=torch.bool) if masked else None
    with pytest.raises(ArrivedError), Apart():
        verifier.verify(batch, target, allowed)
    (tokens,) = downloads
    assert (tokens.device, tokens.shape) == (META, (3 * (1 + len(TREE)),))


def test_a_greedy_step_takes_one_copy_to_the_device_and_one_back(downloads: list[torch.Tensor]) -> None:
    kernels = Shapes()
    runner, kv = a_runner(kernels, (64,))
    batch = a_batch([SamplingParams(temperature=0)] * 3, kv=kv)
    with pytest.raises(ArrivedError), Apart() as apart:
        MatchVerifier(kernels).verify(batch, runner.forward(batch))
    assert apart.num_copies == 1  # the batch
    assert len(downloads) == 1


def test_candidates_of_a_draft_come_to_the_host_together(downloads: list[torch.Tensor]) -> None:
    rows = [sampling.SampleRow(entry.sequence) for entry in a_batch([EVERYTHING] * 2).entries]
    with pytest.raises(ArrivedError), Apart():
        drafter.likely_tokens(torch.empty(3, MODEL.vocab_size, device=META), rows, 4, Shapes())
    assert len(downloads) == 2  # tokens and probabilities of all ranks


def a_runner(kernels: Kernels, buckets: tuple[int, ...]) -> tuple[ModelRunner, KVCache]:
    """A runner of the tiny model on the device without values, and its cache."""
    weights = {name: torch.empty(shape, device=META) for name, shape in MODEL.weight_shapes().items()}
    decoder = Decoder(MODEL, weights, torch.float32, kernels)
    kv = KVCache(MODEL, 32, torch.float32, enable_prefix_caching=False, device=META)
    if not buckets:
        return ModelRunner(decoder, kv), kv
    graphs = Graphs(decoder, kv, buckets, max_sequences=8, max_model_len=64, recorder=run_as_it_is)
    record_all(graphs)
    return ModelRunner(decoder, kv, graphs), kv


# --- Random weights -------------------------------------------------------------------------------------


def test_dummy_weights_are_complete_always_the_same_and_keep_states_in_range() -> None:
    weights = dummy_weights(MODEL, torch.float32)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == MODEL.weight_shapes()
    again = dummy_weights(MODEL, torch.float32)
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
    engine = tiny_engine()
    decoder = Decoder(MODEL, dict(weights), torch.float32, engine.runner.decoder.kernels)
    batch = a_batch([SamplingParams()])
    kv = KVCache(MODEL, 32, torch.float32, enable_prefix_caching=False)
    hidden = decoder.forward(batch.token_ids, batch.rows, decoder.stack(kv.layers))
    assert 0.5 < float(hidden.std()) < 2
