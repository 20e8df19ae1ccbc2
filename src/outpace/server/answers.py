"""From the engine's outputs to HTTP answers: whole, or as server-sent events.

At 32 streams every engine step makes 32 events, and their Python competes with the engine for the
interpreter lock. So what is constant in a stream's events is written once, and an event with nothing but
text costs one string escape, one concatenation and one send.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from outpace.errors import InvalidRequestError, ShuttingDownError
from outpace.request import DraftStep, FinishReason, Output, TokenLogprob
from outpace.server import errors
from outpace.server.connection import while_connected
from outpace.server.draft_report import DraftReport
from outpace.server.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatTokenLogprob,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FunctionCall,
    PromptTokensDetails,
    RequestMetrics,
    StreamOptions,
    ToolCall,
    TopLogprob,
    Usage,
    in_client_names,
)
from outpace.server.tokens import Tokens
from outpace.server.tools import CallDelta, Parsed, Tools

LEAST_LOGPROB = -9999.0  # the OpenAI API's stand-in for minus infinity, which JSON cannot write

Kind = Literal["chat", "text"]

_quote = json.JSONEncoder().encode  # for a str this is one C call


@dataclass(frozen=True, slots=True)
class Job:
    """A client's request on its way: constants of its answer.

    Attributes:
        kind: Which endpoint it came to.
        model: The served name.
        num_answers: n; answers to prompt i have the choice indices from i·n on.
        tokens: Writes the tokens of log-probabilities.
        echoes: For each prompt the text its answers begin with.
        client_names: From the engine's names of fields to the client's, where they differ.
        draft_report: How much an only answer says of its drafts; None: nothing.
        tools: What the answers may call.
        id: Of the answer.
        created: Unix time in seconds.
        synthetic: Whether drafts are accepted by chance; the answer then says so.
    """

    kind: Kind
    model: str
    num_answers: int
    tokens: Tokens
    echoes: tuple[str, ...] = ("",)
    client_names: Mapping[str, str] = field(default_factory=dict)
    draft_report: DraftReport | None = None
    tools: Tools | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    synthetic: bool = False

    @property
    def public_id(self) -> str:
        """The id that the client sees."""
        return ("chatcmpl-" if self.kind == "chat" else "cmpl-") + self.id


class Tally:
    """Counts tokens while outputs pass, and keeps what the last one says of drafts."""

    def __init__(self) -> None:
        self._prompts: dict[int, tuple[int, int]] = {}
        self._num_answered = 0
        self._draft_steps: tuple[DraftStep, ...] = ()

    def add(self, prompt: int, output: Output) -> None:
        """Counts an output of the given prompt."""
        self._num_answered += len(output.token_ids)
        if prompt not in self._prompts:
            self._prompts[prompt] = (output.num_prompt_tokens, output.num_cached_tokens)
        if output.finish_reason is not None:
            self._draft_steps = output.draft_steps

    def metrics(self, job: Job) -> RequestMetrics | None:
        """The report on drafts, once the answer has ended; None unless there is one answer and a report."""
        if job.draft_report is None or len(job.echoes) * job.num_answers > 1:
            return None
        return job.draft_report.of(self._draft_steps)

    def usage(self) -> Usage:
        """The counts so far."""
        num_prompt = sum(total for total, _ in self._prompts.values())
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self._num_answered,
            total_tokens=num_prompt + self._num_answered,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(cached for _, cached in self._prompts.values())
            ),
        )


def merge(job: Job, streams: list[AsyncGenerator[Output]]) -> AsyncGenerator[tuple[int, Output]]:
    """Outputs of several prompts as they come, each with its prompt's number.

    Closing the result closes all of them, and so aborts their requests.
    """
    return _only(job, streams[0]) if len(streams) == 1 else _interleave(streams)


async def _only(job: Job, stream: AsyncGenerator[Output]) -> AsyncGenerator[tuple[int, Output]]:
    try:
        async with aclosing(stream):
            async for output in stream:
                yield 0, output
    except InvalidRequestError as error:
        raise in_client_names(error, job.client_names) from None


async def _interleave(streams: list[AsyncGenerator[Output]]) -> AsyncGenerator[tuple[int, Output]]:
    queue: asyncio.Queue[tuple[int, Output] | Exception | None] = asyncio.Queue()

    async def pump(prompt: int, stream: AsyncGenerator[Output]) -> None:
        try:
            async with aclosing(stream):
                async for output in stream:
                    queue.put_nowait((prompt, output))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(prompt, stream)) for prompt, stream in enumerate(streams)]
    try:
        num_running = len(tasks)
        while num_running:
            event = await queue.get()
            if event is None:
                num_running -= 1
            elif isinstance(event, Exception):
                raise event
            else:
                yield event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _finish(output: Output) -> Literal["stop", "length"]:
    """Why a finished output's answer ended, as clients know it.

    Raises:
        InvalidRequestError: Its grammar leads nowhere.
        ShuttingDownError: The engine gave it up: what there is of it is not an answer.
    """
    if output.finish_reason is FinishReason.STOP:
        return "stop"
    if output.finish_reason is FinishReason.LENGTH:
        return "length"
    if output.finish_reason is FinishReason.ERROR:
        raise InvalidRequestError(str(output.stop_reason))
    raise ShuttingDownError("the server stopped before the answer was complete")


def _finish_chat(output: Output, has_calls: bool) -> Literal["stop", "length", "tool_calls"]:
    """The same for the chat endpoint, where calls that are complete are a reason of their own."""
    finish = _finish(output)
    return "tool_calls" if has_calls and finish == "stop" else finish


# --- Whole answers --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Answer:
    """One answer as far as it came."""

    texts: list[str]
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: Output | None = None

    def add(self, output: Output) -> None:
        self.texts.append(output.text)
        self.logprobs.extend(output.logprobs or ())
        self.last = output


async def whole(job: Job, events: AsyncGenerator[tuple[int, Output]]) -> ChatCompletion | Completion:
    """Collects the outputs of a request into one answer."""
    n, tally = job.num_answers, Tally()
    answers = [_Answer([echo]) for echo in job.echoes for _ in range(n)]
    async with aclosing(events):
        async for prompt, output in events:
            tally.add(prompt, output)
            answers[prompt * n + output.index].add(output)
    parts: Any = {"id": job.public_id, "created": job.created, "model": job.model, "usage": tally.usage()}
    parts["metrics"] = tally.metrics(job)
    parts["synthetic"] = job.synthetic
    if job.kind == "chat":
        choices = [_chat_choice(job, index, answer) for index, answer in enumerate(answers)]
        return ChatCompletion(choices=choices, **parts)
    texts = [_text_choice(job.tokens, index, answer) for index, answer in enumerate(answers)]
    return Completion(choices=texts, **parts)


def _chat_choice(job: Job, index: int, answer: _Answer) -> ChatChoice:
    assert answer.last is not None
    content, calls = "".join(answer.texts), []
    if job.tools is not None:
        reader = job.tools.reader()
        parts = [reader.push(content), reader.finish()]
        content, calls = "".join(part.content for part in parts), _joined(parts)
    return ChatChoice(
        index=index,
        message=AnswerMessage(content=content or (None if calls else ""), tool_calls=calls or None),
        logprobs=None if answer.last.logprobs is None else chat_logprobs(job.tokens, answer.logprobs),
        finish_reason=_finish_chat(answer.last, bool(calls)),
        stop_reason=answer.last.stop_reason,
    )


def _joined(parts: Iterable[Parsed]) -> list[ToolCall]:
    """The calls that the parts of an answer hold."""
    calls: list[ToolCall] = []
    for delta in (call for part in parts for call in part.calls):
        if delta.name is not None:
            function = FunctionCall(name=delta.name, arguments=delta.arguments)
            calls.append(ToolCall(id=delta.id or "", function=function))
        else:
            function = calls[delta.index].function
            whole = function.model_copy(update={"arguments": function.arguments + delta.arguments})
            calls[delta.index] = calls[delta.index].model_copy(update={"function": whole})
    return calls


def _text_choice(tokens: Tokens, index: int, answer: _Answer) -> CompletionChoice:
    assert answer.last is not None
    return CompletionChoice(
        index=index,
        text="".join(answer.texts),
        logprobs=None if answer.last.logprobs is None else text_logprobs(tokens, answer.logprobs, 0),
        finish_reason=_finish(answer.last),
        stop_reason=answer.last.stop_reason,
    )


def chat_logprobs(tokens: Tokens, logprobs: Iterable[TokenLogprob]) -> ChatLogprobs:
    """Log-probabilities as the chat endpoint gives them."""

    def entry(token_id: int, logprob: float) -> TopLogprob:
        text, content = tokens.of(token_id)
        return TopLogprob(token=text, logprob=max(logprob, LEAST_LOGPROB), bytes=content)

    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                **entry(at.token_id, at.logprob).model_dump(), top_logprobs=[entry(*top) for top in at.top]
            )
            for at in logprobs
        ]
    )


def text_logprobs(tokens: Tokens, logprobs: Iterable[TokenLogprob], offset: int) -> CompletionLogprobs:
    """Log-probabilities as the completions endpoint gives them.

    Args:
        tokens: Writes the tokens.
        logprobs: One per token.
        offset: Characters of the tokens before these.
    """
    result = CompletionLogprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
    for at in logprobs:
        text, _ = tokens.of(at.token_id)
        result.text_offset.append(offset)
        result.tokens.append(text)
        result.token_logprobs.append(max(at.logprob, LEAST_LOGPROB))
        best: dict[str, float] = {}
        for token_id, logprob in (*at.top, (at.token_id, at.logprob)):
            best.setdefault(tokens.of(token_id)[0], max(logprob, LEAST_LOGPROB))
        result.top_logprobs.append(best)
        offset += len(text)
    return result


# --- Streams --------------------------------------------------------------------------------------------


class Chunks:
    """Writes a request's server-sent events.

    Args:
        job: The request.
        options: What the client wants besides the answer.
    """

    def __init__(self, job: Job, options: StreamOptions) -> None:
        self._job = job
        self._options = options
        self._tally = Tally()
        self._offsets = [0] * (len(job.echoes) * job.num_answers)
        chat = job.kind == "chat"
        name = "chat.completion.chunk" if chat else "text_completion"
        head: Any = {"id": job.public_id, "object": name, "created": job.created, "model": job.model}
        head |= {"synthetic": True} if job.synthetic else {}
        self._start = f'data: {json.dumps(head, separators=(",", ":"))[:-1]},"choices":['
        self._text, self._after_text = ('"delta":{"content":', "}") if chat else ('"text":', "")
        self._nothing = '"delta":{}' if chat else '"text":""'
        self._heads = [f'{self._start}{{"index":{i},{self._text}' for i in range(len(self._offsets))]
        self._is_plain = not options.continuous_usage_stats
        self._readers = [] if job.tools is None else [job.tools.reader() for _ in self._offsets]
        self._with_calls: set[int] = set()
        usage = ',"usage":null' if options.include_usage else ""
        self._plain_tail = f'{self._after_text},"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'

    def opening(self) -> bytes:
        """Events before the first output: the roles of a chat, the prompts to echo."""
        if self._job.kind == "chat":
            opening = '"delta":{"role":"assistant","content":""}'
            return b"".join(self._event(i, opening) for i in range(len(self._offsets)))
        echoes = [echo for echo in self._job.echoes for _ in range(self._job.num_answers)]
        return b"".join(self._event(i, f'"text":{_quote(echo)}') for i, echo in enumerate(echoes) if echo)

    def of(self, prompt: int, output: Output) -> bytes:
        """The events of one output; none if it has nothing to show yet."""
        self._tally.add(prompt, output)
        index = prompt * self._job.num_answers + output.index
        if self._readers:
            return self._of_tools(index, output)
        if output.logprobs is None and self._is_plain:
            text = output.text
            event = (self._heads[index] + _quote(text) + self._plain_tail).encode() if text else b""
        elif output.text or output.logprobs:
            event = self._event(
                index, self._text + _quote(output.text) + self._after_text, self._logprobs(index, output)
            )
        else:
            event = b""
        if output.finish_reason is None:
            return event
        end = f'"finish_reason":"{_finish(output)}","stop_reason":{json.dumps(output.stop_reason)}'
        return event + self._event(index, self._nothing, end=end)

    def _of_tools(self, index: int, output: Output) -> bytes:
        """The events of an output that may hold calls, or a part of one."""
        reader, is_last = self._readers[index], output.finish_reason is not None
        parts = [reader.push(output.text), *([reader.finish()] if is_last else [])]
        content, calls = "".join(part.content for part in parts), [c for part in parts for c in part.calls]
        deltas = [f'"delta":{{"tool_calls":[{_call_delta(call)}]}}' for call in calls]
        if content or (output.logprobs and not deltas):
            deltas.insert(0, self._text + _quote(content) + self._after_text)
        logprobs = [self._logprobs(index, output), *["null"] * len(deltas)]
        events = [self._event(index, *pair) for pair in zip(deltas, logprobs, strict=False)]
        if calls:
            self._with_calls.add(index)
        if is_last:
            finish = _finish_chat(output, index in self._with_calls)
            end = f'"finish_reason":"{finish}","stop_reason":{json.dumps(output.stop_reason)}'
            events.append(self._event(index, self._nothing, end=end))
        return b"".join(events)

    def closing(self) -> bytes:
        """Events after the last output."""
        usage = ""
        if self._options.include_usage:
            metrics = self._tally.metrics(self._job)
            report = "" if metrics is None else f',"metrics":{metrics.model_dump_json()}'
            usage = f'{self._start}],"usage":{self._tally.usage().model_dump_json()}{report}}}\n\n'
        return f"{usage}data: [DONE]\n\n".encode()

    def _event(
        self, index: int, content: str, logprobs: str = "null", end: str = '"finish_reason":null'
    ) -> bytes:
        usage = ""
        if self._options.continuous_usage_stats:
            usage = f',"usage":{self._tally.usage().model_dump_json()}'
        elif self._options.include_usage:
            usage = ',"usage":null'
        choice = f'{{"index":{index},{content},"logprobs":{logprobs},{end}}}'
        return f"{self._start}{choice}]{usage}}}\n\n".encode()

    def _logprobs(self, index: int, output: Output) -> str:
        if output.logprobs is None:
            return "null"
        if self._job.kind == "chat":
            return chat_logprobs(self._job.tokens, output.logprobs).model_dump_json()
        result = text_logprobs(self._job.tokens, output.logprobs, self._offsets[index])
        self._offsets[index] += sum(len(token) for token in result.tokens)
        return result.model_dump_json()


def _call_delta(call: CallDelta) -> str:
    """What became known of a call, as the OpenAI API streams it."""
    function = {"arguments": call.arguments}
    if call.name is None:
        return json.dumps({"index": call.index, "function": function})
    start = {"index": call.index, "id": call.id, "type": "function"}
    return json.dumps({**start, "function": {"name": call.name, **function}})


class EventStream(StreamingResponse):
    """A request's answer as server-sent events.

    The first output is awaited before the status is sent: a request that the engine refuses gets its
    proper status. A later error is sent as an event and ends the stream without `[DONE]`.

    Args:
        chunks: Writes the events.
        outputs: The engine's, in order.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: Chunks, outputs: AsyncGenerator[tuple[int, Output]]) -> None:
        super().__init__((), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._chunks = chunks
        self._outputs = outputs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer; a client that leaves ends the request at once."""
        with suppress(errors.ClientGoneError):
            await self._send(receive, send)

    async def _send(self, receive: Receive, send: Send) -> None:
        of = self._chunks.of
        async with while_connected(receive), aclosing(self._outputs) as outputs:
            first = of(*await anext(outputs))
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send(_part(self._chunks.opening() + first))
            try:
                async for prompt, output in outputs:
                    if event := of(prompt, output):
                        await send(_part(event))
                closing = self._chunks.closing()
            except Exception as error:  # the status is sent: all that is left is to say it in the stream
                closing = b"data: " + errors.describe(error)[1] + b"\n\n"
            await send(_part(closing, more=False))


def _part(content: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}
