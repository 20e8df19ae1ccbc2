"""The interface of every draft method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outpace import registry
from outpace.batch import Batch, TargetOutput, Verdict
from outpace.config import EngineConfig, SpeculativeConfig, flag
from outpace.models.config import ModelConfig
from outpace.models.decoder import Decoder
from outpace.request import Sequence
from outpace.runtime.kv_cache import KVCache
from outpace.runtime.runner import ModelRunner
from outpace.runtime.streams import StreamPass
from outpace.tree import DraftTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PACKAGE = "outpace.spec.proposers"

Prices = Callable[[int, list[int]], list[float]]


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What a draft method may build on.

    Attributes:
        config: The engine's settings.
        tokenizer: The target's.
        model: The target's shape; that of `decoder` is this rank's part of it.
        kv: The target's cache.
        runner: What runs the target over it, and drafting decoders `beside` it; tells the other ranks.
    """

    config: EngineConfig
    tokenizer: PreTrainedTokenizerFast
    model: ModelConfig
    kv: KVCache
    runner: ModelRunner

    @property
    def decoder(self) -> Decoder:
        """The target itself, with its dtype and kernels."""
        return self.runner.decoder

    @property
    def speculative(self) -> SpeculativeConfig:
        """The settings of drafting."""
        return self.config.speculative


class Proposer(ABC):
    """Drafts continuations. A wrong guess costs time, never correctness."""

    @abstractmethod
    def propose(self, sequences: list[Sequence], limits: list[int]) -> list[DraftTree]:
        """Drafts a tree for each sequence.

        Args:
            sequences: Those that will sample in this step.
            limits: Most nodes allowed for each; 0 asks for an empty tree and must cost nothing.

        Returns:
            One tree per sequence, each with at most `limits[i]` nodes.
        """

    def streams(self, batch: Batch, prices: Prices) -> StreamPass | None:
        """Rows to compute beside those of a step, to draft for the next one; most methods have none.

        Args:
            batch: The step's own rows, which have their slots.
            prices: What more rows cost: `SpeculationPolicy.prices`.
        """
        return None

    def observe(self, batch: Batch, target: TargetOutput, verdict: Verdict) -> None:
        """Learns from a finished step."""

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence that ended."""

    def reset_prefix_cache(self) -> None:
        """Forgets the prompts in a cache of its own; most methods have none."""


def available() -> list[str]:
    """Names of the built-in draft methods: the files in `spec/proposers`."""
    return registry.available(_PACKAGE)


def check_methods(config: SpeculativeConfig) -> None:
    """Finds the draft methods of a config without building them: before a model is loaded for nothing.

    Raises:
        ConfigError: There is no such method.
    """
    for name in config.methods:
        registry.find(_PACKAGE, name, flag("spec_method"))


def load_proposer(context: DraftContext) -> Proposer:
    """Builds the draft method of the settings: `none` is `spec/proposers/none.py`, a dotted name is a module.

    Its module's `create(context)` does. Where the settings name several, the best tree of them is taken.

    Raises:
        ConfigError: There is no such method, or it cannot work with this model.
    """
    from outpace.spec.several import Several  # not at the top: it imports this module

    methods = context.speculative.methods or ("none",)
    built = {name: registry.build(_PACKAGE, name, Proposer, flag("spec_method"), context) for name in methods}
    proposer: Proposer = built[methods[0]] if len(built) == 1 else Several(built)
    return proposer
