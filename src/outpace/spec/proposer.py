"""The interface of every draft method."""

from __future__ import annotations

from abc import ABC, abstractmethod

from outpace import registry
from outpace.batch import Batch, TargetOutput, Verdict
from outpace.config import SpeculativeConfig
from outpace.request import Sequence
from outpace.tree import DraftTree

_PACKAGE = "outpace.spec.proposers"


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

    def observe(self, batch: Batch, target: TargetOutput, verdict: Verdict) -> None:
        """Learns from a finished step."""

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence that ended."""


def available() -> list[str]:
    """Names of the built-in draft methods: the files in `spec/proposers`."""
    return registry.available(_PACKAGE)


def check_methods(config: SpeculativeConfig) -> None:
    """Finds the draft methods of a config without building them: before a model is loaded for nothing.

    Raises:
        ConfigError: There is no such method.
    """
    for name in config.methods:
        registry.find(_PACKAGE, name, "spec_method")


def load_proposer(config: SpeculativeConfig) -> Proposer:
    """Builds the draft method of a config: `none` is `spec/proposers/none.py`, a dotted name is a module.

    Its module's `create(config)` does.

    Raises:
        ConfigError: There is no such method.
    """
    proposer: Proposer = registry.build(_PACKAGE, config.method, Proposer, "spec_method", config)
    return proposer
