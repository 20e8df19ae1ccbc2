"""Tokens per second over HTTP at several concurrencies, for one server or several side by side.

    python benchmarks/serving.py
    python benchmarks/serving.py --server 'outpace=outpace serve {model} --port {port}' \
        --server 'vllm=vllm serve {model} --port {port} --max-model-len 2048' --model DIR --repeat 5

Closed loop: each of c clients sends its next request when its last answer is complete. Every answer is
streamed and has exactly --output-len tokens. Servers are measured in turn within one run (the others are
frozen with SIGSTOP meanwhile), in alternating order, and compared by the median of the repetitions' ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import platform
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Answer:
    """One streamed answer as the client saw it; times in seconds from sending."""

    tokens: int
    first: float
    total: float


@dataclass
class Server:
    """A server process of its own group, so that it can be frozen while another is measured."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    model: str = ""

    def signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGTERM)
            self.process.wait(60)


def start(name: str, command: str, model: str, log_dir: Path) -> Server:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = shlex.split(command.format(port=port, model=model))
    with (log_dir / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    server = Server(name, port, process)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as reply,
        ):
            server.model = json.load(reply)["data"][0]["id"]
            return server
        time.sleep(0.3)
    with contextlib.suppress(ProcessLookupError):
        server.signal(signal.SIGKILL)
    sys.exit(f"{name} did not start; see {log.name}")


async def ask(server: Server, prompt: str, args: argparse.Namespace, seed: int) -> Answer:
    body = json.dumps(
        {
            "model": server.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": args.output_len,
            "temperature": args.temperature,
            "seed": seed,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    begin = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head.encode() + body)
    received, first = bytearray(), 0.0
    while piece := await reader.read(1 << 16):
        received += piece
        if not first and b'"content":"' in received.replace(b'"content":""', b"").replace(b": ", b":"):
            first = time.perf_counter() - begin
    total = time.perf_counter() - begin
    writer.close()
    if b"[DONE]" not in received:
        sys.exit(f"{server.name}: unfinished answer: {bytes(received[-500:])!r}")
    usage = [
        line for line in received.split(b"data: ") if b'"usage"' in line and b"completion_tokens" in line
    ][-1]
    tokens = json.loads(usage[: usage.rindex(b"}") + 1])["usage"]["completion_tokens"]
    if tokens != args.output_len:
        sys.exit(f"{server.name}: {tokens} tokens instead of {args.output_len}")
    return Answer(tokens, first, total)


async def closed_loop(
    server: Server, prompts: list[str], concurrency: int, args: argparse.Namespace
) -> dict[str, float]:
    work: Iterator[tuple[int, str]] = iter(enumerate(prompts))
    answers: list[Answer] = []

    async def client() -> None:
        for seed, prompt in work:
            answers.append(await ask(server, prompt, args, seed))

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    seconds = time.perf_counter() - begin
    return {
        "tokens_per_s": sum(a.tokens for a in answers) / seconds,
        "ttft_ms": statistics.median(a.first for a in answers) * 1e3,
        "tpot_ms": statistics.median((a.total - a.first) / (a.tokens - 1) for a in answers) * 1e3,
    }


def read_prompts(path: Path | None) -> list[str]:
    if path is None:
        return PROMPTS
    with (
        gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8") as file
    ):
        return [json.loads(line)["turns"][0] for line in file]


def measure(servers: list[Server], prompts: list[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for repetition in range(args.repeat):
        for concurrency in args.concurrency:
            count = max(len(PROMPTS), 2 * concurrency)
            chosen = [prompts[(repetition * count + i) % len(prompts)] for i in range(count)]
            for server in servers if repetition % 2 == 0 else servers[::-1]:
                for other in servers:
                    other.signal(signal.SIGCONT if other is server else signal.SIGSTOP)
                result = asyncio.run(closed_loop(server, chosen, concurrency, args))
                rows.append(
                    {"server": server.name, "concurrency": concurrency, "repetition": repetition, **result}
                )
                print(
                    f"{server.name:>10} c={concurrency:<3} {result['tokens_per_s']:8.1f} tokens/s",
                    file=sys.stderr,
                )
    return rows


def summarise(rows: list[dict[str, Any]], names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    points = []
    for concurrency in args.concurrency:
        point: dict[str, Any] = {"concurrency": concurrency}
        series = {n: [r for r in rows if r["server"] == n and r["concurrency"] == concurrency] for n in names}
        for name, runs in series.items():
            point[name] = {
                key: statistics.median(r[key] for r in runs) for key in ("tokens_per_s", "ttft_ms", "tpot_ms")
            }
        for name in names[1:]:
            pairs = zip(series[names[0]], series[name], strict=True)
            ratios = [a["tokens_per_s"] / b["tokens_per_s"] for a, b in pairs]
            point[f"{names[0]}/{name}"] = {
                "median": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
        points.append(point)
        shown = [f"c={concurrency:<3}"]
        for name in names:
            rate, ttft, tpot = (point[name][key] for key in ("tokens_per_s", "ttft_ms", "tpot_ms"))
            shown.append(f"{name} {rate:.0f} tok/s (TTFT {ttft:.0f} ms, TPOT {tpot:.1f} ms)")
        shown += [
            f"ratio {point[k]['median']:.2f} ({point[k]['lowest']:.2f} to {point[k]['highest']:.2f})"
            for k in point
            if "/" in k
        ]
        print("  ".join(shown))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "command": shlex.join(sys.argv), "commit": commit.stdout.strip(), "machine": platform.platform(),
        "cores": os.cpu_count(), "points": points,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    own = f"outpace={Path(sys.executable).parent / 'outpace'} serve {{model}} --port {{port}}"
    parser.add_argument("--server", action="append", metavar="NAME=COMMAND", help=f"default: {own}")
    parser.add_argument("--model", default="", help="put in place of {model}")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument(
        "--dataset", type=Path, help="JSON lines (.gz) with `turns`; default: 8 built-in prompts"
    )
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--log-dir", type=Path, default=Path("/tmp"))
    parser.add_argument("--json", type=Path, help="also write every run here")
    args = parser.parse_args()
    prompts = read_prompts(args.dataset)
    servers: list[Server] = []
    try:
        for spec in args.server or [own]:
            name, _, command = spec.partition("=")
            servers.append(start(name, command, args.model, args.log_dir))
        for server in servers:
            asyncio.run(closed_loop(server, PROMPTS, 4, args))  # warm up
        rows = measure(servers, prompts, args)
    finally:
        for server in servers:
            server.stop()
    summary = summarise(rows, [s.name for s in servers], args)
    if args.json:
        args.json.write_text(json.dumps({**summary, "runs": rows}, indent=1))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
