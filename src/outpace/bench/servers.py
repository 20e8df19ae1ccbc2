"""Server processes that a benchmark starts, freezes while another is measured, and ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from outpace.bench import client
from outpace.errors import ConfigError, OutpaceError

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
POLL_S = 0.2
LOG_TAIL_BYTES = 3000
# On Linux the kernel kills a server whose benchmark was killed; a frozen one would otherwise stay for ever.
# 1 is PR_SET_PDEATHSIG, 9 is SIGKILL, and the setting outlives exec. The parent may be gone already.
_DIE_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


class ServerError(OutpaceError):
    """A server did not start, or died; the text has the end of its log."""


class Server:
    """A server in a process group of its own.

    Args:
        name: Of its log.
        command: Its words; `{port}` in them is replaced.
        log_dir: Where its output goes, as NAME.log.

    Attributes:
        port: Where it listens.
        process: Its leader, once started.
        model: The first that it lists, once started.
    """

    def __init__(self, name: str, command: Sequence[str], log_dir: Path) -> None:
        self.name, self.command = name, tuple(command)
        self.log = log_dir / f"{name.replace('/', '_')}.log"
        self.port = 0
        self.model = ""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "start it first"
        return self._process

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ends_within(self, timeout_s: float) -> bool:
        """Whether it has ended, or does so in that time."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        return not self.is_running

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Starts it and waits until /health is well.

        Raises:
            ServerError: It ended or is not well in time; it is killed then.
        """
        self.port = _free_port()
        words = [word.replace("{port}", str(self.port)) for word in self.command]
        if shutil.which(words[0]) is None:
            raise ServerError(f"cannot run {words[0]}: there is no such program")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*_wrapper(), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout_s
        try:
            while not self._is_well():
                if not self.is_running:
                    raise ServerError(f"{self.name} ended at its start; its log ends in\n{self.log_tail()}")
                if time.monotonic() > deadline:
                    raise ServerError(f"{self.name} is not well after {timeout_s:g} s\n{self.log_tail()}")
                time.sleep(POLL_S)
            self.model = client.first_model(self.base_url)
        except BaseException:
            self.kill()
            raise

    def _is_well(self) -> bool:
        try:
            client.get(self.base_url, "/health")
        except ConfigError:
            return False
        return True

    def freeze(self) -> None:
        """Takes the processor away from the whole group."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Gives it back."""
        self.signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ends it politely, and by force if that takes too long."""
        if self._process is None:
            return
        self.thaw()
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """Ends the whole group by force; frozen processes die too."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def log_tail(self) -> str:
        """The end of its output."""
        with contextlib.suppress(OSError):
            return self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        return ""

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the whole group, if it is there."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


def _wrapper() -> list[str]:
    if sys.platform != "linux":
        return []
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
