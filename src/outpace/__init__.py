"""An LLM server that speculates only when it pays."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from outpace.async_llm import AsyncLLM
    from outpace.config import EngineConfig, ServerConfig
    from outpace.engine.engine import Engine
    from outpace.errors import (
        ConfigError,
        EngineDeadError,
        InvalidRequestError,
        NotFoundError,
        OutpaceError,
        OverloadedError,
        ShuttingDownError,
        UnsupportedModelError,
    )
    from outpace.llm import LLM, CompletionResult, RequestResult
    from outpace.request import DraftStep, FinishReason, LatencyTargets, Output, Speculation, TokenLogprob
    from outpace.sampling import SamplingParams, StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (in plain alphabetical order)
    "AsyncLLM",
    "CompletionResult",
    "ConfigError",
    "DraftStep",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "FinishReason",
    "InvalidRequestError",
    "LLM",
    "LatencyTargets",
    "NotFoundError",
    "OutpaceError",
    "Output",
    "OverloadedError",
    "RequestResult",
    "SamplingParams",
    "ServerConfig",
    "ShuttingDownError",
    "Speculation",
    "StructuredOutputsParams",
    "TokenLogprob",
    "UnsupportedModelError",
]

_MODULES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "CompletionResult": "llm",
    "DraftStep": "request",
    "Engine": "engine.engine",
    "EngineConfig": "config",
    "FinishReason": "request",
    "LatencyTargets": "request",
    "Output": "request",
    "RequestResult": "llm",
    "SamplingParams": "sampling",
    "ServerConfig": "config",
    "Speculation": "request",
    "StructuredOutputsParams": "sampling",
    "TokenLogprob": "request",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `import outpace` alone is quick."""
    if name not in __all__:
        raise AttributeError(f"module 'outpace' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"outpace.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
