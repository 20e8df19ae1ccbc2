"""The engine: one straight step from a plan to outputs, and how an engine is built from its settings."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from outpace.config import BLOCK_SIZE, EngineConfig, flag
from outpace.device import CPU, choose_device
from outpace.engine.admission import Admission
from outpace.engine.detokenizer import detokenizer_factory
from outpace.engine.gpu_memory import DEFAULT_UTILIZATION, Use, measure_use
from outpace.engine.metrics import Metrics
from outpace.engine.profile import load_or_measure
from outpace.engine.scheduler import Scheduler
from outpace.engine.step_log import StepLog
from outpace.errors import ConfigError
from outpace.models.config import ModelConfig
from outpace.models.decoder import Decoder
from outpace.models.hub import resolve_model, resolve_tokenizer
from outpace.models.loader import load_config
from outpace.models.shard import Shard
from outpace.models.tokenizer import load_tokenizer
from outpace.policy.base import BatchView, PolicyContext, StepRecord, check_policy, load_policy
from outpace.policy.cost import CostModel
from outpace.request import Output, Request, Sequence
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.parallel import Part, start
from outpace.runtime.runner import ModelRunner
from outpace.spec.grammar import GrammarStates
from outpace.spec.proposer import DraftContext, check_methods, load_proposer
from outpace.spec.several import Several
from outpace.spec.verifier import Verifier, load_verifier
from outpace.tree import DraftTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
_BF16_CAPABILITY = (8, 0)  # of a GPU
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # the last is Arm's
_TYPICAL_LEN = 1024  # tokens per running sequence that the default cache has room for


class Engine:
    """Owns one of each part. Synchronous, for one thread at a time.

    Attributes:
        config: Its settings.
        model: The shape of its model.
        tokenizer: The model's.
        model_name: As the settings name it.
        max_model_len: Most tokens of prompt and answer.
        admission: Makes requests that `add` accepts.
        metrics: What it did.
        scheduler: Who runs.
        policy: How much is drafted.
        proposer: What is drafted.
        kv: Its cache.
        runner: Its model over that cache.
        grammars: Where constrained answers stand in their grammars.
        verifier: Which tokens come out.
        step_log: Where steps are written down, if anywhere.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: ModelConfig,
        tokenizer: PreTrainedTokenizerFast,
        kv: KVCache,
        runner: ModelRunner,
        verifier: Verifier,
        cost_model: Callable[[], CostModel] | None = None,
    ) -> None:
        """Joins the parts.

        Args:
            config: The settings.
            model: The model's shape.
            tokenizer: The model's.
            kv: An empty cache.
            runner: The model over that cache.
            verifier: Decides which tokens come out.
            cost_model: What steps cost, for policies that ask; None measures it, or reads what was measured.

        Raises:
            ConfigError: A setting does not fit the model or the cache.
        """
        self.config, self.model, self.tokenizer, self.kv = config, model, tokenizer, kv
        self.model_name = config.model or DEFAULT_MODEL_NAME
        self.max_model_len = max_model_len(config, model)
        self.admission = Admission(config, model, tokenizer, self.max_model_len)
        self.scheduler = Scheduler(config, kv.blocks, detokenizer_factory(tokenizer))
        self.proposer = load_proposer(DraftContext(config, tokenizer, model, kv, runner))
        self._several = self.proposer if isinstance(self.proposer, Several) else None
        self.grammars = GrammarStates(tokenizer, model.vocab_size)
        self.runner, self.verifier = runner, verifier
        costs = functools.cache(
            cost_model or functools.partial(load_or_measure, config, kv, runner, verifier)
        )
        speculative = config.speculative
        self.policy = load_policy(config.policy, PolicyContext(speculative, config, costs))
        if config.spec_profile is not None and not costs.cache_info().misses:
            raise ConfigError(
                f"{flag('spec_profile')} is for policies that ask what steps cost: {config.policy} does not"
            )
        max_depth = speculative.num_speculative_tokens if speculative.methods else 0
        self.metrics = Metrics(self.model_name, self.scheduler, max_depth, speculative.methods)
        self.step_log = None if config.step_log is None else StepLog(Path(config.step_log))

    @classmethod
    def from_config(cls, config: EngineConfig) -> Engine:
        """Loads a model and builds its engine. The calling thread should be the one that steps it.

        Raises:
            ConfigError: The model cannot be had or a setting does not fit it.
        """
        check_methods(config.speculative)
        check_policy(config.policy)
        device = choose_device(config.device)
        check_device(config, device)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # of this thread: where streams, graphs and kernels go
        path = resolve_model(config.model, config.revision, weights=config.load_format != "dummy")
        model = load_config(path)
        dtype = choose_dtype(config, device)
        cached = cached_models(config, Shard(0, config.tensor_parallel_size).config(model))
        tokenizer = load_tokenizer(resolve_tokenizer(config.tokenizer) if config.tokenizer else path)
        if config.load_format == "dummy":
            logger.warning("weights are random (--load-format dummy): answers mean nothing")

        def num_blocks(decoder: Decoder) -> int:
            if device.type == "cpu":
                return choose_num_blocks(config, cached, dtype)
            verifier = load_verifier(config.speculative, decoder.kernels)
            return choose_num_gpu_blocks(config, cached, dtype, measure_use(config, decoder, verifier))

        runner, kv = start(config, Part.of(config, path, dtype, device), num_blocks)
        kernels, tokens = runner.decoder.kernels, kv.blocks.num_blocks * BLOCK_SIZE
        if config.speculative.is_synthetic:
            logger.warning("drafts are accepted by chance, at synthetic rates: answers mean nothing")
        logger.info("KV cache of %d tokens in %s on %s, kernels: %s", tokens, dtype, device, kernels.name)
        try:
            return cls(config, model, tokenizer, kv, runner, load_verifier(config.speculative, kernels))
        except BaseException:
            runner.close()
            raise

    def close(self) -> None:
        """Ends the processes of other ranks, if there are any, and the step log. No step may follow."""
        self.runner.close()
        if self.step_log is not None:
            self.step_log.close()

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return self.scheduler.has_work

    def add(self, requests: list[Request]) -> None:
        """Puts requests in line: all of them or none.

        Raises:
            OverloadedError: The queue has no room for them.
            InvalidRequestError: One could never run, or its id is in use.
        """
        self.scheduler.add(requests)

    def abort(self, request_id: str) -> Output | None:
        """Ends a request and frees its blocks at once.

        Returns:
            Its finished Output, or None if there is no such request.
        """
        output = self.scheduler.abort(request_id)
        if output is not None:
            self._release(request_id)
            self.metrics.abort(request_id)
        return output

    def reset_prefix_cache(self) -> None:
        """Forgets the prompts that it has answered, its draft methods' caches included."""
        self.kv.blocks.reset_prefix_cache()
        self.proposer.reset_prefix_cache()

    def step(self) -> list[Output]:
        """Runs one forward pass, if there is work; returns what it added to each answer that sampled."""
        if not self.has_work:
            return []
        lap = self.metrics.lap
        self.metrics.start_step()
        plan = self.scheduler.plan()
        lap("plan")
        view = plan.view()
        limits = self.policy.limits(view)
        lap("policy")
        trees = self._propose(view, plan.decoding, limits)
        trees = self.grammars.fit(plan.decoding, limits, trees)
        lap("propose")
        trees = self._trim(view, trees)
        lap("policy")
        batch = self.kv.place(plan.scheduled, trees)
        target = self.runner.forward(batch, self.proposer.streams(batch, self.policy.prices))
        lap("forward")
        verdict = self.verifier.verify(batch, target, self.grammars.allowed(batch))
        self.kv.commit(batch, verdict)
        lap("verify")
        self.proposer.observe(batch, target, verdict)
        lap("propose")
        outputs = self.grammars.judge(self.scheduler.advance(plan, verdict))
        lap("advance")
        methods = self._several.records if self._several is not None else ()
        predicted_s = self.policy.predicted_s
        self._learn(self.metrics.record(view, limits, batch, target, verdict, predicted_s, methods))
        lap("policy")
        self.metrics.finish_step(plan.decoding, outputs)
        for output in outputs:
            if output.finish_reason is not None:
                self._release(output.request_id)
        return outputs

    def _propose(self, view: BatchView, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        """Asks the draft method; of several those that the policy wants, and takes the trees it prefers."""
        if self._several is None:
            return self.proposer.propose(sequences, limits)
        drafts = self._several.ask(sequences, limits, self.policy.methods(view))
        self.metrics.lap("propose")
        picked = self.policy.pick(view, {name: _shown(trees) for name, trees in drafts.items()})
        self.metrics.lap("policy")
        return self._several.take(picked)

    def _learn(self, record: StepRecord) -> None:
        self.policy.observe(record)
        if self.step_log is not None:
            self.step_log.write(record)

    def _release(self, request_id: str) -> None:
        self.proposer.release(request_id)
        self.grammars.release(request_id)
        self.policy.release(request_id)

    def _trim(self, view: BatchView, trees: list[DraftTree]) -> list[DraftTree]:
        """Cuts trees to what the policy keeps, and never lets one reach beyond its answer's end."""
        most = [sequence.max_draft for sequence in view.sequences]
        kept = self.policy.trim(view, _shown(trees))
        if kept is not None:
            most = [min(pair) for pair in zip(most, kept, strict=True)]
        return [tree.cut(num_nodes) for tree, num_nodes in zip(trees, most, strict=True)]


def _shown(trees: list[DraftTree]) -> list[DraftTree]:
    """Drafts as a policy may see them."""
    # tokens that were drawn would no longer follow their q if they had a say in what is cut
    return [tree if tree.probs is None else replace(tree, confidence=None) for tree in trees]


def max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    """Most tokens of prompt and answer: the setting, or else the model's own limit.

    Raises:
        ConfigError: The setting is above the model's limit.
    """
    if config.max_model_len is None:
        return model.max_position_embeddings
    if config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"{flag('max_model_len')} {config.max_model_len} is above the model's limit of "
            f"{model.max_position_embeddings} positions"
        )
    return config.max_model_len


def check_device(config: EngineConfig, device: torch.device) -> None:
    """Refuses settings that say nothing to a device.

    Raises:
        ConfigError: One is for GPUs and the model runs on a CPU, or one GPU is named and there are several.
    """
    if device.type == "cuda":
        if config.tensor_parallel_size > 1 and device.index:
            raise ConfigError(
                f"{flag('tensor_parallel_size')} {config.tensor_parallel_size} takes the first GPUs: give "
                f"{flag('device')} cuda instead of {device}, and choose with CUDA_VISIBLE_DEVICES"
            )
        return
    for name in ("gpu_memory_utilization", "cudagraph_capture_sizes"):
        if (value := getattr(config, name)) is not None:
            instead = (
                f" ({flag('kv_cache_memory_bytes')} sizes the KV cache there)" if "memory" in name else ""
            )
            raise ConfigError(
                f"{flag(name)} {value} is for a GPU, and the model runs on the CPU{instead}: leave it out, "
                f"or choose a GPU with {flag('device')} cuda"
            )


def choose_dtype(config: EngineConfig, device: torch.device = CPU) -> torch.dtype:
    """The type of weights and cache; `auto` is bfloat16 where the device has arithmetic for it."""
    named = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if config.dtype != "auto":
        return named[config.dtype]
    if device.type == "cuda":
        able_to = torch.cuda.get_device_capability(device) >= _BF16_CAPABILITY
        return torch.bfloat16 if able_to else torch.float32
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if any(able.get(name) for name in _BF16_INSTRUCTIONS) else torch.float32


def cached_models(config: EngineConfig, target: ModelConfig) -> list[ModelConfig]:
    """The models that have a cache: the target, and a draft model if that is among the methods.

    Raises:
        ConfigError: The draft model cannot be had.
    """
    speculative = config.speculative
    if "draft_model" not in speculative.methods:
        return [target]
    return [target, load_config(resolve_model(speculative.model))]


def choose_num_blocks(config: EngineConfig, models: list[ModelConfig], dtype: torch.dtype) -> int:
    """Blocks of each KV cache; the default is what the help of --kv-cache-memory-bytes says.

    Args:
        config: The settings.
        models: The target, then others whose caches hold the same tokens.
        dtype: Type of the caches.

    Raises:
        ConfigError: The cache would not hold one sequence of the longest length, or not fit the machine.
    """
    longest, num_needed, block_bytes = _block_needs(config, models, dtype)
    if config.kv_cache_memory_bytes is None:
        typical = -(-min(longest, _TYPICAL_LEN) // BLOCK_SIZE)
        num_blocks = max(config.max_num_seqs * typical, num_needed)
    else:
        num_blocks = config.kv_cache_memory_bytes // block_bytes
    if num_blocks < num_needed:
        raise ConfigError(
            f"{flag('kv_cache_memory_bytes')} {config.kv_cache_memory_bytes} holds {num_blocks * BLOCK_SIZE} "
            f"tokens, fewer than one sequence of {longest}: give at least {num_needed * block_bytes} "
            f"or lower {flag('max_model_len')}"
        )
    num_others = config.tensor_parallel_size - 1  # ranks, which have the target's only
    cache_bytes = num_blocks * (block_bytes + num_others * KVCache.block_bytes(models[0], dtype))
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if cache_bytes > memory_bytes:
        raise ConfigError(
            f"a KV cache of {cache_bytes} bytes exceeds this machine's memory of {memory_bytes}: "
            f"lower {flag('kv_cache_memory_bytes')} (without it, {flag('max_num_seqs')})"
        )
    return num_blocks


def choose_num_gpu_blocks(
    config: EngineConfig, models: list[ModelConfig], dtype: torch.dtype, use: Use
) -> int:
    """Blocks of each KV cache on a GPU: those of --kv-cache-memory-bytes, else as many as there is room for.

    Args:
        config: The settings.
        models: As `choose_num_blocks` takes them.
        dtype: Type of the caches.
        use: What else needs the memory.

    Raises:
        ConfigError: The cache would not hold one sequence of the longest length, or not fit the GPU.
    """
    longest, num_needed, block_bytes = _block_needs(config, models, dtype)
    given = config.kv_cache_memory_bytes
    utilization = config.gpu_memory_utilization or DEFAULT_UTILIZATION
    room = use.left(1.0 if given is not None else utilization)
    # One more block than there are: the null block.
    num_blocks = (room if given is None else given) // block_bytes - 1
    if given is not None and given > room:
        raise ConfigError(
            f"{flag('kv_cache_memory_bytes')} {given} exceeds what weights and passes leave of the GPU's "
            f"memory, {room} bytes ({use}): lower it"
        )
    if num_blocks < num_needed:
        more = (
            f"raise {flag('kv_cache_memory_bytes')}"
            if given is not None
            else (f"raise {flag('gpu_memory_utilization')} ({utilization})")
        )
        raise ConfigError(
            f"a KV cache of {max(num_blocks, 0) * BLOCK_SIZE} tokens on the GPU ({use}) holds fewer than one "
            f"sequence of {longest}, which needs {(num_needed + 1) * block_bytes} bytes: {more}, or lower "
            f"{flag('max_model_len')}, {flag('max_num_batched_tokens')} or {flag('max_num_seqs')}"
        )
    return num_blocks


def _block_needs(config: EngineConfig, models: list[ModelConfig], dtype: torch.dtype) -> tuple[int, int, int]:
    """Tokens of the longest sequence, the blocks that it needs, and the bytes of a block of all caches."""
    longest = max_model_len(config, models[0])
    block_bytes = sum(KVCache.block_bytes(model, dtype) for model in models)
    return longest, -(-longest // BLOCK_SIZE), block_bytes
