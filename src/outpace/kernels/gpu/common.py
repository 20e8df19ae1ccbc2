"""What the Triton kernels share."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton import knobs

# Triton's interpreter keeps bf16 as bare 16-bit words and would multiply those.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


# Where multiplications and additions are fused is the compiler's choice, which may differ between two kernels
# that are to give the same bits: nowhere.
EXACT = {"enable_fp_fusion": False}


@triton.jit
def dot(a, b, total=None):
    """Adds a @ b to `total`, in float32. Float32 factors become three of TF32, with nearly all bits."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def narrow(x, kind):
    """float32 rounded to `kind`, to nearest, ties to even; the interpreter would cut bits off."""
    if INTERPRETED and kind == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(kind)


@functools.cache
def num_programs(device: torch.device) -> int:
    """Programs that fill a device when each loops over its share: two for each multiprocessor."""
    if device.type != "cuda":
        return 4  # the interpreter's: few, so that tests see work divided and not divided
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)
