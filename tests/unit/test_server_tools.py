"""Structured outputs and tools over HTTP, with the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fake_llm import FakeLLM, make_tokenizer, running_server
from pydantic import BaseModel

from outpace.config import ServerConfig
from outpace.errors import InvalidRequestError
from outpace.request import FinishReason
from outpace.sampling import StructuredOutputsParams

HELLO: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW: Any = {"type": "function", "function": {"name": "now"}}
ANSWER = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)
CALLS = [("weather", '{"city": "Paris"}'), ("now", "{}")]
# Writes tools, calls and results in ways of its own.
KNOWS_TOOLS = (
    "{% if tools %}[{% for t in tools %}{{ t.function.name }} {% endfor %}]{% endif %}"
    "{% for m in messages %}({{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or () %} {{ c.function.name }} {{ c.function.arguments.city }}{% endfor %})"
    "{% endfor %}"
)


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM(answer=ANSWER)


@pytest.fixture
def client(llm: FakeLLM) -> Iterator[openai.OpenAI]:
    with (
        running_server(llm, ServerConfig(enable_auto_tool_choice=True)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client,
    ):
        yield client


def ask(client: openai.OpenAI, messages: Any = HELLO, **fields: Any) -> Any:
    return client.chat.completions.create(model="fake", messages=messages, **fields)


def prompt(llm: FakeLLM) -> str:
    return str(llm.tokenizer.decode(llm.calls[-1].prompt_ids))


# --- Calls -----------------------------------------------------------------------------------------------


def test_calls_are_told_from_text(client: openai.OpenAI) -> None:
    (choice,) = ask(client, tools=[WEATHER, NOW]).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == CALLS
    assert all(call.type == "function" and call.id for call in calls)
    assert calls[0].id != calls[1].id


@pytest.mark.parametrize("n", [1, 2])
def test_calls_are_streamed_as_they_come(client: openai.OpenAI, n: int) -> None:
    content = [""] * n
    calls: list[list[list[str]]] = [[] for _ in range(n)]
    reasons: list[str | None] = [None] * n
    num_pieces = 0
    for chunk in ask(client, tools=[WEATHER, NOW], stream=True, n=n):
        (choice,) = chunk.choices
        content[choice.index] += choice.delta.content or ""
        for delta in choice.delta.tool_calls or ():
            if delta.id is not None:
                assert delta.index == len(calls[choice.index])
                assert delta.type == "function"
                calls[choice.index].append([delta.function.name, ""])
            calls[choice.index][delta.index][1] += delta.function.arguments
            num_pieces += 1
        reasons[choice.index] = choice.finish_reason
    assert content == ["Let me see."] * n
    assert [[tuple(call) for call in answer] for answer in calls] == [CALLS] * n
    assert reasons == ["tool_calls"] * n
    assert num_pieces > 6 * n


def test_calls_are_put_together_by_the_clients_own_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="fake", messages=HELLO, tools=[WEATHER, NOW]) as stream:
        final = stream.get_final_completion().choices[0]
    calls = final.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == CALLS
    assert final.finish_reason == "tool_calls"


def test_an_answer_without_calls_is_plain_text(client: openai.OpenAI, llm: FakeLLM) -> None:
    llm.answer = "It is <b>sunny</b>.\n"
    (choice,) = ask(client, tools=[WEATHER]).choices
    assert (choice.message.content, choice.message.tool_calls) == (llm.answer, None)
    assert choice.finish_reason == "stop"
    chunks = list(ask(client, tools=[WEATHER], stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == llm.answer
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_calls_alone_leave_no_content(client: openai.OpenAI, llm: FakeLLM) -> None:
    llm.answer = ANSWER.partition("\n")[2]
    assert ask(client, tools=[WEATHER, NOW]).choices[0].message.content is None


def test_a_call_that_was_cut_off_ends_with_length(client: openai.OpenAI) -> None:
    (choice,) = ask(client, tools=[WEATHER], max_tokens=60).choices
    assert choice.finish_reason == "length"
    assert CALLS[0][1].startswith(choice.message.tool_calls[0].function.arguments)


def test_logprobs_come_with_calls(client: openai.OpenAI, llm: FakeLLM) -> None:
    whole = ask(client, tools=[WEATHER, NOW], logprobs=True).choices[0]
    chunks = list(ask(client, tools=[WEATHER, NOW], logprobs=True, stream=True))
    streamed = [at.token for c in chunks if c.choices[0].logprobs for at in c.choices[0].logprobs.content]
    assert streamed == [at.token for at in whole.logprobs.content]
    assert len(streamed) == len(llm.tokenizer.encode(ANSWER))


def test_without_tools_an_answer_is_not_read(client: openai.OpenAI) -> None:
    assert ask(client).choices[0].message.content == ANSWER
    (choice,) = ask(client, tools=[WEATHER], tool_choice="none").choices
    assert (choice.message.content, choice.message.tool_calls) == (ANSWER, None)


# --- What the model gets ----------------------------------------------------------------------------------


def test_a_template_that_knows_tools_writes_them_its_own_way(llm: FakeLLM) -> None:
    llm.tokenizer = make_tokenizer(KNOWS_TOOLS)
    with (
        running_server(llm, ServerConfig(enable_auto_tool_choice=True)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="-") as client,
    ):
        message = ask(client, tools=[WEATHER, NOW]).choices[0].message
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls
        ]
        ask(client, [*HELLO, message.model_dump(), *results], tools=[WEATHER, NOW])
    written = prompt(llm)
    assert written.startswith("[weather now ](user: What is")
    assert "(assistant: Let me see. weather Paris now )(tool: sunny)(tool: sunny)" in written


def test_another_template_has_them_in_words(client: openai.OpenAI, llm: FakeLLM) -> None:
    message = ask(client, tools=[WEATHER, NOW]).choices[0].message
    assert prompt(llm).startswith("<|im_start|>system\nYou may call these functions:\n<tools>\n{")
    assert '"description": "Tells the weather."' in prompt(llm)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    ask(client, [*HELLO, message.model_dump(), result], tools=[WEATHER])
    assert f"<|im_start|>assistant\n{ANSWER}<|im_end|>" in prompt(llm)
    assert "<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>" in prompt(llm)


def test_tools_that_must_not_be_called_are_not_shown(client: openai.OpenAI, llm: FakeLLM) -> None:
    ask(client, tools=[WEATHER], tool_choice="none")
    assert "weather." not in prompt(llm)


@pytest.mark.parametrize(
    ("fields", "tags", "kind", "stops"),
    [
        ({"tool_choice": "required"}, 2, "tags_with_separator", False),
        ({"tool_choice": "required", "parallel_tool_calls": False}, 2, "tags_with_separator", True),
        ({"tool_choice": {"type": "function", "function": {"name": "now"}}}, 1, "tags_with_separator", True),
        ({"parallel_tool_calls": False}, 2, "triggered_tags", True),
    ],
)
def test_calls_are_enforced_where_the_request_says_so(
    client: openai.OpenAI, llm: FakeLLM, fields: dict[str, Any], tags: int, kind: str, stops: bool
) -> None:
    ask(client, tools=[WEATHER, NOW], **fields)
    structure = llm.calls[-1].sampling.structured_outputs.structural_tag["format"]
    assert (len(structure["tags"]), structure["type"], structure["stop_after_first"]) == (tags, kind, stops)


def test_nothing_is_enforced_under_auto(client: openai.OpenAI, llm: FakeLLM) -> None:
    ask(client, tools=[WEATHER, NOW], tool_choice="auto", parallel_tool_calls=True)
    assert llm.calls[-1].sampling.structured_outputs is None


# --- Refusals ---------------------------------------------------------------------------------------------


def test_auto_needs_a_server_that_was_started_for_it(llm: FakeLLM) -> None:
    with running_server(llm) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-") as client:
        with pytest.raises(openai.BadRequestError, match="--enable-auto-tool-choice") as error:
            ask(client, tools=[WEATHER])
        assert error.value.param == "tool_choice"
        assert ask(client, tools=[WEATHER], tool_choice="required").choices[0].message.tool_calls


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        (
            {"tool_choice": "required"},
            "tool_choice",
            "'required' must find its function among tools, which has none",
        ),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice",
            "'f' must find its function among tools, which has",
        ),
        (
            {"tools": [WEATHER], "response_format": {"type": "json_object"}},
            "response_format",
            "leaves no way to call a tool",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
            "the parameters of the tool 'f' cannot be enforced",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"required": [[]]}}}],
                "tool_choice": "required",
            },
            "tools",
            "the parameters of the tool 'f' cannot be enforced",
        ),
        (
            {"messages": [*HELLO, {"role": "assistant", "content": None}]},
            "messages[1].content",
            "messages[1].content is required",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(
    client: openai.OpenAI, fields: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, **fields)
    assert error.value.param == param
    assert reason in str(error.value)


# --- Structured outputs -----------------------------------------------------------------------------------


def test_structured_outputs_reach_the_engine(client: openai.OpenAI, llm: FakeLLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    ask(client, response_format=form)
    assert llm.calls[-1].sampling.structured_outputs == StructuredOutputsParams(json=schema)
    client.completions.create(
        model="fake", prompt="x", extra_body={"structured_outputs": {"choice": ["a", "b"]}}
    )
    assert llm.calls[-1].sampling.structured_outputs == StructuredOutputsParams(choice=("a", "b"))


def test_a_refusal_of_the_engine_names_what_the_client_wrote(client: openai.OpenAI, llm: FakeLLM) -> None:
    llm.error = InvalidRequestError("the JSON schema cannot be used: no", "structured_outputs")
    form: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    for fields, param in (
        ({"response_format": form}, "response_format"),
        ({"extra_body": {"structured_outputs": {"json": "{}"}}}, "structured_outputs"),
        ({"tools": [NOW], "tool_choice": "required"}, "tools"),
    ):
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, **fields)
        assert error.value.param == param


def test_an_answer_whose_grammar_leads_nowhere_is_an_error(client: openai.OpenAI, llm: FakeLLM) -> None:
    llm.end = (FinishReason.ERROR, "the grammar allows no token here")
    with pytest.raises(openai.BadRequestError, match="the grammar allows no token here"):
        ask(client)
    with pytest.raises(openai.APIError, match="the grammar allows no token here"):
        list(ask(client, stream=True))


def test_the_clients_own_parsing_works(client: openai.OpenAI, llm: FakeLLM) -> None:

    class Person(BaseModel):
        name: str
        age: int

    llm.answer = json.dumps({"name": "Ann", "age": 3})
    parsed = client.chat.completions.parse(model="fake", messages=HELLO, response_format=Person)
    assert parsed.choices[0].message.parsed == Person(name="Ann", age=3)
