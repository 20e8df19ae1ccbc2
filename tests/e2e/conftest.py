"""The default model, really loaded, and really running servers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from lossless import Loaded

from outpace.bench.servers import Server


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    """SmolLM2-135M-Instruct, fetched once into the cache."""
    return Loaded.default(max_num_seqs=16)


@pytest.fixture(scope="session")
def serve(
    loaded: Loaded, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., AbstractContextManager[Server]]:
    """Runs `outpace serve` with the given flags in a process of its own, which must end well on SIGTERM.

    It starts without network: `loaded` has filled the cache.
    """

    @contextlib.contextmanager
    def running(*flags: str) -> Iterator[Server]:
        log_dir = tmp_path_factory.mktemp("serve")
        command = [sys.executable, "-m", "outpace", "serve", "--port", "{port}", *flags]
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("PIP_NO_INDEX", "1")
            environment.delenv("PIP_FIND_LINKS", raising=False)
            environment.setenv("HF_HUB_OFFLINE", "1")
            server = Server("outpace", command, log_dir)
            server.start()
        try:
            yield server
        finally:
            server.stop()
        assert server.process.returncode == 0, (log_dir / "outpace.log").read_text()

    return running


@pytest.fixture(scope="session")
def server(serve: Callable[..., AbstractContextManager[Server]]) -> Iterator[str]:
    """Base URL of a server that the tests share."""
    with serve("--max-num-seqs", "8") as running:
        yield f"http://127.0.0.1:{running.port}"
