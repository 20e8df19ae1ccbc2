"""From settings to a listening server, and back to a quiet end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvicorn

from outpace.config import EngineConfig, ServerConfig, flag
from outpace.errors import ConfigError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from outpace.async_llm import AsyncLLM

logger = logging.getLogger("outpace.server")

ENGINE_POLL_S = 0.5
LISTEN_BACKLOG = 2048
FINAL_SENDS_S = 5  # for answers that the drain has completed to reach slow clients


def serve(engine_config: EngineConfig, server_config: ServerConfig) -> int:
    """Loads the model and serves it until SIGTERM or SIGINT.

    The first signal closes the port and lets running requests finish for up to `shutdown_timeout`; a
    second one ends the process at once.

    Returns:
        The exit code: 0 after a signal, 1 if the engine died.

    Raises:
        ConfigError: A setting is at fault. What can be known early (port, template) is checked before
            the model loads.
    """
    logging.basicConfig(
        level=server_config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    with bind(server_config.host, server_config.port) as listener:
        # Imported only now: a port that is taken is said at once, not after torch has loaded.
        from outpace.async_llm import AsyncLLM
        from outpace.server.app import read_chat_template

        read_chat_template(server_config)
        check_draft_report(engine_config, server_config)
        llm = AsyncLLM.from_config(engine_config)
        return asyncio.run(_serve(llm, server_config, listener))


def check_draft_report(engine_config: EngineConfig, server_config: ServerConfig) -> None:
    """A report on drafts needs drafts.

    Raises:
        ConfigError: There is no draft method.
    """
    level = server_config.per_request_spec_decode_metrics
    if level != "none" and not engine_config.speculative.methods:
        raise ConfigError(
            f"{flag('per_request_spec_decode_metrics')} {level} reports on drafts, and there are none: "
            f"choose a method with {flag('spec_method')}"
        )


def bind(host: str, port: int) -> socket.socket:
    """Takes the port without listening yet: clients are refused, not left waiting, until the model is there.

    Raises:
        ConfigError: The address is not to be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose with --host and --port"
        ) from None
    return listener


class _Server(uvicorn.Server):
    """uvicorn's server with the signals left to us: its own handlers end in death by the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(llm: AsyncLLM, config: ServerConfig, listener: socket.socket) -> int:
    from outpace.server.app import create_app

    app = create_app(llm, config)
    # What is there stays; a full collection would walk all of it within a step, for a tenth of a second.
    gc.collect()
    gc.freeze()
    server = _Server(_uvicorn_config(app, config))
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, number, stop)
    listener.listen(LISTEN_BACKLOG)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    watching = asyncio.create_task(_watch(llm, stop))
    name = config.served_model_name or llm.model_name
    print(f"Outpace serves {name} at {_url(config, listener)}/v1 (Ctrl-C stops)", flush=True)
    await asyncio.wait({serving, watching}, return_when=asyncio.FIRST_COMPLETED)
    app.state.is_draining = True
    server.should_exit = True  # closes the port; open connections live on until they are answered
    await llm.shutdown(config.shutdown_timeout)
    await serving
    return 0 if await watching else 1


def _uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    is_debug = config.log_level == "debug"
    return uvicorn.Config(
        app,
        log_config=None,
        log_level="debug" if is_debug else "warning",
        access_log=is_debug,
        lifespan="off",
        timeout_graceful_shutdown=config.shutdown_timeout + FINAL_SENDS_S,
    )


def _on_signal(number: int, stop: asyncio.Event) -> None:
    if stop.is_set():
        os._exit(128 + number)
    logger.info("draining; a second signal ends the process at once")
    stop.set()


async def _watch(llm: AsyncLLM, stop: asyncio.Event) -> bool:
    """Waits for a signal, and then is true, or for the engine's death."""
    while not stop.is_set():
        if not llm.is_running:
            logger.critical("the engine has stopped; the server ends")
            return False
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), ENGINE_POLL_S)
    return True


def _url(config: ServerConfig, listener: socket.socket) -> str:
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"http://{host}:{listener.getsockname()[1]}"
