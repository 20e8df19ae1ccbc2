"""The operations a decoder is made of, and the choice of who computes them."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Literal

import torch

from outpace.config import BLOCK_SIZE
from outpace.device import CPU
from outpace.errors import ConfigError
from outpace.kernels.base import (
    Cache,
    Heads,
    Kernels,
    Layer,
    LayerAttention,
    LayerStack,
    Linear,
    Moves,
    RopeTable,
    Rows,
    move_slots,
)
from outpace.kernels.huge_pages import HugePages, populate
from outpace.kernels.stream_heads import EarlyExit, TokenChange

__all__ = [
    "Cache",
    "EarlyExit",
    "Heads",
    "Kernels",
    "Layer",
    "LayerAttention",
    "LayerStack",
    "Linear",
    "Moves",
    "RopeTable",
    "Rows",
    "TokenChange",
    "load_kernels",
    "move_slots",
    "new_cache",
]

logger = logging.getLogger(__name__)


def load_kernels(
    choice: Literal["auto", "native", "reference", "triton"],
    dtype: torch.dtype,
    *,
    head_dim: int,
    widths: tuple[int, ...],
    num_threads: int,
    device: torch.device = CPU,
    batch_invariant: bool = False,
) -> Kernels:
    """Builds the backend of a device.

    Args:
        choice: On a GPU `triton`. On a CPU `native`, `reference`, or `triton` in its interpreter, for tests.
            `auto` is triton on a GPU; on a CPU native where it can be had, else the reference with a warning.
        dtype: The model's dtype.
        head_dim: Width of an attention head.
        widths: Widths of the rows that are normed or gated.
        num_threads: Threads that share the work of a pass. Torch gets them, in the calling thread,
            or one if the backend has its own: two teams would spin on the same cores.
        device: Where tensors are.
        batch_invariant: Whether a GPU's linear layers are to give a row the same bits in any batch, as all
            else does, and as everything does on a CPU.

    Raises:
        ConfigError: What was asked for cannot be had on that device.
    """
    if choice == "triton" or device.type != "cpu":
        return _load_triton(choice, device, batch_invariant)
    from outpace.kernels import cpu_library, native
    from outpace.kernels.reference import ReferenceKernels

    torch.set_num_threads(num_threads)
    if choice == "reference":
        return ReferenceKernels()
    try:
        reason = native.unsupported_reason(head_dim, *widths)
        if reason is not None:
            raise ConfigError(reason)
        kernels = native.NativeKernels(dtype, cpu_library.build(), num_threads)
    except (ConfigError, OSError) as error:
        if choice == "native":
            raise ConfigError(f"--kernels native: {error}") from error
        logger.warning(
            "native kernels are not available (%s): plain torch is used, several times slower", error
        )
        return ReferenceKernels()
    torch.set_num_threads(1)
    return kernels


def new_cache(
    shape: tuple[int, int, int],
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device = CPU,
    group: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes a cache of keys and values, all zeros: what is masked is multiplied by 0, which would keep a NaN.

    Args:
        shape: Layers, blocks and kv heads.
        head_dim: Width of a head.
        dtype: The model's.
        device: Where. A CPU reads a dimension of a block's 16 keys as one vector, a GPU a key: there keys lie
            in memory as values do.
        group: Of the kernels that are to use it, see `Kernels`.

    Returns:
        Keys [layers, blocks, kv_heads, head_dim / group, 16, group] and values [layers, blocks, kv_heads,
        16 / group, head_dim, group].
    """
    if device.type == "cpu":
        pages = HugePages()
        keys = pages.zeros((*shape, head_dim // group, BLOCK_SIZE, group), dtype)
        values = pages.zeros((*shape, BLOCK_SIZE // group, head_dim, group), dtype)
        populate(keys, values)
        return keys, values
    values = torch.zeros(*shape, BLOCK_SIZE, head_dim, 1, dtype=dtype, device=device)
    return torch.zeros_like(values).transpose(-2, -3), values


def _load_triton(choice: str, device: torch.device, batch_invariant: bool) -> Kernels:
    if choice not in ("auto", "triton"):
        raise ConfigError(f"--kernels {choice} computes on a CPU, and the device is {device}: leave it out")
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(f"the kernels for {device} need triton: pip install 'outpace[gpu]'")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "--kernels triton needs a GPU, and the device is cpu: leave it out "
            "(TRITON_INTERPRET=1 interprets the kernels there, far too slowly to serve)"
        )
    from outpace.kernels.gpu import TritonKernels

    return TritonKernels(batch_invariant)
