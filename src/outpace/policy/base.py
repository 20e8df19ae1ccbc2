"""What a policy sees, decides and learns from: plain numbers only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from outpace import registry
from outpace.config import EngineConfig, SpeculativeConfig
from outpace.errors import ConfigError

if TYPE_CHECKING:
    from outpace.policy.cost import CostModel

_PACKAGE = "outpace.policy"


class SequenceView(NamedTuple):
    """One sequence that will sample in this step.

    Attributes:
        id: Its request's id.
        context_len: Tokens in its cache before the step.
        max_draft: Most draft tokens that can be of use to it (length limits) and that its request allows.
        client: Who asked for it; empty where the request does not say.
        num_output: Tokens answered so far.
        decode_s: Seconds since its first token; 0 before.
    """

    id: str
    context_len: int
    max_draft: int
    client: str = ""
    num_output: int = 0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class BatchView:
    """The step about to run, drafts not counted.

    Attributes:
        sequences: Those that sample.
        num_rows: Known token rows of the step, prefill chunks included.
        num_context: Cached tokens that the step's rows attend to, summed over sequences.
        num_free_slots: Cache slots that drafts may take.
        num_pairs: The same, summed over rows: what attention computes.
        num_scheduled: Sequences of the step, those that do not sample included.
        num_waiting: Requests without a first token that do not sample in this step.
        oldest_wait_s: Seconds since the first of those arrived; 0 without any.
    """

    sequences: tuple[SequenceView, ...]
    num_rows: int
    num_context: int
    num_free_slots: int
    num_pairs: int = 0
    num_scheduled: int = 0
    num_waiting: int = 0
    oldest_wait_s: float = 0.0


class Draft(Protocol):
    """A drafted tree, as `outpace.tree.DraftTree` has it: parents before children, best first."""

    @property
    def parents(self) -> tuple[int, ...]:
        """For each node the index of its parent, or -1."""

    @property
    def confidence(self) -> tuple[float, ...] | None:
        """For each node the drafter's estimate that it is accepted given that its parent is."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a step did.

    Attributes:
        view: What it was to do before drafts were made.
        limits: Draft tokens the policy allowed, per sampling sequence.
        drafts: The trees verified, per sampling sequence.
        paths: Their accepted nodes, root side first.
        seconds: Wall time by phase: between (since the step before, if that left work), plan, policy,
            propose, forward, verify, advance; and their total.
        num_rows: Rows of the forward, drafts included.
        num_tokens: Tokens emitted.
        predicted_s: What the policy expected of the total; None if it does not predict.
        num_stream_rows: Rows beside those in the forward that only make drafts, each counted as the share of
            the layers that it went through.
    """

    view: BatchView
    limits: tuple[int, ...]
    drafts: tuple[Draft, ...]
    paths: tuple[tuple[int, ...], ...]
    seconds: dict[str, float]
    num_rows: int
    num_tokens: int
    predicted_s: float | None = None
    num_stream_rows: float = 0.0

    @property
    def num_drafted(self) -> tuple[int, ...]:
        """Draft nodes verified, per sampling sequence."""
        return tuple(len(draft.parents) for draft in self.drafts)

    @property
    def num_accepted(self) -> tuple[int, ...]:
        """Draft tokens accepted, per sampling sequence."""
        return tuple(map(len, self.paths))


class SpeculationPolicy(ABC):
    """Chooses how many draft tokens each sequence verifies. Deterministic given what it was shown.

    Attributes:
        predicted_s: What it expects the step at hand to take, once asked for its limits; None if it does not
            predict.
    """

    predicted_s: float | None = None

    @abstractmethod
    def limits(self, view: BatchView) -> list[int]:
        """Draft tokens allowed for each of `view.sequences`; 0 is plain decoding."""

    def trim(self, view: BatchView, drafts: Sequence[Draft]) -> list[int] | None:
        """A second cut once drafts exist: nodes to keep per sequence, or None to keep all.

        Args:
            view: The same view that `limits` saw.
            drafts: What was drafted, one tree per sequence, some perhaps empty.
        """
        return None

    def price(self, num_rows: int, num_more: float) -> float:
        """What rows of the step at hand cost in tokens: others could have had as many in the same time.

        Args:
            num_rows: Rows that the step has, drafts included.
            num_more: Rows to be added.

        Returns:
            Tokens that these must bring to be worth it; 0 if the policy does not weigh the two.
        """
        return 0.0

    def observe(self, record: StepRecord) -> None:
        """Learns from a finished step."""

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence that ended."""


def no_cost_model() -> CostModel:
    """Stands for the cost model where there is none.

    Raises:
        ConfigError: Always.
    """
    raise ConfigError("this policy needs a cost model: give one with --spec-profile FILE")


@dataclass(frozen=True)
class PolicyContext:
    """What a policy is made from.

    Attributes:
        speculative: How drafts are made.
        engine: The engine's settings.
        cost_model: Gives what steps cost on this machine, measuring it if need be: a policy calls it only if
            it needs to know.
    """

    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cost_model: Callable[[], CostModel] = no_cost_model


def available() -> list[str]:
    """Names of the built-in policies: the files beside this one that have a function `create`."""
    return registry.available(_PACKAGE)


def check_policy(name: str) -> None:
    """Finds the policy called `name` without building it.

    Raises:
        ConfigError: There is no such policy.
    """
    registry.find(_PACKAGE, name, "spec_policy")


def load_policy(name: str, context: PolicyContext) -> SpeculationPolicy:
    """Builds the policy called `name`: `off` is `policy/off.py`, a dotted name is a module from outside.

    Its module's `create(context)` does.

    Raises:
        ConfigError: There is no such policy, or it cannot be had with these settings.
    """
    policy: SpeculationPolicy = registry.build(_PACKAGE, name, SpeculationPolicy, "spec_policy", context)
    return policy
