"""The library of the C++ kernels: how it is built, on first use, and what its functions take."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from outpace.config import cache_dir
from outpace.errors import ConfigError

SOURCE = Path(__file__).with_name("cpu.cpp")
FLAGS = [
    "-O3",
    "-std=gnu++17",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-shared",
    "-fPIC",
    "-pthread",
    "-Wno-psabi",
]

_ARCH_PRCTL, _REQUEST_PERMISSION, _AMX_REGISTERS = 158, 0x1023, 18  # on x86-64

Pointer, Int, Float = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "linear": (Pointer, Pointer, Pointer, Int),
    "rms_norm": (Pointer, Pointer, Pointer, Float, Int, Int),
    "add_rms_norm": (Pointer, Pointer, Pointer, Pointer, Float, Int, Int),
    "silu_mul": (Pointer, Pointer, Int, Int),
    "rope_and_cache": (Pointer, Pointer, Pointer, Pointer, Pointer, Pointer),
    "attend": (Pointer, Pointer, Pointer, Pointer, Pointer, Int),
    "move_slots": (Pointer, Pointer, Pointer, Int, Int, ctypes.c_int64, Int, Int),
    "decoder_layers": (*[Pointer] * 5, Int, Pointer, Float),
    "noisy_argmax": (*[Pointer] * 5, Int, Int),
    "noisy_topk": (*[Pointer] * 6, Int, Int, Int),
    "start_streams": (*[Pointer] * 5, Int, Int, Int, Int),
    "change_first": (*[Pointer] * 4, Int, Int),
    "stream_candidates": (*[Pointer] * 9, Int, Int, Int, Int),
    "exit_probs": (*[Pointer] * 10, Int, Int, Int),
}
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class LinearArgs(ctypes.Structure):
    """`LinearArgs` of cpu.cpp."""

    _fields_ = (
        ("packed", Pointer),
        ("bias", Pointer),
        ("down", Pointer),
        ("up", Pointer),
        ("changed", Pointer),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("num_changed", ctypes.c_int32),
    )


class RopeArgs(ctypes.Structure):
    """`RopeArgs` of cpu.cpp."""

    _fields_ = (
        ("positions", Pointer),
        ("slots", Pointer),
        ("cos_sin", Pointer),
        ("rows", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("eps", Float),
    )


class AttendArgs(ctypes.Structure):
    """`AttendArgs` of cpu.cpp."""

    _fields_ = (
        ("positions", Pointer),
        ("parents", Pointer),
        ("row_starts", Pointer),
        ("context_lens", Pointer),
        ("block_tables", Pointer),
        ("branching", Pointer),
        ("sequences", ctypes.c_int32),
        ("max_blocks", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("scale", Float),
    )


class ChangeArgs(ctypes.Structure):
    """`ChangeArgs` of cpu.cpp."""

    _fields_ = (
        ("said", Pointer),
        ("before", Pointer),
        ("up", Pointer),
        ("befores", Pointer),
        ("afters", Pointer),
        ("hidden", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("eps", Float),
    )


class LayerArgs(ctypes.Structure):
    """`LayerArgs` of cpu.cpp."""

    _fields_ = (
        ("input_norm", Pointer),
        ("q_norm", Pointer),
        ("k_norm", Pointer),
        ("post_norm", Pointer),
        ("qkv", Pointer),
        ("out", Pointer),
        ("gate_up", Pointer),
        ("down", Pointer),
        ("k_cache", Pointer),
        ("v_cache", Pointer),
        ("window", ctypes.c_int32),
    )


def find_compiler() -> str | None:
    """The C++ compiler: `$CXX`, else the first of c++, g++ and clang++ on the path."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    return None


def build() -> Path:
    """Compiles cpu.cpp for this machine, unless the cache has it, and gives the library's path.

    Raises:
        ConfigError: There is no compiler, or it fails.
    """
    compiler = find_compiler()
    if compiler is None:
        raise ConfigError("no C++ compiler found (tried $CXX, c++, g++, clang++)")
    flags = [*FLAGS, "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"]
    if "GenuineIntel" in _cpu_info("vendor_id"):
        flags.append("-DSLOW_BF16_DOT")
    if may_use_amx():
        flags.append("-DUSE_AMX")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    # What -march=native looks at, so that a cache shared between machines does not mix their libraries.
    machine = f"{platform.machine()} {_cpu_info('flags', 'Features')}"
    key = hashlib.sha256("\0".join((SOURCE.read_text(), *flags, version, machine)).encode())
    library = cache_dir() / "kernels" / f"cpu-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / library.name
        command = [compiler, *flags, "-o", str(built), str(SOURCE)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            reason = (result.stderr.strip() or f"exit status {result.returncode}").splitlines()[0]
            raise ConfigError(f"{compiler} could not compile {SOURCE.name}: {reason}")
        built.rename(library)
    return library


def load(library: Path) -> ctypes.CDLL:
    """Loads what `build` returned, with the types of its functions' arguments."""
    lib = ctypes.CDLL(str(library))
    for stem, argtypes in SIGNATURES.items():
        for suffix in SUFFIXES.values():
            _takes(lib, f"{stem}_{suffix}", argtypes)
    _takes(lib, "filter_logits", (*[Pointer] * 4, Int, Int))
    _takes(lib, "likeliest_behind", (*[Pointer] * 7, Int, Int, Int, Int))
    return lib


def _takes(lib: ctypes.CDLL, name: str, argtypes: tuple[Any, ...]) -> None:
    function = getattr(lib, name)
    function.argtypes, function.restype = argtypes, None


def may_use_amx() -> bool:
    """Asks Linux for the registers of AMX, which it gives to processes that ask."""
    if "amx_bf16" not in _cpu_info("flags").split():
        return False
    refused: int = ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _AMX_REGISTERS)
    return not refused


def _cpu_info(*names: str) -> str:
    """The first line of /proc/cpuinfo that begins with one of the names, else the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(names)), platform.processor())
