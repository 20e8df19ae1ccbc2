"""Microseconds per step that the goodput controller takes, without any model.

    OMP_NUM_THREADS=1 python benchmarks/controller.py

Simulated steps of a closed loop, on three machines: one on which rows are free, so that everyone drafts; one
like two CPU cores, on which drafts are cut; and one on which rows cost what tokens cost, so that drafts are
bypassed. Drafts have confidences, as those of lookups do. `view` is what the scheduler takes to
show a plan of as many sequences to a policy. Time is that of the thread: neighbours do not count.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from outpace.batch import Scheduled
from outpace.config import SpeculativeConfig
from outpace.engine.scheduler import Plan
from outpace.policy.base import BatchView, Draft, PolicyContext, SpeculationPolicy, StepRecord, load_policy
from outpace.policy.cost import CostModel
from outpace.policy.simulate import Acceptance, Arrival, Chain, Machine, Workload, simulate
from outpace.request import Request
from outpace.request import Sequence as Running
from outpace.sampling import SamplingParams

T = TypeVar("T")
FORWARD = np.ones(8 * 2**20)  # read before a step is observed, as a pass reads weights: it empties the caches
MACHINES = {
    "drafting": CostModel([1, 1024], [0.020, 0.021], per_pair=1e-10, draft=(0, 1e-6, 1e-7, 0, 0)),
    "cutting": CostModel([1, 8, 16, 64, 256], [0.008, 0.009, 0.011, 0.024, 0.082], per_pair=3e-7),
    "bypassing": CostModel([1, 1024], [0.002, 0.400], per_pair=3e-7, draft=(0, 3e-5, 1e-5, 0, 1e-6)),
}
OFTEN, SELDOM = Acceptance((0.7,), coverage=0.7), Acceptance((0.2,), coverage=0.3)
ACCEPTANCE = {"drafting": OFTEN, "cutting": OFTEN, "bypassing": SELDOM}


class Timed(SpeculationPolicy):
    """A policy whose calls are timed; keeps the seconds of each step by call."""

    def __init__(self, policy: SpeculationPolicy) -> None:
        self._policy, self.steps = policy, list[dict[str, float]]()
        self._random = random.Random(0)

    def limits(self, view: BatchView) -> list[int]:
        self.steps.append({})
        limits = self._timed("limits", lambda: self._policy.limits(view))
        self.predicted_s = self._policy.predicted_s
        return limits

    def trim(self, view: BatchView, drafts: Sequence[Draft]) -> list[int] | None:
        sure = [Chain(d.parents, tuple(self._random.random() for _ in d.parents)) for d in drafts]
        kept = self._timed("trim", lambda: self._policy.trim(view, sure))
        self.predicted_s = self._policy.predicted_s
        return kept

    def observe(self, record: StepRecord) -> None:
        FORWARD.sum()
        self._timed("observe", lambda: self._policy.observe(record))

    def release(self, sequence_id: str) -> None:
        self._policy.release(sequence_id)

    def _timed(self, name: str, call: Callable[[], T]) -> T:
        begin = time.thread_time()
        result = call()
        self.steps[-1][name] = time.thread_time() - begin
        return result


def controller_times(mode: str, num_sequences: int, num_tokens: int) -> list[dict[str, float]]:
    """Seconds by call, of each step after the first hundred."""
    config = SpeculativeConfig(method="prompt_lookup", num_speculative_tokens=7)
    made: list[Timed] = []

    def make(cost: CostModel) -> Timed:
        made.append(Timed(load_policy("goodput", PolicyContext(config, cost_model=lambda: cost))))
        return made[-1]

    arrivals = (Arrival(0.0, 300, num_tokens),) * num_sequences
    workload = Workload(arrivals, (ACCEPTANCE[mode],), concurrency=num_sequences)
    simulate(Machine(MACHINES[mode], max_num_batched_tokens=4096, noise=0.05), workload, make)
    return made[0].steps[100:]


def view_times(num_sequences: int, repeat: int = 200) -> list[float]:
    """Seconds of each `Plan.view`."""
    sampling = SamplingParams()
    running = [
        Running(Request(f"{i}-0", (1,) * 300, sampling, 0, 400), [1] * 350, 349) for i in range(num_sequences)
    ]
    plan = Plan([Scheduled(sequence, 1, True) for sequence in running], running, 10_000)
    times = []
    for _ in range(repeat):
        begin = time.thread_time()
        plan.view()
        times.append(time.thread_time() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--output-len", type=int, default=600)
    args = parser.parse_args()
    result: dict[str, dict[str, float]] = {}
    for mode in MACHINES:
        for number in args.sequences:
            steps = [step for step in controller_times(mode, number, args.output_len) if len(step) == 3]
            columns = {name: [step[name] for step in steps] for name in ("limits", "trim", "observe")}
            columns["total"] = [sum(step.values()) for step in steps]
            columns["view"] = view_times(number)
            row = {
                f"{name}_{kind}": round(1e6 * average(times), 1)
                for name, times in columns.items()
                for kind, average in (("median", statistics.median), ("mean", statistics.mean))
            }
            words = (f"{name} {row[f'{name}_median']:.0f} ({row[f'{name}_mean']:.0f})" for name in columns)
            print(f"{mode:9} {number:3} sequences, median (mean) us: " + ", ".join(words), flush=True)
            result[f"{mode}_{number}"] = row
    print(json.dumps(result))


if __name__ == "__main__":
    main()
