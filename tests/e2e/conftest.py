"""The default model, really loaded, and a really running server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from lossless import Loaded


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    """SmolLM2-135M-Instruct, fetched once into the cache."""
    return Loaded.default()


@pytest.fixture(scope="session")
def server(loaded: Loaded) -> Iterator[str]:
    """Base URL of `outpace serve` in a process of its own, which must end cleanly on SIGTERM.

    It starts without network: `loaded` has filled the cache.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    offline = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "outpace", "serve", "--port", str(port), "--max-num-seqs", "8"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=offline)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(url, process)
        yield url
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output.decode()
    finally:
        process.kill()
        process.communicate()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0].decode()
        try:
            with urllib.request.urlopen(f"{url}/health") as reply:
                assert reply.status == 200
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError("the server did not become healthy")
