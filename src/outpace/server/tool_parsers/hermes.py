"""Calls as Hermes, Qwen 2.5 and Qwen 3 write them: JSON objects between `<tool_call>` and `</tool_call>`."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import final

from outpace.server.tools import CallText, Parsed, ToolFormat, ToolReader

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ToolFormat):
    """See ToolFormat."""

    begin, end, separator = f"{_OPEN}\n", f"\n{_CLOSE}", "\n"
    arguments_key = "arguments"

    def reader(self, names: AbstractSet[str]) -> ToolReader:
        """See ToolFormat."""
        return HermesReader(names, self.arguments_key)


@final
class HermesReader(ToolReader):
    """Text outside of the tags, calls inside. Space around the tags belongs to them."""

    def __init__(self, names: AbstractSet[str], arguments_key: str) -> None:
        super().__init__(names, arguments_key)
        self._awaits_close = False

    def finish(self) -> Parsed:
        """See ToolReader."""
        if self._call is not None:
            return Parsed("" if self._call.name else self._opening + self._call.text)
        after_calls = self._awaits_close or (self._calls.num_named and not self._held.strip())
        return Parsed("" if after_calls else self._held)

    def _go_on(self, parsed: Parsed) -> bool:
        """See ToolReader."""
        if self._call is not None:
            return self._read_call(self._call, parsed)
        return self._skip_close() if self._awaits_close else self._read_text(parsed)

    def _read_text(self, parsed: Parsed) -> bool:
        at = self._held.find(_OPEN)
        num_certain = at if at >= 0 else len(self._held) - _num_begun(self._held, _OPEN)
        content = self._held[:num_certain].rstrip()
        parsed.content += content
        self._held = self._held[len(content) :]
        if at < 0:
            return False
        self._opening, _, self._held = self._held.partition(_OPEN)
        self._opening += _OPEN
        self._call = self._calls.start()
        return True

    def _read_call(self, call: CallText, parsed: Parsed) -> bool:
        self._held = call.push(self._held)
        parsed.calls += self._calls.news()
        if call.is_refused:
            parsed.content += self._opening + call.text
        elif not call.is_done:
            return False
        self._call, self._awaits_close = None, not call.is_refused
        return True

    def _skip_close(self) -> bool:
        rest = self._held.lstrip()
        if len(rest) < len(_CLOSE) and _CLOSE.startswith(rest):
            return False
        self._held = rest.removeprefix(_CLOSE)
        self._awaits_close = False
        return True


def _num_begun(text: str, tag: str) -> int:
    """Length of the longest end of `text` that begins `tag`."""
    return next(n for n in range(min(len(tag), len(text)), -1, -1) if text.endswith(tag[:n]))


def create() -> Hermes:
    """Builds the format."""
    return Hermes()
