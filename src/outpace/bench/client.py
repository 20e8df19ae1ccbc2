"""A client for any OpenAI endpoint that takes as little of the cores as it can.

It may share two cores with the server it measures. So every request is made ready beforehand; a connection is
a bare asyncio protocol, which notes time and bytes of what comes and wakes no task until the answer is
complete; answers are parsed when the run is over; and the garbage collector rests meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import re
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from outpace.bench.workload import Closed, Load, Open, Phased, Query
from outpace.errors import ConfigError

DEFAULT_TIMEOUT_S = 600.0
PROBE_TIMEOUT_S = 10.0
_OPENER = build_opener(ProxyHandler({}))  # the run itself takes no proxy either
_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
# Where servers put what an answer says; each kind takes tokens.
_TEXTS = ("content", "text", "reasoning_content", "reasoning", "tool_calls")
_CHUNKED = re.compile(rb"^transfer-encoding:\s*chunked", re.IGNORECASE | re.MULTILINE)
_CHUNK_SIZE = re.compile(rb"(?:\r\n)?([0-9a-fA-F]+)[^\r\n]*\r\n")

Pieces = list[tuple[float, bytes]]


@dataclass(frozen=True)
class Endpoint:
    """Where queries go and how they are put.

    Attributes:
        base_url: Of the server, with or without `/v1`.
        model: Its name in the API.
        kind: Chat, or plain completions, for which the messages' texts are joined.
        temperature: Sent with every query.
        ignore_eos: Whether every answer has exactly its `output_len` tokens.
        extra_body: Further fields; they overrule ours.
    """

    base_url: str
    model: str
    kind: Literal["chat", "completions"] = "chat"
    api_key: str | None = None
    temperature: float = 0.0
    ignore_eos: bool = False
    extra_body: dict[str, Any] = field(default_factory=dict)

    def request(self, query: Query) -> bytes:
        """The bytes of an HTTP request for a streamed answer."""
        text = "\n".join(str(message["content"]) for message in query.messages)
        content = {"messages": query.messages} if self.kind == "chat" else {"prompt": text}
        body: dict[str, Any] = {
            "model": self.model,
            **content,
            "max_tokens": query.output_len,
            "temperature": self.temperature,
            "seed": query.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        data = json.dumps(body | self.extra_body).encode()
        url = urlsplit(root_url(self.base_url))
        lines = [
            f"POST {url.path}{_PATHS[self.kind]} HTTP/1.1",
            f"Host: {url.netloc}",
            "Connection: close",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
            *(f"{name}: {value}" for name, value in _headers(self.api_key).items()),
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


@dataclass(frozen=True)
class Answer:
    """What became of a query, as the client saw it. Times are in seconds from the run's start.

    Attributes:
        index: Of the query.
        due_s: When it was to be sent.
        sent_s: When it was; the connection is opened then.
        chunks_s: When each chunk with text arrived. With speculation a chunk may hold several tokens.
        end_s: When the answer was complete, or failed.
        prompt_tokens: By the server's count, if it gave one.
        output_tokens: By the server's count, else the number of chunks.
        has_usage: Whether the server gave counts.
        error: Why there is no complete answer, or None.
    """

    index: int
    due_s: float
    sent_s: float
    chunks_s: tuple[float, ...]
    end_s: float
    prompt_tokens: int | None
    output_tokens: int
    has_usage: bool
    error: str | None

    @property
    def ttft_s(self) -> float:
        """From sending to the first text."""
        return self.chunks_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        """From sending to the end."""
        return self.end_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first; None if there is only one."""
        if self.output_tokens < 2:
            return None
        return (self.end_s - self.chunks_s[0]) / (self.output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Between chunks."""
        return [later - earlier for earlier, later in itertools.pairwise(self.chunks_s)]


@dataclass(frozen=True)
class Run:
    """The answers of a run, in the order in which they were complete.

    Attributes:
        began: Wall-clock time of the start.
        duration_s: From the start to the last answer's end.
        client_cpu_s: Processor time that the client itself took meanwhile.
    """

    answers: tuple[Answer, ...]
    began: float
    duration_s: float
    client_cpu_s: float = 0.0


# --- Asking once ----------------------------------------------------------------------------------------


def root_url(base_url: str) -> str:
    """The server's URL without `/v1`.

    Raises:
        ConfigError: It is no http(s) URL.
    """
    url = base_url.rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good:
        raise ConfigError(f"--base-url must be like http://127.0.0.1:8000, got {base_url!r}")
    return url


def _headers(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def get(base_url: str, path: str, api_key: str | None = None) -> bytes:
    """The body of a GET.

    Raises:
        ConfigError: The server cannot be reached, or answers with another status than 200.
    """
    url = root_url(base_url) + path
    try:
        with _OPENER.open(Request(url, headers=_headers(api_key)), timeout=PROBE_TIMEOUT_S) as reply:
            return bytes(reply.read())
    except HTTPError as error:
        with error:
            raise ConfigError(f"{url}: HTTP {error.code}") from None
    except (URLError, OSError) as error:
        raise ConfigError(f"cannot reach {url}: {getattr(error, 'reason', error)}") from None


def first_model(base_url: str, api_key: str | None = None) -> str:
    """The name of the first model that the server lists.

    Raises:
        ConfigError: It cannot be asked, or lists none.
    """
    try:
        return str(json.loads(get(base_url, "/v1/models", api_key))["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise ConfigError(f"{base_url} lists no models; name one with --model") from None


# --- A run ----------------------------------------------------------------------------------------------


def run(
    endpoint: Endpoint,
    queries: Sequence[Query],
    load: Load,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    on_answer: Callable[[], None] = lambda: None,
) -> Run:
    """Sends queries under a load, and gives what became of each of them.

    Args:
        endpoint: Where.
        queries: What; a `Phased` load begins them anew, the others send each once.
        load: When.
        timeout_s: A query without a complete answer after this is an error.
        on_answer: Called when an answer is complete or has failed.
    """
    requests = [endpoint.request(query) for query in queries]
    sender = _Sender(endpoint, timeout_s, on_answer)
    gc.disable()
    cpu_s = time.process_time()
    try:
        asyncio.run(sender.send_all(requests, load))
    finally:
        cpu_s = time.process_time() - cpu_s
        gc.enable()
    answers = tuple(_answer(exchange, sender.start_s) for exchange in sender.exchanges)
    return Run(answers, sender.began, max((answer.end_s for answer in answers), default=0.0), cpu_s)


@dataclass
class _Exchange:
    """A query under way; `closed_s` and `failure` are set at its end, times are perf_counter's."""

    index: int
    due_s: float
    sent_s: float
    pieces: Pieces = field(default_factory=list)
    closed_s: float = 0.0
    failure: str | None = None


class _Connection(asyncio.Protocol):
    def __init__(self, request: bytes, pieces: Pieces) -> None:
        self._request, self._pieces = request, pieces
        self.closed: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._pieces.append((time.perf_counter(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(error)


class _Sender:
    def __init__(self, endpoint: Endpoint, timeout_s: float, on_answer: Callable[[], None]) -> None:
        url = urlsplit(root_url(endpoint.base_url))
        self._host = url.hostname or ""  # root_url has made sure of one
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._port = url.port or (443 if self._tls else 80)
        self._timeout_s, self._on_answer = timeout_s, on_answer
        self.exchanges: list[_Exchange] = []
        self.began, self.start_s = 0.0, 0.0

    async def send_all(self, requests: Sequence[bytes], load: Load) -> None:
        self.began, self.start_s = time.time(), time.perf_counter()
        match load:
            case Closed():
                await self._closed(requests, load)
            case Open():
                await self._open(requests, load)
            case Phased():
                await self._phased(requests, load)

    async def _closed(self, requests: Sequence[bytes], load: Closed) -> None:
        work = iter(enumerate(requests))

        async def client() -> None:
            for index, request in work:
                await self._send(index, request, time.perf_counter())

        await asyncio.gather(*(client() for _ in range(load.concurrency)))

    async def _open(self, requests: Sequence[bytes], load: Open) -> None:
        tasks = []
        for index, (request, arrival_s) in enumerate(zip(requests, load.arrivals_s, strict=True)):
            due = self.start_s + arrival_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self._send(index, request, due)))
        await asyncio.gather(*tasks)

    async def _phased(self, requests: Sequence[bytes], load: Phased) -> None:
        work = itertools.cycle(enumerate(requests))
        allowed = 0
        clients: dict[int, asyncio.Task[None]] = {}

        async def client(rank: int) -> None:
            while rank < allowed:  # those beyond leave when they are answered
                index, request = next(work)
                await self._send(index, request, time.perf_counter())

        end = self.start_s
        for phase in load.phases:
            allowed, end = phase.concurrency, end + phase.seconds
            for rank in range(allowed):
                if rank not in clients or clients[rank].done():
                    clients[rank] = asyncio.create_task(client(rank))
            await asyncio.sleep(max(0.0, end - time.perf_counter()))
        allowed = 0
        await asyncio.gather(*clients.values())

    async def _send(self, index: int, request: bytes, due: float) -> None:
        exchange = _Exchange(index, due, time.perf_counter())
        transport: asyncio.Transport | None = None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout_s):
                transport, connection = await loop.create_connection(
                    lambda: _Connection(request, exchange.pieces), self._host, self._port, ssl=self._tls
                )
                if error := await connection.closed:
                    exchange.failure = f"connection lost: {error}"
        except TimeoutError:
            exchange.failure = f"no complete answer after {self._timeout_s:g} s"
        except OSError as error:
            exchange.failure = f"cannot connect: {error.strerror or error}"
        finally:
            if transport is not None:
                transport.abort()
        exchange.closed_s = time.perf_counter()
        self.exchanges.append(exchange)
        self._on_answer()


# --- From bytes to an answer ----------------------------------------------------------------------------


class _AnswerError(Exception):
    """The server refused, or sent what is no complete answer."""


def _answer(exchange: _Exchange, start_s: float) -> Answer:
    stream = _Stream()
    error = exchange.failure
    try:
        stream.read(exchange.pieces)
        if not stream.is_complete:
            raise _AnswerError("the stream ended before the answer did")
        error = None  # what happens to the connection after that is nobody's loss
    except _AnswerError as reason:
        error = error or str(reason)
    end = stream.last_s if error is None else exchange.closed_s
    chunks = stream.chunks_s or [end]  # an answer may be without text, as when its one token ends it
    count = stream.usage.get("completion_tokens")
    return Answer(
        index=exchange.index,
        due_s=exchange.due_s - start_s,
        sent_s=exchange.sent_s - start_s,
        chunks_s=tuple(when - start_s for when in chunks) if error is None else (),
        end_s=end - start_s,
        prompt_tokens=stream.usage.get("prompt_tokens"),
        output_tokens=len(stream.chunks_s) if count is None else count,
        has_usage=count is not None,
        error=error,
    )


class _Stream:
    """What a streamed answer said."""

    def __init__(self) -> None:
        self.chunks_s: list[float] = []
        self.last_s = 0.0
        self.usage: dict[str, int | None] = {}
        self.is_complete = False

    def read(self, pieces: Pieces) -> None:
        """Reads all events.

        Raises:
            _AnswerError: The status is not 200, an event is an error, or something is no event of a stream.
        """
        for self.last_s, data in _events(_body(pieces)):
            if data == b"[DONE]":
                self.is_complete = True
                return
            try:
                self._read_event(json.loads(data))
            except (ValueError, LookupError, TypeError, AttributeError):
                raise _AnswerError(f"no event of an answer: {_shown(data)}") from None

    def _read_event(self, event: Any) -> None:
        if event.get("error"):
            raise _AnswerError(_message(event))
        if isinstance(usage := event.get("usage"), dict):
            self.usage = usage
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or choice
            if any(delta.get(name) for name in _TEXTS):
                self.chunks_s.append(self.last_s)


def _body(pieces: Pieces) -> Iterator[tuple[float, bytes]]:
    """The body of a response in parts, each with its time of arrival; undoes the chunked encoding.

    Raises:
        _AnswerError: The status is not 200.
    """
    buffer, head, is_chunked, left = bytearray(), b"", False, 0
    for when, piece in pieces:
        buffer += piece
        if not head:
            if b"\r\n\r\n" not in buffer:
                continue
            head, _, rest = bytes(buffer).partition(b"\r\n\r\n")
            if head.split(b" ", 2)[1:2] != [b"200"]:
                raise _AnswerError(_refusal(pieces))
            is_chunked, buffer = bool(_CHUNKED.search(head)), bytearray(rest)
        while is_chunked:
            if left:
                part = bytes(buffer[:left])
                if not part:
                    break
                del buffer[: len(part)]
                left -= len(part)
                yield when, part
            elif match := _CHUNK_SIZE.match(buffer):
                left = int(match[1], 16)
                del buffer[: match.end()]
                if left == 0:
                    return
            else:
                break
        if not is_chunked:
            yield when, bytes(buffer)
            buffer.clear()


def _events(body: Iterator[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of server-sent events, each with the time at which its line was complete."""
    when, rest = 0.0, b""
    for when, part in body:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield when, line[5:].strip()
    if rest.startswith(b"data:"):
        yield when, rest[5:].strip()


def _refusal(pieces: Pieces) -> str:
    head, _, body = b"".join(data for _, data in pieces).partition(b"\r\n\r\n")
    status = _shown(b" ".join(head.split(b"\r\n")[0].split(b" ")[1:]))
    try:
        return f"HTTP {status}: {_message(json.loads(body[body.index(b'{') : body.rindex(b'}') + 1]))}"
    except (ValueError, LookupError, TypeError):
        return f"HTTP {status}"


def _message(event: Any) -> str:
    """The text of an error in the OpenAI shape, or of any other."""
    error = event.get("error", event)
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _shown(data: bytes) -> str:
    return data[:200].decode(errors="replace")
