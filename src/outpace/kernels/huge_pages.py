"""Memory for weights and caches in huge pages, where the system has them."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import sys
import threading
from collections.abc import Sequence

import torch

_LINE = 64  # bytes: where a tensor may begin
_CHUNK = 1 << 28  # bytes asked for at once; what is not touched takes no memory
_POPULATE_WRITE = 23  # of madvise(2), which `mmap` has no name for


class HugePages:
    """Hands out tensors whose pages are huge.

    In small pages each process reads the same weights at a speed of its own, some percent apart, by the
    physical pages that it happened to get, and attention looks up an address for every other cached block.
    """

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of zeros; its memory comes back when no tensor in the same chunk is left."""
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.zeros(*shape, dtype=dtype)
        count = math.prod(shape)
        num_bytes = count * dtype.itemsize
        if self._chunk is None or self._used + num_bytes > len(self._chunk):
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._chunk = mmap.mmap(-1, max(_CHUNK, num_bytes), flags=private)
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._chunk.madvise(mmap.MADV_HUGEPAGE)
            self._used = 0
        flat = torch.frombuffer(self._chunk, dtype=dtype, count=count, offset=self._used)
        self._used += -(-num_bytes // _LINE) * _LINE
        return flat.view(*shape)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy, likewise."""
        return self.zeros(tensor.shape, tensor.dtype).copy_(tensor)


def populate(*tensors: torch.Tensor) -> threading.Thread | None:
    """Has the system find the memory of tensors meanwhile, which else the first to write there waits for.

    Their contents stay. Nothing happens where the system cannot do that, or where it would take more than
    half of the memory that is free: a cache may be promised more than it ever needs.

    Returns:
        The thread that waits for the system; None where there is none.
    """
    if sys.platform != "linux":
        return None
    free = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    if sum(tensor.nbytes for tensor in tensors) > free // 2:
        return None
    madvise = ctypes.CDLL(None).madvise  # that of `mmap` would hold up all other threads

    def wait() -> None:
        for tensor in tensors:
            begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            size = tensor.data_ptr() + tensor.nbytes - begin
            madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _POPULATE_WRITE)

    thread = threading.Thread(target=wait, name="populate", daemon=True)
    thread.start()
    return thread
