"""Conversations as tokens: read, laid out by the chat template, packed into rows."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from outpace.errors import ConfigError
from outpace.training.method import TrainBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

Message = dict[str, str]
_ROLES = ("system", "user", "assistant")
_SHOWN = 20  # bad lines that are logged one by one


class BadLineError(ValueError):
    """A line that is no conversation to learn from; the text says why."""


@dataclass
class Report:
    """What became of the lines of a dataset.

    Attributes:
        num_lines: Lines that are not empty.
        bad: Where each line that cannot be used is, and why.
        num_cut: Conversations that were longer than a row.
        num_without_answer: Those of them with no answer left.
        sha256: Of the file's content; of a hub dataset its fingerprint.
    """

    num_lines: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    num_cut: int = 0
    num_without_answer: int = 0
    sha256: str = ""

    def add_bad(self, where: str, reason: str) -> None:
        """Notes a line that cannot be used, and says so."""
        self.bad.append((where, reason))
        if len(self.bad) <= _SHOWN:
            logger.warning("%s: %s; left out", where, reason)

    def check(self, source: str, max_share: float) -> None:
        """Refuses data of which too much is bad.

        Raises:
            ConfigError: It is, or there is nothing.
        """
        if len(self.bad) > _SHOWN:
            logger.warning("%s: %d more lines like these", source, len(self.bad) - _SHOWN)
        if not self.num_lines:
            raise ConfigError(f"{source} has no lines")
        if len(self.bad) > max_share * self.num_lines:
            where, reason = self.bad[0]
            raise ConfigError(
                f"{len(self.bad)} of {self.num_lines} lines of {source} cannot be used, more than the "
                f"share of {max_share:g} that is allowed (--max-bad-share); the first is {where}: {reason}"
            )


# --- Reading --------------------------------------------------------------------------------------------


def read_conversations(source: str, report: Report) -> Iterator[tuple[str, list[Message], dict[str, Any]]]:
    """The conversations of a dataset; what cannot be used is reported and passed over.

    Args:
        source: A file of JSON lines (`.gz` too) with `messages`, or a hub id (`org/name`, its split train).
        report: Told of every line.

    Yields:
        Where it is (`file:line`), its messages, and the whole row.

    Raises:
        ConfigError: There is no such dataset, or it cannot be read.
    """
    lines = _file_lines(Path(source), report) if Path(source).exists() else _hub_rows(source, report)
    for where, line in lines:
        report.num_lines += 1
        try:
            row = _object(line) if isinstance(line, str) else line
            messages = _messages(row)
        except BadLineError as error:
            report.add_bad(where, str(error))
            continue
        yield where, messages, row


def _file_lines(path: Path, report: Report) -> Iterator[tuple[str, str]]:
    try:
        with path.open("rb") as content:
            report.sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", line.decode("utf-8", "backslashreplace")
    except (OSError, EOFError) as error:
        raise ConfigError(f"cannot read the data {path}: {error}") from None


def _hub_rows(name: str, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"there is no file {name}, and hub datasets need: pip install 'outpace[train]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises what its storage raises
        reason = " ".join(str(error).split())
        raise ConfigError(f"there is no file {name}, and no dataset of that hub id: {reason}") from None
    report.sha256 = str(rows._fingerprint)
    for number, row in enumerate(rows):
        yield f"{name}:{number + 1}", dict(row)


def _object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadLineError(f"is no JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadLineError(f"holds a {type(row).__name__}, not an object with messages")
    return row


def _messages(row: dict[str, Any]) -> list[Message]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadLineError("has no list of messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise BadLineError(f"message {number} has no role among {', '.join(_ROLES)}")
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise BadLineError(f"message {number} ({message['role']}) has no text")
    if all(message["role"] != "assistant" for message in messages):
        raise BadLineError("has no answer of the assistant")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


# --- Tokens ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Documents (conversations) as tokens, one after the other.

    Attributes:
        token_ids: [tokens] int64.
        answer: [tokens] bool, whether a token is one that the model answered.
        offsets: [documents + 1] int64, where each begins.
    """

    token_ids: NDArray[np.int64]
    answer: NDArray[np.bool_]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def of(cls, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> Corpus:
        """Joins documents, each with its tokens and which of them are answers."""
        ends = np.cumsum([0, *(len(tokens) for tokens, _ in documents)])
        token_ids = [token for tokens, _ in documents for token in tokens]
        answer = [is_answer for _, answers in documents for is_answer in answers]
        return cls(np.array(token_ids, np.int64), np.array(answer, np.bool_), ends.astype(np.int64))

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document."""
        return np.diff(self.offsets)

    def answer_counts(self, vocab_size: int, documents: Sequence[int] | None = None) -> torch.Tensor:
        """How often each token is answered, [vocab_size] int64, in all documents or in some."""
        answer = self.answer
        if documents is not None:
            answer = np.zeros_like(self.answer)
            for document in documents:
                piece = slice(*self.offsets[document : document + 2])
                answer[piece] = self.answer[piece]
        return torch.from_numpy(np.bincount(self.token_ids[answer], minlength=vocab_size))

    def checksum(self) -> str:
        """Of the tokens and where documents begin."""
        return hashlib.sha256(self.token_ids.tobytes() + self.offsets.tobytes()).hexdigest()


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    eos_token_ids: Sequence[int],
    is_cut: bool = False,
) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which of them the assistant answered.

    An answer is what the template writes between the opened turn of the assistant and the end of its message,
    up to its first end-of-sequence token: what a served model generates. Where that is in the text is found
    by laying out the conversation's beginnings, so that templates need not mark it.

    Args:
        tokenizer: The target's.
        messages: The conversation.
        eos_token_ids: The target's.
        is_cut: Whether the last answer was longer: what the template writes behind it is not the model's.

    Raises:
        BadLineError: The template refuses the messages, or lays out a beginning differently from the whole.
    """
    whole = _laid_out(tokenizer, messages, False)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _laid_out(tokenizer, messages[:number], True)
            through = _laid_out(tokenizer, messages[: number + 1], False)
            if not (whole.startswith(through) and through.startswith(before)):
                raise BadLineError(
                    f"the chat template lays out message {number + 1} differently with others after it"
                )
            end = len(through)
            if is_cut and number == len(messages) - 1:
                text = message["content"].rstrip()  # templates may strip it
                end = through.rindex(text) + len(text)
            spans.append((len(before), end))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    token_ids: list[int] = encoded["input_ids"]
    answer = [False] * len(token_ids)
    for begin, end in spans:
        for index, (start, stop) in enumerate(encoded["offset_mapping"]):
            if begin <= start and stop <= end and stop > begin:
                answer[index] = True
                if token_ids[index] in eos_token_ids:
                    break
    return token_ids, answer


def _laid_out(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], opens: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=opens)
    except Exception as error:  # a template is a program run on the data: it may raise anything
        raise BadLineError(f"the chat template refuses it: {error}") from None
    return text


def load_corpus(
    source: str,
    tokenizer: PreTrainedTokenizerFast,
    eos_token_ids: Sequence[int],
    max_len: int,
    max_bad_share: float,
) -> tuple[Corpus, Report]:
    """Reads a dataset as tokens.

    Args:
        source: As `read_conversations` takes it.
        tokenizer: The target's, with its chat template.
        eos_token_ids: The target's.
        max_len: Longer conversations are cut to so many tokens.
        max_bad_share: Most lines that may be of no use, as a share of all.

    Raises:
        ConfigError: It cannot be read, or too many of its lines cannot be used.
    """
    if not tokenizer.chat_template:
        raise ConfigError("the model has no chat template: conversations cannot be laid out for it")
    report, documents = Report(), []
    for where, messages, row in read_conversations(source, report):
        try:
            is_cut = row.get("truncated") is True
            token_ids, answer = encode_conversation(tokenizer, messages, eos_token_ids, is_cut)
        except BadLineError as error:
            report.add_bad(where, str(error))
            continue
        report.num_cut += len(token_ids) > max_len
        if any(answer[:max_len]):
            documents.append((token_ids[:max_len], answer[:max_len]))
        else:
            report.num_without_answer += 1
    report.check(source, max_bad_share)
    if not documents:
        raise ConfigError(f"no conversation of {source} has an answer within its first {max_len} tokens")
    return Corpus.of(documents), report


# --- Packing --------------------------------------------------------------------------------------------

PackedRows = list[list[int]]  # documents of each row of a batch


def pack(lengths: Sequence[int], order: Sequence[int], max_len: int, num_rows: int) -> list[PackedRows]:
    """Puts documents into rows and rows into batches.

    Each goes to the fullest row of the batch that has room for it; where none has, the next batch begins.

    Args:
        lengths: Tokens of each document, at most `max_len`.
        order: In which order the documents come.
        max_len: Tokens of a row.
        num_rows: Rows of a batch.
    """
    batches: list[PackedRows] = []
    rows: PackedRows = [[] for _ in range(num_rows)]
    room = [max_len] * num_rows
    for document in order:
        length = int(lengths[document])
        if length > max(room):
            batches.append([row for row in rows if row])
            rows, room = [[] for _ in range(num_rows)], [max_len] * num_rows
        row = min((space, i) for i, space in enumerate(room) if space >= length)[1]
        rows[row].append(document)
        room[row] -= length
    if any(rows):
        batches.append([row for row in rows if row])
    return batches


def epoch_order(num_documents: int, epoch: int, seed: int) -> list[int]:
    """The order of an epoch: a function of its arguments only, so that training can be taken up again."""
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(num_documents).tolist()
    return order


def collate(corpus: Corpus, rows: PackedRows) -> TrainBatch:
    """The tensors of packed rows, as long as the longest of them; padding is token 0."""
    spans = [[slice(*corpus.offsets[d : d + 2]) for d in row] for row in rows]
    longest = max(sum(s.stop - s.start for s in row) for row in spans)
    shape = (len(rows), longest)
    token_ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    documents, answer = np.full(shape, -1, np.int64), np.zeros(shape, np.bool_)
    for row, pieces in enumerate(spans):
        end = 0
        for number, piece in enumerate(pieces):
            begin, end = end, end + piece.stop - piece.start
            token_ids[row, begin:end] = corpus.token_ids[piece]
            answer[row, begin:end] = corpus.answer[piece]
            positions[row, begin:end] = np.arange(end - begin)
            documents[row, begin:end] = number
    of = torch.from_numpy
    return TrainBatch(of(token_ids), of(positions), of(documents), of(answer))
