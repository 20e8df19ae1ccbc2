"""Requests, their progress, and what comes out."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from outpace.config import METHOD_ALIASES
from outpace.errors import InvalidRequestError
from outpace.sampling import SamplingParams
from outpace.sampling import TokenLogprob as TokenLogprob

if TYPE_CHECKING:
    from xgrammar import CompiledGrammar


class FinishReason(enum.StrEnum):
    """Why an answer ended; `stop` and `length` carry the OpenAI names. `error`: its grammar leads nowhere."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Speculation:
    """What a request asks of its drafts. It may change how fast an answer comes, never the answer.

    Attributes:
        max_draft_tokens: Most draft tokens in a step, at most the engine's `num_speculative_tokens`; 0 is
            plain decoding, None leaves it to the engine.
        method: A draft method that the engine runs, or "none"; None leaves it to the engine.
    """

    max_draft_tokens: int | None = None
    method: str | None = None

    def __post_init__(self) -> None:
        """Checks the range and resolves the alias.

        Raises:
            InvalidRequestError: `max_draft_tokens` is negative.
        """
        if self.max_draft_tokens is not None and self.max_draft_tokens < 0:
            raise InvalidRequestError(
                f"speculation.max_draft_tokens must be at least 0, got {self.max_draft_tokens}",
                "speculation.max_draft_tokens",
            )
        if self.method is not None:
            object.__setattr__(self, "method", METHOD_ALIASES.get(self.method, self.method))

    def cap(self, num_tokens: int) -> int:
        """So many draft tokens, or fewer if the request wants fewer."""
        if self.method == "none":
            return 0
        return num_tokens if self.max_draft_tokens is None else min(num_tokens, self.max_draft_tokens)


@dataclass(frozen=True, slots=True)
class LatencyTargets:
    """How soon a request wants its answer: what the policy `slo` aims at. The answer does not depend on it.

    Attributes:
        ttft_ms: Milliseconds from arrival to the first token; None: the server's target, if it has one.
        tpot_ms: Milliseconds per token after the first, likewise.
    """

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            InvalidRequestError: A target is not above 0, or not finite.
        """
        for name, value in (("ttft_ms", self.ttft_ms), ("tpot_ms", self.tpot_ms)):
            if value is not None and not 0 < value < math.inf:
                raise InvalidRequestError(
                    f"slo.{name} must be above 0 and finite, got {value}: leave it out for the server's",
                    f"slo.{name}",
                )


class DraftStep(NamedTuple):
    """A draft that was verified.

    Attributes:
        num_drafted: Its tokens, at least one.
        num_accepted: How many of them became part of the answer.
    """

    num_drafted: int
    num_accepted: int


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to produce. Never changes; safe to hand between threads.

    A client's request with `n` answers becomes n of these, told apart by `index`.

    Attributes:
        id: Unique in the engine.
        prompt_ids: Token ids of the prompt, at least one.
        sampling: How to choose and when to stop.
        seed: Key of this answer's sampling noise (never None: drawn at admission if the client gave none).
        max_tokens: Most tokens the answer may have, the context limit counted in.
        eos_token_ids: Tokens that end the answer unless `sampling.ignore_eos`.
        bad_words_ids: Token sequences never to be completed (`sampling.bad_words`, tokenised).
        grammar: What the answer must match (`sampling.structured_outputs`, compiled), or None.
        index: Which of the client's n answers this is.
        priority: Lower runs first; 0 for all under the `fcfs` scheduling policy.
        arrival: Seconds on the monotonic clock when the request was accepted.
        speculation: What it asks of its drafts; the engine can honour it.
        allowed_ids: [tokens] int64, `sampling.allowed_token_ids` made a tensor once; None if there are none.
        client: Who asked, if the request says so.
        slo: How soon it wants its answer.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    seed: int
    max_tokens: int
    eos_token_ids: frozenset[int] = frozenset()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    grammar: CompiledGrammar | None = None
    index: int = 0
    priority: int = 0
    arrival: float = 0.0
    speculation: Speculation = Speculation()
    client: str = ""
    slo: LatencyTargets = LatencyTargets()
    allowed_ids: torch.Tensor | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        allowed = self.sampling.allowed_token_ids
        object.__setattr__(self, "allowed_ids", None if allowed is None else torch.tensor(allowed))


@dataclass(slots=True, eq=False)
class Sequence:
    """Progress of one request. Known tokens run ahead, computed ones catch up.

    There is no prefill or decode phase: each step computes some of the known tokens, and where it
    reaches the last one it samples. A preempted sequence starts again with `num_computed = 0`.

    Attributes:
        request: What was asked.
        token_ids: Prompt and answer so far; only `Scheduler.advance` appends.
        num_computed: How many of them have their keys and values in the cache.
        block_ids: The cache blocks that hold them, in order.
        num_cached: Prompt tokens that were found in the prefix cache at first admission.
        num_preemptions: How often its blocks were taken away.
        first_scheduled: Seconds on the monotonic clock of its first step, or None.
        draft_steps: Its drafts so far, in order; only `Metrics.record` appends.
        first_token: The same of its first token.
    """

    request: Request
    token_ids: list[int]
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    num_preemptions: int = 0
    first_scheduled: float | None = None
    draft_steps: list[DraftStep] = field(default_factory=list)
    first_token: float | None = None

    @classmethod
    def start(cls, request: Request) -> Sequence:
        """A sequence that has computed nothing yet."""
        return cls(request, list(request.prompt_ids))

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.id

    @property
    def num_prompt(self) -> int:
        """Tokens in the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_output(self) -> int:
        """Tokens answered so far."""
        return len(self.token_ids) - len(self.request.prompt_ids)


@dataclass(frozen=True, slots=True)
class Output:
    """What one step added to one answer. Every request ends with exactly one finished Output.

    Attributes:
        request_id: The engine request this belongs to.
        index: Which of the client's n answers.
        text: New text, safe to show: it holds no part of a stop string and no broken character.
        token_ids: New tokens.
        logprobs: One per new token, if asked for.
        finish_reason: Why the answer ended, or None while it goes on.
        stop_reason: The stop string or stop token that ended it, if one did; the reason for an `error`.
        num_prompt_tokens: Length of the prompt.
        num_cached_tokens: How many of those came from the prefix cache.
        draft_steps: All drafts of the answer, once it has ended.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    draft_steps: tuple[DraftStep, ...] = ()
