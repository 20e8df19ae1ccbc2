"""Norms and the gated activation in Triton: a program for each row, or for a piece of one."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from outpace.kernels.gpu.common import EXACT, narrow

PIECE = 1024  # outputs of silu_mul that a program makes


@triton.jit
def _rms_norm(
    out, x, residual, weight, eps, width, x_stride, PADDED: tl.constexpr, ADDS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PADDED)
    inside = column < width
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    kind = values.dtype
    wide = values.to(tl.float32)
    if ADDS:
        rest = tl.load(residual + row * width + column, mask=inside, other=0.0)
        added = narrow(wide + rest.to(tl.float32), kind)
        tl.store(residual + row * width + column, added, mask=inside)
        wide = added.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    # Rounded before the weight, as Hugging Face does.
    scaled = narrow(wide * inverse, kind).to(tl.float32)
    scaled *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, narrow(scaled, kind), mask=inside)


@triton.jit
def _silu_mul(out, gate_up, width, PIECE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0)
    up = tl.load(gate_up + (row * 2 + 1) * width + column, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    silu = narrow(wide / (1.0 + tl.exp(-wide)), gate.dtype).to(tl.float32)
    tl.store(out + row * width + column, narrow(silu * up, gate.dtype), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `Kernels.rms_norm`."""
    return _norm(x, None, weight, eps)


def add_rms_norm(
    delta: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """See `Kernels.add_rms_norm`."""
    return _norm(delta, residual, weight, eps)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See `Kernels.silu_mul`."""
    rows, width = len(gate_up), gate_up.shape[1] // 2
    out = gate_up.new_empty((rows, width))
    if rows:
        _silu_mul[(rows, triton.cdiv(width, PIECE))](out, gate_up, width, PIECE=PIECE, **EXACT)
    return out


def _norm(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows, width = x.shape
    out = x.new_empty((rows, width))
    if rows:
        padded = triton.next_power_of_2(width)
        _rms_norm[(rows,)](
            out,
            x,
            x if residual is None else residual,
            weight,
            eps,
            width,
            x.stride(0),
            PADDED=padded,
            ADDS=residual is not None,
            num_warps=min(16, max(1, padded // 512)),  # by the width alone, which fixes the order of the sum
            **EXACT,
        )
    return out
