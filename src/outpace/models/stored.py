"""A weight that has not been read yet, whatever kind of file holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """Its shape, and how to read it.

    Attributes:
        shape: In torch order.
        read: Reads and converts it to the given type; safe to call from several threads.
    """

    shape: tuple[int, ...]
    read: Callable[[torch.dtype], torch.Tensor]
