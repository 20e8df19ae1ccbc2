"""What is sent and when: prompts from datasets, arrivals from rates, traces and phases; all of it seeded."""

from __future__ import annotations

import csv
import functools
import gzip
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from outpace.errors import ConfigError

Message = dict[str, Any]
Messages = tuple[Message, ...]

# Used where no dataset is named.
PROMPTS = [
    "Explain to a ten-year-old why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "What are the main differences between TCP and UDP? When would you use each?",
    "Write a Python function that returns the n-th Fibonacci number, and explain its complexity.",
    "A train leaves at 9:40 and arrives at 13:05. How long is the journey? Think step by step.",
    "Give me a three-day itinerary for a first visit to Lisbon.",
    "Summarize the causes of the French Revolution in two paragraphs.",
    "Write a polite email asking a landlord to repair a leaking tap.",
]

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SHAREGPT_ROLES |= {"chatgpt": "assistant", "bard": "assistant", "system": "system"}
_TRACE_COLUMNS = ("timestamp_s", "prompt_tokens", "output_tokens")
_PHASE = re.compile(r"(\d+):(\d+(?:\.\d+)?)s?")


@dataclass(frozen=True)
class Query:
    """One request to send: the conversation so far, the most tokens of its answer, its seed."""

    messages: Messages
    output_len: int
    seed: int


@dataclass(frozen=True)
class Closed:
    """So many clients, each of which sends its next query when its last is answered."""

    concurrency: int


@dataclass(frozen=True)
class Open:
    """Queries are sent at these times, in seconds from the start, whether or not others are answered."""

    arrivals_s: tuple[float, ...]


@dataclass(frozen=True)
class Phase:
    """A stretch of a closed loop with so many clients."""

    concurrency: int
    seconds: float


@dataclass(frozen=True)
class Phased:
    """A closed loop whose number of clients changes; it begins its queries anew until the time is over."""

    phases: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        """How long queries are sent."""
        return sum(phase.seconds for phase in self.phases)


Load = Closed | Open | Phased


@dataclass(frozen=True)
class Arrival:
    """A row of a trace."""

    time_s: float
    prompt_tokens: int
    output_tokens: int


# --- Prompts --------------------------------------------------------------------------------------------


def built_in_prompts() -> list[Messages]:
    """The conversations used where no dataset is named."""
    return [_user(text) for text in PROMPTS]


def read_dataset(path: Path) -> list[Messages]:
    """The conversations of a file of JSON lines, each up to its first user turn or last user message.

    A row holds `messages` (OpenAI's; a final answer is left off), `turns` (user texts, the first counts),
    `conversations` (ShareGPT's; the first user turn and a system turn before it count) or `prompt`.

    Args:
        path: `.jsonl`, or `.gz` of it.

    Raises:
        ConfigError: The file cannot be read, is empty, or a row has none of the four; the text names the row.
    """
    conversations = []
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    conversations.append(_conversation(line, f"{path}, line {number}"))
    except (OSError, EOFError, UnicodeError) as error:
        raise ConfigError(f"cannot read the dataset {path}: {error}") from None
    if not conversations:
        raise ConfigError(f"the dataset {path} has no rows")
    return conversations


def _open_text(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def _conversation(line: str, where: str) -> Messages:
    try:
        row = json.loads(line)
        if "messages" in row:
            messages = [{"role": m["role"], "content": m["content"]} for m in row["messages"]]
            last = max(i for i, message in enumerate(messages) if message["role"] == "user")
            return tuple(messages[: last + 1])
        if "turns" in row:
            return _user(row["turns"][0])
        if "conversations" in row:
            turns = [(_SHAREGPT_ROLES[turn["from"]], turn["value"]) for turn in row["conversations"]]
            first = next(i for i, (role, _) in enumerate(turns) if role == "user")
            kept = [turn for turn in turns[:first] if turn[0] == "system"] + [turns[first]]
            return tuple({"role": role, "content": text} for role, text in kept)
        if "prompt" in row:
            return _user(row["prompt"])
    except (ValueError, LookupError, TypeError, StopIteration) as error:
        raise ConfigError(f"{where} cannot be read as a prompt: {type(error).__name__}: {error}") from None
    raise ConfigError(f"{where} has none of messages, turns, conversations, prompt; it has {', '.join(row)}")


def _user(text: Any) -> Messages:
    if not isinstance(text, str):
        raise TypeError(f"a text was expected, not {text!r}")
    return ({"role": "user", "content": text},)


def up_to(conversations: list[Messages], max_chars: int) -> list[Messages]:
    """The conversations whose texts have at most so many characters in all.

    Raises:
        ConfigError: None has.
    """
    lengths = [sum(len(str(message["content"])) for message in messages) for messages in conversations]
    kept = [messages for messages, length in zip(conversations, lengths, strict=True) if length <= max_chars]
    if not kept:
        raise ConfigError(
            f"--max-prompt-chars {max_chars} leaves no prompt: the shortest has {min(lengths)} characters"
        )
    return kept


def choose(conversations: list[Messages], number: int, seed: int, skip: int = 0) -> list[Messages]:
    """A seeded choice, without repeats as far as the dataset goes.

    Args:
        conversations: The dataset.
        number: How many; beyond the dataset's size the same order begins anew.
        seed: Of the order.
        skip: How many of that order to pass over, so that later runs take other prompts.
    """
    order = list(range(len(conversations)))
    random.Random(seed).shuffle(order)
    return [conversations[order[(skip + i) % len(order)]] for i in range(number)]


def make_queries(
    conversations: list[Messages], lengths: Sequence[int], seed: int, skip: int = 0
) -> list[Query]:
    """The next queries of the seeded order.

    Args:
        conversations: The dataset.
        lengths: Most tokens of each answer.
        seed: Of the order; the sampling seeds count up from it.
        skip: How many of the order other runs have used; the sampling seeds go on too.
    """
    chosen = choose(conversations, len(lengths), seed, skip)
    return [Query(messages, lengths[i], seed + skip + i) for i, messages in enumerate(chosen)]


# --- Arrivals -------------------------------------------------------------------------------------------


def poisson(
    rate: float, number: int | None, seed: int, burstiness: float = 1.0, duration_s: float | None = None
) -> Open:
    """Arrivals with gamma-distributed gaps, as vLLM has them.

    Args:
        rate: Queries per second on average; inf sends all at once.
        number: Most arrivals; None sets no limit.
        seed: Of the gaps.
        burstiness: Shape of the gaps: 1 is a Poisson process, less is burstier, more is steadier.
        duration_s: Keep what is due within so many seconds; None keeps all.

    Raises:
        ConfigError: There would be no end to the arrivals.
    """
    if number is None and (duration_s is None or math.isinf(rate)):
        raise ConfigError(
            f"a rate of {rate:g} needs --num-prompts" + ("" if duration_s else " or --duration")
        )
    rng = random.Random(seed)
    scale = 1 / (rate * burstiness) if math.isfinite(rate) else 0.0
    gaps = (rng.gammavariate(burstiness, 1) * scale for _ in itertools.count())
    arrivals = itertools.islice(itertools.accumulate(gaps), number)
    last = math.inf if duration_s is None else duration_s
    return Open(tuple(itertools.takewhile(lambda time_s: time_s <= last, arrivals)))


@functools.lru_cache
def read_trace(path: Path, speed: float = 1.0, duration_s: float | None = None) -> tuple[Arrival, ...]:
    """The arrivals of a trace, from its first on.

    Args:
        path: `.csv` or `.csv.gz` with the header `timestamp_s,prompt_tokens,output_tokens`.
        speed: How many times as fast as recorded to play it.
        duration_s: Keep what arrives within so many seconds when played at that speed; None keeps all.

    Raises:
        ConfigError: The file cannot be read, or is no such trace.
    """
    try:
        with _open_text(path) as file:
            arrivals = tuple(_arrivals(file, path, speed, math.inf if duration_s is None else duration_s))
    except (OSError, EOFError, UnicodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from None
    if not arrivals:
        raise ConfigError(f"the trace {path} has no rows")
    return arrivals


def _arrivals(file: TextIO, path: Path, speed: float, duration_s: float) -> Iterator[Arrival]:
    rows = csv.DictReader(file)
    if missing := [name for name in _TRACE_COLUMNS if name not in (rows.fieldnames or ())]:
        raise ConfigError(f"the trace {path} has no column {', '.join(missing)}")
    start, last = None, 0.0
    for number, row in enumerate(rows, 2):
        try:
            recorded, prompt, output = (float(row[name]) for name in _TRACE_COLUMNS)
        except (TypeError, ValueError):
            raise ConfigError(f"{path}, line {number}: three numbers were expected") from None
        start = recorded if start is None else start
        time_s = (recorded - start) / speed
        if time_s < last:
            raise ConfigError(f"{path}, line {number}: times must not decrease")
        if time_s > duration_s:
            return
        last = time_s
        yield Arrival(time_s, int(prompt), int(output))


def parse_phases(text: str) -> Phased:
    """Reads `4:60s,32:60s`: the number of clients and for how long.

    Raises:
        ConfigError: It is not of this form, or a number is 0.
    """
    phases = []
    for part in text.split(","):
        match = _PHASE.fullmatch(part.strip())
        if not match or int(match[1]) < 1 or float(match[2]) <= 0:
            raise ConfigError(f"a phase is CLIENTS:SECONDS, as 4:60s, both above 0; got {part!r}")
        phases.append(Phase(int(match[1]), float(match[2])))
    return Phased(tuple(phases))
