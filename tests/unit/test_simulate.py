"""The simulator, and what it shows: goodput never loses, and finds its way back after a change."""

from __future__ import annotations

import functools
import gzip
import math
from pathlib import Path

import numpy as np
import pytest

from outpace.config import SpeculativeConfig
from outpace.errors import ConfigError
from outpace.policy.base import PolicyContext, SpeculationPolicy, load_policy
from outpace.policy.cost import CostModel
from outpace.policy.simulate import (
    Acceptance,
    Arrival,
    Machine,
    Result,
    Workload,
    poisson,
    read_trace,
    simulate,
)

FIXED = ("off", "fixed:1", "fixed:2", "fixed:3", "fixed:5", "fixed:7")
ACCEPTANCE = {
    "high": Acceptance((0.8,)),
    "low": Acceptance((0.2,)),
    "few drafts": Acceptance((0.7,), coverage=0.3),
    "mixed requests": Acceptance((0.5,), coverage=0.6, spread=0.45),
}


def machine(noise: float = 0.05) -> Machine:
    """A few rows more are nearly free up to 8 rows; beyond 32 cost is in proportion."""
    rows = [1, 2, 4, 8, 16, 32, 64, 128, 512]
    seconds = [0.0125, 0.0130, 0.0142, 0.0165, 0.0215, 0.033, 0.060, 0.115, 0.45]
    cost = CostModel(
        rows,
        seconds,
        per_context=1e-8,
        per_pair=2e-7,
        per_sample=3e-5,
        draft=(0, 1.5e-5, 1e-6, 0, 1e-6),
        host=(5e-4, 3e-5),
    )
    return Machine(cost, noise=noise)


def make(name: str, cost: CostModel) -> SpeculationPolicy:
    policy, _, length = name.partition(":")
    config = SpeculativeConfig(method="prompt_lookup", num_speculative_tokens=int(length or 7))
    return load_policy(policy, PolicyContext(config, cost_model=lambda: cost))


def run(name: str, workload: Workload, noise: float = 0.05, seed: int = 0) -> Result:
    return simulate(machine(noise), workload, functools.partial(make, name), seed)


def closed_loop(concurrency: int, *acceptance: Acceptance, num_requests: int | None = None) -> Workload:
    arrivals = (Arrival(0.0, 100, 150),) * (num_requests or 2 * concurrency + 2)
    return Workload(arrivals, acceptance, concurrency)


def test_plain_decoding_takes_what_its_steps_cost() -> None:
    result = run("off", Workload((Arrival(0.0, 600, 10),)), noise=0.0)
    cost = machine().cost
    chunks = [(512, 0, 0), (88, 1, 512), *((1, 1, 600 + i) for i in range(9))]
    expected = [
        float(cost.target_s(rows, samples, context, rows * context)) + cost.host_s(1)
        for rows, samples, context in chunks
    ]
    assert [step.seconds for step in result.steps] == pytest.approx(expected)
    assert result.latencies_s == pytest.approx([sum(expected)])
    assert result.first_token_s == pytest.approx([sum(expected[:2])])
    assert result.tpot_s == pytest.approx([sum(expected[2:]) / 9])


@pytest.mark.parametrize("name", ["off", "fixed:3", "smartspec", "nightjar", "goodput"])
def test_the_same_seed_gives_the_same_steps_and_every_request_its_tokens(name: str) -> None:
    workload = Workload(tuple(poisson(20.0, 12, 50, 40, seed=1)), (ACCEPTANCE["mixed requests"],))
    first, second = run(name, workload, seed=3), run(name, workload, seed=3)
    assert first.steps == second.steps
    assert sum(step.num_tokens for step in first.steps) == 12 * 40
    assert len(first.latencies_s) == 12


def test_accepted_drafts_come_at_the_given_rates() -> None:
    by_depth = (0.9, 0.5, 0.2)
    result = run("fixed:3", closed_loop(1, Acceptance(by_depth), num_requests=20))
    whole = [step for step in result.steps if step.num_drafted == 3]
    tokens = np.mean([step.num_tokens for step in whole])
    # 1,300 steps with a standard deviation of 0.85 tokens: a standard error of 0.024
    assert tokens == pytest.approx(1 + 0.9 + 0.45 + 0.09, abs=0.1)


@functools.cache
def rate(name: str, concurrency: int, acceptance: str) -> float:
    """Tokens per second at a load."""
    return run(name, closed_loop(concurrency, ACCEPTANCE[acceptance])).tokens_per_s


@pytest.mark.parametrize("acceptance", ACCEPTANCE)
def test_goodput_is_as_fast_as_the_best_fixed_length_at_every_load(acceptance: str) -> None:
    # It has to learn everything within these few hundred steps, so it is granted 4 %, and 2 % on average.
    ratios = []
    for concurrency in (1, 8, 32):
        best = max(rate(name, concurrency, acceptance) for name in FIXED)
        ratios.append(rate("goodput", concurrency, acceptance) / best)
    assert min(ratios) > 0.96
    assert math.prod(ratios) ** (1 / 3) > 0.98


def test_over_all_loads_goodput_beats_every_single_choice() -> None:
    points = [(concurrency, name) for concurrency in (1, 8, 32) for name in ACCEPTANCE]
    for fixed in FIXED:
        ratios = [rate("goodput", *point) / rate(fixed, *point) for point in points]
        assert math.prod(ratios) ** (1 / len(ratios)) > 1.05, fixed


def steps_until_good(result: Result, since_s: float, until_s: float, best: float, window: int = 20) -> int:
    """Steps after `since_s` until a window has 95 % of the best rate."""
    steps = [step for step in result.steps if since_s <= step.time_s < until_s]
    for first in range(0, len(steps) - window, window // 2):
        part = steps[first : first + window]
        if sum(s.num_tokens for s in part) / sum(s.seconds for s in part) >= 0.95 * best:
            return first
    return len(steps)


def test_after_a_change_of_acceptance_the_best_choice_is_found_again() -> None:
    high, low, phase_s = (0.8,), (0.1,), 6.0
    steady = {
        rates: max(
            run(name, closed_loop(8, Acceptance(rates), num_requests=24), 0.0).tokens_per_s for name in FIXED
        )
        for rates in (high, low)
    }
    phases = [Acceptance(rates, since_s=i * phase_s) for i, rates in enumerate((high, low, high))]
    workload = Workload((Arrival(0.0, 20, 300),) * 80, tuple(phases), 8)
    result = run("goodput", workload, 0.0)
    needed = [
        steps_until_good(result, i * phase_s, (i + 1) * phase_s, steady[rates])
        for i, rates in enumerate((high, low, high))
    ]
    assert needed[1] <= 60, "drafts that fail are noticed at once"
    assert needed[2] <= 150, "that drafts would succeed again is known from probes only"


def test_a_change_of_load_is_followed_in_the_same_step() -> None:
    lone, crowd = Arrival(0.0, 50, 400), Arrival(2.0, 50, 60)
    result = run("goodput", Workload((lone, *(crowd,) * 63), (Acceptance((0.6,)),)))
    decoding = [s for s in result.steps if s.num_sequences]
    before = [s for s in decoding if s.time_s < 2.0]
    during = [s for s in decoding if s.num_sequences > 48]
    assert np.mean([s.num_drafted / s.num_sequences for s in before[20:]]) > 2
    assert np.mean([s.num_drafted / s.num_sequences for s in during]) < 0.2


def test_predicted_and_simulated_step_times_agree() -> None:
    result = run("goodput", closed_loop(8, ACCEPTANCE["high"]), noise=0.05)
    errors = [abs(s.predicted_s - s.seconds) / s.seconds for s in result.steps if s.predicted_s is not None]
    assert np.quantile(errors, 0.5) < 0.05
    assert np.quantile(errors, 0.9) < 0.15


def test_traces_are_read_scaled_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("timestamp_s,prompt_tokens,output_tokens\n5.0,10,20\n9.0,30,0\n11.0,1,1\n")
    assert read_trace(path, 2, speed=2.0) == [Arrival(0.0, 10, 20), Arrival(2.0, 30, 1)]
    with pytest.raises(ConfigError, match="cannot read the trace"):
        read_trace(tmp_path / "none.csv", 2)
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="columns timestamp_s, prompt_tokens and output_tokens"):
        read_trace(tmp_path / "bad.csv", 2)


@pytest.mark.parametrize("wrong", [{"rates": (1.2,)}, {"rates": ()}, {"coverage": -0.1}, {"spread": 2.0}])
def test_chances_outside_zero_and_one_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"\[0, 1\]|at least one rate"):
        Acceptance(**wrong)  # type: ignore[arg-type]
