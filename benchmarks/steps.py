"""Median time of a decoding step, without any server, against the memory bound.

    python benchmarks/steps.py

The bound is the time to read every weight once at --bandwidth GB/s. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time

import lossless

from outpace.bench.workload import PROMPTS
from outpace.engine.engine import Engine
from outpace.sampling import SamplingParams


def step_times(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[float]:
    """Seconds of each step in which all sequences decode."""
    for i, prompt in enumerate(prompts):
        engine.add(engine.admission.requests(str(i), prompt, params))
    times = []
    while engine.has_work:
        begin = time.perf_counter()
        if len(engine.step()) == len(prompts):
            times.append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--bandwidth", type=float, default=41.0, help="GB/s of this machine's memory")
    args = parser.parse_args()
    loaded = lossless.Loaded.default(model=args.model)
    weights = sum(math.prod(shape) for shape in loaded.model.weight_shapes().values())
    bound = weights * loaded.decoder.dtype.itemsize / args.bandwidth / 1e9
    ids = [lossless.chat_ids(loaded.engine, text) for text in PROMPTS]
    params = SamplingParams(temperature=args.temperature, max_tokens=args.output_len, ignore_eos=True, seed=0)
    result: dict[str, object] = {"bound_ms": round(bound * 1e3, 2)}
    for number in args.sequences:
        prompts = [ids[i % len(ids)] for i in range(number)]
        times = [t for _ in range(3) for t in step_times(loaded.build(), prompts, params)]
        low, median, high = (x * 1e3 for x in statistics.quantiles(times, n=4))
        print(f"{number:3} sequences: {median:6.2f} ms ({low:.2f} to {high:.2f}), bound {bound * 1e3:.2f} ms")
        result[str(number)] = {"median_ms": round(median, 2), "tokens_per_s": round(number / median * 1e3)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
