"""Serving: one engine thread, and asyncio streams of what it gives out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar

from outpace.config import EngineConfig, SpeculativeConfig
from outpace.engine.engine import Engine
from outpace.engine.metrics import Metrics
from outpace.errors import EngineDeadError, InvalidRequestError, OutpaceError, ShuttingDownError
from outpace.request import LatencyTargets, Output, Request, Speculation
from outpace.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

logger = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 1e-4


@dataclass(frozen=True, slots=True)
class _Command:
    """What the event loop asks of the engine thread; all of it happens between two steps."""

    add: list[Request] = field(default_factory=list)
    abort: list[str] = field(default_factory=list)
    stop: bool = False


@dataclass(frozen=True, slots=True)
class _News:
    """What the engine thread tells the event loop, at most once per step."""

    outputs: list[Output] = field(default_factory=list)
    refused: list[tuple[str, OutpaceError]] = field(default_factory=list)  # by engine request


class _Stream:
    """Outputs of one client request on their way to its consumer. Lives in the event loop."""

    def __init__(self, requests: list[Request]) -> None:
        self.unfinished = {request.id for request in requests}
        self._outputs: deque[Output] = deque()
        self._error: OutpaceError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: Output) -> None:
        self._outputs.append(output)
        self._wake()

    def fail(self, error: OutpaceError) -> None:
        self._error = error
        self._wake()

    async def get(self) -> Output | None:
        """The next output; None after the last one."""
        while not self._outputs:
            if self._error is not None:
                raise self._error
            if not self.unfinished:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._outputs.popleft()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class AsyncLLM:
    """Serves an engine to the coroutines of one event loop.

    The engine lives in a thread of its own, from its building on, and is touched by no other. Commands reach
    it through a queue, on which it sleeps when idle; outputs come back with one call into the loop per
    step. Every accepted request ends with exactly one finished Output per answer, or with EngineDeadError.

    Attributes:
        tokenizer: The model's.
        model_name: As the settings name it.
        max_model_len: Most tokens of prompt and answer.
        metrics: What the engine did.
        speculative: How it drafts.
    """

    def __init__(self, build: Callable[[], Engine]) -> None:
        """Starts the engine thread and waits until it has its engine.

        Args:
            build: Makes the engine; called in its thread.

        Raises:
            Exception: Whatever `build` raises; no thread is left then.
        """
        built: Future[Engine] = Future()
        self._inbox: SimpleQueue[_Command] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, _Stream] = {}  # by client request, until all its answers ended
        self._drained = asyncio.Event()
        self._drained.set()
        self._accepting = True
        self._death: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(build, built), name="outpace-engine", daemon=True
        )
        self._thread.start()
        if (error := built.exception()) is not None:
            self._thread.join()  # it is at its end
            raise error
        engine = built.result()
        self.tokenizer: PreTrainedTokenizerFast = engine.tokenizer
        self.model_name: str = engine.model_name
        self.max_model_len: int = engine.max_model_len
        self.metrics: Metrics = engine.metrics
        self.speculative: SpeculativeConfig = engine.config.speculative
        self._admission = engine.admission

    @classmethod
    def from_config(cls, config: EngineConfig) -> AsyncLLM:
        """Loads a model and starts its engine.

        Raises:
            ConfigError: The model cannot be had or a setting does not fit it.
        """
        return cls(functools.partial(Engine.from_config, config))

    @property
    def errored(self) -> bool:
        """Whether the engine ended on an unexpected error."""
        return self._death is not None

    @property
    def is_running(self) -> bool:
        """Whether requests are served: not errored, not shut down."""
        return self._thread.is_alive() and not self.errored

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        speculation: Speculation | None = None,
        client: str = "",
        slo: LatencyTargets | None = None,
    ) -> AsyncGenerator[Output]:
        """Yields what each step adds to each of the n answers, until all have ended.

        A consumer that stops early, is cancelled or closes the iterator aborts the request: its blocks
        are free before the next step.

        Args:
            prompt_ids: The prompt's tokens.
            sampling: How to choose and when to stop.
            request_id: Unique among unfinished requests.
            priority: Lower runs first; not 0 only under the `priority` scheduling policy.
            speculation: What the request asks of its drafts.
            client: Who asked; the policy `fair` shares between clients.
            slo: How soon the request wants its answer; only under the policy `slo`.

        Raises:
            InvalidRequestError: The request cannot be served as asked (before anything is yielded).
            OverloadedError: The queue is full (likewise).
            ShuttingDownError: No new work is accepted (likewise).
            EngineDeadError: The engine ended on an unexpected error.
        """
        if sampling.structured_outputs is not None:
            await asyncio.to_thread(self._admission.prepare, sampling.structured_outputs)
        stream = self._submit(prompt_ids, sampling, request_id, priority, speculation, client, slo)
        try:
            while (output := await stream.get()) is not None:
                yield output
        finally:
            self._leave(stream)

    def abort(self, request_id: str) -> None:
        """Ends a request; its consumer gets the finished Outputs. Unknown ids are ignored."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._inbox.put(_Command(abort=list(stream.unfinished)))

    async def shutdown(self, timeout: float) -> None:
        """Drains, then stops: refuses new requests, lets the others finish, and ends the engine thread.

        Args:
            timeout: Seconds until those that are not finished are aborted.
        """
        self._loop = asyncio.get_running_loop()
        self._accepting = False
        try:
            async with asyncio.timeout(timeout):
                await self._drained.wait()
        except TimeoutError:
            self._inbox.put(_Command(abort=[id for s in self._streams.values() for id in s.unfinished]))
            await self._drained.wait()
        self._inbox.put(_Command(stop=True))
        while self._thread.is_alive():  # for as long as the step under way, if there is one
            await asyncio.sleep(0.001)

    def _submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        request_id: str,
        priority: int,
        speculation: Speculation | None,
        client: str,
        slo: LatencyTargets | None,
    ) -> _Stream:
        self._loop = asyncio.get_running_loop()  # before the check: see _run
        if self._death is not None:
            raise _dead(self._death)
        if not self._accepting:
            raise ShuttingDownError("the server is shutting down and accepts no new requests")
        if request_id in self._streams:
            raise InvalidRequestError(f"request id {request_id} is in use", "request_id")
        requests = self._admission.requests(
            request_id, prompt_ids, sampling, priority, speculation, client, slo
        )
        stream = self._streams[request_id] = _Stream(requests)
        self._drained.clear()
        self._inbox.put(_Command(add=requests))
        return stream

    def _leave(self, stream: _Stream) -> None:
        """The consumer is gone. The stream itself goes when the engine has ended its requests."""
        if stream.unfinished:
            self._inbox.put(_Command(abort=list(stream.unfinished)))

    def _deliver(self, news: _News) -> None:
        for output in news.outputs:
            client_id = _client_id(output.request_id)
            stream = self._streams[client_id]
            if output.finish_reason is not None:
                stream.unfinished.remove(output.request_id)
                if not stream.unfinished:
                    del self._streams[client_id]
            stream.put(output)
        for request_id, error in news.refused:
            self._streams.pop(_client_id(request_id)).fail(error)
        if not self._streams:
            self._drained.set()

    def _fail_all(self, cause: BaseException) -> None:
        for stream in self._streams.values():
            stream.fail(_dead(cause))
        self._streams.clear()
        self._drained.set()

    # What follows runs in the engine thread.

    def _run(self, build: Callable[[], Engine], built: Future[Engine]) -> None:
        # The event loop's turns are short; with the default of 5 ms the engine would wait for them at length.
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        try:
            engine = build()
        except BaseException as error:
            built.set_exception(error)
            return
        built.set_result(engine)
        try:
            while self._turn(engine):
                pass
        except BaseException as error:
            logger.exception("the engine stopped on an unexpected error")
            # First this, then the loop's streams: a request submitted in between finds one or the other.
            self._death = error
            self._tell(self._fail_all, error)
        finally:
            engine.close()

    def _turn(self, engine: Engine) -> bool:
        """Obeys what was asked since the last turn, then runs a step; False to end."""
        news, go_on = _News(), True
        if not engine.has_work or not self._inbox.empty():
            go_on = self._obey(engine, news)
        if go_on:
            news.outputs.extend(engine.step())
        if news.outputs or news.refused:
            self._tell(self._deliver, news)
        return go_on

    def _obey(self, engine: Engine, news: _News) -> bool:
        """Takes at least one command, sleeping until there is one; False to end."""
        while True:
            command = self._inbox.get()
            if command.stop:
                return False
            if command.add:
                try:
                    engine.add(command.add)
                except OutpaceError as error:
                    news.refused.append((command.add[0].id, error))
            for request_id in command.abort:
                output = engine.abort(request_id)
                if output is not None:
                    news.outputs.append(output)
            if self._inbox.empty():
                return True

    def _tell(self, callback: Callable[[T], None], argument: T) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(callback, argument)


def _client_id(request_id: str) -> str:
    """The id the client's request has, from that of one of its answers."""
    return request_id.rpartition("-")[0]


def _dead(cause: BaseException) -> EngineDeadError:
    error = EngineDeadError(f"the engine stopped on an unexpected error: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
