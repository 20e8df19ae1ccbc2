"""A small OpenAI server that misbehaves on demand, in a process of its own too:

python fake_openai.py PORT [MOST_REQUESTS]
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from typing import Any

Write = Callable[[bytes], None]
TEXTS = ("Hel", "lo", "!")


def event(value: Any) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def delta(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}]})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}})


class FakeServer:
    """Answers by what the last message says; counts requests and remembers their bodies."""

    def __init__(self, most_requests: int | None = None) -> None:
        self.most_requests = most_requests  # it dies of one more
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.num_open, self.most_open, self.num_drafts = 0, 0, 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            self.paths.append(path)
            if method == "GET":
                self.get(path, writer)
            else:
                length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
                self.bodies.append(json.loads(await reader.readexactly(length)))
                await self.post(self.bodies[-1], writer)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            self.num_open -= 1
            writer.close()

    def get(self, path: str, writer: asyncio.StreamWriter) -> None:
        drafts = self.num_drafts
        metrics = (
            "# HELP vllm:spec_decode_num_drafts_total Draft 1\n"
            f'vllm:spec_decode_num_drafts_total{{engine="0"}} {drafts}\n'
            f'vllm:spec_decode_num_draft_tokens_total{{engine="0"}} {3 * drafts}\n'
            f'vllm:spec_decode_num_accepted_tokens_total{{engine="0"}} {2 * drafts}\n'
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="0"}} {drafts}\n'
            f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",position="1"}} {drafts}\n'
        )
        answers = {"/v1/models": '{"data": [{"id": "fake"}]}', "/health": "{}", "/metrics": metrics}
        body = answers[path].encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async def post(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.num_drafts += 1
        if self.num_drafts == self.most_requests:
            print("out of requests", flush=True)
            os._exit(3)
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if text == "busy":
            error = b'{"error": {"message": "the queue is full"}}'
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: %d\r\n\r\n" % len(error) + error)
            return
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        write = chunked(writer)
        if text == "slow":
            await asyncio.sleep(0.15)
        if text == "hang":
            await asyncio.sleep(5)
        write(event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
        for part in TEXTS:
            write(event({"choices": [{"text": part}]}) if "prompt" in body else delta(part))
            await writer.drain()
            await asyncio.sleep(0.005)
        if text == "broken":
            writer.transport.abort()
            return
        if text == "sick":
            write(event({"error": {"message": "the engine died"}}))
        if text == "nonsense":
            write(b"data: {not json\n\n")
        if text != "unfinished":
            write((b"" if text == "uncounted" else USAGE) + event(b"[DONE]"))
        writer.write(b"0\r\n\r\n")


def chunked(writer: asyncio.StreamWriter) -> Write:
    """Writes with HTTP's chunks cut in the middle of events."""

    def write(data: bytes) -> None:
        for part in (data[:9], data[9:]):
            writer.write(b"%x\r\n%b\r\n" % (len(part), part))

    return write


async def serve(port: int, most_requests: int | None) -> None:
    server = FakeServer(most_requests)
    async with await asyncio.start_server(server.handle, "127.0.0.1", port) as listening:
        await listening.serve_forever()


if __name__ == "__main__":
    print("fake server starts", flush=True)
    asyncio.run(serve(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None))
