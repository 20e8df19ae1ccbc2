"""Every setting, once: its name, type, default and help. Flags, environment and YAML come from here."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from outpace.errors import ConfigError

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

    method: str = setting("none", "Draft method, a name of spec/proposers; ngram is prompt_lookup")
    num_speculative_tokens: int = setting(
        5, "Most draft tokens for a sequence in a step (policy fixed: always)"
    )
    num_speculative_tokens_per_batch_size: tuple[tuple[int, int, int], ...] = setting(
        (), "policy batch_table: [first batch size, last, draft tokens] each; without it, from the profile"
    )
    prompt_lookup_min: int = setting(2, "prompt_lookup: shortest match that gives a draft, in tokens")
    prompt_lookup_max: int = setting(5, "prompt_lookup: longest match looked for")
    suffix_decoding_max_tree_depth: int = setting(24, "suffix: longest match and longest draft")
    suffix_decoding_max_cached_requests: int = setting(10000, "suffix: finished answers kept")
    suffix_decoding_max_spec_factor: float = setting(1.0, "suffix: longest draft per token of match")
    suffix_decoding_min_token_prob: float = setting(0.1, "suffix: least relative frequency of a drafted path")

    def __post_init__(self) -> None:
        """Checks types and ranges, and resolves the alias.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.method == "ngram":
            object.__setattr__(self, "method", "prompt_lookup")
        object.__setattr__(self, _TABLE, _batch_table(getattr(self, _TABLE)))
        for field in dataclasses.fields(self):
            value: Any = getattr(self, field.name)
            default: Any = field.default
            kind = type(default)
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ConfigError(
                    f"{field.name} of --speculative-config must be {kind.__name__}, got {value!r}"
                )
            if kind is int and value < 1:
                raise ConfigError(f"{field.name} of --speculative-config must be at least 1, got {value}")
        if not 2 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise ConfigError(
                f"prompt_lookup_min must be in [2, prompt_lookup_max = {self.prompt_lookup_max}], "
                f"got {self.prompt_lookup_min}"
            )
        if self.suffix_decoding_max_spec_factor <= 0:
            factor = self.suffix_decoding_max_spec_factor
            raise ConfigError(f"suffix_decoding_max_spec_factor must be above 0, got {factor}")
        if not 0 <= self.suffix_decoding_min_token_prob <= 1:
            prob = self.suffix_decoding_min_token_prob
            raise ConfigError(f"suffix_decoding_min_token_prob must be in [0, 1], got {prob}")


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
    dtype: Literal["auto", "bfloat16", "float32"] = setting(
        "auto", "Type of weights and cache; auto is bfloat16 where the CPU computes in it, else float32"
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
        "Memory of the KV cache, as 2G; the default holds max-num-seqs sequences of 1,024 tokens, or one of "
        "max-model-len if that is more",
    )
    num_threads: int | None = setting(None, "Threads of the CPU kernels; the default is one per core")
    kernels: Literal["auto", "native", "reference"] = setting(
        "auto", "CPU kernels: native C++ (built on first use), plain torch, or native if a compiler is there"
    )
    seed: int = setting(0, "Seeds the draw of seeds for requests that give none")
    spec_method: str | None = setting(None, "Draft method: none, prompt_lookup (ngram), suffix")
    spec_tokens: int | None = setting(None, "Most draft tokens for a sequence in a step")
    spec_policy: str | None = setting(
        None,
        "Speculation policy, a name of policy/; the default is goodput if there is a draft method, else off",
    )
    spec_profile: str | None = setting(
        None, "JSON file with what steps cost; without it this is measured at first start and kept"
    )
    slo_ttft_ms: float | None = setting(None, "Policy slo: target for the time to the first token")
    slo_tpot_ms: float | None = setting(None, "Policy slo: target for the time per token after the first")
    step_log: str | None = setting(None, "File that gets one JSON line per step")
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
        }
        for name, limit in least.items():
            value = getattr(self, name)
            if value is not None and value < limit:
                raise ConfigError(f"{flag(name)} must be at least {limit}, got {value}")
        for name in ("slo_ttft_ms", "slo_tpot_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{flag(name)} must be above 0, got {value}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens ({self.max_num_batched_tokens}) must be at least "
                f"--max-num-seqs ({self.max_num_seqs}): each running sequence takes a row of every step"
            )
        cores = os.cpu_count() or 1
        if self.num_threads is not None and self.num_threads > cores:
            raise ConfigError(f"--num-threads must be at most {cores}, one per core, got {self.num_threads}")
        _ = self.speculative

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
        for name, key in (("spec_method", "method"), ("spec_tokens", "num_speculative_tokens")):
            value = getattr(self, name)
            if value is not None and settings.setdefault(key, value) != value:
                raise ConfigError(
                    f"{key} is given twice: {flag(name)} {value} and {settings[key]} in --speculative-config"
                )
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
    shutdown_timeout: int = setting(30, "Seconds that running requests get to finish after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "What is logged")

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


def cache_dir() -> Path:
    """Where downloads and built kernels are kept: `$OUTPACE_CACHE`, else `~/.cache/outpace`."""
    if root := os.environ.get("OUTPACE_CACHE"):
        return Path(root).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "outpace"
