"""Tools: how a model learns of them, and how its calls are told from its text as they come."""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, final

from outpace import registry
from outpace.config import flag
from outpace.errors import InvalidRequestError
from outpace.sampling import StructuredOutputsParams
from outpace.spec.grammar import enforceable

_PACKAGE = "outpace.server.tool_parsers"
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}
_MAX_WHITESPACE = 1  # between the tokens of arguments: a small model would write nothing else for ever


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What became known of a call.

    Attributes:
        index: Its place among the answer's calls.
        id: Its id, with the name.
        name: The tool's, once.
        arguments: More of the JSON text of its arguments.
    """

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(slots=True)
class Parsed:
    """What a piece of an answer turned out to hold."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class ToolReader(ABC):
    """Tells calls from text in one answer. What may yet become a call is held back."""

    def __init__(self, names: AbstractSet[str], arguments_key: str) -> None:
        self._calls = Calls(names, arguments_key)
        self._call: CallText | None = None  # the one being read
        self._opening = ""  # what came before it
        self._held = ""

    def push(self, text: str) -> Parsed:
        """Takes more of the answer, of whatever length, and gives what is certain."""
        self._held += text
        parsed = Parsed()
        while self._go_on(parsed):
            pass
        return parsed

    @abstractmethod
    def _go_on(self, parsed: Parsed) -> bool:
        """Reads on in what is held; False where more text is needed."""

    @abstractmethod
    def finish(self) -> Parsed:
        """What was held back, at the answer's end. A call that was cut off stays as far as it came."""


class ToolFormat(ABC):
    """How a model writes its calls: each is `begin`, a JSON object of name and arguments, and `end`.

    Attributes:
        begin: What comes before the object.
        end: What comes after it.
        separator: What comes between two calls.
        arguments_key: What the object calls its arguments.
    """

    begin: str
    end: str
    separator: str
    arguments_key: str

    @abstractmethod
    def reader(self, names: AbstractSet[str]) -> ToolReader:
        """Starts to read an answer.

        Args:
            names: The tools there are; what looks like a call of another is text.
        """

    def before_arguments(self, name: str) -> str:
        """A call up to its arguments."""
        return f'{self.begin}{{"name": {json.dumps(name)}, {json.dumps(self.arguments_key)}: '

    @property
    def after_arguments(self) -> str:
        """The rest of it."""
        return "}" + self.end

    def write(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls as the model would have written them.

        Args:
            calls: Each with `name` and `arguments`, an object.
        """
        return self.separator.join(
            self.before_arguments(call["name"])
            + json.dumps(call["arguments"], ensure_ascii=False)
            + self.after_arguments
            for call in calls
        )

    def tag(self, name: str, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
        """A call with arguments that match a JSON schema, as a part of a structural tag.

        Raises:
            InvalidRequestError: The schema asks for what cannot be enforced.
        """
        try:
            schema = enforceable(parameters or _NO_ARGUMENTS)
        except (ValueError, TypeError) as error:
            reason = f"the parameters of the tool {name!r} cannot be enforced: {error}"
            raise InvalidRequestError(reason, "tools") from None
        content = {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": _MAX_WHITESPACE}
        return {
            "type": "tag",
            "begin": self.before_arguments(name),
            "content": content,
            "end": self.after_arguments,
        }


def available() -> list[str]:
    """Names of the built-in formats: the files in `server/tool_parsers`."""
    return registry.available(_PACKAGE)


def load_tool_format(name: str) -> ToolFormat:
    """Builds a format: `hermes` is `tool_parsers/hermes.py`, a dotted name is a module from outside.

    Raises:
        ConfigError: There is no such format.
    """
    tool_format: ToolFormat = registry.build(_PACKAGE, name, ToolFormat, flag("tool_call_parser"))
    return tool_format


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools a request offers.

    Attributes:
        format: How calls are written.
        parameters: The JSON schema of each one's arguments, by name; None is no arguments.
        strict: Those whose arguments match their schema whenever they are called.
        must_call: Whether the answer must be calls and nothing else.
        many: Whether it may be several.
    """

    format: ToolFormat
    parameters: Mapping[str, Mapping[str, Any] | None]
    strict: frozenset[str] = frozenset()
    must_call: bool = False
    many: bool = True

    def reader(self) -> ToolReader:
        """Starts to read an answer."""
        return self.format.reader(self.parameters.keys())

    def structure(self) -> StructuredOutputsParams | None:
        """What answers must look like; None where anything goes.

        Raises:
            InvalidRequestError: A schema asks for what cannot be enforced.
        """
        tags = [
            self.format.tag(name, schema if self.must_call or name in self.strict else {"type": "object"})
            for name, schema in self.parameters.items()
        ]
        parts: dict[str, Any] = {"tags": tags, "stop_after_first": not self.many}
        if self.must_call:
            parts |= {"type": "tags_with_separator", "separator": self.format.separator, "at_least_one": True}
        elif self.strict or not self.many:
            trigger = self.format.begin.strip() or self.format.before_arguments("").partition('""')[0]
            parts |= {"type": "triggered_tags", "triggers": [trigger]}
        else:
            return None
        return StructuredOutputsParams(structural_tag={"type": "structural_tag", "format": parts})


@final
class CallText:
    """Reads one call, a JSON object with a name and arguments, as its text comes.

    Attributes:
        text: What it has read.
        is_done: Whether the object is complete.
        is_refused: Whether it is no call of a known tool.
    """

    def __init__(self, names: AbstractSet[str], arguments_key: str) -> None:
        self._names, self._arguments_key = names, arguments_key
        self.text = ""
        self.is_done = self.is_refused = False
        self.name: str | None = None
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._key: str | None = None  # of the value being read
        self._start = 0  # where the key or the value being read starts
        self._values: dict[str, str] = {}

    def push(self, text: str) -> str:
        """Takes more text; returns what comes after the object."""
        for count, char in enumerate(text):
            if self.is_done or self.is_refused:
                return text[count:]
            self.text += char
            try:
                self._take(char)
            except ValueError:  # a key or a name that is no JSON string
                self.is_refused = True
        return ""

    @property
    def arguments(self) -> str:
        """The text of the arguments as far as it came."""
        if self._arguments_key in self._values:
            return self._values[self._arguments_key]
        if self._key == self._arguments_key:
            return _value(self.text[self._start :])
        return "{}" if self.is_done else ""

    def _take(self, char: str) -> None:
        if self._in_string:
            self._take_in_string(char)
        elif char == '"':
            self._in_string = True
            if self._depth == 1 and self._key is None:
                self._start = len(self.text) - 1
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        if self._depth <= 0 and not self._in_string:
            self._end_object(char)
        elif self._depth == 1 and not self._in_string and char == "," and self._key is not None:
            self._end_value()

    def _take_in_string(self, char: str) -> None:
        if self._is_escaped or char == "\\":
            self._is_escaped = not self._is_escaped
        elif char == '"':
            self._in_string = False
            if self._depth == 1 and self._key is None:
                self._key = str(json.loads(self.text[self._start :]))
                self._start = len(self.text)

    def _end_object(self, char: str) -> None:
        if char == "}":
            self._end_value()
            self.is_done = True
            self.is_refused = self.name is None
        elif not char.isspace():
            self.is_refused = True

    def _end_value(self) -> None:
        if self._key is None:
            return
        value = self._values[self._key] = _value(self.text[self._start : -1])
        if self._key == "name":
            name = json.loads(value)
            self.name = name if isinstance(name, str) and name in self._names else None
            self.is_refused = self.name is None
        self._key = None


def _value(text: str) -> str:
    """What stands after a key and its colon."""
    return text.strip().removeprefix(":").strip()


@final
class Calls:
    """The calls of one answer: numbers them and gives what is new of each."""

    def __init__(self, names: AbstractSet[str], arguments_key: str) -> None:
        self._names, self._arguments_key = names, arguments_key
        self._call: CallText | None = None
        self._num_sent = 0
        self._is_named = False
        self.num_named = 0

    def start(self) -> CallText:
        """Begins to read the next one."""
        self._call, self._num_sent, self._is_named = CallText(self._names, self._arguments_key), 0, False
        return self._call

    def news(self) -> list[CallDelta]:
        """What became known of the one being read."""
        call = self._call
        if call is None or call.name is None or call.is_refused:
            return []
        deltas = []
        if not self._is_named:
            self._is_named = True
            self.num_named += 1
            deltas.append(CallDelta(self.num_named - 1, f"call_{uuid.uuid4().hex[:24]}", call.name, ""))
        arguments = call.arguments
        if len(arguments) > self._num_sent:
            deltas.append(CallDelta(self.num_named - 1, None, None, arguments[self._num_sent :]))
            self._num_sent = len(arguments)
        return deltas


def in_words(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], tool_format: ToolFormat
) -> list[dict[str, Any]]:
    """A conversation for a chat template that knows nothing of tools.

    They are described in the system message; calls are written as the model is to write them, and results
    come in the user's turn.

    Args:
        messages: As templates that know tools expect them.
        tools: Those on offer.
        tool_format: How calls are written.
    """
    result: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            result.append({"role": "user", "content": content})
        elif calls := message.get("tool_calls"):
            parts = (message["content"], tool_format.write([call["function"] for call in calls]))
            result.append({"role": "assistant", "content": "\n".join(filter(None, parts))})
        else:
            result.append(dict(message))
    if not tools:
        return result
    example = f"{tool_format.before_arguments('NAME')}{{...}}}}{tool_format.end}"
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    description = (
        f"You may call these functions:\n<tools>\n{listed}\n</tools>\n"
        f"To call one, answer with its name and an object of arguments in this form:\n{example}"
    )
    if result[0]["role"] != "system":
        return [{"role": "system", "content": description}, *result]
    result[0]["content"] = f"{result[0]['content']}\n\n{description}"
    return result
