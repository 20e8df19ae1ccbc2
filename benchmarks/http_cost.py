"""What serving 32 streams over HTTP costs the engine, and how much of it is the interpreter lock.

    python benchmarks/http_cost.py

Three times per decoding step, interleaved: (alone) the engine with no HTTP side; (apart) the same while
another process serves as many streams at the same pace from a stand-in for the engine, which takes the cores
but not the lock; (served) the real server with its HTTP side in the engine's process. apart/alone is the
price of sharing the cores; served/apart is what a split into two processes would win.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lossless
from prometheus_client import CollectorRegistry

from outpace.bench import client, report
from outpace.bench.servers import Server
from outpace.bench.workload import PROMPTS, Closed, built_in_prompts, make_queries
from outpace.config import ServerConfig
from outpace.request import FinishReason, Output
from outpace.sampling import SamplingParams
from outpace.server.run import _serve, bind


class PacedLLM:
    """Streams a word per step of a given length to everyone, as an engine thread would: a wake-up a step."""

    model_name, max_model_len, is_running = "paced", 8192, True

    def __init__(self, tokenizer: Any, step_s: float) -> None:
        self.tokenizer, self._step_s = tokenizer, step_s
        self.metrics = SimpleNamespace(registry=CollectorRegistry())

    async def generate(
        self, prompt_ids: list[int], sampling: SamplingParams, *, request_id: str, priority: int = 0
    ) -> AsyncGenerator[Output]:
        loop = asyncio.get_running_loop()
        for position in range(sampling.max_tokens or 16):
            await asyncio.sleep(self._step_s - loop.time() % self._step_s)
            last = position + 1 == sampling.max_tokens
            reason = FinishReason.LENGTH if last else None
            yield Output(request_id, 0, " word", (position,), None, reason, None, len(prompt_ids), 0)

    async def shutdown(self, timeout: float) -> None:
        pass


def serve_paced(port: int, step_s: float) -> None:
    from outpace.models.hub import resolve_model
    from outpace.models.tokenizer import load_tokenizer

    llm: Any = PacedLLM(load_tokenizer(resolve_model(None)), step_s)
    asyncio.run(_serve(llm, ServerConfig(port=port), bind("127.0.0.1", port)))


def ask_all(base_url: str, model: str, streams: int, tokens: int) -> float:
    """Median time per token of as many answers as streams, all at once, in seconds."""
    endpoint = client.Endpoint(base_url, model, ignore_eos=True)
    queries = make_queries(built_in_prompts(), [tokens] * streams, seed=0)
    run = client.run(endpoint, queries, Closed(streams))
    summary = report.summarise(run, (), None)
    if summary["num_failed"]:
        sys.exit(f"requests failed: {summary['errors']}")
    return float(summary["tpot_ms"]["p50"]) / 1e3


def load(port: int, model: str, streams: int, tokens: int) -> None:
    """A client of so many streams, over and over."""
    while True:
        ask_all(f"http://127.0.0.1:{port}", model, streams, tokens)


def decode_step_s(loaded: lossless.Loaded, streams: int, tokens: int) -> float:
    """Median time of a step in which all streams decode."""
    engine = loaded.build()
    ids = [lossless.chat_ids(loaded.engine, text) for text in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for i in range(streams):
        engine.add(engine.admission.requests(str(i), ids[i % len(ids)], params))
    times = []
    while engine.has_work:
        begin = time.perf_counter()
        num_decoding = len(engine.step())
        if num_decoding == streams:
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    loaded = lossless.Loaded.default()
    decode_step_s(loaded, args.streams, args.output_len)  # warm up
    pace = decode_step_s(loaded, args.streams, args.output_len)
    own = [sys.executable, "-m", "outpace", "serve", "--port", "{port}"]
    served = Server("served", own, Path("/tmp"))
    served.start()
    ask_all(served.base_url, served.model, args.streams, args.output_len)
    times: dict[str, list[float]] = {"alone": [], "apart": [], "served": []}
    for repetition in range(args.repeat):
        times["alone"].append(decode_step_s(loaded, args.streams, args.output_len))
        port = 18000 + repetition
        apart = [
            spawn.Process(target=serve_paced, args=(port, pace), daemon=True),
            spawn.Process(target=load, args=(port, "paced", args.streams, args.output_len), daemon=True),
        ]
        for process in apart:
            process.start()
            time.sleep(4)  # until it listens
        times["apart"].append(decode_step_s(loaded, args.streams, args.output_len))
        for process in apart[::-1]:
            process.kill()
            process.join()
        times["served"].append(ask_all(served.base_url, served.model, args.streams, args.output_len))
        print({name: f"{series[-1] * 1e3:.1f} ms" for name, series in times.items()}, file=sys.stderr)
    served.stop()
    medians = {f"{name}_ms": statistics.median(series) * 1e3 for name, series in times.items()}
    ratios = {
        f"{a}/{b}": statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
        for a, b in (("apart", "alone"), ("served", "apart"), ("served", "alone"))
    }
    print(json.dumps({"streams": args.streams, **medians, **ratios}))


if __name__ == "__main__":
    main()
