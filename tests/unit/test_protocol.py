from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from outpace.errors import InvalidRequestError
from outpace.sampling import SamplingParams, StructuredOutputsParams
from outpace.server.errors import explain
from outpace.server.protocol import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

HELLO = [{"role": "user", "content": "Hello"}]


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"messages": HELLO, **fields})


def complete(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "Hello", **fields})


def refusal(model: Any, **fields: Any) -> tuple[str, str | None]:
    """Message and field of the first complaint."""
    with pytest.raises(ValidationError) as error:
        model.model_validate(fields)
    first = error.value.errors()[0]
    return explain({**first, "loc": ("body", *first["loc"])})


def test_what_is_not_given_keeps_the_defaults_of_sampling_params() -> None:
    assert chat().sampling() == SamplingParams()
    assert chat(temperature=None, n=None, stop=None, logit_bias=None).sampling() == SamplingParams()


def test_completions_are_sixteen_tokens_long_unless_told_otherwise() -> None:
    assert complete().sampling().max_tokens == 16
    assert complete(max_tokens=None).sampling().max_tokens is None


def test_every_sampling_field_arrives() -> None:
    fields: dict[str, Any] = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "seed": 3,
        "include_stop_str_in_output": True,
        "min_tokens": 2,
        "max_tokens": 9,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    lists: dict[str, Any] = {
        "stop": ["a", "b"],
        "stop_token_ids": [1],
        "bad_words": ["x"],
        "allowed_token_ids": [4, 5],
    }
    tuples: Any = {name: tuple(value) for name, value in lists.items()}
    expected = SamplingParams(**fields, **tuples, logprobs=3, logit_bias={7: -1.0})
    bias = {"logit_bias": {"7": -1}}
    assert chat(**fields, **lists, **bias, logprobs=True, top_logprobs=3).sampling() == expected
    assert complete(**fields, **lists, **bias, logprobs=3).sampling() == expected


def test_one_stop_string_needs_no_list() -> None:
    assert chat(stop="end").sampling().stop == ("end",)


def test_max_completion_tokens_is_max_tokens_and_they_must_agree() -> None:
    assert chat(max_completion_tokens=5).sampling().max_tokens == 5
    assert chat(max_completion_tokens=5, max_tokens=5).sampling().max_tokens == 5
    with pytest.raises(InvalidRequestError, match="one limit by two names"):
        chat(max_completion_tokens=5, max_tokens=6)


def test_chat_logprobs_is_a_switch_and_top_logprobs_a_number() -> None:
    assert chat(logprobs=True).sampling().logprobs == 0
    assert chat(logprobs=False).sampling().logprobs is None
    with pytest.raises(InvalidRequestError, match="only allowed with logprobs") as error:
        chat(top_logprobs=2)
    assert error.value.param == "top_logprobs"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 30: 1}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"top_p": 0}, "top_p"),
    ],
)
def test_out_of_range_values_are_refused_by_the_clients_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError, match=param) as error:
        chat(**fields).sampling()
    assert error.value.param == param


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": "5"}, "temperature should be a valid number, got '5'"),
        ({"temperature": float("nan")}, "temperature should be a finite number, got nan"),
        ({"max_tokens": 5.0}, "max_tokens should be a valid integer, got 5.0"),
        ({"n": True}, "n should be a valid integer, got True"),
        ({"n": 129}, "n should be less than or equal to 128, got 129"),
        ({"stream": 1}, "stream should be a valid boolean, got 1"),
        ({"stop": 5}, "stop should be a string or a list of strings, got 5"),
        ({"stop": ["a", 5]}, r"stop[1] should be a valid string, got 5"),
        ({"seed": 2**70}, "seed should be less than"),
        ({"nonsense": 1}, "unknown field: nonsense"),
        (
            {"response_format": {"type": "xml"}},
            "response_format.type should be 'text', 'json_object' or 'json_schema', got 'xml'",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema is required",
        ),
        ({"structured_outputs": {"json": 5}}, "structured_outputs.json should be a valid dictionary, got 5"),
        ({"structured_outputs": {"json": "\ud800"}}, "structured_outputs.json should be Unicode text"),
        ({"structured_outputs": {"xml": 5}}, "unknown field: structured_outputs.xml"),
        ({"store": True}, "store should be False, got True"),
        ({"service_tier": "flex"}, "service_tier should be 'auto' or 'default', got 'flex'"),
        ({"modalities": ["text", "audio"]}, "modalities[1] should be 'text', got 'audio'"),
        ({"messages": []}, "messages must not be empty"),
        ({"messages": "Hello"}, "messages should be a valid list, got 'Hello'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role should be"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content should be a string or a list"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content should be Unicode text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type should be 'text', got 'image_url'",
        ),
        ({"tools": [{"type": "function"}]}, "tools[0].function is required"),
        (
            {"tools": [{"type": "function", "function": {"name": ""}}]},
            "tools[0].function.name must not be empty",
        ),
        ({"tool_choice": "always"}, "tool_choice should be 'none', 'auto' or 'required', got 'always'"),
        ({"tool_choice": 5}, "tool_choice should be a valid dictionary"),
    ],
)
def test_wrong_types_and_unknown_fields_are_refused_in_words(fields: dict[str, Any], message: str) -> None:
    text, param = refusal(ChatCompletionRequest, **{"messages": HELLO, **fields})
    assert text.startswith(message)
    assert param is not None
    assert param in text


UNSUPPORTED_IN_CHAT = {
    "functions": [],
    "function_call": "auto",
    "audio": {"voice": "alloy"},
    "prediction": {},
    "reasoning_effort": "low",
    "verbosity": "low",
    "web_search_options": {},
    "chat_template": "{{ messages }}",
    "prompt_logprobs": 1,
    "use_beam_search": True,
    "length_penalty": 1.0,
    "truncate_prompt_tokens": 5,
    "return_token_ids": True,
    "documents": [],
    "echo": True,
}


@pytest.mark.parametrize("field", UNSUPPORTED_IN_CHAT)
def test_known_fields_that_are_not_served_are_refused_by_name(field: str) -> None:
    message = refusal(ChatCompletionRequest, messages=HELLO, **{field: UNSUPPORTED_IN_CHAT[field]})
    assert message == (f"{field} is not supported by this server", field)
    chat(**{field: None})


def test_known_fields_that_completions_do_not_serve_are_refused_by_name() -> None:
    message = refusal(CompletionRequest, prompt="x", suffix="x")
    assert message == ("suffix is not supported by this server", "suffix")


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("fields", "asked"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "description": "d", "schema": SCHEMA},
                }
            },
            {"json": SCHEMA},
        ),
        ({"structured_outputs": {"regex": "a+"}}, {"regex": "a+"}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ("a", "b")}),
        ({"structured_outputs": {"grammar": "root ::= x"}}, {"grammar": "root ::= x"}),
        ({"structured_outputs": {"json": "{}", "regex": None}}, {"json": "{}"}),
        (
            {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            {"json": SCHEMA, "disable_any_whitespace": True},
        ),
        ({"structured_outputs": {"json_object": True}}, {"json_object": True}),
        ({"structured_outputs": {"structural_tag": {"a": 1}}}, {"structural_tag": {"a": 1}}),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "text"}}, {"regex": "a"}),
    ],
)
def test_the_form_of_an_answer_can_be_asked_for_in_two_ways(
    fields: dict[str, Any], asked: dict[str, Any] | None
) -> None:
    expected = None if asked is None else StructuredOutputsParams(**asked)
    assert chat(**fields).sampling().structured_outputs == expected
    assert complete(**fields).sampling().structured_outputs == expected


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"structured_outputs": {}}, "exactly one of"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "got regex and choice"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "exclude each other",
        ),
    ],
)
def test_the_form_of_an_answer_is_asked_for_once(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as error:
        chat(**fields).sampling()
    assert error.value.param == "structured_outputs"


def test_fields_without_effect_on_the_answer_are_accepted() -> None:
    request = chat(
        user="me",
        safety_identifier="me",
        metadata={"a": "b"},
        prompt_cache_key="k",
        store=False,
        service_tier="auto",
        modalities=["text"],
        response_format={"type": "text"},
    )
    assert request.sampling() == SamplingParams()


@pytest.mark.parametrize("prompt", ["", "a", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_prompts_come_in_four_shapes(prompt: Any) -> None:
    assert complete(prompt=prompt).prompt == prompt


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (5, "prompt should be a string, a list of strings, token ids or lists of them"),
        (None, "prompt should be a string, a list of strings, token ids or lists of them"),
        ([], "prompt must not be empty"),
        ([[]], "prompt[0] must not be empty"),
        ([1, "a"], "prompt[1] should be a valid integer, got 'a'"),
        (["a", 1], "prompt[1] should be a valid string, got 1"),
        ([True], "prompt[0] should be a valid string, got True"),
        ([-1], "prompt[0] should be greater than or equal to 0, got -1"),
        ([2**40], "prompt[0] should be less than 2147483648"),
        ([[1, 2.5]], "prompt[0][1] should be a valid integer, got 2.5"),
        ("\udc00", "prompt should be Unicode text"),
    ],
)
def test_other_shapes_of_prompts_are_refused(prompt: Any, message: str) -> None:
    text, _ = refusal(CompletionRequest, prompt=prompt)
    assert text.startswith(message)


def test_a_stream_option_without_a_stream_is_refused() -> None:
    chat(stream=True, stream_options={"include_usage": True})
    with pytest.raises(InvalidRequestError, match="only allowed with stream"):
        chat(stream_options={"include_usage": True})


def test_best_of_must_equal_n() -> None:
    complete(best_of=2, n=2)
    complete(best_of=1)
    with pytest.raises(InvalidRequestError, match=r"best_of must equal n \(1\), got 3"):
        complete(best_of=3)


def test_one_request_cannot_ask_for_endless_answers() -> None:
    complete(prompt=["a"] * 16, n=128)
    complete(prompt=[1] * 5000)
    with pytest.raises(InvalidRequestError, match=r"17 prompts times n \(128\) must be at most 2048"):
        complete(prompt=["a"] * 17, n=128)


def test_echo_excludes_logprobs() -> None:
    with pytest.raises(InvalidRequestError, match="echo cannot be used with logprobs"):
        complete(echo=True, logprobs=1)


def test_text_parts_are_joined_and_developers_are_systems() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = ChatMessage.model_validate({"role": "developer", "content": parts, "name": "n"})
    assert message.for_template() == {"role": "system", "content": "ab", "name": "n"}


def test_an_answer_of_the_server_can_be_sent_back_to_it() -> None:
    ChatMessage.model_validate({"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None})


def test_tokenize_takes_a_prompt_or_messages() -> None:
    TokenizeRequest.model_validate({"prompt": ""})
    TokenizeRequest.model_validate({"messages": HELLO})
    for fields in ({}, {"prompt": "a", "messages": HELLO}):
        with pytest.raises(InvalidRequestError, match="either prompt or messages"):
            TokenizeRequest.model_validate(fields)


def test_detokenize_takes_token_ids_only() -> None:
    assert refusal(DetokenizeRequest, tokens=[1, -1])[1] == "tokens[1]"


def test_long_values_are_shortened_in_messages() -> None:
    text, _ = refusal(CompletionRequest, prompt="x", seed="long" * 100)
    assert len(text) < 150


@pytest.mark.parametrize("kind", ["text", "json_object", "json_schema"])
def test_a_schema_comes_with_its_type(kind: str) -> None:
    given = None if kind == "json_schema" else {"name": "x", "schema": {}}
    with pytest.raises(InvalidRequestError, match=f"the type is {kind}") as error:
        chat(response_format={"type": kind, "json_schema": given})
    assert error.value.param == "response_format"


def call(arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user"}, "messages[1].content is required"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "messages[1].content is required"),
        ({"role": "user", "content": "x", "tool_calls": [call("{}")]}, "messages[1].tool_calls goes with"),
        (
            {"role": "user", "content": "x", "tool_call_id": "1"},
            "messages[1].tool_call_id goes with",
        ),
        (
            {"role": "assistant", "tool_calls": [call("{}"), call("[1]")]},
            "messages[1].tool_calls[1].function.arguments must be a JSON object as text, got '[1]'",
        ),
        ({"role": "assistant", "tool_calls": [call("{")]}, "messages[1].tool_calls[0].function.arguments"),
    ],
)
def test_a_message_holds_what_its_role_may_say(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        chat(messages=[*HELLO, message])
    assert str(error.value).startswith(reason)
    assert error.value.param is not None
    assert reason.startswith(error.value.param)


def test_calls_and_their_results_reach_the_template_as_objects() -> None:
    request = chat(
        messages=[
            *HELLO,
            {"role": "assistant", "content": None, "tool_calls": [call('{"a": 1}')]},
            {"role": "tool", "tool_call_id": "1", "content": "42"},
        ]
    )
    assert [message.for_template() for message in request.messages[1:]] == [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]


TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (None, ["f", "g"]),
        ("auto", ["f", "g"]),
        ("required", ["f", "g"]),
        ("none", []),
        ({"type": "function", "function": {"name": "g"}}, ["g"]),
    ],
)
def test_the_choice_says_which_tools_are_offered(choice: Any, names: list[str]) -> None:
    offered = chat(tools=TOOLS, tool_choice=choice).offered_tools
    assert [tool.function.name for tool in offered] == names


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "h"}}}, "tool_choice"),
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": TOOLS, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ],
)
def test_tools_that_could_not_be_called_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError, match=param) as error:
        chat(**fields)
    assert error.value.param == param
    chat(**{**fields, "tools": TOOLS, "tool_choice": "none"})
