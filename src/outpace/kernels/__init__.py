"""The operations a decoder is made of, and the choice of who computes them."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from outpace.errors import ConfigError
from outpace.kernels.base import Heads, Kernels, LayerAttention, Linear, RopeTable, Rows

__all__ = ["Heads", "Kernels", "LayerAttention", "Linear", "RopeTable", "Rows", "load_kernels"]

logger = logging.getLogger(__name__)


def load_kernels(
    choice: Literal["auto", "native", "reference"],
    dtype: torch.dtype,
    *,
    head_dim: int,
    widths: tuple[int, ...],
    num_threads: int,
) -> Kernels:
    """Builds the CPU backend.

    Args:
        choice: `native`, `reference`, or `auto`: native where it can be had, else the reference
            with a warning.
        dtype: The model's dtype.
        head_dim: Width of an attention head.
        widths: Widths of the rows that are normed or gated.
        num_threads: Threads that share the work of a pass. Torch gets them, in the calling thread,
            or one if the backend has its own: two teams would spin on the same cores.

    Raises:
        ConfigError: `native` was asked for and cannot be had.
    """
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
