"""Data from the target itself: its answers in place of those that a dataset has.

A draft is right where it guesses what the target says, so it learns most from that. The answers come from the
engine at batch speed, with a draft method too if one is named: that changes no answer.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outpace.bench.report import provenance, read_json, write_json
from outpace.config import EngineConfig, flag
from outpace.errors import ConfigError
from outpace.llm import LLM
from outpace.models.tokenizer import encode_chat
from outpace.request import FinishReason
from outpace.sampling import SamplingParams
from outpace.training.data import Message, Report, read_conversations

_CHUNK = 256  # conversations that are answered and written together
_NOT_THE_ANSWERS = ("out", "resume")


@dataclass(frozen=True)
class DistillConfig:
    """What is answered, and how.

    Attributes:
        data: File or hub id with conversations.
        out: File to write, `.jsonl` or `.jsonl.gz`; beside it `OUT.json` says where it comes from.
        temperature: Of the answers.
        max_tokens: Most tokens of an answer; one that is cut there is marked `truncated`.
        seed: With the place of a conversation the seed of its answers.
        num_conversations: Most of them; None takes all.
        max_bad_share: Most lines of `data` that may be of no use, as a share.
        resume: Whether to go on where an earlier run stopped.
    """

    data: str
    out: Path
    temperature: float = 0.0
    max_tokens: int = 512
    seed: int = 0
    num_conversations: int | None = None
    max_bad_share: float = 0.01
    resume: bool = False

    def answers(self) -> dict[str, Any]:
        """What the answers depend on, as JSON has it."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in _NOT_THE_ANSWERS}


@dataclass
class _Conversation:
    """One that is being answered."""

    number: int
    given: list[Message]
    row: dict[str, Any]
    messages: list[Message] = dataclasses.field(default_factory=list)
    is_cut: bool = False


def distill(llm: LLM, config: DistillConfig, progress: bool = False) -> dict[str, Any]:
    """Writes `config.out`.

    Args:
        llm: The target.
        config: What to do.
        progress: Whether to show progress bars.

    Returns:
        The report, which is in `OUT.json` too.

    Raises:
        ConfigError: A file is at fault.
    """
    state_file = config.out.with_name(config.out.name + ".json")
    state = _begin(llm, config, state_file)
    data = Report()
    conversations = itertools.islice(_conversations(config, data), config.num_conversations)
    rest = itertools.islice(conversations, state["num_done"], None)
    while chunk := list(itertools.islice(rest, _CHUNK)):
        rows = _answer(llm, config, chunk, data, progress)
        state["num_bytes"] = _append(config.out, rows, state["num_bytes"])
        state["num_done"] += len(chunk)
        state["num_written"] += len(rows)
        state["num_truncated"] += sum("truncated" in row for row in rows)
        write_json(state_file, state)
    data.check(config.data, config.max_bad_share)
    state |= {"is_complete": True, "data_sha256": data.sha256, "bad_lines": data.bad}
    write_json(state_file, state)
    return state


def _begin(llm: LLM, config: DistillConfig, state_file: Path) -> dict[str, Any]:
    """The state of the run: a new one, or that of one to take up.

    Raises:
        ConfigError: A file would be overwritten, or there is nothing to resume.
    """
    settings = {"model": llm.engine.model_name, **config.answers()}
    if not config.resume:
        if config.out.exists():
            raise ConfigError(
                f"{config.out} exists: choose another {flag('out')}, or {flag('resume')} its run"
            )
        counts = {"num_done": 0, "num_written": 0, "num_truncated": 0, "num_bytes": 0}
        where = provenance(config.seed)
        return {"kind": "distill", **where, "settings": settings, **counts, "is_complete": False}
    if not state_file.exists():
        raise ConfigError(f"there is no {state_file} to {flag('resume')} from")
    state = read_json(state_file)
    for name, value in settings.items():
        if state["settings"].get(name) != value:
            raise ConfigError(
                f"{config.out} was begun with {name} {state['settings'].get(name)!r}, not {value!r}: it can "
                "be resumed only as it was"
            )
    return state


def _conversations(config: DistillConfig, data: Report) -> Iterator[_Conversation]:
    for number, (_, messages, row) in enumerate(read_conversations(config.data, data)):
        yield _Conversation(number, messages, row)


def _answer(
    llm: LLM, config: DistillConfig, chunk: list[_Conversation], data: Report, progress: bool
) -> list[dict[str, Any]]:
    """Rows with the target's answers, turn by turn; a later turn sees the target's own earlier ones."""
    active = chunk
    while active := [c for c in active if _up_to_answer(c)]:
        prompts = [encode_chat(llm.tokenizer, c.messages) for c in active]
        fitting = []
        for conversation, prompt in zip(active, prompts, strict=True):
            if len(prompt) < llm.engine.max_model_len:
                fitting.append((conversation, prompt))
            else:
                where = f"{config.data}, conversation {conversation.number + 1}"
                data.add_bad(where, f"{len(prompt)} tokens leave no room in {llm.engine.max_model_len}")
        # seeds differ, so that equal prompts may have different answers
        params = [
            SamplingParams(
                temperature=config.temperature,
                max_tokens=config.max_tokens,
                seed=config.seed + c.number,
            )
            for c, _ in fitting
        ]
        results = (
            llm.generate([prompt for _, prompt in fitting], params, progress=progress) if fitting else []
        )
        active = []
        for (conversation, _), result in zip(fitting, results, strict=True):
            answer = result.outputs[0]
            if not answer.text.strip():
                continue
            conversation.messages.append({"role": "assistant", "content": answer.text})
            conversation.is_cut = answer.finish_reason is FinishReason.LENGTH
            if not conversation.is_cut:  # what would follow half an answer is nobody's conversation
                active.append(conversation)
    return [_row(c) for c in chunk if any(m["role"] == "assistant" for m in c.messages)]


def _up_to_answer(conversation: _Conversation) -> bool:
    """Takes over messages up to the next answer; whether there is one."""
    given = conversation.given
    for message in given[len(conversation.messages) :]:
        if message["role"] == "assistant":
            return True
        conversation.messages.append(message)
    return False


def _row(conversation: _Conversation) -> dict[str, Any]:
    messages = conversation.messages
    while messages[-1]["role"] != "assistant":
        messages.pop()
    source = {"source": conversation.row["source"]} if "source" in conversation.row else {}
    return {"messages": messages, **source, **({"truncated": True} if conversation.is_cut else {})}


def _append(path: Path, rows: list[dict[str, Any]], num_bytes: int) -> int:
    """Writes rows behind the first `num_bytes` of a file; returns how many there are then.

    Raises:
        ConfigError: It cannot be written.
    """
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content, mtime=0)  # a member of its own: they may follow one another
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if path.exists() else "wb") as file:
            file.truncate(num_bytes)
            file.seek(num_bytes)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from None
    return num_bytes + len(content)


def run_distill(engine: EngineConfig, config: DistillConfig, progress: bool) -> dict[str, Any]:
    """Loads the target and runs `distill`."""
    return distill(LLM(**dataclasses.asdict(engine)), config, progress)
