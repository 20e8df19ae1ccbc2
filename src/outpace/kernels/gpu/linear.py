"""A linear layer whose rows do not depend on how many there are: fixed tiles, sums in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from outpace.kernels.base import Linear
from outpace.kernels.gpu.common import EXACT, dot, narrow

# One tile for every number of rows: 64 rows are the least that Hopper's warp-group product takes, and few
# enough that a step of one row waits for its weights and not for the product.
TILE_ROWS, TILE_OUTPUTS, TILE_INPUTS = 64, 128, 64
MIN_PARTS_INPUTS = 512  # inputs of a part, at least
PROGRAMS = 264  # that fill an H100 or H200; a constant, so that bits do not depend on the device's size


@triton.jit(do_not_specialize=["rows"])
def _product(
    out,
    parts,
    x,
    weight,
    bias,
    rows,
    outputs,
    inputs,
    part_inputs,
    NUM_PARTS: tl.constexpr,
    DIVIDED: tl.constexpr,
    BIASED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    TILE_INPUTS: tl.constexpr,
):
    """One tile of x @ weight.T. Its inputs come in parts, each summed by itself, and added in order.

    Where DIVIDED, a program sums one part and leaves it in `parts` [NUM_PARTS, rows, outputs].
    """
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    output = tl.program_id(0) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    lane = tl.arange(0, TILE_INPUTS)
    row_there, output_there = row < rows, output < outputs
    from_x = x + row.to(tl.int64)[:, None] * inputs + lane[None, :]
    from_weight = weight + output.to(tl.int64)[None, :] * inputs + lane[:, None]
    first_part = tl.program_id(2)
    last_part = first_part + 1 if DIVIDED else NUM_PARTS
    whole = tl.zeros([TILE_ROWS, TILE_OUTPUTS], tl.float32)
    for part in range(first_part, last_part):
        total = tl.zeros([TILE_ROWS, TILE_OUTPUTS], tl.float32)
        end = tl.minimum((part + 1) * part_inputs, inputs)
        for begin in range(part * part_inputs, end, TILE_INPUTS):
            there = lane < end - begin
            a = tl.load(from_x + begin, mask=row_there[:, None] & there[None, :], other=0.0)
            b = tl.load(from_weight + begin, mask=output_there[None, :] & there[:, None], other=0.0)
            total = dot(a, b, total)
        whole += total
    there = row_there[:, None] & output_there[None, :]
    at = row.to(tl.int64)[:, None] * outputs + output[None, :]
    if DIVIDED:
        tl.store(parts + first_part * tl.cast(rows, tl.int64) * outputs + at, whole, mask=there)
    else:
        if BIASED:
            whole += tl.load(bias + output, mask=output_there, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, narrow(whole, out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows"])
def _add_parts(
    out, parts, bias, rows, outputs, NUM_PARTS: tl.constexpr, BIASED: tl.constexpr, PIECE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    output = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    there = output < outputs
    whole = tl.zeros([PIECE], tl.float32)
    for part in tl.static_range(NUM_PARTS):
        whole += tl.load(parts + (part * rows + row) * outputs + output, mask=there, other=0.0)
    if BIASED:
        whole += tl.load(bias + output, mask=there, other=0.0).to(tl.float32)
    tl.store(out + row * outputs + output, narrow(whole, out.dtype.element_ty), mask=there)


def num_parts(outputs: int, inputs: int) -> int:
    """Into how many parts a layer's inputs are divided, so that a step of few rows fills the device."""
    parts = 1
    while triton.cdiv(outputs, TILE_OUTPUTS) * parts < PROGRAMS and inputs // (parts * 2) >= MIN_PARTS_INPUTS:
        parts *= 2
    return parts


def invariant_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
    """A linear layer with `weight` [out, in] in which a row has the same bits in any batch.

    Up to a tile's rows the parts of the inputs are summed by programs of their own, beyond that in turn by
    one program: the same sums, added in the same order.
    """
    weight = weight.contiguous()
    outputs, inputs = weight.shape
    parts = num_parts(outputs, inputs)
    part_inputs = triton.cdiv(triton.cdiv(inputs, parts), TILE_INPUTS) * TILE_INPUTS
    tile = {"TILE_ROWS": TILE_ROWS, "TILE_OUTPUTS": TILE_OUTPUTS, "TILE_INPUTS": TILE_INPUTS}

    def linear(x: torch.Tensor) -> torch.Tensor:
        rows = len(x)
        out = x.new_empty((rows, outputs))
        if not rows:
            return out
        divided = parts > 1 and rows <= TILE_ROWS
        sums = torch.empty((parts, rows, outputs) if divided else (0,), dtype=torch.float32, device=x.device)
        grid = (triton.cdiv(outputs, TILE_OUTPUTS), triton.cdiv(rows, TILE_ROWS), parts if divided else 1)
        _product[grid](
            out,
            sums,
            x,
            weight,
            weight if bias is None else bias,
            rows,
            outputs,
            inputs,
            part_inputs,
            NUM_PARTS=parts,
            DIVIDED=divided,
            BIASED=bias is not None,
            **tile,
            num_warps=4,
            num_stages=4 if x.dtype == torch.bfloat16 else 2,
            **EXACT,
        )
        if divided:
            _add_parts[(rows, triton.cdiv(outputs, 1024))](
                out,
                sums,
                weight if bias is None else bias,
                rows,
                outputs,
                NUM_PARTS=parts,
                BIASED=bias is not None,
                PIECE=1024,
                **EXACT,
            )
        return out

    return linear
