"""`outpace serve --tensor-parallel-size 2`: an answer, and no process left behind whichever way it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from outpace.bench.servers import Server
from tiny import write_model

WAYS = ("terminated", "killed", "bereft")
BODY = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """One for each way to end; they start at the same time."""
    directory = tmp_path_factory.mktemp("ranks")
    model = str(write_model(directory / "model"))
    flags = ["--tensor-parallel-size", "2", "--num-threads", "2", "--dtype", "float32"]
    command = [sys.executable, "-m", "outpace", "serve", model, "--port", "{port}", *flags]
    found = {way: Server(way, command, directory) for way in WAYS}
    with pytest.MonkeyPatch.context() as environment, contextlib.ExitStack() as ending:
        environment.setenv("HF_HUB_OFFLINE", "1")
        pool = ending.enter_context(
            ThreadPoolExecutor(len(found))
        )  # servers end with the thread that starts them
        for server in found.values():
            ending.callback(server.kill)
        list(pool.map(Server.start, found.values()))
        yield found


def workers_of(server: Server) -> list[int]:
    """The processes that a server has started for other ranks."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = (directory / "stat").read_text().rpartition(")")[2].split()[1]
            is_worker = b"outpace.runtime.worker" in (directory / "cmdline").read_bytes()
            if is_worker and int(parent) == server.process.pid:
                found.append(int(directory.name))
    return found


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask(server: Server, max_tokens: int) -> httpx.Response:
    body = BODY | {"max_tokens": max_tokens}
    return httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=120)


def test_a_signal_lets_what_runs_finish_and_ends_all_ranks(servers: dict[str, Server]) -> None:
    server = servers["terminated"]
    (worker,) = workers_of(server)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(ask, server, 400)
        wait_until(lambda: "num_requests_running" in metrics(server, 1))
        server.signal(signal.SIGTERM)  # to the whole group, as a terminal or a service manager does
        assert answer.result().json()["usage"]["completion_tokens"] == 400
    assert server.process.wait(60) == 0
    assert has_ended(worker)


def metrics(server: Server, value: int) -> set[str]:
    """Metrics of this value."""
    lines = httpx.get(f"{server.base_url}/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.split("{")[0].removeprefix("outpace:") for name, found in pairs if float(found) == value}


def test_a_rank_0_that_is_killed_leaves_no_process(servers: dict[str, Server]) -> None:
    server = servers["killed"]
    (worker,) = workers_of(server)
    task = Path(f"/proc/{worker}/cmdline").read_bytes().split(b"\0")[-2]
    directory = Path(json.loads(task)["store"]).parent
    assert directory.exists()
    os.kill(server.process.pid, signal.SIGKILL)
    wait_until(lambda: has_ended(worker))
    assert not directory.exists()


def test_a_server_whose_worker_died_says_so_and_ends(servers: dict[str, Server]) -> None:
    server = servers["bereft"]
    (worker,) = workers_of(server)
    assert ask(server, 4).status_code == 200
    os.kill(worker, signal.SIGKILL)
    answer = ask(server, 4)
    assert answer.status_code == 500
    message = "the process of rank 1 of --tensor-parallel-size ended with exit status -9"
    assert message in answer.json()["error"]["message"]
    assert server.process.wait(60) == 1
    assert message in server.log_tail()
