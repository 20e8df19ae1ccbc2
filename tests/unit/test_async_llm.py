"""Streams on an event loop: none hangs, none is lost, and who leaves frees what it held."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from outpace.async_llm import AsyncLLM
from outpace.engine.engine import Engine
from outpace.errors import (
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    ShuttingDownError,
)
from outpace.request import FinishReason, Output
from outpace.sampling import SamplingParams, StructuredOutputsParams
from tiny import FakeModel, check_idle

PROMPT = list(b"hello")
ENDLESS = SamplingParams()


def pace(seconds: float = 0.002) -> FakeModel:
    """A model whose passes take a while, so that tests can act between them."""
    return FakeModel(on_forward=lambda: time.sleep(seconds))


@asynccontextmanager
async def serving(model: FakeModel, **settings: Any) -> AsyncIterator[tuple[AsyncLLM, Engine]]:
    """An AsyncLLM that at the end has every block back and no thread left."""
    engine = model.engine(**settings)
    llm = AsyncLLM(lambda: engine)
    try:
        yield llm, engine
    finally:
        await llm.shutdown(0)
        check_no_thread()
        if not llm.errored:
            check_idle(engine)


def check_no_thread() -> None:
    assert "outpace-engine" not in {thread.name for thread in threading.enumerate()}


async def collect(
    llm: AsyncLLM, request_id: str, sampling: SamplingParams, prompt: list[int] = PROMPT
) -> list[Output]:
    return [output async for output in llm.generate(prompt, sampling, request_id=request_id)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


def run_async(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    """Runs a coroutine as a test, and lets none of its tasks outlive it."""

    async def whole() -> None:
        async with asyncio.timeout(20):
            await test()
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    def wrapper() -> None:
        asyncio.run(whole())

    wrapper.__name__ = test.__name__
    return wrapper


@run_async
async def test_many_streams_get_their_own_answers() -> None:
    async with serving(FakeModel(), max_num_seqs=4) as (llm, _):
        sampling = SamplingParams(max_tokens=20)
        results = await asyncio.gather(*(collect(llm, str(i), sampling, [i, 1, 2]) for i in range(12)))
        alone = [await collect(llm, f"again{i}", sampling, [i, 1, 2]) for i in range(12)]
    for together, single in zip(results, alone, strict=True):
        assert "".join(o.text for o in together) == "".join(o.text for o in single)
        assert [o.finish_reason for o in together] == [None] * 19 + [FinishReason.LENGTH]


@run_async
async def test_a_stream_of_n_answers_lasts_until_each_has_ended() -> None:
    async with serving(FakeModel()) as (llm, _):
        outputs = await collect(llm, "a", SamplingParams(max_tokens=5, n=3))
    assert sorted(o.index for o in outputs if o.finish_reason) == [0, 1, 2]
    assert len(outputs) == 15


@run_async
async def test_what_cannot_be_served_is_refused_before_anything_is_yielded() -> None:
    async with serving(FakeModel()) as (llm, _):
        with pytest.raises(InvalidRequestError, match="empty"):
            await collect(llm, "a", ENDLESS, [])


@run_async
async def test_a_full_queue_refuses_and_the_others_go_on() -> None:
    async with serving(pace(), max_num_seqs=1, max_num_queued_reqs=1) as (llm, engine):
        tasks = [asyncio.create_task(collect(llm, name, SamplingParams(max_tokens=20))) for name in "ab"]
        await until(lambda: engine.scheduler.num_waiting == 1 and engine.scheduler.num_running == 1)
        with pytest.raises(OverloadedError):
            await collect(llm, "c", ENDLESS)
        assert [len(outputs) for outputs in await asyncio.gather(*tasks)] == [20, 20]


def test_an_engine_that_cannot_be_built_is_an_error_of_the_constructor_and_leaves_no_thread() -> None:
    def build() -> Engine:
        time.sleep(0.01)
        raise ConfigError("there is no such model")

    for _ in range(20):
        with pytest.raises(ConfigError, match="there is no such model"):
            AsyncLLM(build)
        check_no_thread()


@run_async
async def test_an_id_cannot_be_used_twice_at_once() -> None:
    async with serving(pace()) as (llm, _):
        first = llm.generate(PROMPT, ENDLESS, request_id="a")
        await anext(first)
        with pytest.raises(InvalidRequestError, match="in use"):
            await collect(llm, "a", ENDLESS)
        await first.aclose()


@run_async
async def test_closing_the_iterator_aborts_the_request_within_a_step() -> None:
    model = pace()
    async with serving(model) as (llm, engine):
        async with aclosing(llm.generate(PROMPT, ENDLESS, request_id="a")) as stream:
            async for _ in stream:
                break
        passes = len(model.passes)
        await until(lambda: not engine.has_work)
        assert len(model.passes) <= passes + 1


@run_async
async def test_a_cancelled_consumer_aborts_its_request() -> None:
    async with serving(pace()) as (llm, engine):
        task = asyncio.create_task(collect(llm, "a", ENDLESS))
        await until(lambda: engine.has_work)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not engine.has_work)


@run_async
async def test_a_consumer_that_leaves_before_its_first_token_frees_its_place() -> None:
    async with serving(pace(), max_num_seqs=1) as (llm, engine):
        running = asyncio.create_task(collect(llm, "a", SamplingParams(max_tokens=30)))
        await until(lambda: engine.scheduler.num_running == 1)
        waiting = asyncio.create_task(collect(llm, "b", ENDLESS))
        await until(lambda: engine.scheduler.num_waiting == 1)
        waiting.cancel()
        await until(lambda: engine.scheduler.num_waiting == 0)
        assert len(await running) == 30


@run_async
async def test_an_aborted_request_ends_with_one_output_per_answer() -> None:
    async with serving(pace()) as (llm, engine):
        task = asyncio.create_task(collect(llm, "a", SamplingParams(max_tokens=200, n=2)))
        await until(lambda: engine.scheduler.num_running == 2)
        llm.abort("a")
        llm.abort("a")
        llm.abort("unknown")
        ends = [o.finish_reason for o in await task if o.finish_reason]
        assert ends == [FinishReason.ABORT] * 2


@run_async
async def test_shutdown_lets_running_requests_finish_and_refuses_new_ones() -> None:
    async with serving(pace()) as (llm, engine):
        task = asyncio.create_task(collect(llm, "a", SamplingParams(max_tokens=30)))
        await until(lambda: engine.has_work)
        shutdown = asyncio.create_task(llm.shutdown(10))
        await asyncio.sleep(0)
        with pytest.raises(ShuttingDownError):
            await collect(llm, "b", ENDLESS)
        await shutdown
        assert (await task)[-1].finish_reason == FinishReason.LENGTH
        assert not llm.is_running
        assert not llm.errored


@run_async
async def test_shutdown_aborts_what_does_not_finish_in_time() -> None:
    async with serving(pace(0.01)) as (llm, engine):
        tasks = [asyncio.create_task(collect(llm, name, ENDLESS)) for name in "abc"]
        await until(lambda: engine.scheduler.num_running == 3)
        await llm.shutdown(0.03)
        for outputs in await asyncio.gather(*tasks):
            assert [o.finish_reason for o in outputs if o.finish_reason] == [FinishReason.ABORT]


@run_async
async def test_a_bug_in_the_engine_reaches_every_consumer_and_none_hangs() -> None:
    model = pace()
    async with serving(model) as (llm, engine):
        tasks = [asyncio.create_task(collect(llm, name, ENDLESS)) for name in "abc"]
        await until(lambda: engine.scheduler.num_running == 3)

        def fail() -> None:
            raise ZeroDivisionError("a bug")

        model.on_forward = fail
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineDeadError)
            assert "ZeroDivisionError: a bug" in str(result)
        assert llm.errored
        assert not llm.is_running
        with pytest.raises(EngineDeadError):
            await collect(llm, "d", ENDLESS)


@run_async
async def test_an_idle_engine_uses_no_time() -> None:
    async with serving(FakeModel()) as (llm, _):
        await collect(llm, "a", SamplingParams(max_tokens=2))
        begin = time.process_time()
        await asyncio.sleep(0.2)
        assert time.process_time() - begin < 0.05


@run_async
async def test_the_loop_is_called_once_per_step_whatever_the_number_of_streams() -> None:
    model = FakeModel()
    async with serving(model, max_num_seqs=16) as (llm, _):
        loop, calls = asyncio.get_running_loop(), 0
        original = loop.call_soon_threadsafe

        def counting(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            return original(*arguments)

        loop.call_soon_threadsafe = counting  # type: ignore[method-assign,assignment]
        await asyncio.gather(*(collect(llm, str(i), SamplingParams(max_tokens=10)) for i in range(16)))
        assert calls <= len(model.passes)


@run_async
async def test_a_storm_of_cancellations_leaves_nothing_behind() -> None:
    rng = random.Random(0)
    model = FakeModel()
    async with serving(model, num_blocks=24, max_model_len=100, max_num_seqs=6) as (llm, engine):

        async def client(number: int) -> None:
            await asyncio.sleep(rng.random() * 0.1)
            stream = llm.generate([number % 5] * rng.randrange(1, 60), ENDLESS, request_id=str(number))
            num_wanted = rng.randrange(60)
            async with aclosing(stream):
                async for _ in stream:
                    num_wanted -= 1
                    if num_wanted <= 0:
                        break

        await asyncio.gather(*(client(number) for number in range(150)))
        await until(lambda: not engine.has_work)
        assert await collect(llm, "after", SamplingParams(max_tokens=3))


@run_async
async def test_a_structure_is_compiled_before_the_request_and_refused_if_it_cannot_be() -> None:
    loop_thread = threading.get_ident()
    async with serving(FakeModel()) as (llm, engine):
        compiled_in: list[int] = []
        prepare = engine.admission.prepare

        def noted(asked: StructuredOutputsParams) -> None:
            compiled_in.append(threading.get_ident())
            prepare(asked)

        engine.admission.prepare = noted  # type: ignore[method-assign]
        bad = SamplingParams(structured_outputs=StructuredOutputsParams(regex="(a"))
        with pytest.raises(InvalidRequestError, match="regular expression"):
            await collect(llm, "a", bad)
        assert compiled_in
        assert loop_thread not in compiled_in
        assert len(await collect(llm, "a", SamplingParams(max_tokens=3))) == 3
