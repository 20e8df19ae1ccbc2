"""Tool calls are told from text however the answer is cut in pieces, and nothing of them leaks."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from xgrammar import GrammarMatcher

from outpace.errors import ConfigError, InvalidRequestError
from outpace.sampling import SamplingParams, StructuredOutputsParams
from outpace.server.tools import Tools, available, in_words, load_tool_format
from tiny import run, submit, text, tiny_engine

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "maximum": 9, "minimum": 0},
    },
    "required": ["city", "days"],
}
PARAMETERS = {"weather": SCHEMA, "now": None}
CALL = '<tool_call>{"name": %s</tool_call>'
PARIS = '{"city": "Pa\\"}{ris", "days": [1, {"a": 2}]}'

HERMES = {
    "no call": ("Hello, <tool> world. \n", "Hello, <tool> world. \n", []),
    "one": (
        f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>',
        None,
        [("weather", PARIS)],
    ),
    "text first": (
        'Let me see. \n\n<tool_call>{"name": "now", "arguments": {}}</tool_call>\n',
        "Let me see.",
        [("now", "{}")],
    ),
    "two and text": (
        'a <tool_call>{"name": "now"}</tool_call>\n<tool_call> {"arguments": {"x": 1 } , "name": "weather"}'
        "\n</tool_call> b",
        "a b",
        [("now", "{}"), ("weather", '{"x": 1 }')],
    ),
    "unknown tool": (
        'x <tool_call>\n{"name": "cook", "arguments": {}}\n</tool_call>',
        'x <tool_call>\n{"name": "cook", "arguments": {}}\n</tool_call>',
        [],
    ),
    "no object": ("<tool_call>\nnow()\n</tool_call>", "<tool_call>\nnow()\n</tool_call>", []),
    "a list": ('<tool_call>["now"]</tool_call>', '<tool_call>["now"]</tool_call>', []),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
    "odd name": (
        '<tool_call>{"name": {"a": 1}}</tool_call>',
        '<tool_call>{"name": {"a": 1}}</tool_call>',
        [],
    ),
    "bad key": ('<tool_call>{"\\x": 1}</tool_call>', '<tool_call>{"\\x": 1}</tool_call>', []),
    "brace": ("<tool_call>}", "<tool_call>}", []),
    "cut in the name": ('<tool_call>{"name": "no', '<tool_call>{"name": "no', []),
    "cut in the arguments": ('<tool_call>{"name": "now", "arguments": {"a"', None, [("now", '{"a"')]),
    "cut in the tag": ("x <tool_ca", "x <tool_ca", []),
    "no end tag": ('<tool_call>{"name": "now"} so', "so", [("now", "{}")]),
}
LLAMA = {
    "no call": ("Hello {} world; ", "Hello {} world; ", []),
    "one": (f' {{"name": "weather", "parameters": {PARIS}}}', None, [("weather", PARIS)]),
    "tagged": ('<|python_tag|>{"name": "now", "parameters": {}}', None, [("now", "{}")]),
    "two": (
        '{"name": "now", "parameters": {}}; {"name": "weather", "parameters": {"a": 1}}',
        None,
        [("now", "{}"), ("weather", '{"a": 1}')],
    ),
    "plain JSON": ('{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
    "an object first": ('{"a": 1} {"name": "now"}', '{"a": 1} {"name": "now"}', []),
    "text after": ('{"name": "now"}\nDone.', "\nDone.", [("now", "{}")]),
    "cut": ('{"name": "now', '{"name": "now', []),
    "part of a tag": ("<|pyth", "<|pyth", []),
}
CASES = [("hermes", *case) for case in HERMES.values()] + [("llama3_json", *case) for case in LLAMA.values()]
IDS = [f"hermes: {name}" for name in HERMES] + [f"llama: {name}" for name in LLAMA]


def read(name: str, pieces: list[str]) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Content, calls, and all that was shown at each piece."""
    reader = load_tool_format(name).reader(PARAMETERS.keys())
    content = ""
    calls: list[tuple[str, str]] = []
    shown: list[str] = []
    for parsed in [*map(reader.push, pieces), reader.finish()]:
        content += parsed.content
        shown.append(parsed.content)
        for delta in parsed.calls:
            if delta.name is not None:
                assert delta.id is not None
                assert delta.index == len(calls)
                calls.append((delta.name, delta.arguments))
            else:
                assert delta.index == len(calls) - 1
                calls[-1] = (calls[-1][0], calls[-1][1] + delta.arguments)
    return content, calls, shown


@pytest.mark.parametrize(("name", "answer", "content", "calls"), CASES, ids=IDS)
def test_calls_are_found_however_the_answer_is_cut_in_pieces(
    name: str, answer: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    rng = random.Random(answer)
    cuttings = [[answer], list(answer)]
    for _ in range(20):
        places = sorted(rng.sample(range(len(answer) + 1), k=min(len(answer), rng.randint(1, 6))))
        cuttings.append([answer[a:b] for a, b in zip([0, *places], [*places, len(answer)], strict=True)])
    for pieces in cuttings:
        assert read(name, pieces)[:2] == (content or "", calls), pieces


@pytest.mark.parametrize("name", ["hermes", "llama3_json"])
def test_arguments_are_given_as_they_come(name: str) -> None:
    tool_format = load_tool_format(name)
    reader = tool_format.reader(PARAMETERS.keys())
    assert [d.name for d in reader.push(tool_format.before_arguments("weather")).calls] == ["weather"]
    assert [d.arguments for d in reader.push('{"city": "P').calls] == ['{"city": "P']
    assert [d.arguments for d in reader.push('aris"').calls] == ['aris"']
    assert [d.arguments for d in reader.push("}" + tool_format.after_arguments).calls] == ["}"]
    assert not reader.finish().content


def test_text_is_given_as_soon_as_it_cannot_begin_a_call() -> None:
    assert read("hermes", ["Hi", " th", "ere <tool", " x"])[2] == ["Hi", " th", "ere", " <tool x", ""]
    assert read("llama3_json", ["Hi", " there {"])[2] == ["Hi", " there {", ""]


@pytest.mark.parametrize("name", available())
def test_what_a_format_writes_it_reads(name: str) -> None:
    tool_format = load_tool_format(name)
    calls = [{"name": "weather", "arguments": {"city": "Ré <b>", "x": [1]}}, {"name": "now", "arguments": {}}]
    _, found, _ = read(name, list(tool_format.write(calls)))
    assert [{"name": name, "arguments": json.loads(arguments)} for name, arguments in found] == calls


def test_a_format_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="--tool-call-parser must be one of hermes, llama3_json"):
        load_tool_format("telepathy")


# --- Enforced calls --------------------------------------------------------------------------------------


def answered(
    name: str, structure: StructuredOutputsParams | None, **fields: Any
) -> tuple[str, list[tuple[str, str]]]:
    engine = tiny_engine()
    sampling = SamplingParams(**{"seed": 4, "max_tokens": 150, "structured_outputs": structure, **fields})
    submit(engine, "r", "What is the weather?", sampling)
    content, calls, _ = read(name, [text(run(engine)["r-0"])])
    return content, calls


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", available())
def test_a_call_that_must_be_made_matches_its_schema(name: str, seed: int) -> None:
    tools = Tools(load_tool_format(name), PARAMETERS, must_call=True, many=False)
    content, calls = answered(name, tools.structure(), seed=seed)
    assert content == ""
    ((tool, arguments),) = calls
    given = json.loads(arguments)
    assert given == {} if tool == "now" else set(given) == {"city", "days"}


@pytest.mark.parametrize("name", available())
def test_several_calls_may_be_made_at_once(name: str) -> None:
    tools = Tools(load_tool_format(name), {"now": None}, must_call=True)
    bias = {ord(char): 60.0 for char in "\n;"}  # to what begins another one
    _, calls = answered(name, tools.structure(), logit_bias=bias)
    assert len(calls) > 1
    assert all(tool == "now" and json.loads(arguments) == {} for tool, arguments in calls[:-1])


@pytest.mark.parametrize("name", available())
def test_nothing_is_enforced_where_the_model_is_free(name: str) -> None:
    assert Tools(load_tool_format(name), PARAMETERS).structure() is None


@pytest.mark.parametrize("name", available())
def test_a_strict_tool_is_called_by_its_schema_if_it_is_called(name: str) -> None:
    tool_format = load_tool_format(name)
    tools = Tools(tool_format, PARAMETERS, strict=frozenset({"weather"}))
    structure = tools.structure()
    content, calls = answered(name, structure, max_tokens=20)
    assert content
    assert not calls
    begun = tool_format.before_arguments("weather")
    sampling = SamplingParams(structured_outputs=structure)
    (request,) = tiny_engine().admission.requests("r", [1], sampling)
    matcher = GrammarMatcher(request.grammar)
    assert matcher.accept_string("Well. " + begun)
    assert matcher.find_jump_forward_string().startswith("{")
    assert not matcher.accept_string('{"town"')
    assert matcher.accept_string('{"city": "Rome", "days": 3' + "}" + tool_format.after_arguments + " So.")


def test_a_tool_whose_schema_cannot_be_enforced_is_refused_where_it_would_have_to_be() -> None:
    schema = {"type": "object", "properties": {"a": {"not": {}}}}
    tools = Tools(load_tool_format("hermes"), {"f": schema}, must_call=True)
    with pytest.raises(
        InvalidRequestError, match="parameters of the tool 'f' cannot be enforced: 'not'"
    ) as error:
        tools.structure()
    assert error.value.param == "tools"


# --- Templates that know no tools ------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "now", "description": "Tells the time."}}


MADE = {"id": "1", "type": "function", "function": {"name": "now", "arguments": {"a": 1}}}


def test_a_template_that_knows_no_tools_has_them_in_words() -> None:
    conversation: list[dict[str, Any]] = [
        {"role": "user", "content": "What time is it?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "now", "arguments": {"a": 1}}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "Noon."},
    ]
    system, *rest = in_words(conversation, [TOOL], load_tool_format("hermes"))
    assert system["role"] == "system"
    assert json.dumps(TOOL) in system["content"]
    assert system["content"].endswith('<tool_call>\n{"name": "NAME", "arguments": {...}}\n</tool_call>')
    assert rest == [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": '<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>'},
        {"role": "user", "content": "<tool_response>\nNoon.\n</tool_response>"},
    ]


def test_a_system_message_stays_and_without_tools_nothing_is_added() -> None:
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    tool_format = load_tool_format("hermes")
    assert in_words(conversation, [], tool_format) == conversation
    system, user = in_words(conversation, [TOOL], tool_format)
    assert system["content"].startswith("Be brief.\n\nYou may call")
    assert user == conversation[1]
    assert conversation[0]["content"] == "Be brief."
