"""What Triton's compiler makes of the GPU kernels for a GPU that need not be here.

    python benchmarks/gpu_compile.py

Registers of a thread, bytes that spill from them, shared memory of a program, and how many instructions of
the PTX are products of a warp group (wgmma) or of a warp (mma), or copy to shared memory asynchronously
(cp.async).
Sizes are those of a layer of Llama-3.1-8B; nothing runs. A kernel that does not compile fails here, too.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from outpace.kernels import Heads, RopeTable, Rows
from outpace.kernels.gpu import TritonKernels, attention, sampling

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
NUM_PROGRAMS = 264


class Compiler:
    """Stands in for launching: compiles what would be launched.

    Attributes:
        found: By kernel and constants what came out.
    """

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, 32)
        self.found: dict[str, dict[str, int]] = {}

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        """As `JITFunction.run` is called."""
        given = dict(zip([param.name for param in kernel.params], args, strict=False))
        given |= {name: value for name, value in named.items() if name in kernel.arg_names}
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        signature, constants, attributes = {}, {}, {}
        for index, param in enumerate(kernel.params):
            value = given[param.name]
            special = not param.do_not_specialize
            if param.is_constexpr or (special and isinstance(value, int) and value == 1):
                signature[param.name], constants[param.name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[param.name] = f"*{TYPES[value.dtype]}"
            else:
                signature[param.name] = "i32" if isinstance(value, int) else "fp32"
            # As a launch would find out: multiples of 16 let loads be wide.
            if special and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)):
                attributes[(index,)] = [["tt.divisibility", 16]]
        flags = [f"{name}={value}" for name, value in constants.items() if isinstance(value, bool)]
        name = " ".join(
            [kernel.__name__, *sorted({kind for kind in signature.values() if "f" in kind}), *flags]
        )
        if name not in self.found:
            compiled = triton.compile(
                ASTSource(kernel, signature, constants, attributes), self._target, options
            )
            self.found[name] = report(compiled)
            print(f"{name:60} {self.found[name]}", flush=True)


def report(compiled: Any) -> dict[str, int]:
    """Counts of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name.lower(): int(count) for name, count in re.findall(r"(REG|STACK):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    counts = {name: ptx.count(name) for name in ("wgmma.mma_async", "mma.sync", "cp.async.cg")}
    return {"registers": used["reg"], "spilled": used["stack"], "shared": compiled.metadata.shared, **counts}


def call_all(dtype: torch.dtype) -> None:
    """Calls every kernel on tensors of the right shapes."""

    def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind)

    kernels, heads = TritonKernels(batch_invariant=True), Heads(32, 8, 128)
    rows = Rows(
        **{name: empty(64, kind=torch.int32) for name in ("positions", "slots", "parents")},
        row_starts=empty(33, kind=torch.int32),
        context_lens=empty(32, kind=torch.int32),
        block_tables=empty(32, 512, kind=torch.int32),
        branching=empty(32, kind=torch.int32),
    )
    attend = kernels.attention(heads, RopeTable(empty(1024, 128, kind=torch.float32)), 1e-5, rows)
    keys, values = empty(4, 8, 16, 128).transpose(2, 3), empty(4, 8, 16, 128)
    attend(empty(64, 48 * 128), keys, values, None, None, None)
    attend(empty(64, 48 * 128), keys, values, empty(128), empty(128), 4096)
    x, weight = empty(64, 4096), empty(4096)
    kernels.rms_norm(x, weight, 1e-5)
    kernels.add_rms_norm(x, x, weight, 1e-5)
    kernels.silu_mul(x)
    linear = kernels.linear(empty(6144, 4096), empty(6144))
    linear(x)
    linear(empty(128, 4096))
    numbers, shares = empty(4, kind=torch.int64), empty(4, kind=torch.float32)
    kernels.noisy_argmax(empty(4, 128256), numbers, numbers, empty(4, kind=torch.bool))
    kernels.filter_logits_(empty(4, 128256, kind=torch.float32), numbers, shares, shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability, times 10")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args()
    compiler = Compiler(args.arch)
    JITFunction.run = lambda kernel, *given, **named: compiler.run(kernel, *given, **named)
    for module in (attention, sampling):
        vars(module)["num_programs"] = lambda device: NUM_PROGRAMS
    call_all(getattr(torch, args.dtype))
    print(json.dumps({"triton": triton.__version__, "arch": args.arch, "kernels": compiler.found}))


if __name__ == "__main__":
    main()
