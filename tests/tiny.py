"""A tiny engine on the CPU, real or with a make-believe model, for tests of everything around the model.

    tiny_engine(max_num_seqs=4)         random weights, a real decoder, cache and verifier
    FakeModel().engine(max_num_seqs=4)  no tensors: the next token is a hash of all tokens before it

Both speak bytes: token i is byte i, and the special tokens follow.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from outpace.batch import Batch, BatchEntry, Decision, Scheduled, TargetOutput, Verdict
from outpace.config import BLOCK_SIZE, EngineConfig
from outpace.engine.engine import Engine, cached_models, choose_num_blocks
from outpace.kernels import load_kernels
from outpace.models.config import ModelConfig, RopeConfig
from outpace.models.decoder import Decoder
from outpace.policy.cost import CostModel
from outpace.request import Output
from outpace.request import Sequence as Running
from outpace.runtime.block_manager import BlockManager
from outpace.runtime.graphs import Graphs, record_all, run_as_it_is
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.runner import ModelRunner
from outpace.sampling import SamplingParams
from outpace.spec.proposer import Proposer
from outpace.spec.verifier import load_verifier, matched_path
from outpace.tree import EMPTY_TREE, DraftTree

EOS, USER, ASSISTANT = 256, 257, 258
VOCAB_SIZE = 259
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=512,
    rope=RopeConfig(),
    eos_token_ids=(EOS,),
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is byte i; then `<|eos|>`, `<|user|>` and `<|assistant|>`."""
    backend = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_chars())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = ("<|eos|>", "<|user|>", "<|assistant|>")
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|eos|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_chars() -> list[str]:
    """The visible character that byte-level tokenizers write for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def cost_model() -> CostModel:
    """A machine on which a few more rows are nearly free and many are not."""
    return CostModel([1, 8, 512], [1e-2, 1.1e-2, 0.5], per_pair=1e-7, per_sample=1e-5, host=(1e-3, 1e-5))


def tiny_engine(
    *,
    dtype: Any = "float32",
    kernels: Any = "reference",
    num_blocks: int | None = None,
    buckets: Sequence[int] = (),
    **settings: Any,
) -> Engine:
    """An engine with a randomly initialised model of two layers, always the same one.

    Its drafts have a fixed length unless a policy is named. With `buckets` its passes are padded to them, as
    those are that become CUDA graphs.
    """
    if "spec_method" in settings or "speculative_config" in settings:
        settings.setdefault("spec_policy", "fixed")
    settings = {"max_num_batched_tokens": 256, "max_model_len": 256, "num_threads": 1, **settings}
    config = EngineConfig(model="tiny", dtype=dtype, kernels=kernels, **settings)
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    weights = {name: weight.to(kind) for name, weight in _weights().items()}
    backend = load_kernels(
        config.kernels,
        kind,
        head_dim=MODEL.head_dim,
        widths=(MODEL.hidden_size, MODEL.intermediate_size),
        num_threads=config.num_threads or 1,
    )
    decoder = Decoder(MODEL, weights, kind, backend)
    blocks = num_blocks or choose_num_blocks(config, cached_models(config, MODEL), kind)
    kv = KVCache.of(decoder, blocks, config.enable_prefix_caching)
    verifier = load_verifier(config.speculative, backend)
    graphs = None
    if buckets:
        graphs = Graphs(decoder, kv, buckets, config.max_num_seqs, config.max_model_len or 0, run_as_it_is)
        record_all(graphs)
    parts = (kv, ModelRunner(decoder, kv, graphs), verifier)
    return Engine(config, MODEL, byte_tokenizer(), *parts, cost_model=cost_model)


def write_model(directory: Path, noise: float = 0.0, exit_layer: int | None = None, **config: Any) -> Path:
    """Writes the model of `tiny_engine` as a Hugging Face directory.

    Args:
        directory: Where to.
        noise: Change of every weight, as a share of its size: a model that is often right about the first.
        exit_layer: If given, layers from this one on add nothing.
        **config: Settings of config.json that replace the model's.
    """
    generator = torch.Generator().manual_seed(8)
    weights = {
        name: weight * (1 + noise * torch.randn(weight.shape, generator=generator))
        for name, weight in _weights().items()
    }
    for name, weight in weights.items():
        if exit_layer is not None and name.endswith(("o_proj.weight", "down_proj.weight")):
            weight *= int(name.split(".")[2]) < exit_layer
    shape = {
        "architectures": [MODEL.architecture],
        "vocab_size": MODEL.vocab_size,
        "hidden_size": MODEL.hidden_size,
        "intermediate_size": MODEL.intermediate_size,
        "num_hidden_layers": MODEL.num_layers,
        "num_attention_heads": MODEL.num_heads,
        "num_key_value_heads": MODEL.num_kv_heads,
        "rms_norm_eps": MODEL.rms_norm_eps,
        "max_position_embeddings": MODEL.max_position_embeddings,
        "eos_token_id": EOS,
    }
    byte_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(shape | config))
    save_file(weights, directory / "model.safetensors")
    return directory


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {name: _random_weight(name, shape, generator) for name, shape in MODEL.weight_shapes().items()}


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.1 * noise
    return noise if "embed" in name else noise * shape[-1] ** -0.5


SHARED = "You are a helpful assistant that answers briefly. "
PROMPTS = [
    SHARED + "What is the capital of France?",
    SHARED + "Name three colours.",
    "Once upon a time",
    "x",
    "def fibonacci(n):\n    " * 4,
    SHARED + "What is the capital of Spain?",
]
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
SAMPLED = replace(GREEDY, temperature=0.8, top_p=0.95, seed=11, presence_penalty=0.5, logprobs=2)


class FakeModel:
    """Stands in for cache, runner and verifier. Whatever is read from the cache is checked.

    A cache slot holds the hash of the tokens up to its own; a pass writes its rows' slots and reads all
    those before them, so that a block that is shared wrongly, overwritten or lost fails the test.

    Attributes:
        passes: Per forward pass the number of known rows of each sequence.
        on_forward: Called before each pass.
    """

    def __init__(
        self,
        next_token: Callable[[Sequence[int]], int] | None = None,
        on_forward: Callable[[], None] | None = None,
    ) -> None:
        self.next_token = next_token or hashed_token
        self.on_forward = on_forward or (lambda: None)
        self.passes: list[dict[str, int]] = []
        self.decoder = None  # there is none for a draft method to use
        self.close = lambda: None

    def engine(self, *, num_blocks: int = 64, **settings: Any) -> Engine:
        settings = {"max_model_len": min(256, num_blocks * BLOCK_SIZE), **settings}
        config = EngineConfig(model="fake", **settings)
        self.blocks = BlockManager(num_blocks, config.enable_prefix_caching)
        self.slots: dict[int, str] = {}
        parts: Any = self
        return Engine(config, MODEL, byte_tokenizer(), parts, parts, parts, cost_model)

    def place(self, scheduled: list[Scheduled], trees: list[DraftTree]) -> Batch:
        remaining = iter(trees)
        entries = []
        row = sample = 0
        for item in scheduled:
            tree = next(remaining) if item.samples else EMPTY_TREE
            assert len(tree) == 0 or tree.is_chain(), "the fake cache knows chains only"
            end = item.sequence.num_computed + item.num_known
            if not self.blocks.reserve(item.sequence, end + len(tree)):
                tree = EMPTY_TREE
            entries.append(
                BatchEntry(item.sequence, row, item.num_known, tree, sample if item.samples else None)
            )
            row += item.num_known + len(tree)
            sample += 1 + len(tree) if item.samples else 0
        nothing: Any = None
        return Batch(tuple(entries), torch.zeros(row, dtype=torch.int64), nothing, nothing)

    def forward(self, batch: Batch, streams: Any = None) -> TargetOutput:
        self.on_forward()
        self.passes.append({entry.sequence.id: entry.num_known for entry in batch.entries})
        for entry in batch.entries:
            tokens, start = _tokens(entry), entry.sequence.num_computed
            for index in range(start, len(tokens)):
                block = entry.sequence.block_ids[index // BLOCK_SIZE]
                assert self.blocks._num_users[block] == 1, "a shared block is written"
                self.slots[self._slot(entry.sequence, index)] = _digest(tokens[: index + 1])
        for entry in batch.entries:
            tokens = _tokens(entry)
            for index in range(len(tokens)):
                found = self.slots.get(self._slot(entry.sequence, index))
                assert found == _digest(tokens[: index + 1]), f"slot {index} of {entry.sequence.id} is wrong"
        return TargetOutput(torch.empty(0, VOCAB_SIZE))

    def verify(self, batch: Batch, target: TargetOutput, allowed: torch.Tensor | None = None) -> Verdict:
        return Verdict(tuple(self._decide(entry) for entry in batch.entries))

    def commit(self, batch: Batch, verdict: Verdict) -> None:
        for entry, decision in zip(batch.entries, verdict.decisions, strict=True):
            entry.sequence.num_computed += entry.num_known + (len(decision.path) if decision else 0)
            self.blocks.trim(entry.sequence)

    def _decide(self, entry: BatchEntry) -> Decision | None:
        if entry.first_sample is None:
            return None
        known = entry.sequence.token_ids
        chosen = [self.next_token([*known, *entry.tree.token_ids[:n]]) for n in range(len(entry.tree) + 1)]
        path = matched_path(entry.tree, chosen)
        return Decision(path, tuple(chosen[: len(path) + 1]))

    def _slot(self, sequence: Running, index: int) -> int:
        return sequence.block_ids[index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE


def _tokens(entry: BatchEntry) -> list[int]:
    known = entry.sequence.token_ids[: entry.sequence.num_computed + entry.num_known]
    return [*known, *entry.tree.token_ids]


def _digest(tokens: Sequence[int]) -> str:
    return hashlib.blake2b(repr(list(tokens)).encode(), digest_size=8).hexdigest()


def hashed_token(tokens: Sequence[int]) -> int:
    """A lower-case letter or a space that depends on every token."""
    return b"abcdefghijklmnopqrstuvwxyz "[int(_digest(tokens), 16) % 27]


def submit(
    engine: Engine, request_id: str, prompt: str | Sequence[int], sampling: SamplingParams, priority: int = 0
) -> None:
    """Admits a client request."""
    ids = engine.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    engine.add(engine.admission.requests(request_id, ids, sampling, priority))


def run(engine: Engine, max_steps: int = 5000) -> dict[str, list[Output]]:
    """Steps until all work is done, checks that no block is lost, and gives the outputs by engine request."""
    outputs: dict[str, list[Output]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            break
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    assert not engine.has_work, "the engine does not come to an end"
    check_idle(engine)
    return outputs


def check_idle(engine: Engine) -> None:
    """An engine without work has every block back."""
    engine.kv.blocks.check()
    assert engine.kv.blocks.num_free_blocks == engine.kv.blocks.num_blocks


def text(outputs: list[Output]) -> str:
    """The answer's text."""
    return "".join(output.text for output in outputs)


def tokens(outputs: list[Output]) -> list[int]:
    """The answer's tokens."""
    return [token_id for output in outputs for token_id in output.token_ids]


def answers(engine: Engine, sampling: SamplingParams, stagger: int | None = None) -> list[list[int]]:
    """The answers to all prompts, given one every `stagger` steps, or all at once."""
    got: dict[str, list[int]] = {}

    def note(outputs: list[Any]) -> None:
        for output in outputs:
            got.setdefault(output.request_id, []).extend(output.token_ids)

    for number, prompt in enumerate(PROMPTS):
        submit(engine, str(number), prompt, sampling)
        for _ in range(stagger or 0):
            note(engine.step())
    for request_id, outputs in run(engine).items():
        got.setdefault(request_id, []).extend(tokens(outputs))
    return [got[f"{number}-0"] for number in range(len(PROMPTS))]


class Guesser(Proposer):
    """Drafts what a past run answered, with mistakes and branches."""

    def __init__(self, known: dict[str, list[int]]) -> None:
        self.known = known
        self.released: list[str] = []

    def propose(self, sequences: list[Running], limits: list[int]) -> list[DraftTree]:
        trees = []
        for sequence, limit in zip(sequences, limits, strict=True):
            right = self.known[sequence.id][sequence.num_output :][:3]
            if len(right) < 3:
                trees.append(DraftTree())
                continue
            wrong = [(token + 1) % MODEL.vocab_size for token in right]
            last = (right if sequence.num_output % 2 else wrong)[2]
            tree = DraftTree((-1, -1, 1, 1, 3), (wrong[0], right[0], wrong[1], right[1], last))
            trees.append(tree.cut(limit))
        return trees

    def release(self, sequence_id: str) -> None:
        self.released.append(sequence_id)
