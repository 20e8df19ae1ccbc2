"""Nothing leaks: thousands of requests, a third of them abandoned at random moments.

    python benchmarks/soak.py --requests 2000

Every kind of request is first answered alone. Then workers send them in random order to a server that is so
small that requests queue and are preempted; some connections close before the request is complete, before
its answer begins, or in the middle of it. Every complete answer must have the bytes it had alone, every
abandoned one a beginning of them, and when all is quiet the server must be as it was: nothing runs or waits,
no cache block is held, threads and open files are as many as before, and memory has stopped growing. Linux
only: it reads /proc. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from outpace.bench.servers import Server
from outpace.bench.workload import PROMPTS

# A cache of 22 blocks of 16 tokens for SmolLM2 in bfloat16: the longest request, or three average ones.
FLAGS = "--max-model-len 320 --max-num-seqs 8 --max-num-batched-tokens 64 --kv-cache-memory-bytes 8M"
# Resident memory may grow by so much after the first quarter.
MAX_GROWTH_MIB = 16
LEAST_FOR_MEMORY = 1000
PREFIXES = [
    "",
    "You are a helpful assistant. Answer briefly, in one or two sentences, and never apologise. ",
    "Here is a list of fruits: apple, pear, plum, cherry, quince, fig, date, grape, melon, lemon, lime. " * 2,
]
QUESTIONS = [*PROMPTS, "Hello!", "Why?", "Count from one to twenty.", "Translate 'good morning'."]
MOMENTS = ("half a body", "sent", "waiting", "answering")

_EVENT = re.compile(rb"data: (\{.*\})\n\n")  # a complete one: what was received may end anywhere

Texts = dict[int, str]  # by choice index


@dataclass(frozen=True)
class Case:
    """A request; its answer is a function of it alone, so it is greedy or has a seed."""

    path: str
    body: dict[str, Any]

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def is_chat(self) -> bool:
        return self.path.endswith("chat/completions")

    def request(self) -> bytes:
        body = json.dumps(self.body).encode()
        head = f"POST {self.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    def texts(self, received: bytes) -> Texts:
        """The answers as far as they were received.

        Raises:
            ValueError: The status is not 200, or there is an error among the events.
        """
        head, _, content = received.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise ValueError(received.decode(errors="replace"))
        if not self.is_stream:
            return {c["index"]: self._text(c) for c in json.loads(content)["choices"]}
        if b'data: {"error"' in content:
            raise ValueError(content.decode(errors="replace"))
        texts: Texts = {}
        for event in _EVENT.findall(content):
            for choice in json.loads(event)["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + self._text(choice)
        return texts

    def is_complete(self, received: bytes) -> bool:
        return not self.is_stream or b"data: [DONE]\n\n" in received

    def _text(self, choice: dict[str, Any]) -> str:
        if not self.is_chat:
            return str(choice["text"])
        return str(choice["delta" if self.is_stream else "message"].get("content", ""))


def make_cases(number: int, rng: random.Random) -> list[Case]:
    """Requests of many shapes, with prompts that share beginnings."""
    return [_chat(i, rng) if rng.random() < 0.5 else _completion(i, rng) for i in range(number)]


def _chat(seed: int, rng: random.Random) -> Case:
    messages = [{"role": "user", "content": rng.choice(PREFIXES) + rng.choice(QUESTIONS)}]
    logprobs = {"logprobs": True, "top_logprobs": 2} if seed % 8 == 0 else {}
    return Case("/v1/chat/completions", {"messages": messages, **_options(seed, rng), **logprobs})


def _completion(seed: int, rng: random.Random) -> Case:
    prompt: Any = rng.choice(PREFIXES) + rng.choice(QUESTIONS)
    if rng.random() < 0.2:  # two prompts in one request
        prompt = [[rng.randrange(1000, 40000) for _ in range(rng.randrange(1, 150))] for _ in range(2)]
    return Case("/v1/completions", {"prompt": prompt, **_options(seed, rng)})


def _options(seed: int, rng: random.Random) -> dict[str, Any]:
    sampled = {"temperature": 0.8, "seed": seed, "top_p": rng.choice([1, 0.9])}
    return {
        "max_tokens": rng.choice([1, 4, 16, 48, 120]),
        "n": rng.choice([1, 1, 1, 2, 3]),
        "stream": rng.random() < 0.6,
        "ignore_eos": rng.random() < 0.5,
        **(sampled if rng.random() < 0.6 else {"temperature": 0}),
    }


# --- Clients --------------------------------------------------------------------------------------------


@asynccontextmanager
async def connection(
    port: int, rng: random.Random
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Ends politely or, half the time, at once, which resets the connection if data is under way."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()
        writer.close()


async def stay(port: int, case: Case, rng: random.Random) -> Texts:
    """Sends a request and receives all of its answer."""
    async with connection(port, rng) as (reader, writer):
        writer.write(case.request())
        received = await reader.read()
    if not case.is_complete(received):
        raise ValueError(f"unfinished: {received[-300:]!r}")
    return case.texts(received)


async def leave(port: int, case: Case, moment: str, rng: random.Random) -> Texts:
    """Abandons a request at some moment; gives what was received of a streamed answer."""
    received = bytearray()
    async with connection(port, rng) as (reader, writer):
        request = case.request()
        writer.write(request[: len(request) - 20] if moment == "half a body" else request)
        await writer.drain()
        if moment == "waiting":
            await asyncio.sleep(rng.random() * 0.5)
        elif moment == "answering":
            num_wanted = rng.randrange(1, 20_000)
            while len(received) < num_wanted and (piece := await reader.read(1000)):
                received += piece
    return case.texts(bytes(received)) if received and case.is_stream else {}


@dataclass
class Tally:
    """What became of a storm's requests."""

    answered: int = 0
    abandoned: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


async def answer_alone(port: int, cases: list[Case]) -> list[Texts]:
    """Each case's answers when nothing else runs."""
    return [await stay(port, case, random.Random(0)) for case in cases]


async def storm(
    port: int,
    cases: list[Case],
    expected: list[Texts],
    number: int,
    rng: random.Random,
    workers: int = 24,
    share: float = 1 / 3,
) -> Tally:
    """Sends that many requests, abandons a share of them, and compares what is received.

    Args:
        port: Of the server.
        cases: What to send.
        expected: Their answers.
        number: How many requests.
        rng: Chooses cases and moments.
        workers: How many requests are under way at once.
        share: Of requests to abandon.
    """
    tally = Tally()
    todo = iter(range(number))

    async def worker() -> None:
        for _ in todo:
            index = rng.randrange(len(cases))
            case, whole = cases[index], expected[index]
            try:
                if rng.random() < share:
                    moment = rng.choice(MOMENTS)
                    tally.abandoned[moment] += 1
                    texts = await leave(port, case, moment, rng)
                    is_right = all(whole[i].startswith(text) for i, text in texts.items())
                else:
                    tally.answered += 1
                    texts = await stay(port, case, rng)
                    is_right = texts == whole
            except (ValueError, OSError, LookupError) as error:
                tally.wrong.append(f"{case.body}: {type(error).__name__}: {error}")
            else:
                if not is_right:
                    tally.wrong.append(f"{case.body}: got {texts}, alone {whole}")

    await asyncio.gather(*(worker() for _ in range(workers)))
    return tally


# --- The server's state ---------------------------------------------------------------------------------


def metrics(port: int) -> dict[str, float]:
    """The values of metrics without labels of their own, and requests by how they ended."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as reply:
        families = text_string_to_metric_families(reply.read().decode())
        return {
            s.name.removeprefix("outpace:") + s.labels.get("finished_reason", ""): s.value
            for family in families
            for s in family.samples
            if "le" not in s.labels
        }


def quiet_state(server: Server) -> dict[str, float]:
    """What the server holds once nothing is under way."""
    idle = {"num_requests_running": 0.0, "num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.0}
    deadline = time.monotonic() + 5
    while True:
        now = metrics(server.port)
        held = {name: now[name] for name in idle}
        if held == idle or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    time.sleep(0.2)  # for the last connections to be closed
    process = Path(f"/proc/{server.process.pid}")
    pages = int((process / "statm").read_text().split()[1])
    return {
        **held,
        "threads": len(os.listdir(process / "task")),
        "open_files": len(os.listdir(process / "fd")),
        "rss_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
    }


def complaints(
    requests: int, states: list[dict[str, float]], counts: dict[str, float], log: str
) -> list[str]:
    """What is wrong with the states at the start and after each quarter, the metrics and the log."""
    start, first, *_, last = states
    found = [
        f"{name} is {state[name]:g} when all is quiet, not {start[name]:g}"
        for state in states
        for name in start
        if name != "rss_mib" and state[name] != start[name]
    ]
    found += [f"{name} is not 0 at the start" for name in start if name[:2] in ("nu", "kv") and start[name]]
    if requests >= LEAST_FOR_MEMORY and last["rss_mib"] > first["rss_mib"] + MAX_GROWTH_MIB:
        found.append(f"memory grew from {first['rss_mib']} to {last['rss_mib']} MiB")
    if not counts["num_preemptions_total"] or not counts["request_success_totalabort"]:
        found.append("the load was too light: nothing was preempted, or nothing aborted")
    if any(word in log for word in ("ERROR", "CRITICAL", "Traceback")):
        found.append(f"the log has errors: {log[-2000:]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--requests", type=int, default=2000, help=f"memory is judged from {LEAST_FOR_MEMORY} on"
    )
    parser.add_argument("--cases", type=int, default=150, help="different requests among them")
    parser.add_argument("--workers", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flags", default=FLAGS, help=f"of the server; default: {FLAGS}")
    parser.add_argument("--log-dir", type=Path, default=Path("/tmp"))
    args = parser.parse_args()
    rng = random.Random(args.seed)
    cases = make_cases(args.cases, rng)
    command = [sys.executable, "-m", "outpace", "serve", "--port", "{port}", *shlex.split(args.flags)]
    server = Server("soak", command, args.log_dir)
    server.start()
    tallies, states = [], []
    try:
        expected = asyncio.run(answer_alone(server.port, cases))
        begin = time.perf_counter()
        states.append(quiet_state(server))
        for quarter in range(4):
            number = args.requests * (quarter + 1) // 4 - args.requests * quarter // 4
            run = storm(server.port, cases, expected, number, rng, args.workers)
            tallies.append(asyncio.run(run))
            states.append(quiet_state(server))
            print(f"quarter {quarter + 1}: {states[-1]}", file=sys.stderr)
        seconds = time.perf_counter() - begin
        counts = metrics(server.port)
    finally:
        server.stop()
    wrong = [text for tally in tallies for text in tally.wrong]
    wrong += complaints(args.requests, states, counts, (args.log_dir / "soak.log").read_text())
    if server.process.returncode != 0:
        wrong.append(f"the server ended with {server.process.returncode}")
    for text in wrong:
        print(f"WRONG: {text[:2000]}", file=sys.stderr)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    summary = {
        "command": shlex.join(sys.argv),
        "commit": commit.stdout.strip(),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "requests": args.requests,
        "seconds": round(seconds),
        "answered_as_alone": sum(t.answered for t in tallies),
        "abandoned": dict(sum((t.abandoned for t in tallies), Counter())),
        "aborted_by_engine": counts["request_success_totalabort"],
        "tokens": counts["generation_tokens_total"],
        "preemptions": counts["num_preemptions_total"],
        "prefix_hits": counts["prefix_cache_hits_total"],
        "max_growth_mib": MAX_GROWTH_MIB,
        "states": states,
        "wrong": len(wrong),
    }
    print(json.dumps(summary))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
