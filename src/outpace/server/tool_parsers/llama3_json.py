"""Calls as Llama 3 writes them: the whole answer is JSON objects, separated by semicolons."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import final

from outpace.server.tools import CallText, Parsed, ToolFormat, ToolReader

_TAG = "<|python_tag|>"  # may come first


class Llama3Json(ToolFormat):
    """See ToolFormat."""

    begin, end, separator = "", "", "; "
    arguments_key = "parameters"

    def reader(self, names: AbstractSet[str]) -> ToolReader:
        """See ToolFormat."""
        return Llama3JsonReader(names, self.arguments_key)


@final
class Llama3JsonReader(ToolReader):
    """Calls as long as there are any; from the first other thing on all is text."""

    def __init__(self, names: AbstractSet[str], arguments_key: str) -> None:
        super().__init__(names, arguments_key)
        self._is_text = False

    def finish(self) -> Parsed:
        """See ToolReader."""
        if self._call is not None:
            return Parsed("" if self._call.name else self._opening + self._call.text)
        return Parsed("" if self._calls.num_named else self._held)

    def _go_on(self, parsed: Parsed) -> bool:
        """See ToolReader."""
        if self._is_text:
            parsed.content += self._held
            self._held = ""
            return False
        return self._find_call() if self._call is None else self._read_call(self._call, parsed)

    def _find_call(self) -> bool:
        rest = self._held.lstrip(" \n\t;" if self._calls.num_named else " \n\t")
        if not rest or (len(rest) < len(_TAG) and _TAG.startswith(rest)):
            return False
        rest = rest.removeprefix(_TAG).lstrip()
        if rest.startswith("{"):
            self._opening = self._held[: len(self._held) - len(rest)]
            self._held, self._call = rest, self._calls.start()
            return True
        self._is_text = bool(rest)
        return self._is_text

    def _read_call(self, call: CallText, parsed: Parsed) -> bool:
        self._held = call.push(self._held)
        parsed.calls += self._calls.news()
        if call.is_refused:
            self._is_text = True
            parsed.content += self._opening + call.text
        elif not call.is_done:
            return False
        self._call = None
        return True


def create() -> Llama3Json:
    """Builds the format."""
    return Llama3Json()
