"""One JSON line per step, for plots of what the policy did and why."""

from __future__ import annotations

import json
import time
from pathlib import Path

from outpace.errors import ConfigError
from outpace.policy.base import StepRecord


class StepLog:
    """Appends to a file; a line is on disk once its buffer is full or the process ends."""

    def __init__(self, path: Path) -> None:
        """Opens the file; what a process before this one wrote is kept.

        Raises:
            ConfigError: It cannot be written.
        """
        try:
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write --step-log {path}: {error}") from None

    def write(self, record: StepRecord) -> None:
        """Writes a finished step."""
        self._file.write(json.dumps(line(record)) + "\n")

    def close(self) -> None:
        """Writes out what is buffered."""
        self._file.close()


def line(record: StepRecord) -> dict[str, object]:
    """A step as the log has it.

    `time` is Unix seconds at its end; `limits` is how many sequences had each limit; seconds are rounded to
    microseconds.
    """
    view, drafted = record.view, record.num_drafted
    return {
        "time": round(time.time(), 6),
        "sequences": len(view.sequences),
        "scheduled": view.num_scheduled,
        "waiting": view.num_waiting,
        "known_rows": view.num_rows,
        "rows": record.num_rows,
        "stream_rows": round(record.num_stream_rows, 2),
        "context": view.num_context,
        "limits": {str(limit): record.limits.count(limit) for limit in sorted(set(record.limits))},
        "drafted": sum(drafted),
        "drafting": sum(map(bool, drafted)),
        "accepted": sum(record.num_accepted),
        "tokens": record.num_tokens,
        "predicted_s": None if record.predicted_s is None else round(record.predicted_s, 6),
        "seconds": {phase: round(seconds, 6) for phase, seconds in record.seconds.items()},
    }
