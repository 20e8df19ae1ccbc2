"""The shapes of the HTTP API: what requests may hold, and what is answered.

Types are strict ("5" is no integer) and unknown fields are refused. What is accepted is honoured, apart
from fields that have no effect on the answer: `user`, `safety_identifier`, `metadata`, `prompt_cache_key`
(the prefix cache needs no key), `store: false`, `service_tier: auto | default`, `modalities: ["text"]`.
Fields of type `Unsupported` belong to the OpenAI or vLLM API but are not served: only null is accepted.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from outpace.errors import InvalidRequestError
from outpace.sampling import SamplingParams

MAX_N = 128  # the OpenAI API's own limit

Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Float = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Unsupported = Annotated[None, Field(description="Not supported: only null is accepted.")]


class Strict(BaseModel):
    """A request object: strict types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_usage: bool = Field(False, description="Send a last chunk with the usage and no choices")
    continuous_usage_stats: bool = Field(False, description="Send the usage so far with every chunk")


class GenerationRequest(Strict):
    """What completions and chat completions have in common."""

    model: str | None = Field(None, description="The served model's name; it may be left out")
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: Int | None = None
    min_p: Float | None = None
    presence_penalty: Float | None = None
    frequency_penalty: Float | None = None
    repetition_penalty: Float | None = None
    logit_bias: dict[str, Float] | None = Field(None, description="Token id to a bias in [-100, 100]")
    seed: Int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Int | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[TokenId] | None = None
    skip_special_tokens: bool | None = None
    priority: Int = Field(0, description="Lower runs first under --scheduling-policy priority")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream: true")

    # No effect on the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    # Of the OpenAI API or vLLM's, not served here.
    prompt_logprobs: Unsupported = None
    structured_outputs: Unsupported = None
    use_beam_search: Unsupported = None
    length_penalty: Unsupported = None
    truncate_prompt_tokens: Unsupported = None
    logits_processors: Unsupported = None
    return_token_ids: Unsupported = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed with stream: true", "stream_options")
        return self

    def sampling(self) -> SamplingParams:
        """The request's sampling parameters; absent and null fields keep SamplingParams' defaults.

        Raises:
            InvalidRequestError: A value is out of range; `param` is the field as the client wrote it.
        """
        raise NotImplementedError

    def _sampling(self, max_tokens: int | None, logprobs: int | None, names: dict[str, str]) -> SamplingParams:
        ...
