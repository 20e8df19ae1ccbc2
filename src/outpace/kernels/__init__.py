"""The operations a decoder is made of, and the choice of who computes them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import Literal

import torch

from outpace.device import CPU
from outpace.errors import ConfigError
from outpace.kernels.base import Heads, Kernels, LayerAttention, Linear, RopeTable, Rows

__all__ = [
    "Heads",
    "Kernels",
    "LayerAttention",
    "Linear",
    "RopeTable",
    "Rows",
    "gpu_problem",
    "load_kernels",
]

logger = logging.getLogger(__name__)

_GPU_MODULE = "outpace.kernels.gpu"  # its `create(dtype, device)` makes the backend


def gpu_problem() -> str | None:
    """Why there are no kernels for a GPU in this installation, or None."""
    for module in (_GPU_MODULE, "triton"):
        if importlib.util.find_spec(module) is None:
            return f"the kernels for GPUs need {module}, which is not installed"
    return None


def load_kernels(
    choice: Literal["auto", "native", "reference"],
    dtype: torch.dtype,
    *,
    head_dim: int,
    widths: tuple[int, ...],
    num_threads: int,
    device: torch.device = CPU,
) -> Kernels:
    """Builds the backend of a device.

    Args:
        choice: `native`, `reference`, or `auto`: native where it can be had, else the reference
            with a warning.
        dtype: The model's dtype.
        head_dim: Width of an attention head.
        widths: Widths of the rows that are normed or gated.
        num_threads: Threads that share the work of a pass. Torch gets them, in the calling thread,
            or one if the backend has its own: two teams would spin on the same cores.
        device: Whose; `choice` is among those of a CPU.

    Raises:
        ConfigError: What was asked for cannot be had, or not on that device.
    """
    if device.type == "cuda":
        if choice != "auto":
            raise ConfigError(f"--kernels {choice} runs on a CPU, not on {device}: leave it out")
        made: Kernels = importlib.import_module(_GPU_MODULE).create(dtype, device)
        return made
    from outpace.kernels import native
    from outpace.kernels.reference import ReferenceKernels

    torch.set_num_threads(num_threads)
    if choice == "reference":
        return ReferenceKernels()
    try:
        reason = native.unsupported_reason(head_dim, *widths)
        if reason is not None:
            raise ConfigError(reason)
        kernels = native.NativeKernels(dtype, native.build(), num_threads)
    except (ConfigError, OSError) as error:
        if choice == "native":
            raise ConfigError(f"--kernels native: {error}") from error
        logger.warning(
            "native kernels are not available (%s): plain torch is used, several times slower", error
        )
        return ReferenceKernels()
    torch.set_num_threads(1)
    return kernels
