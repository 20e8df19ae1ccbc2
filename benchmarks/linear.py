"""Time of all linear layers of SmolLM2-135M, head aside, against oneDNN's for the same weights.

    python benchmarks/linear.py

Nothing else may run on the machine. The two are not interleaved: OpenMP's threads go on spinning after their
work, on the cores of ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import torch

from outpace.config import num_cores
from outpace.kernels import Linear, load_kernels
from outpace.kernels.linear import packed_linear

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # of a layer: [out, in]
NUM_LAYERS = 30


def milliseconds(layers: list[list[Linear]], rows: int, repeat: int) -> float:
    """Median time of a pass through all layers."""
    inputs = [torch.randn(rows, num_in).to(torch.bfloat16) for _, num_in in SHAPES]
    times = []
    for _ in range(repeat + 2):
        begin = time.perf_counter()
        for layer in layers:
            for linear, x in zip(layer, inputs, strict=True):
                linear(x)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:]) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 12, 16, 32, 64, 128, 512])
    parser.add_argument("--num-threads", type=int, default=num_cores())
    parser.add_argument("--repeat", type=int, default=15)
    args = parser.parse_args()
    weights = [
        [torch.randn(shape).mul(0.05).to(torch.bfloat16) for shape in SHAPES] for _ in range(NUM_LAYERS)
    ]
    result: dict[str, dict[int, float]] = {}
    sizes: dict[str, Any] = {"head_dim": 64, "widths": (576, 1536), "num_threads": args.num_threads}
    kernels = load_kernels("native", torch.bfloat16, **sizes)
    for name, make in (("native", kernels.linear), ("oneDNN", partial(packed_linear, bias=None))):
        torch.set_num_threads(1 if name == "native" else args.num_threads)
        layers = [[make(weight) for weight in layer] for layer in weights]
        result[name] = {rows: round(milliseconds(layers, rows, args.repeat), 2) for rows in args.rows}
    for rows in args.rows:
        ours, theirs = (result[name][rows] for name in ("native", "oneDNN"))
        print(f"{rows:4} rows: {ours:7.2f} ms, oneDNN {theirs:7.2f} ms, ratio {theirs / ours:.2f}")
    print(json.dumps({"num_threads": args.num_threads, **result}))


if __name__ == "__main__":
    main()
