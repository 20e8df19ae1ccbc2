"""Where tensors live, and how they get there and back: one copy in and one copy out wherever possible.

A copy from pageable memory, or an index given as a Python list, makes the host wait until the device has done
all that was asked of it. So what a step needs goes over as one pinned buffer that the device copies when it
comes to it, and what comes back is waited for once. On the CPU nothing here copies anything.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from outpace.errors import ConfigError

CPU = torch.device("cpu")
_ALIGNED = 64  # bytes; kernels are compiled anew for pointers that are aligned to less than 16

_NUMPY = {torch.int64: np.int64, torch.int32: np.int32}


def choose_device(name: str) -> torch.device:
    """The device that `--device` names; `auto` is a GPU where there is one that can be used.

    Args:
        name: `auto`, `cpu`, `cuda` or `cuda:N`; settings are checked for that.

    Raises:
        ConfigError: It is not there, or cannot be used.
    """
    lacks_triton = importlib.util.find_spec("triton") is None
    if name == "auto":
        return CPU if lacks_triton or not torch.cuda.is_available() else torch.device("cuda", 0)
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        kind = f"torch {torch.__version__} is built without CUDA"
        reason = "torch finds no GPU and driver" if torch.backends.cuda.is_built() else kind
        raise ConfigError(f"--device {name}: {reason}; use --device cpu")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, counted from 0")
    if lacks_triton:
        raise ConfigError(
            f"--device {name}: its kernels need triton: pip install 'outpace[gpu]', or use --device cpu"
        )
    return torch.device("cuda", device.index or 0)


class Packing:
    """Where several tensors lie in one buffer of bytes.

    Attributes:
        starts: The byte at which each begins.
        num_bytes: Of the buffer.
    """

    def __init__(self, fields: Sequence[tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """Lays them out.

        Args:
            fields: Type and shape of each.
        """
        self._fields = fields
        self.starts: list[int] = []
        end = 0
        for dtype, shape in fields:
            self.starts.append(-(-end // _ALIGNED) * _ALIGNED)
            end = self.starts[-1] + math.prod(shape) * dtype.itemsize
        self.num_bytes = end

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The tensors in a buffer, [num_bytes] uint8 or more."""
        return [
            buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for start, (dtype, shape) in zip(self.starts, self._fields, strict=True)
        ]

    def arrays(self, buffer: torch.Tensor) -> list[np.ndarray]:
        """The same in a buffer of the host, as numpy has them: there small things are faster."""
        raw = buffer.numpy()
        return [
            np.ndarray(shape, _NUMPY[dtype], raw, start)
            for start, (dtype, shape) in zip(self.starts, self._fields, strict=True)
        ]

    def buffer(self, device: torch.device = CPU, pinned: bool = False) -> torch.Tensor:
        """A new buffer; a pinned one is the host's, and is not reused before the copies from it are done."""
        return torch.empty(self.num_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)


def upload(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tensors of the host on a device: there in one copy, which the host does not wait for.

    Args:
        tensors: Any types and shapes.
        device: Where to; on the CPU the result is the tensors themselves.
    """
    if device.type == "cpu":
        return list(tensors)
    packing = Packing([(tensor.dtype, tuple(tensor.shape)) for tensor in tensors])
    staged = packing.buffer(pinned=device.type == "cuda")
    for view, tensor in zip(packing.views(staged), tensors, strict=True):
        view.copy_(tensor)
    return packing.views(staged.to(device, non_blocking=True))


def tensor_of(values: Sequence[Any], dtype: type[np.generic] = np.int64) -> torch.Tensor:
    """A tensor of the host with Python's numbers, by way of numpy.

    Between passes, when caches are cold, torch's own way there takes a tenth of a millisecond or two.
    """
    return torch.from_numpy(np.array(values, dtype=dtype))


def indices(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """[values] int64 on a device."""
    (index,) = upload([tensor_of(values)], device)
    return index


def synchronize(device: torch.device) -> None:
    """Waits until a device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Download:
    """A tensor on its way to the host, behind all that the device was asked before: nobody waits yet."""

    def __init__(self, tensor: torch.Tensor) -> None:
        """Asks for the copy; on the CPU there is none."""
        self._host, self._done = tensor, None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def tolist(self) -> list[Any]:
        """Its values, once they are there."""
        if self._done is not None:
            self._done.synchronize()
        values: list[Any] = self._host.tolist()
        return values
