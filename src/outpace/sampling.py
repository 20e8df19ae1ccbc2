"""What a request asks of sampling, and the one function from logits to the target distribution."""

from __future__ import annotations

from dataclasses import dataclass, field

from outpace.errors import InvalidRequestError

MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose and when to stop, with the field names of vLLM and the OpenAI API.

    Attributes:
        n: Number of answers for the prompt.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: Keep the smallest set of most probable tokens whose mass reaches this, in (0, 1].
        top_k: Keep the k most probable tokens; 0 or -1 keeps all.
        min_p: Drop tokens less probable than this times the most probable one, in [0, 1].
        presence_penalty: Subtracted once from every token already in the answer, in [-2, 2].
        frequency_penalty: Subtracted per occurrence in the answer, in [-2, 2].
        repetition_penalty: Divides (positive) or multiplies (negative) the logits of tokens already in
            the prompt or answer; 1 is off.
        logit_bias: Added to the logits of the given token ids, each in [-100, 100].
        seed: Makes the answer reproducible; None draws one at admission.
        stop: Strings that end the answer.
        stop_token_ids: Tokens that end the answer.
        include_stop_str_in_output: Whether a matched stop string stays in the text.
        min_tokens: No end-of-sequence token and no stop token before this many tokens.
        max_tokens: Length limit of the answer; None is as long as the context allows.
        ignore_eos: Go on after the end-of-sequence token.
        bad_words: Strings never to be completed.
        allowed_token_ids: If given, only these tokens are ever chosen.
        logprobs: If given, return the chosen token's log-probability and this many most probable ones.
        skip_special_tokens: Whether special tokens are left out of the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    ignore_eos: bool = False
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            InvalidRequestError: A value is out of range; `param` names the field.
        """
        _require(self.n >= 1, "n", self.n, "at least 1")
        _require(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(self.top_k >= -1, "top_k", self.top_k, "at least 1, or 0 or -1 for all tokens")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        _require(-2 <= self.presence_penalty <= 2, "presence_penalty", self.presence_penalty, "in [-2, 2]")
        _require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", self.frequency_penalty, "in [-2, 2]")
        _require(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "above 0")
        for bias in self.logit_bias.values():
            _require(-100 <= bias <= 100, "logit_bias", bias, "in [-100, 100]")
        if self.seed is not None:
            _require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer")
        _require(all(self.stop), "stop", "''", "a non-empty string")
        _require(all(self.bad_words), "bad_words", "''", "a non-empty string")
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "at least 0")
        if self.max_tokens is not None:
            _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
            limit = f"at most max_tokens ({self.max_tokens})"
            _require(self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens, limit)
        if self.allowed_token_ids is not None:
            _require(len(self.allowed_token_ids) > 0, "allowed_token_ids", [], "not empty")
        if self.logprobs is not None:
            _require(0 <= self.logprobs <= MAX_LOGPROBS, "logprobs", self.logprobs, f"in [0, {MAX_LOGPROBS}]")


def _require(holds: bool, param: str, value: object, limit: str) -> None:
    if not holds:
        raise InvalidRequestError(f"{param} must be {limit}, got {value}", param)
