"""What a policy sees, decides and learns from: plain numbers only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from outpace import registry
from outpace.config import EngineConfig, SpeculativeConfig, flag
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
        method: The draft method that its request insists on; empty where it leaves the choice.
        tpot_s: Its request's own target for the time per token after the first, if it has one.
    """

    id: str
    context_len: int
    max_draft: int
    client: str = ""
    num_output: int = 0
    decode_s: float = 0.0
    method: str = ""
    tpot_s: float | None = None


class Wait(NamedTuple):
    """A request that waits for its first token and has a target of its own for that.

    Attributes:
        wait_s: Seconds since it arrived.
        ttft_s: Seconds from then in which it wants that token.
    """

    wait_s: float
    ttft_s: float


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
        own_targets: Of those the requests that bring a target for their first token.
    """

    sequences: tuple[SequenceView, ...]
    num_rows: int
    num_context: int
    num_free_slots: int
    num_pairs: int = 0
    num_scheduled: int = 0
    num_waiting: int = 0
    oldest_wait_s: float = 0.0
    own_targets: tuple[Wait, ...] = ()


class Draft(Protocol):
    """A drafted tree, as `outpace.tree.DraftTree` has it: parents before children, best first."""

    @property
    def parents(self) -> tuple[int, ...]:
        """For each node the index of its parent, or -1."""

    @property
    def confidence(self) -> tuple[float, ...] | None:
        """For each node the drafter's estimate that it is accepted given that its parent is."""


@dataclass(frozen=True, slots=True)
class MethodRecord:
    """What one of several draft methods did in a step.

    The tokens of the step are known, so what would have become of a draft is known whether it was verified
    or not, down to the depth that these tokens reach.

    Attributes:
        name: The method.
        limits: Nodes that it was asked for, per sampling sequence.
        drafts: The trees it made.
        lengths: Leading nodes of each of which it is known whether they fit.
        paths: Of these the ones that do, root side first.
        taken: Whether the tree was the one to go on with.
        seconds: What it took, rows of the pass aside.
        has_streams: Whether the step's `num_stream_rows` were its own.
    """

    name: str
    limits: tuple[int, ...]
    drafts: tuple[Draft, ...]
    lengths: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    taken: tuple[bool, ...]
    seconds: float
    has_streams: bool = False


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
        methods: What each draft method did, where there are several.
        num_stream_rows: Rows beside those in the forward that only make drafts, each counted as the share of
            the layers that it went through.
        num_drafted: Draft nodes verified, per sampling sequence.
    """

    view: BatchView
    limits: tuple[int, ...]
    drafts: tuple[Draft, ...]
    paths: tuple[tuple[int, ...], ...]
    seconds: dict[str, float]
    num_rows: int
    num_tokens: int
    predicted_s: float | None = None
    methods: tuple[MethodRecord, ...] = ()
    num_stream_rows: float = 0.0
    num_drafted: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Counts once what many ask for."""
        object.__setattr__(self, "num_drafted", tuple([len(draft.parents) for draft in self.drafts]))

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

    def methods(self, view: BatchView) -> Mapping[str, list[int]] | None:
        """Of several draft methods those to ask; one that is left out is not asked and costs nothing.

        Args:
            view: The same view that `limits` saw.

        Returns:
            For each method the draft tokens allowed per sequence, none above what `limits` said; None asks
            every method for that.
        """
        return None

    def pick(self, view: BatchView, drafts: Mapping[str, Sequence[Draft]]) -> list[str] | None:
        """Whose draft to go on with, where several methods were asked.

        Args:
            view: The same view that `limits` saw.
            drafts: By method what it drafted: one tree per sequence, some perhaps empty.

        Returns:
            A method per sequence; None leaves it to the drafts' own confidences.
        """
        return None

    def trim(self, view: BatchView, drafts: Sequence[Draft]) -> list[int] | None:
        """A second cut once drafts exist: nodes to keep per sequence, or None to keep all.

        Args:
            view: The same view that `limits` saw.
            drafts: What was drafted, one tree per sequence, some perhaps empty.
        """
        return None

    def prices(self, num_rows: int, more: Sequence[int]) -> list[float]:
        """What rows of the step at hand cost in tokens: others could have had as many in the same time.

        Args:
            num_rows: Rows that the step has, drafts included.
            more: Numbers of rows that may be added.

        Returns:
            For each, the tokens that they must bring to be worth it; 0 if the policy does not weigh the two.
        """
        return [0.0] * len(more)

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
    registry.find(_PACKAGE, name, flag("spec_policy"))


def load_policy(name: str, context: PolicyContext) -> SpeculationPolicy:
    """Builds the policy called `name`: `off` is `policy/off.py`, a dotted name is a module from outside.

    Its module's `create(context)` does.

    Raises:
        ConfigError: There is no such policy, or it cannot be had with these settings.
    """
    policy: SpeculationPolicy = registry.build(
        _PACKAGE, name, SpeculationPolicy, flag("spec_policy"), context
    )
    return policy
