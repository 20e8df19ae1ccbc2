"""What a policy sees, decides and learns from: plain numbers only."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from outpace.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence that will sample in this step.

    Attributes:
        id: Its request's id.
        context_len: Tokens in its cache before the step.
        max_draft: Most draft tokens that can be of use to it (length limits).
    """

    id: str
    context_len: int
    max_draft: int


@dataclass(frozen=True, slots=True)
class BatchView:
    """The step about to run, drafts not counted.

    Attributes:
        sequences: Those that sample.
        num_rows: Known token rows of the step, prefill chunks included.
        num_context: Cached tokens that the step's rows attend to, summed over sequences.
        num_free_slots: Cache slots that drafts may take.
    """

    sequences: tuple[SequenceView, ...]
    num_rows: int
    num_context: int
    num_free_slots: int


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a step did.

    Attributes:
        seconds: Wall time by phase: plan, propose, forward, verify, and their total.
        num_rows: Rows of the forward, drafts included.
        num_context: Cached tokens attended to, summed over sequences.
        num_tokens: Tokens emitted.
        num_drafted: Draft nodes verified, per sampling sequence.
        num_accepted: Draft tokens accepted, per sampling sequence.
    """

    seconds: dict[str, float]
    num_rows: int
    num_context: int
    num_tokens: int
    num_drafted: tuple[int, ...]
    num_accepted: tuple[int, ...]


class SpeculationPolicy(ABC):
    """Chooses how many draft tokens each sequence verifies. Deterministic given what it was shown."""

    @abstractmethod
    def limits(self, view: BatchView) -> list[int]:
        """Draft tokens allowed for each of `view.sequences`; 0 is plain decoding."""

    def trim(self, view: BatchView, confidences: Sequence[Sequence[float] | None]) -> list[int] | None:
        """A second cut once drafts exist: nodes to keep per sequence, or None to keep all.

        Args:
            view: The same view that `limits` saw.
            confidences: Per sequence the drafter's confidence for each node, None where it has none.
        """
        return None

    def observe(self, record: StepRecord) -> None:
        """Learns from a finished step."""


def available() -> list[str]:
    """Names of the built-in policies: the files beside this one."""
    here = Path(__file__).parent
    return sorted(f.stem for f in here.glob("*.py") if f.stem not in {"__init__", "base"})


def load_policy(name: str) -> SpeculationPolicy:
    """Builds the policy called `name`.

    The file name is the registry: `off` is `policy/off.py`, whose module function `create()` builds it.
    A dotted name is a module from outside with the same function.

    Raises:
        ConfigError: There is no such policy.
    """
    if "." not in name and name not in available():
        raise ConfigError(f"unknown spec policy {name!r}; there are: {', '.join(available())}")
    module = importlib.import_module(name if "." in name else f"outpace.policy.{name}")
    policy = module.create()
    if not isinstance(policy, SpeculationPolicy):
        raise ConfigError(f"{name}.create() returned a {type(policy).__name__}, not a SpeculationPolicy")
    return policy
