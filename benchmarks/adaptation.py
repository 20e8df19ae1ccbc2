"""How many steps a policy takes to choose well again after the workload has changed.

    outpace profile MODEL --output cost.json && python benchmarks/adaptation.py cost.json

Simulated on a measured profile. The goodput of a step is what its choice may expect with the true chances and
the true costs; it is compared with that of the best length for the whole batch. Printed for each phase: its
first step with which `WINDOW` steps begin that are within 5 % of the best on average, and the goodput lost
until then, in steps. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from outpace.config import SpeculativeConfig
from outpace.policy.base import BatchView, Draft, PolicyContext, SpeculationPolicy, StepRecord, load_policy
from outpace.policy.cost import CostModel
from outpace.policy.simulate import Acceptance, Arrival, Machine, Workload, simulate

WINDOW, ENOUGH = 10, 0.95
MOST = 7  # draft tokens
PHASE_S = 8.0
HIGH, LOW = 0.85, 0.25  # acceptance
FEW, MANY = 2, 62  # sequences


class Judged(SpeculationPolicy):
    """A policy each of whose steps is compared with the best length in hindsight.

    Attributes:
        steps: Time at the beginning of each step, and its expected goodput over the best.
    """

    def __init__(self, policy: SpeculationPolicy, cost: CostModel, acceptance: Sequence[Acceptance]) -> None:
        self._policy, self._cost, self._acceptance = policy, cost, acceptance
        self.steps: list[tuple[float, float]] = []
        self._now = 0.0

    def limits(self, view: BatchView) -> list[int]:
        return self._policy.limits(view)

    def trim(self, view: BatchView, drafts: Sequence[Draft]) -> list[int] | None:
        return self._policy.trim(view, drafts)

    def observe(self, record: StepRecord) -> None:
        view = record.view
        if view.num_rows == len(view.sequences):  # no prompts in it
            chosen = self._goodput(view, record.num_drafted)
            best = max(
                self._goodput(view, [min(length, s.max_draft) for s in view.sequences])
                for length in range(MOST + 1)
            )
            self.steps.append((self._now, chosen / best))
        self._now += record.seconds["total"]
        self._policy.observe(record)

    def release(self, sequence_id: str) -> None:
        self._policy.release(sequence_id)

    def _goodput(self, view: BatchView, lengths: Sequence[int]) -> float:
        """Expected tokens per second with so many draft tokens for each sequence."""
        rate = next(a for a in reversed(self._acceptance) if a.since_s <= self._now).rates[0]
        tokens = sum(sum(rate**depth for depth in range(length + 1)) for length in lengths)
        rows = len(lengths) + sum(lengths)
        pairs = sum((1 + n) * s.context_len for n, s in zip(lengths, view.sequences, strict=True))
        seconds = self._cost.target_s(rows, rows, view.num_context, pairs)
        return tokens / (float(seconds) + self._cost.host_s(len(lengths)))


def settled(steps: Sequence[float]) -> tuple[int, float]:
    """Steps until the choice is good, and goodput lost until then, in steps."""
    starts = range(len(steps) - WINDOW)
    number = next((i for i in starts if sum(steps[i : i + WINDOW]) >= ENOUGH * WINDOW), len(steps))
    return number, sum(1 - share for share in steps[:number])


def run(
    policy: str, cost: CostModel, workload: Workload, changes: Sequence[float]
) -> list[tuple[int, float]]:
    """Steps and loss for the phase that begins at each of `changes`."""
    config = SpeculativeConfig(method="prompt_lookup", num_speculative_tokens=MOST)
    made: list[Judged] = []

    def make(own: CostModel) -> Judged:
        context = PolicyContext(config, cost_model=lambda: own)
        made.append(Judged(load_policy(policy, context), cost, workload.acceptance))
        return made[-1]

    simulate(Machine(cost, max_num_batched_tokens=4096, noise=0.05), workload, make)
    ends = [*changes[1:], changes[-1] + PHASE_S]
    return [
        settled([share for time_s, share in made[0].steps if begin <= time_s < end])
        for begin, end in zip(changes, ends, strict=True)
    ]


def workloads() -> dict[str, tuple[Workload, tuple[str, ...]]]:
    """Acceptance high, low, high; and load low, high, low. With names of the phases."""
    times = [phase * PHASE_S for phase in range(3)]
    rates = [Acceptance((rate,), since_s=since) for rate, since in zip((HIGH, LOW, HIGH), times, strict=True)]
    endless = 4000  # tokens: longer than the simulation looks at
    same = tuple(Arrival(0.0, 256, endless) for _ in range(16))
    few = tuple(Arrival(0.0, 256, endless) for _ in range(FEW))
    crowd = tuple(Arrival(PHASE_S, 64, 150) for _ in range(MANY - FEW))
    return {
        "acceptance": (Workload(same, tuple(rates)), ("high", "low", "high")),
        "load": (Workload(few + crowd, (Acceptance((0.6,)),)), ("low", "high")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profile", type=Path, help="of outpace profile --output")
    parser.add_argument("--policies", nargs="+", default=["goodput", "smartspec", "nightjar"])
    args = parser.parse_args()
    cost = CostModel.load(args.profile)
    results: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name, (workload, phases) in workloads().items():
        for policy in args.policies:
            changes = [phase * PHASE_S for phase in range(len(phases))]
            found = run(policy, cost, workload, changes)
            results.setdefault(name, {})[policy] = found
            words = (
                f"{phase}: {steps} steps ({lost:.1f} lost)"
                for phase, (steps, lost) in zip(phases, found, strict=True)
            )
            print(f"{name:10} {policy:10} " + ", ".join(words), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
