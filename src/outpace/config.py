"""Every setting, once: its name, type, default and help. Flags, environment and YAML come from here."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from outpace.errors import ConfigError

METHOD_ALIASES = {"ngram": "prompt_lookup"}  # vLLM's names of draft methods
MODEL_METHODS = ("draft_model", "medusa", "redrafter", "streaming")  # need weights: `model`
DEFAULT_METHOD = "prompt_lookup"  # of the default model: it needs no weights, and costs next to nothing
DEFAULT_DRAFT = "default"  # the trained draft for the default model that comes with this package,
DEFAULT_DRAFT_METHODS = ("redrafter", "streaming")  # for each of these methods one
BLOCK_SIZE = 16  # tokens in a cache block; also the tile of the CPU attention kernel


def setting(default: Any, help: str, positional: bool = False) -> Any:
    """A dataclass field with its help text.

    Args:
        default: The default value.
        help: One sentence for `--help` and the docs.
        positional: Whether it may also be given without its flag.
    """
    return dataclasses.field(default=default, metadata={"help": help, "positional": positional})


_TABLE = "num_speculative_tokens_per_batch_size"


@dataclass(frozen=True)
class SpeculativeConfig:
    """How drafts are made: the keys of --speculative-config, vLLM's where it has them."""

    method: str = setting(
        "none", "Draft method, a name of spec/proposers, or several with commas; ngram is prompt_lookup"
    )
    num_speculative_tokens: int = setting(
        12, "Most draft tokens for a sequence in a step (policy fixed: always)"
    )
    model: str | None = setting(
        None,
        "draft_model: Hugging Face directory or hub id, or a GGUF file; "
        "medusa, redrafter, streaming: what outpace train wrote, or default, the draft that comes with the "
        "default model",
    )
    num_speculative_tokens_per_batch_size: tuple[tuple[int, int, int], ...] = setting(
        (), "policy batch_table: [first batch size, last, draft tokens] each; without it, from the profile"
    )
    prompt_lookup_min: int = setting(2, "prompt_lookup: shortest match that gives a draft, in tokens")
    prompt_lookup_max: int = setting(
        32, "prompt_lookup: longest match looked for; the longer it is, the surer is what followed"
    )
    suffix_decoding_max_tree_depth: int = setting(24, "suffix: longest match and longest draft")
    suffix_decoding_max_cached_requests: int = setting(10000, "suffix: finished answers kept")
    suffix_decoding_max_spec_factor: float = setting(1.0, "suffix: longest draft per token of match")
    suffix_decoding_min_token_prob: float = setting(
        0.1, "suffix: least estimated probability of a drafted path"
    )
    draft_branching: int | None = setting(
        None,
        "Tokens drafted at each depth; the default is 1 for draft_model and self_draft, whose chain goes on "
        "from the first of them, and the checkpoint's for streaming, where any may go on",
    )
    stream_min_prob: float | None = setting(
        None,
        "streaming: least probability that the accepted path ends at a draft token for it to get streams; by "
        "default the policy's price of rows decides",
    )
    num_draft_layers: int | None = setting(
        None, "self_draft: layers of the target that draft; the default is a quarter of them"
    )
    verification: Literal["match", "ratio", "synthetic"] | None = setting(
        None, "How drafts are accepted; the default is match, and synthetic with the method of that name"
    )
    synthetic_acceptance_rates: list[float] | None = setting(  # noqa: RUF009 (a field, as all of these)
        None, "synthetic: for each depth the probability that a draft is accepted at least so far"
    )

    def __post_init__(self) -> None:
        """Checks types and ranges, and resolves the alias.

        Raises:
            ConfigError: A value is out of range, or a setting belongs to no method that was chosen.
        """
        if self.verification is None:
            rule = "synthetic" if self.method == "synthetic" else "match"
            object.__setattr__(self, "verification", rule)
        hints = typing.get_type_hints(SpeculativeConfig)
        object.__setattr__(self, _TABLE, _batch_table(getattr(self, _TABLE)))
        for field in dataclasses.fields(self):
            value: Any = getattr(self, field.name)
            kind, *none = typing.get_args(hints[field.name]) or (hints[field.name],)
            if (none and value is None) or typing.get_origin(kind) is not None:
                continue  # the latter have checks of their own
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ConfigError(
                    f"{field.name} of --speculative-config must be {kind.__name__}, got {value!r}"
                )
            if kind is int and value < 1:
                raise ConfigError(f"{field.name} of --speculative-config must be at least 1, got {value}")
        self._check_methods()
        if not 2 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min must be in [2, prompt_lookup_max = {self.prompt_lookup_max}], "
                f"got {self.prompt_lookup_min}"
            )
        if self.suffix_decoding_max_spec_factor <= 0:
            factor = self.suffix_decoding_max_spec_factor
            raise ConfigError(f"suffix_decoding_max_spec_factor must be above 0, got {factor}")
        for name in ("suffix_decoding_min_token_prob", "stream_min_prob"):
            prob = getattr(self, name)
            if prob is not None and not 0 <= prob <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {prob}")
        self._check_verification()

    @property
    def is_synthetic(self) -> bool:
        """Whether drafts are accepted by chance, so that answers mean nothing."""
        return self.verification == "synthetic"

    def _check_verification(self) -> None:
        if self.verification not in ("match", "ratio", "synthetic"):
            raise ConfigError(f"verification must be match, ratio or synthetic, got {self.verification!r}")
        if self.method == "synthetic" and not self.is_synthetic:
            raise ConfigError(
                f"verification must be synthetic for the method of that name, got {self.verification}"
            )
        rates, num_rates = self.synthetic_acceptance_rates, self.num_speculative_tokens
        if self.is_synthetic != (rates is not None):
            raise ConfigError(
                "synthetic verification and synthetic_acceptance_rates of --speculative-config go together: "
                f"give both or neither, got verification {self.verification} and {rates}"
            )
        if rates is None:
            return
        are_numbers = isinstance(rates, list) and all(type(rate) in (int, float) for rate in rates)
        falls = are_numbers and all(rate >= after for rate, after in itertools.pairwise([1, *rates, 0]))
        if not falls or len(rates) != num_rates:
            raise ConfigError(
                f"synthetic_acceptance_rates must be {num_rates} numbers (num_speculative_tokens) in [0, 1], "
                f"none above the one before it, got {rates}"
            )

    @property
    def methods(self) -> tuple[str, ...]:
        """The draft methods that run, of which a request may choose one; empty without speculation."""
        return tuple(name for name in self.method.split(",") if name != "none")

    @property
    def model_method(self) -> str | None:
        """The one of its methods that `model` is for; None where none of those that come with Outpace is."""
        return next((name for name in self.methods if name in MODEL_METHODS), None)

    def _check_methods(self) -> None:
        names = [METHOD_ALIASES.get(name, name) for name in map(str.strip, self.method.split(","))]
        object.__setattr__(self, "method", ",".join(names))
        if len(names) > 1 and ("none" in names or len(set(names)) < len(names)):
            raise ConfigError(f"{flag('spec_method')} must name different methods, got {self.method}")
        with_model = [name for name in names if name in MODEL_METHODS]
        if with_model and self.model is None:
            raise ConfigError(f"{with_model[0]} needs a model: name one with {flag('spec_model')}")
        if len(with_model) > 1:
            raise ConfigError(
                f"{' and '.join(with_model)} each need a model, and there is one: choose one of them"
            )
        users = {
            "model": MODEL_METHODS,
            "num_draft_layers": ("self_draft",),
            "stream_min_prob": ("streaming",),
        }
        for key, methods in users.items():
            # a method from outside may use what it likes
            if getattr(self, key) is not None and not set(methods) & set(names) and "." not in self.method:
                raise ConfigError(
                    f"{key} of --speculative-config is for {', '.join(methods)}, "
                    f"{flag('spec_method')} is {self.method}"
                )


def _batch_table(rows: Any) -> tuple[tuple[int, ...], ...]:
    """The checked table of draft tokens by batch size.

    Raises:
        ConfigError: It is no list of [first, last, tokens], or its batch sizes are not 1, 2, 3, …
    """
    is_table = isinstance(rows, list | tuple) and all(isinstance(row, list | tuple) for row in rows)
    if not is_table or not all(len(row) == 3 and all(type(x) is int for x in row) for row in rows):
        raise ConfigError(f"{_TABLE} must be a list of [first batch size, last, draft tokens], got {rows!r}")
    expected = 1
    for first, last, length in rows:
        if first != expected or last < first or length < 0:
            raise ConfigError(
                f"{_TABLE} must cover batch sizes from 1 on without gaps, with 0 or more draft tokens; "
                f"[{first}, {last}, {length}] should begin at {expected}, and end no earlier"
            )
        expected = last + 1
    return tuple(map(tuple, rows))


@dataclass(frozen=True)
class EngineConfig:
    """The model and the engine that runs it. Names are vLLM's where it has them."""

    model: str | None = setting(
        None,
        "Hugging Face directory or hub id, or a GGUF file; the default is SmolLM2-135M-Instruct",
        positional=True,
    )
    tokenizer: str | None = setting(None, "Directory or hub id of the tokenizer, if not the model's own")
    revision: str | None = setting(None, "Branch, tag or commit of the hub model")
    load_format: Literal["auto", "dummy"] = setting(
        "auto",
        "Where weights come from: the model's files, or dummy: random ones, for measuring; the model needs "
        "no more than its config.json then",
    )
    device: str = setting(
        "auto", "Where the model runs: cpu, cuda or cuda:N; auto is a GPU where there is one, else cpu"
    )
    dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto", "Type of weights and cache; auto is bfloat16 where the device computes in it, else float32"
    )
    max_model_len: int | None = setting(None, "Most tokens of prompt and answer; the default is the model's")
    max_num_seqs: int = setting(64, "Most sequences that run at once")
    max_num_batched_tokens: int = setting(512, "Most token rows of a step; longer prompts are cut in chunks")
    max_num_queued_reqs: int = setting(1024, "Most requests that wait; one more is answered with 429")
    scheduling_policy: Literal["fcfs", "priority"] = setting(
        "fcfs", "Who runs first: first come, or the request's priority (lower first)"
    )
    enable_prefix_caching: bool = setting(True, "Reuse cached blocks of equal prompt beginnings")
    kv_cache_memory_bytes: int | None = setting(
        None,
        "Memory of the KV cache, that of a draft model included, as 2G; by default on a CPU for max-num-seqs "
        "sequences of 1,024 tokens, or one of max-model-len if that is more, and on a GPU what is left there",
    )
    gpu_memory_utilization: float | None = setting(
        None,
        "Share of a GPU's memory that may be used, for weights, passes and the KV cache, which gets the "
        "rest; the default is 0.9",
    )
    enforce_eager: bool = setting(False, "Run operation by operation on a GPU: record no CUDA graphs")
    cudagraph_capture_sizes: list[int] | None = setting(  # noqa: RUF009 (a field, as all of these)
        None,
        "Rows of the passes that are recorded as CUDA graphs, ascending; others are padded to the next of "
        "these, larger ones run operation by operation; the default is 1, 2, 4, 8, 16, 24, … up to 512",
    )
    num_threads: int | None = setting(None, "Threads of the CPU kernels; the default is one per core")
    tensor_parallel_size: int = setting(
        1,
        "Processes, each with a device of its own, that divide the model's heads and widths between them; on "
        "a CPU they divide the threads",
    )
    kernels: Literal["auto", "native", "reference", "triton"] = setting(
        "auto",
        "triton on a GPU; on a CPU native C++ (built on first use) or reference, plain torch; auto is native "
        "there if a compiler is there",
    )
    batch_invariant: bool = setting(
        False,
        "On a GPU: linear layers that give a row the same bits in any batch, slower than cuBLAS; on a CPU "
        "they always do",
    )
    seed: int = setting(0, "Seeds the draw of seeds for requests that give none")
    spec_method: str | None = setting(
        None,
        "Draft method: none, prompt_lookup (ngram), suffix, draft_model, self_draft, medusa, redrafter, "
        "streaming; several with commas; the default is none, and prompt_lookup for the default model",
    )
    spec_model: str | None = setting(
        None,
        "Weights of the draft: for draft_model a model of the same vocabulary (Hugging Face directory, hub "
        "id, GGUF file), for others the directory or hub id of what outpace train wrote; default are those "
        "that come with the default model",
    )
    spec_tokens: int | None = setting(None, "Most draft tokens for a sequence in a step")
    verification: Literal["match", "ratio"] | None = setting(
        None,
        "How drafts are accepted: match (the default), answers never depend on drafts; ratio, the classical "
        "rejection rule, they keep their distribution but depend on drafts",
    )
    allow_synthetic: bool = setting(
        False, "For benchmarks: let --spec-method synthetic accept drafts by chance; answers mean nothing"
    )
    spec_policy: str | None = setting(
        None,
        "Speculation policy, a name of policy/; the default is goodput if there is a draft method, else off",
    )
    spec_profile: str | None = setting(
        None, "JSON file with what steps cost; without it this is measured at first start and kept"
    )
    slo_ttft_ms: float | None = setting(
        None, "Policy slo: target for the time to the first token, if a request has none"
    )
    slo_tpot_ms: float | None = setting(
        None, "Policy slo: target for the time per token after the first, likewise"
    )
    step_log: str | None = setting(None, "File that one JSON line per step is appended to")
    speculative_config: dict[str, Any] | None = setting(  # noqa: RUF009 (a field, as all of these)
        None, "JSON object with these and the other settings of drafting, as vLLM has it"
    )

    def __post_init__(self) -> None:
        """Checks what can be checked without the model.

        Raises:
            ConfigError: A value is out of range.
        """
        least = {
            "max_model_len": 2,  # a token of prompt and one of answer
            "max_num_seqs": 1,
            "max_num_queued_reqs": 0,
            "kv_cache_memory_bytes": 1,
            "num_threads": 1,
            "tensor_parallel_size": 1,
        }
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ConfigError(f"{flag(name)} must be at least {limit}, got {value}")
        for name in ("slo_ttft_ms", "slo_tpot_ms"):
            value = getattr(self, name)
            if value is None:
                continue
            if not 0 < value < math.inf:
                raise ConfigError(f"{flag(name)} must be above 0, got {value}")
            # a policy from outside may use what it likes
            if self.policy != "slo" and "." not in self.policy:
                raise ConfigError(
                    f"{flag(name)} is for {flag('spec_policy')} slo, the policy is {self.policy}"
                )
        self._check_gpu()
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least "
                f"--max-num-seqs ({self.max_num_seqs}): each running sequence takes a row of every step"
            )
        cores = num_cores()
        if self.num_threads is not None and self.num_threads > cores:
            raise ConfigError(f"--num-threads must be at most {cores}, one per core, got {self.num_threads}")
        self._check_ranks(cores)
        if self.speculative.is_synthetic and not self.allow_synthetic:
            raise ConfigError(
                f"synthetic verification gives answers that mean nothing: for a benchmark add "
                f"{flag('allow_synthetic')}, else choose another {flag('spec_method')}"
            )

    def _check_ranks(self, cores: int) -> None:
        num_ranks, num_threads = self.tensor_parallel_size, self.num_threads or cores
        if num_ranks > num_threads:
            raise ConfigError(
                f"{flag('tensor_parallel_size')} must be at most {num_threads}, the number of threads (here "
                f"there are {cores} cores): each rank needs one of its own, got {num_ranks}"
            )
        if num_ranks > 1 and "streaming" in self.speculative.methods:
            raise ConfigError(
                f"{flag('spec_method')} streaming runs on one rank, since its adapters are not divided, got "
                f"{flag('tensor_parallel_size')} {num_ranks}: choose another method or 1"
            )

    @property
    def threads_per_rank(self) -> int:
        """Threads of the CPU kernels in each process that computes."""
        return (self.num_threads or num_cores()) // self.tensor_parallel_size

    def _check_gpu(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        share, sizes = self.gpu_memory_utilization, self.cudagraph_capture_sizes
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"--gpu-memory-utilization must be in (0, 1], got {share}")
        if share is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError(
                "--gpu-memory-utilization leaves the KV cache what is free, --kv-cache-memory-bytes says how "
                "much that is: give one of them"
            )
        if sizes is None:
            return
        if self.enforce_eager:
            raise ConfigError("--enforce-eager records no CUDA graphs: leave out --cudagraph-capture-sizes")
        if self.tensor_parallel_size > 1:
            raise ConfigError(
                f"{flag('tensor_parallel_size')} {self.tensor_parallel_size} records no CUDA graphs: leave "
                "out --cudagraph-capture-sizes"
            )
        if not sizes or min(sizes) < 1 or sorted(set(sizes)) != sizes:
            raise ConfigError(
                f"--cudagraph-capture-sizes must be row counts from 1 on, ascending, got {sizes}; without it "
                "there are sizes, with --enforce-eager there are none"
            )

    @property
    def speculative(self) -> SpeculativeConfig:
        """How drafts are made, from --speculative-config and the flags for its parts.

        Raises:
            ConfigError: A key is unknown, a value is out of range, or something is given twice.
        """
        settings = dict(self.speculative_config or {})
        known = [field.name for field in dataclasses.fields(SpeculativeConfig)]
        for key in settings:
            if key not in known:
                raise ConfigError(
                    f"unknown key {key!r} in --speculative-config; there are: {', '.join(known)}"
                )
        keys = {
            "spec_method": "method",
            "spec_model": "model",
            "spec_tokens": "num_speculative_tokens",
            "verification": "verification",
        }
        for name, key in keys.items():
            value = getattr(self, name)
            if value is not None and settings.setdefault(key, value) != value:
                raise ConfigError(
                    f"{key} is given twice: {flag(name)} {value} and {settings[key]} in --speculative-config"
                )
        if self.model is None:
            method = settings.setdefault("method", DEFAULT_METHOD)
            names = map(str.strip, method.split(",")) if isinstance(method, str) else ()
            if set(names) & set(DEFAULT_DRAFT_METHODS):
                settings.setdefault("model", DEFAULT_DRAFT)
        return SpeculativeConfig(**settings)

    @property
    def policy(self) -> str:
        """The name of the speculation policy."""
        return self.spec_policy or ("off" if self.speculative.method == "none" else "goodput")


@dataclass(frozen=True)
class ServerConfig:
    """The HTTP side."""

    host: str = setting("127.0.0.1", "Address to listen on")
    port: int = setting(8000, "Port to listen on")
    api_key: str | None = setting(None, "If given, clients must send it as a bearer token")
    served_model_name: str | None = setting(None, "Name of the model in the API, if not its own")
    chat_template: str | None = setting(None, "File with a Jinja chat template, if not the tokenizer's own")
    enable_auto_tool_choice: bool = setting(
        False, "Let the model choose whether to call a tool: tool_choice auto, which is a request's default"
    )
    tool_call_parser: str = setting("hermes", "How the model writes tool calls: hermes, llama3_json")
    shutdown_timeout: int = setting(30, "Seconds that running requests get to finish after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "What is logged")
    metrics_compat: Literal["none", "vllm"] = setting(
        "none", "vllm: /metrics has what vLLM counts too also under vLLM's names and labels"
    )
    per_request_spec_decode_metrics: Literal["none", "summary", "detailed"] = setting(
        "none", "What answers say of their drafts: sums, or also every step (one prompt and n = 1 only)"
    )

    def __post_init__(self) -> None:
        """Checks ranges.

        Raises:
            ConfigError: A value is out of range.
        """
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port must be in [0, 65535], got {self.port}")
        if self.api_key == "":
            raise ConfigError("--api-key must not be empty; leave it out to serve without a key")
        if self.shutdown_timeout < 0:
            raise ConfigError(f"--shutdown-timeout must be at least 0, got {self.shutdown_timeout}")


def flag(field_name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + field_name.replace("_", "-")


def num_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_dir() -> Path:
    """Where downloads and built kernels are kept: `$OUTPACE_CACHE`, else `~/.cache/outpace`."""
    if root := os.environ.get("OUTPACE_CACHE"):
        return Path(root).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "outpace"
