"""The soak's storm of requests against a server in this process: nothing, down to its tasks, is left."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import soak
import uvicorn

from outpace.async_llm import AsyncLLM
from outpace.config import ServerConfig
from outpace.server.app import create_app
from outpace.server.run import bind
from tiny import FakeModel, check_idle


def cases() -> list[soak.Case]:
    rng = random.Random(1)
    result = []
    for number in range(20):
        text = "a shared beginning, " * rng.randrange(3) + "and an end"
        body: dict[str, Any] = {
            "max_tokens": rng.choice([1, 20, 60]),
            "n": rng.randrange(1, 4),
            "stream": number % 3 > 0,
        }
        if number % 2:
            messages = [{"role": "user", "content": text}]
            result.append(soak.Case("/v1/chat/completions", {"messages": messages, **body}))
        else:
            prompt = [text] * rng.randrange(1, 3)
            result.append(soak.Case("/v1/completions", {"prompt": prompt, **body}))
    return result


def test_after_a_storm_of_abandoned_requests_no_task_block_or_stream_is_left() -> None:
    async def run() -> None:
        engine = FakeModel().engine(num_blocks=14, max_model_len=160, max_num_seqs=6)
        llm = AsyncLLM(lambda: engine)
        app = create_app(llm, ServerConfig())
        config = uvicorn.Config(app, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        with bind("127.0.0.1", 0) as listener:
            serving = asyncio.create_task(server._serve([listener]))
            while not server.started:
                await asyncio.sleep(0.005)
            port = listener.getsockname()[1]
            own_tasks = asyncio.all_tasks()
            expected = await soak.answer_alone(port, cases())
            tally = await soak.storm(port, cases(), expected, 150, random.Random(2))
            assert tally.wrong == []
            assert set(tally.abandoned) == set(soak.MOMENTS)
            async with asyncio.timeout(5):
                while asyncio.all_tasks() != own_tasks:
                    await asyncio.sleep(0.01)
            assert llm._streams == {}
            assert server.server_state.connections == set()
            assert engine.scheduler.num_preemptions > 0
            check_idle(engine)
            server.should_exit = True
            await llm.shutdown(0)
            await serving

    asyncio.run(run())
