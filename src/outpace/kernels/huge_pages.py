"""Memory for weights in huge pages."""

from __future__ import annotations

import contextlib
import mmap

import torch

_LINE = 64  # bytes: where a copy may begin
_CHUNK = 1 << 28  # bytes asked for at once; what is not touched takes no memory


class HugePages:
    """Memory for weights in huge pages, where the system has them.

    In small ones each process reads the same weights at a speed of its own, some percent apart, by the
    physical pages that it happened to get.
    """

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy; its memory comes back when no copy in the same chunk is left."""
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return tensor.contiguous()
        if self._chunk is None or self._used + tensor.nbytes > len(self._chunk):
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._chunk = mmap.mmap(-1, max(_CHUNK, tensor.nbytes), flags=private)
            with contextlib.suppress(OSError):  # a kernel without huge pages
                self._chunk.madvise(mmap.MADV_HUGEPAGE)
            self._used = 0
        flat = torch.frombuffer(self._chunk, dtype=tensor.dtype, count=tensor.numel(), offset=self._used)
        self._used += -(-tensor.nbytes // _LINE) * _LINE
        return flat.view(tensor.shape).copy_(tensor)
