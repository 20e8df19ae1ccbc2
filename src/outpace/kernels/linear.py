"""Linear layers of the reference backend, whose rows do not depend on one another."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from outpace.kernels.base import Linear


def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """A linear layer with `weight` [out, in] packed for oneDNN where torch has it.

    oneDNN gives a row the same bits whatever the number of rows, except one row alone, for which it takes
    a different routine. So one row is run twice. Plain `F.linear` is the fallback elsewhere.
    """
    if not torch.backends.mkldnn.is_available():
        return partial(F.linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    run = torch.ops.mkldnn._linear_pointwise.default

    def linear(x: torch.Tensor) -> torch.Tensor:
        rows = x if len(x) != 1 else x.expand(2, -1).contiguous()
        y: torch.Tensor = run(rows, packed, bias, "none", [], "")
        return y[: len(x)]

    return linear
