"""What a policy sees, decides and learns from: plain numbers only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from outpace import registry
from outpace.config import SpeculativeConfig

_PACKAGE = "outpace.policy"


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence that will sample in this step.

    Attributes:
        id: Its request's id.
        context_len: Tokens in its cache before the step.
        max_draft: Most draft tokens that can be of use to it (length limits) and that its request allows.
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
    """Names of the built-in policies: the files beside this one that have a function `create`."""
    return registry.available(_PACKAGE)


def check_policy(name: str) -> None:
    """Finds the policy called `name` without building it.

    Raises:
        ConfigError: There is no such policy.
    """
    registry.find(_PACKAGE, name, "spec_policy")


def load_policy(name: str, config: SpeculativeConfig) -> SpeculationPolicy:
    """Builds the policy called `name`: `off` is `policy/off.py`, a dotted name is a module from outside.

    Its module's `create(config)` does.

    Raises:
        ConfigError: There is no such policy.
    """
    policy: SpeculationPolicy = registry.build(_PACKAGE, name, SpeculationPolicy, "spec_policy", config)
    return policy
