"""The shapes of the HTTP API: what requests may hold, and what is answered.

Types are strict ("5" is no integer) and unknown fields are refused. What is accepted is honoured, apart
from fields that have no effect on the answer: `user`, `safety_identifier`, `metadata`, `prompt_cache_key`
(the prefix cache needs no key), `store: false`, `service_tier: auto | default`, `modalities: ["text"]`.
Fields of type `Unsupported` belong to the OpenAI API or are vLLM's extras, but are not served: only null
is accepted. Ranges are checked by `SamplingParams`, the one place that knows them.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from outpace.errors import InvalidRequestError
from outpace.request import LatencyTargets, Speculation
from outpace.sampling import SamplingParams, StructuredOutputsParams

MAX_N = 128  # the OpenAI API's own limit
MAX_ANSWERS = 2048  # prompts × n of one request: each is a task and a place in the queue
DEFAULT_COMPLETION_TOKENS = 16  # the OpenAI API's own; chat has none


def _check_unicode(text: str) -> str:
    """Refuses what JSON can escape but UTF-8 cannot hold, and so no tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("should be Unicode text, without lone surrogates") from None
    return text


def _shape(value: Any) -> str:
    """Which member of a union a value is meant to be, so that errors are about that one only."""
    if isinstance(value, str):
        return "<text>"
    if isinstance(value, list):
        return {int: "<ids>", list: "<lists of ids>"}.get(type(value[0]) if value else str, "<list>")
    return "<other>"


def _is_none(value: object) -> bool:
    return value is None


Int = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Float = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, AfterValidator(_check_unicode)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Stop = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[Text], Tag("<list>")],
    Discriminator(_shape, "stop_type", "Input should be a string or a list of strings"),
]
Prompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("<list>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("<lists of ids>")],
    Discriminator(
        _shape, "prompt_type", "Input should be a string, a list of strings, token ids or lists of them"
    ),
]
JsonText = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[dict[str, Any], Tag("<other>")],
    Discriminator(_shape, "json_text_type", "Input should be a JSON object or its text"),
]
Unsupported = Annotated[None, Field(description="Not supported: only null is accepted.")]


# --- Requests -------------------------------------------------------------------------------------------


class RequestModel(BaseModel):
    """A request object: strict types, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(RequestModel):
    """What a stream holds besides the answer."""

    include_usage: bool = Field(default=False, description="Send a last chunk with the usage and no choices")
    continuous_usage_stats: bool = Field(default=False, description="Send the usage so far with every chunk")


class SpeculationOptions(RequestModel):
    """What a request asks of its drafts, which change how fast an answer comes, never the answer."""

    max_draft_tokens: Int | None = Field(None, description="Most draft tokens in a step; 0: no drafts")
    method: Text | None = Field(None, description="A draft method that the server runs, or none")


class SloOptions(RequestModel):
    """How soon a request wants its answer: what the policy slo aims at."""

    ttft_ms: Float | None = Field(None, description="Milliseconds to the first token, above 0")
    tpot_ms: Float | None = Field(None, description="Milliseconds per token after the first, above 0")


class StructuredOutputs(RequestModel):
    """What the answer must look like: exactly one of these, as in vLLM."""

    schema_: JsonText | None = Field(None, alias="json", description="A JSON schema")
    regex: Text | None = None
    choice: list[Text] | None = Field(None, description="The texts to choose from")
    grammar: Text | None = Field(None, description="A grammar in GBNF; its first rule is called root")
    json_object: bool | None = Field(None, description="Any JSON object")
    structural_tag: JsonText | None = Field(None, description="A structural tag of xgrammar")
    disable_any_whitespace: bool = Field(False, description='With json: ", " and ": ", and no other space')

    def for_sampling(self) -> StructuredOutputsParams:
        """The same for the engine.

        Raises:
            InvalidRequestError: It is not exactly one constraint.
        """
        return StructuredOutputsParams(
            json=self.schema_,
            regex=self.regex,
            choice=None if self.choice is None else tuple(self.choice),
            grammar=self.grammar,
            json_object=self.json_object,
            structural_tag=self.structural_tag,
            disable_any_whitespace=self.disable_any_whitespace,
        )


class JsonSchema(RequestModel):
    """A JSON schema by name. It is always enforced."""

    name: Text
    schema_: dict[str, Any] = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """How the answer is constrained, in the words of the OpenAI API."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(None, description="Only with type json_schema")

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise InvalidRequestError(
                f"response_format.json_schema belongs to the type json_schema; the type is {self.type}",
                "response_format",
            )
        return self

    def for_sampling(self) -> StructuredOutputsParams | None:
        """The same for the engine; None for any text."""
        if self.json_schema is not None:
            return StructuredOutputsParams(json=self.json_schema.schema_)
        return StructuredOutputsParams(json_object=True) if self.type == "json_object" else None


class GenerationRequest(RequestModel):
    """What completions and chat completions have in common."""

    model: str | None = Field(None, description="The served model; may be left out, as there is one")
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: Int | None = None
    min_p: Float | None = None
    presence_penalty: Float | None = None
    frequency_penalty: Float | None = None
    repetition_penalty: Float | None = None
    logit_bias: dict[str, Float] | None = Field(None, description="From token id to a bias in [-100, 100]")
    seed: Int | None = None
    stop: Stop | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Int | None = None
    ignore_eos: bool | None = None
    bad_words: list[Text] | None = None
    allowed_token_ids: list[TokenId] | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(None, description="Not with response_format")
    priority: Int = Field(0, description="Lower runs first under --scheduling-policy priority")
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only with stream: true")
    speculation: SpeculationOptions | None = None
    slo: SloOptions | None = Field(None, description="Only under --spec-policy slo")

    user: str | None = None
    safety_identifier: str | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None

    prompt_logprobs: Unsupported = None
    use_beam_search: Unsupported = None
    length_penalty: Unsupported = None
    truncate_prompt_tokens: Unsupported = None
    return_token_ids: Unsupported = None

    @property
    def client_names(self) -> dict[str, str]:
        """From the engine's names of fields to those that the client wrote, where they differ."""
        return {} if self.response_format is None else {"structured_outputs": "response_format"}

    @property
    def structure(self) -> StructuredOutputsParams | None:
        """What the answer must look like, however that was said.

        Raises:
            InvalidRequestError: It was said twice, or it is not exactly one constraint.
        """
        formatted = None if self.response_format is None else self.response_format.for_sampling()
        if self.structured_outputs is None:
            return formatted
        if formatted is not None:
            raise InvalidRequestError(
                "response_format and structured_outputs exclude each other: give one", "structured_outputs"
            )
        return self.structured_outputs.for_sampling()

    def wanted_speculation(self) -> Speculation | None:
        """What is asked of the drafts.

        Raises:
            InvalidRequestError: A value is out of range.
        """
        asked = self.speculation
        return None if asked is None else Speculation(asked.max_draft_tokens, asked.method)

    def wanted_slo(self) -> LatencyTargets | None:
        """How soon the answer is wanted.

        Raises:
            InvalidRequestError: A value is out of range.
        """
        return None if self.slo is None else LatencyTargets(self.slo.ttft_ms, self.slo.tpot_ms)

    @model_validator(mode="after")
    def _check_stream_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed with stream: true", "stream_options")
        return self


class CompletionRequest(GenerationRequest):
    """Body of POST /v1/completions."""

    prompt: Prompt = Field(description="A text, token ids, or a list of either")
    max_tokens: Int | None = Field(
        DEFAULT_COMPLETION_TOKENS,
        description="null: what the context allows. The default is less if the prompt leaves less",
    )
    echo: bool | None = Field(None, description="Begin the text with the prompt; not with logprobs")
    logprobs: Int | None = None
    add_special_tokens: bool = Field(True, description="Give texts the tokenizer's own, such as BOS")
    best_of: Int | None = Field(None, description="Only equal to n: answers are not ranked")

    suffix: Unsupported = None

    @model_validator(mode="after")
    def _check_combinations(self) -> CompletionRequest:
        num_prompts = 1 if _shape(self.prompt) in ("<text>", "<ids>") else len(self.prompt)
        if num_prompts * (self.n or 1) > MAX_ANSWERS:
            reason = f"{num_prompts} prompts times n ({self.n or 1}) must be at most {MAX_ANSWERS}"
            raise InvalidRequestError(reason, "prompt")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequestError(
                f"best_of must equal n ({self.n or 1}), got {self.best_of}: answers are not ranked", "best_of"
            )
        if self.echo and self.logprobs is not None:
            raise InvalidRequestError(
                "echo cannot be used with logprobs: a prompt's are not computed", "echo"
            )
        return self

    def sampling(self) -> SamplingParams:
        """The sampling parameters.

        Raises:
            InvalidRequestError: A value is out of range.
        """
        return _sampling(self, self.max_tokens, self.logprobs)


class TextPart(RequestModel):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


Content = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[TextPart], Tag("<list>")],
    Discriminator(_shape, "content_type", "Input should be a string or a list of text parts"),
]


class FunctionCall(RequestModel):
    """What a call asks for."""

    name: Text
    arguments: Text = Field(description="A JSON object, as text")


class ToolCall(RequestModel):
    """A call that the model made."""

    id: Text
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(RequestModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="developer means system"
    )
    content: Content | None = Field(None, description="May be left out only beside tool_calls")
    name: Text | None = Field(None, description="Handed to the chat template")
    tool_calls: list[ToolCall] | None = Field(None, description="Only of the assistant")
    tool_call_id: Text | None = Field(None, description="Only of a tool: the call that this answers")

    # Null in what a client sends back of an earlier answer.
    refusal: Unsupported = None
    annotations: Unsupported = None
    audio: Unsupported = None
    function_call: Unsupported = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: its text in one string, arguments as objects."""
        parts = [self.content] if isinstance(self.content, str) else [p.text for p in self.content or ()]
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": "".join(parts)}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {
                        "name": call.function.name,
                        "arguments": json.loads(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ]
        return message


def _check_messages(messages: list[ChatMessage]) -> list[ChatMessage]:
    for number, message in enumerate(messages):
        place = f"messages[{number}]"
        if message.content is None and not message.tool_calls:
            raise InvalidRequestError(f"{place}.content is required", f"{place}.content")
        for field, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(message, field) and message.role != role:
                reason = f"{place}.{field} goes with the role {role}, not with {message.role}"
                raise InvalidRequestError(reason, f"{place}.{field}")
        for index, call in enumerate(message.tool_calls or ()):
            if not _is_object(call.function.arguments):
                at = f"{place}.tool_calls[{index}].function.arguments"
                value = ascii(call.function.arguments[:80])
                raise InvalidRequestError(f"{at} must be a JSON object as text, got {value}", at)
    return messages


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


Messages = Annotated[list[ChatMessage], Field(min_length=1), AfterValidator(_check_messages)]


class Function(RequestModel):
    """What a tool does and what it takes."""

    name: Annotated[Text, Field(min_length=1)]
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema; without one, no arguments")
    strict: bool | None = Field(
        None, description="Calls always match the schema, also under tool_choice auto"
    )


class Tool(RequestModel):
    """Something the model may call."""

    type: Literal["function"]
    function: Function


class FunctionName(RequestModel):
    """A function by its name."""

    name: Text


class NamedTool(RequestModel):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[NamedTool, Tag("<other>")],
    Discriminator(_shape, "tool_choice_type", "Input should be a string or an object"),
]


class ChatCompletionRequest(GenerationRequest):
    """Body of POST /v1/chat/completions."""

    messages: Messages
    max_tokens: Int | None = None
    max_completion_tokens: Int | None = Field(None, description="The newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: Int | None = Field(None, description="Only with logprobs: true")
    add_generation_prompt: bool | None = Field(None, description="Default: unless continue_final_message")
    continue_final_message: bool = Field(False, description="Go on with the last message")
    add_special_tokens: bool = Field(False, description="Add the tokenizer's own to what the template writes")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template")

    modalities: list[Literal["text"]] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = Field(None, description="auto if there are tools, else none")
    parallel_tool_calls: bool | None = Field(
        None, description="Whether there may be several calls; default true"
    )

    functions: Unsupported = None
    function_call: Unsupported = None
    audio: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None
    chat_template: Unsupported = None
    documents: Unsupported = None
    echo: Unsupported = None

    @property
    def client_names(self) -> dict[str, str]:
        """See GenerationRequest."""
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        names = {"prompt": "messages", "logprobs": "top_logprobs", "max_tokens": limit}
        if self.offered_tools:
            names["structured_outputs"] = "tools"
        return {**super().client_names, **names}

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model may call, or must; none of them under tool_choice none."""
        if self.tool_choice == "none" or not self.tools:
            return []
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools

    @model_validator(mode="after")
    def _check_combinations(self) -> ChatCompletionRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequestError(
                f"max_tokens ({self.max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) "
                "are one limit by two names: give one",
                "max_tokens",
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs is only allowed with logprobs: true", "top_logprobs")
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise InvalidRequestError("tools must have different names", "tools")
        if self.tool_choice not in (None, "none", "auto") and not self.offered_tools:
            wanted = self.tool_choice
            what = repr(wanted.function.name) if isinstance(wanted, NamedTool) else repr(wanted)
            there_are = ", ".join(names) or "none"
            raise InvalidRequestError(
                f"tool_choice {what} must find its function among tools, which has {there_are}", "tool_choice"
            )
        if self.offered_tools and self.structure is not None:
            field = "response_format" if self.structured_outputs is None else "structured_outputs"
            raise InvalidRequestError(
                f"{field} leaves no way to call a tool: leave it out, or give tool_choice none", field
            )

    def sampling(self) -> SamplingParams:
        """The sampling parameters.

        Raises:
            InvalidRequestError: A value is out of range.
        """
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return _sampling(self, max_tokens, (self.top_logprobs or 0) if self.logprobs else None)


class TokenizeRequest(RequestModel):
    """Body of POST /tokenize: either a prompt or messages."""

    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(None, description="Default: for a prompt, not for messages")
    add_generation_prompt: bool | None = Field(None, description="Default: unless continue_final_message")
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check_one_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("give either prompt or messages", "prompt")
        return self


class DetokenizeRequest(RequestModel):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


_SAME_IN_SAMPLING = (
    *("n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "seed", "stop_token_ids", "include_stop_str_in_output", "min_tokens"),
    *("ignore_eos", "bad_words", "allowed_token_ids", "skip_special_tokens"),
)


def in_client_names(error: InvalidRequestError, names: Mapping[str, str]) -> InvalidRequestError:
    """A refusal with the field at fault called as the client wrote it.

    Args:
        error: Its message begins with the field, if it names it ("max_tokens must ...").
        names: `GenerationRequest.client_names`.
    """
    name = names.get(error.param or "", error.param)
    return InvalidRequestError(str(error).replace(f"{error.param} must", f"{name} must"), name)


def _sampling(request: GenerationRequest, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """Builds SamplingParams; absent and null fields keep its defaults.

    Args:
        request: Holds the fields that are called the same in SamplingParams.
        max_tokens: Its `max_tokens`.
        logprobs: Its `logprobs`.
    """
    asked: dict[str, Any] = {name: getattr(request, name) for name in _SAME_IN_SAMPLING}
    asked |= {"max_tokens": max_tokens, "logprobs": logprobs, "structured_outputs": request.structure}
    asked["stop"] = [request.stop] if isinstance(request.stop, str) else request.stop
    asked = {key: tuple(value) if isinstance(value, list) else value for key, value in asked.items()}
    asked["logit_bias"] = {_token_id(key): bias for key, bias in (request.logit_bias or {}).items()}
    try:
        return SamplingParams(**{key: value for key, value in asked.items() if value is not None})
    except InvalidRequestError as error:
        raise in_client_names(error, request.client_names) from None


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise InvalidRequestError(f"logit_bias maps token ids to numbers, got the key {key!r}", "logit_bias")
    return int(key)


# --- Answers --------------------------------------------------------------------------------------------

_METRICS = "Of one prompt with n = 1, if the server runs with --per-request-spec-decode-metrics"


class PromptTokensDetails(BaseModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts; the prompt counts once, however many answers it gets."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class SpeculativeDecodingMetrics(BaseModel):
    """What became of an answer's drafts, as vLLM reports it. A step counts if it verified a draft."""

    mean_acceptance_length: float = Field(description="Tokens per step, the target's own included")
    draft_acceptance_rate: float = Field(description="Accepted per drafted token")
    acceptance_histogram: list[int] = Field(description="At j the steps that accepted j draft tokens")
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int = Field(description="The server's limit of draft tokens in a step")
    per_step_accepted: list[int] | None = Field(None, exclude_if=_is_none, description="If detailed")
    per_step_drafted: list[int] | None = Field(None, exclude_if=_is_none, description="If detailed")


class RequestMetrics(BaseModel):
    """How a request was served, if the server says so."""

    speculative_decoding: SpeculativeDecodingMetrics


class TopLogprob(BaseModel):
    """A token that could have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """The token that was chosen, and the most probable ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities in the chat format."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="Null if there is nothing but calls")
    refusal: None = None
    tool_calls: list[ToolCall] | None = Field(None, exclude_if=_is_none)


class ChatChoice(BaseModel):
    """One of the n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None = Field(description="The stop string or token that ended it, if one did")


class Answer(BaseModel):
    """What the answers of both endpoints may carry besides the OpenAI API's own."""

    synthetic: bool = Field(
        default=False,
        description="Drafts were accepted by chance: the answer means nothing. Absent if false",
        exclude_if=operator.not_,
    )


class ChatCompletion(Answer):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    metrics: RequestMetrics | None = Field(None, exclude_if=_is_none, description=_METRICS)


class CompletionLogprobs(BaseModel):
    """Log-probabilities in the format of the older endpoint, one entry per token."""

    text_offset: list[int]
    token_logprobs: list[float]
    tokens: list[str]
    top_logprobs: list[dict[str, float]]


class CompletionChoice(BaseModel):
    """One answer; answers to prompt i have the indices i·n to i·n + n - 1."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = Field(description="The stop string or token that ended it, if one did")


class Completion(Answer):
    """Answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    metrics: RequestMetrics | None = Field(None, exclude_if=_is_none, description=_METRICS)


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "outpace"
    max_model_len: int


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(BaseModel):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    """Answer of POST /detokenize."""

    prompt: str


class VersionResponse(BaseModel):
    """Answer of GET /version."""

    version: str


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = Field(None, description="The field at fault")
    code: str | None = None


class ErrorResponse(BaseModel):
    """Every error, whatever its status."""

    error: ErrorDetail
