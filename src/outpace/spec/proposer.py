"""The interface of every draft method."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from pathlib import Path

from outpace.batch import Batch, TargetOutput, Verdict
from outpace.errors import ConfigError
from outpace.request import Sequence
from outpace.tree import DraftTree


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
    return sorted(f.stem for f in (Path(__file__).parent / "proposers").glob("*.py") if f.stem != "__init__")


def load_proposer(name: str) -> Proposer:
    """Builds the draft method called `name` from `spec/proposers/{name}.py`, or from a dotted module path.

    The module's function `create()` builds it.

    Raises:
        ConfigError: There is no such method.
    """
    if "." not in name and name not in available():
        raise ConfigError(f"unknown spec method {name!r}; there are: {', '.join(available())}")
    module = importlib.import_module(name if "." in name else f"outpace.spec.proposers.{name}")
    proposer = module.create()
    if not isinstance(proposer, Proposer):
        raise ConfigError(f"{name}.create() returned a {type(proposer).__name__}, not a Proposer")
    return proposer
