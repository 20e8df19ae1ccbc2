"""A weight that has not been read yet, whatever kind of file holds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Part = tuple[slice, ...]  # of a tensor: per dimension from the first on; what is not named is whole
WHOLE: Part = ()


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """Its shape, and how to read it.

    Attributes:
        shape: In torch order.
        read: Reads a part of it and converts that to the given type; safe to call from several threads.
    """

    shape: tuple[int, ...]
    read: Callable[[torch.dtype, Part], torch.Tensor]
