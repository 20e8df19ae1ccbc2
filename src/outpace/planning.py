"""`outpace profile` and `outpace simulate`: what steps cost, and what policies would make of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outpace.config import EngineConfig, SpeculativeConfig, flag
from outpace.errors import ConfigError
from outpace.policy.base import PolicyContext, SpeculationPolicy, load_policy
from outpace.policy.cost import CostModel, Roofline
from outpace.policy.simulate import (
    Acceptance,
    Arrival,
    Machine,
    Result,
    Workload,
    poisson,
    read_trace,
)
from outpace.policy.simulate import simulate as run_simulation
from outpace.settings import parse_value

DEFAULT_POLICIES = ("off", "fixed:1", "fixed:3", "fixed:5", "smartspec", "batch_table", "nightjar", "goodput")
_SHOWN_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_SHOWN_CONTEXTS = (0, 512, 2048)  # cached tokens per row


def profile(
    config: EngineConfig, show: Path | None, roofline: str | None, output: Path | None, plot: Path | None
) -> int:
    """Measures, reads or derives a cost model; prints it, and writes and draws it where asked.

    Raises:
        ConfigError: Two sources are given, or a file cannot be read or written.
    """
    if show is not None and roofline is not None:
        raise ConfigError("give --show or --roofline, not both")
    if show is not None:
        cost = CostModel.load(show)
    elif roofline is not None:
        cost = Roofline.from_json(roofline).cost_model()
    else:
        cost = _measure(config)
    _print_costs(cost)
    try:
        if output is not None:
            output.write_text(cost.to_json() + "\n", encoding="utf-8")
        if plot is not None:
            _draw(cost, plot)
    except OSError as error:
        raise ConfigError(f"cannot write {error.filename}: {error.strerror}") from None
    return 0


def _measure(config: EngineConfig) -> CostModel:
    from outpace.engine.engine import Engine
    from outpace.engine.profile import measure_and_keep

    engine = Engine.from_config(dataclasses.replace(config, spec_policy="off"))
    return measure_and_keep(config, engine.kv, engine.runner, engine.verifier)


def step_ms(cost: CostModel, rows: int, context: int) -> float:
    """Milliseconds of a pass of as many sequences as rows, each with so much context."""
    return 1e3 * float(cost.target_s(rows, rows, rows * context, rows * context))


def _print_costs(cost: CostModel) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="milliseconds of a decoding pass")
    for name in ("rows", *(f"context {context}" for context in _SHOWN_CONTEXTS)):
        table.add_column(name, justify="right")
    for rows in _SHOWN_ROWS:
        table.add_row(str(rows), *(f"{step_ms(cost, rows, context):.2f}" for context in _SHOWN_CONTEXTS))
    console = Console()
    console.print(table)
    for name, value in cost.meta.items():
        if name != "model":
            console.print(f"{name}: {value}", markup=False, highlight=False)


def _draw(cost: CostModel, path: Path) -> None:
    """The table as a plot, rows and milliseconds on logarithmic axes.

    Raises:
        ConfigError: There is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'outpace[bench]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    rows = [n for e in range(10) for n in (2**e, 3 * 2**e // 2) if n >= 1]
    for context in _SHOWN_CONTEXTS:
        axes.plot(rows, [step_ms(cost, n, context) for n in rows], label=f"context {context}")
    axes.set(xscale="log", yscale="log", xlabel="token rows", ylabel="ms per pass")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


def simulate(args: argparse.Namespace) -> int:
    """Runs the policies on the same workload; a table, and as the last line everything as JSON.

    Raises:
        ConfigError: An argument is out of range.
    """
    from rich.console import Console
    from rich.table import Table

    number = _reader(args)
    machine = Machine(
        CostModel.load(args.profile),
        max_num_seqs=number("max_num_seqs", int, 1),
        max_num_batched_tokens=number("max_num_batched_tokens", int, 1),
        noise=number("noise", float, 0),
    )
    workload = _workload(args, number)
    table = Table(title=f"{len(workload.arrivals)} requests on {args.profile}")
    summaries: dict[str, dict[str, float]] = {}
    for name in args.policy or DEFAULT_POLICIES:
        begin = time.perf_counter()
        result = run_simulation(machine, workload, _maker(name, args, number), number("seed", int, 0))
        summaries[name] = _summary(result, time.perf_counter() - begin)
    columns = list(next(iter(summaries.values())))
    for column in ("policy", *columns):
        table.add_column(column, justify="left" if column == "policy" else "right", no_wrap=True)
    for name, summary in summaries.items():
        table.add_row(name, *(f"{summary[column]:.4g}" for column in columns))
    Console(width=160).print(table)
    print(json.dumps({"profile": str(args.profile), "policies": summaries}))
    return 0


_Number = Callable[[str, Any, float], Any]


def _reader(args: argparse.Namespace) -> _Number:
    """Reads numeric arguments, naming the flag where one is malformed or too small."""

    def number(name: str, kind: Any, least: float) -> Any:
        text = getattr(args, name)
        if text is None:
            return None
        value = parse_value(kind, text, flag(name))
        if not value >= least:
            raise ConfigError(f"{flag(name)} must be at least {least}, got {text}")
        return value

    return number


def _workload(args: argparse.Namespace, number: _Number) -> Workload:
    loops = [name for name in ("concurrency", "request_rate", "trace") if getattr(args, name) is not None]
    if len(loops) > 1:
        raise ConfigError(f"give one of {', '.join(map(flag, loops))}")
    count = number("num_requests", int, 1)
    lengths = number("prompt_len", int, 1), number("output_len", int, 1)
    acceptance = _acceptance(args, number)
    if args.trace is not None:
        return Workload(tuple(read_trace(args.trace, count, number("speed", float, 1e-6))), acceptance)
    if args.request_rate is not None:
        rate = number("request_rate", float, 1e-6)
        return Workload(tuple(poisson(rate, count, *lengths, number("seed", int, 0))), acceptance)
    concurrency = number("concurrency", int, 1) or 8
    return Workload((Arrival(0.0, *lengths),) * count, acceptance, concurrency)


def _acceptance(args: argparse.Namespace, number: _Number) -> tuple[Acceptance, ...]:
    coverage, spread = number("coverage", float, 0), number("spread", float, 0)
    text = args.acceptance.strip()
    try:
        if text.startswith("["):
            phases = [{**phase, "rates": tuple(phase["rates"])} for phase in json.loads(text)]
        else:
            phases = [{"rates": tuple(float(x) for x in text.split(","))}]
        made = [Acceptance(**{"coverage": coverage, "spread": spread, **phase}) for phase in phases]
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            "--acceptance must be a rate, rates by depth as 0.8,0.7, or a JSON list of objects with rates, "
            f"coverage, spread and since_s, got {text!r}: {error}"
        ) from None
    if not made or made[0].since_s > 0 or sorted(made, key=lambda a: a.since_s) != made:
        raise ConfigError("--acceptance must begin at since_s 0 and go on in order of time")
    return tuple(made)


def _maker(name: str, args: argparse.Namespace, number: _Number) -> Callable[[CostModel], SpeculationPolicy]:
    """Makes the policy NAME or NAME:K for a simulation."""
    policy, _, length = name.partition(":")
    most = parse_value(int, length, f"--policy {name}") if length else number("spec_tokens", int, 1)
    speculative = SpeculativeConfig(method=args.spec_method, num_speculative_tokens=most)
    targets = {name: number(name, float, 0) for name in ("slo_ttft_ms", "slo_tpot_ms")}
    engine = EngineConfig(
        max_num_seqs=number("max_num_seqs", int, 1),
        max_num_batched_tokens=max(number("max_num_batched_tokens", int, 1), number("max_num_seqs", int, 1)),
        spec_policy=policy,
        **(targets if policy == "slo" else {}),
    )
    return lambda cost: load_policy(policy, PolicyContext(speculative, engine, lambda: cost))


def _summary(result: Result, wall_s: float) -> dict[str, float]:
    simulated_s = sum(step.seconds for step in result.steps)
    return {**result.summary(), "simulated_s": simulated_s, "times_real_time": simulated_s / wall_s}
