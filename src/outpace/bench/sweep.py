"""Configurations of a server against each other: every load on each of them, interleaved and repeated.

One server per configuration lives for the whole sweep, or for a repetition, and all but the one under test
are frozen. Processes of one configuration differ in speed by a percent or more for as long as they live, so
only new servers for each repetition tell configurations apart that are closer than that. The order
of configurations is reversed from repetition to repetition, so that what drifts while they run cancels in
pairs of them, and rotated from pair to pair. All configurations get the same prompts, in the same order, with
the same seeds and arrivals; other loads and repetitions get other prompts, so that nothing that a server
remembers of an answer helps it with the next.
"""

from __future__ import annotations

import itertools
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from outpace.bench import client, report, workload
from outpace.bench.servers import Server, ServerError
from outpace.bench.workload import Closed, Load, Messages, Open, Query
from outpace.errors import ConfigError, OutpaceError

DEFAULT_RATE_DURATION_S = 60.0
DEFAULT_OUTPUT_LEN = 128
MIN_PROMPTS, PROMPTS_PER_CLIENT = 8, 2
FIXED = "fixed"  # labels that begin so are fixed draft lengths
BEST_FIXED, BEST_OTHER = "best fixed", "best other"
FILE_WIDTH = 180  # of a table that is not shown on a terminal
_PLAIN = ("output_throughput", "request_throughput", "goodput", "num_failed")


@dataclass(frozen=True)
class Configuration:
    """Something to measure.

    Attributes:
        label: Its name in tables and plots.
        command: What starts it, with `{port}`; empty if it runs already.
        base_url: Where it runs already.
        is_own: Whether it is one of ours, and so may be the "best other".
        step_log: Where it logs its steps, if it does.
    """

    label: str
    command: tuple[str, ...] = ()
    base_url: str | None = None
    is_own: bool = False
    step_log: Path | None = None


@dataclass(frozen=True)
class Point:
    """A load: clients of a closed loop, requests per second, or times as fast as the trace."""

    kind: Literal["concurrency", "rate", "trace"]
    value: float

    @property
    def label(self) -> str:
        """As tables show it."""
        forms = {"concurrency": "c={:g}", "rate": "{:g}/s", "trace": "trace x{:g}"}
        return forms[self.kind].format(self.value)


class Cell(NamedTuple):
    """A run to do."""

    repetition: int
    point: Point
    configuration: Configuration

    @property
    def key(self) -> tuple[int, str, str]:
        """What names it in a result."""
        return (self.repetition, self.point.label, self.configuration.label)


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a sweep measures."""

    configurations: tuple[Configuration, ...]
    points: tuple[Point, ...]
    repetitions: int
    baseline: str
    conversations: list[Messages]
    endpoint_options: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    output_len: int | None = None
    num_prompts: int | None = None
    num_warmups: int = 4
    duration_s: float | None = None
    burstiness: float = 1.0
    datasets: tuple[Path, ...] = ()
    trace: Path | None = None
    goals: tuple[report.Goal, ...] = ()
    timeout_s: float = client.DEFAULT_TIMEOUT_S
    seed: int = 0
    restart: bool = False

    def __post_init__(self) -> None:
        """Checks that there is something to compare.

        Raises:
            ConfigError: There are no configurations or loads, a label comes twice, or the baseline is none.
        """
        labels = [configuration.label for configuration in self.configurations]
        if not labels:
            raise ConfigError("nothing to measure; give --server, --policies, --command or --base-url")
        if twice := sorted({label for label in labels if labels.count(label) > 1}):
            raise ConfigError(f"each configuration needs a label of its own; twice: {', '.join(twice)}")
        if self.baseline not in labels:
            raise ConfigError(f"--baseline {self.baseline} is none of {', '.join(labels)}")
        if not self.points:
            raise ConfigError("no loads; give --concurrency, --request-rates or --trace")

    def cells(self) -> Iterator[Cell]:
        """All runs in order; who begins changes with every second repetition, the others run backwards."""
        for repetition in range(self.repetitions):
            first = repetition // 2 % len(self.configurations)
            order = self.configurations[first:] + self.configurations[:first]
            for point in self.points:
                for configuration in reversed(order) if repetition % 2 else order:
                    yield Cell(repetition, point, configuration)

    def load(self, point: Point, repetition: int) -> tuple[Load, list[int]]:
        """When queries are sent, and the most tokens of each answer."""
        length = self.output_len or DEFAULT_OUTPUT_LEN
        if point.kind == "trace":
            assert self.trace is not None
            arrivals = workload.read_trace(self.trace, point.value, self.duration_s)[: self.num_prompts]
            lengths = [self.output_len or arrival.output_tokens for arrival in arrivals]
            return Open(tuple(arrival.time_s for arrival in arrivals)), lengths
        if point.kind == "rate":
            seconds = self.duration_s or (None if self.num_prompts else DEFAULT_RATE_DURATION_S)
            seed = self.seed + repetition
            arriving = workload.poisson(point.value, self.num_prompts, seed, self.burstiness, seconds)
            return arriving, [length] * len(arriving.arrivals_s)
        clients = int(point.value)
        number = self.num_prompts or max(MIN_PROMPTS, PROMPTS_PER_CLIENT * clients)
        return Closed(clients), [length] * number

    def num_queries(self, repetition: int, points: Sequence[Point]) -> int:
        """How many queries a repetition sends to each configuration at these points, warm-ups included."""
        return sum(len(self.load(point, repetition)[1]) + self.num_warmups for point in points)

    def work(self, point: Point, repetition: int) -> tuple[Load, list[Query], list[Query]]:
        """The load of a run, its queries, and those sent before it to warm up."""
        before = self.points[: self.points.index(point)]
        skip = sum(self.num_queries(earlier, self.points) for earlier in range(repetition))
        skip += self.num_queries(repetition, before)
        load, lengths = self.load(point, repetition)
        warm = [self.output_len or DEFAULT_OUTPUT_LEN] * self.num_warmups
        queries = workload.make_queries(self.conversations, lengths + warm, self.seed, skip)
        return load, queries[: len(lengths)], queries[len(lengths) :]

    def describe(self) -> dict[str, Any]:
        """What must be the same for a result to be gone on with; more repetitions may be added."""
        return {
            "configurations": [
                {
                    "label": c.label,
                    "command": shlex.join(c.command),
                    "base_url": c.base_url,
                    "is_own": c.is_own,
                    "step_log": str(c.step_log) if c.step_log else None,
                }
                for c in self.configurations
            ],
            "loads": [{"label": p.label, "kind": p.kind, "value": p.value} for p in self.points],
            "baseline": self.baseline,
            "datasets": list(map(str, self.datasets)),
            "num_conversations": len(self.conversations),
            "endpoint": self.endpoint_options,
            "model": self.model,
            "output_len": self.output_len,
            "num_prompts": self.num_prompts,
            "num_warmups": self.num_warmups,
            "duration_s": self.duration_s,
            "burstiness": self.burstiness,
            "trace": str(self.trace) if self.trace else None,
            "goals_ms": {goal.name: goal.limit_ms for goal in self.goals},
            "timeout_s": self.timeout_s,
            "seed": self.seed,
            "restart": self.restart,
        }


# --- Running --------------------------------------------------------------------------------------------


def run(plan: Plan, out: Path, log_dir: Path, start_timeout_s: float, resume: bool) -> dict[str, Any]:
    """Does the runs of a plan that its result file lacks; the file is saved after each.

    Args:
        plan: What to measure.
        out: The result file.
        log_dir: For the servers' output.
        start_timeout_s: How long a server may take to start.
        resume: Whether to go on with the file if it is there.

    Returns:
        The whole result.

    Raises:
        ConfigError: The file is there and not to be gone on with, or is of another plan.
        ServerError: A server did not start. One that dies later costs its run, and is started again.
    """
    if out.exists() and not resume:
        raise ConfigError(f"{out} exists; go on with it by --resume, or name another file")
    cells: list[dict[str, Any]] = []
    if out.exists():
        cells = _previous(plan, out)
    else:
        for configuration in plan.configurations:
            if configuration.step_log is not None:  # servers append to it
                configuration.step_log.unlink(missing_ok=True)
    done = {(cell["repetition"], cell["load"], cell["configuration"]) for cell in cells}
    todo = [cell for cell in plan.cells() if cell.key not in done]
    log_dir.mkdir(parents=True, exist_ok=True)
    num_queries = sum(plan.num_queries(repetition, plan.points) for repetition in range(plan.repetitions))
    if num_queries > len(plan.conversations):
        _say(f"note: each configuration is sent {num_queries} prompts, {len(plan.conversations)} differ")
    origin = report.provenance(plan.seed)
    number = 0
    for _, group in itertools.groupby(todo, key=lambda cell: cell.repetition if plan.restart else 0):
        to_run = list(group)
        with _servers(plan, log_dir, start_timeout_s, to_run) as servers:
            for cell in to_run:
                number += 1
                record = _record(plan, cell, servers, start_timeout_s)
                cells.append({**record, "commit": origin["commit"]})  # after --resume it may be another one
                report.write_json(out, summarise(plan, cells, origin))
                _say(f"[{number}/{len(todo)}] {_line(record)}; {_minutes_left(cells, todo[number:])}")
    result = summarise(plan, cells, origin)
    report.write_json(out, result)
    return result


def _previous(plan: Plan, out: Path) -> list[dict[str, Any]]:
    """The runs of an earlier result that did not fail."""
    result = report.read_json(out)
    theirs, ours = result.get("plan"), plan.describe()
    if theirs != ours:
        which = [key for key in ours if not isinstance(theirs, dict) or theirs.get(key) != ours[key]]
        raise ConfigError(f"{out} is the result of another sweep (it differs in {', '.join(which)})")
    return [cell for cell in result["cells"] if "error" not in cell]


@contextmanager
def _servers(
    plan: Plan, log_dir: Path, timeout_s: float, todo: Sequence[Cell]
) -> Iterator[dict[str, Server]]:
    """The servers of what is to do, started and frozen; whatever happens, they are ended."""
    needed = {cell.configuration.label for cell in todo}
    servers = {
        c.label: Server(c.label, c.command, log_dir)
        for c in plan.configurations
        if c.command and c.label in needed
    }
    restore = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        for server in servers.values():
            _say(f"starting {server.name}: {shlex.join(server.command)}")
            server.start(timeout_s)
            server.freeze()
        yield servers
    finally:
        for server in servers.values():
            server.stop()
        for number, handler in restore.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _record(plan: Plan, cell: Cell, servers: Mapping[str, Server], start_timeout_s: float) -> dict[str, Any]:
    """Does a run; a failure becomes part of the result, with the end of the server's log."""
    begin = time.perf_counter()
    repetition, label, configuration = cell.key
    record: dict[str, Any] = {"repetition": repetition, "load": label, "configuration": configuration}
    server = servers.get(configuration)
    try:
        if server is not None and not server.is_running:
            server.start(start_timeout_s)
        for other in servers.values():
            if other is not server:
                other.freeze()
        if server is not None:
            server.thaw()
        record["summary"] = _measure(plan, cell, server)
        # a dying process closes its connections some time before it is seen to have ended
        patience_s = 1.0 if record["summary"]["num_failed"] else 0.0
        if server is not None and server.ends_within(patience_s):
            raise ServerError("the server died")
    except OutpaceError as error:
        record["error"] = str(error)
        record["log_tail"] = server.log_tail() if server is not None else ""
    record["seconds"] = time.perf_counter() - begin
    return record


def _measure(plan: Plan, cell: Cell, server: Server | None) -> dict[str, Any]:
    base_url = cell.configuration.base_url if server is None else server.base_url
    assert base_url is not None
    model = plan.model or (client.first_model(base_url) if server is None else server.model)
    endpoint = client.Endpoint(base_url, model, **plan.endpoint_options)
    load, queries, warm = plan.work(cell.point, cell.repetition)
    if warm:
        concurrency = load.concurrency if isinstance(load, Closed) else len(warm)
        client.run(endpoint, warm, Closed(concurrency), plan.timeout_s)
    before = report.read_drafts(base_url)
    measured = client.run(endpoint, queries, load, plan.timeout_s)
    drafts = report.speculation(before, report.read_drafts(base_url))
    summary = report.summarise(measured, plan.goals, drafts)
    if not summary["num_completed"]:
        raise ServerError(f"no request was answered: {', '.join(summary['errors'])}")
    return summary


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _line(cell: Mapping[str, Any]) -> str:
    where = f"{cell['load']} {cell['configuration']}, repetition {cell['repetition'] + 1}"
    if "error" in cell:
        return f"{where}: FAILED: {cell['error']}\n{cell['log_tail']}\n"
    summary = cell["summary"]
    number = summary["num_failed"]
    failed = f", {number} requests FAILED: {summary['errors']}" if number else ""
    return (
        f"{where}: {summary['output_throughput']:.1f} tokens/s, TTFT {summary['ttft_ms']['mean']:.0f} ms, "
        f"E2E {summary['e2e_ms']['mean']:.0f} ms{failed}"
    )


def _minutes_left(done: Sequence[Mapping[str, Any]], todo: Sequence[Cell]) -> str:
    """An estimate from the runs so far, those of the same load where there are any."""
    by_load: dict[str, list[float]] = {}
    for record in done:
        by_load.setdefault(record["load"], []).append(record["seconds"])
    all_seconds = [record["seconds"] for record in done]
    seconds = sum(statistics.mean(by_load.get(cell.point.label, all_seconds)) for cell in todo)
    return f"about {seconds / 60:.0f} min left"


# --- Results --------------------------------------------------------------------------------------------


def summarise(plan: Plan, cells: Sequence[Mapping[str, Any]], origin: Mapping[str, Any]) -> dict[str, Any]:
    """The whole result: medians, spreads and ratios at each load, and all runs as they were.

    Args:
        plan: What was to be measured.
        cells: The runs so far.
        origin: Of `report.provenance`.
    """
    points = [_point(plan, point, cells) for point in plan.points]
    return {
        "kind": "sweep",
        **origin,
        "plan": plan.describe(),
        "repetitions": plan.repetitions,
        "points": points,
        "overall": _overall([c.label for c in plan.configurations], plan.baseline, points),
        "cells": list(cells),
    }


def join(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sweeps of the same configurations over different loads as one, for a table and for plots.

    Raises:
        ConfigError: One is no sweep, or of other configurations, or has a load of another one.
    """
    if any(result.get("kind") != "sweep" for result in results):
        raise ConfigError("only results of outpace bench sweep can be joined")
    plans = [result["plan"] for result in results]
    labels = [[c["label"] for c in plan["configurations"]] for plan in plans]
    compared = [(theirs, plan["baseline"]) for theirs, plan in zip(labels, plans, strict=True)]
    if any(theirs != compared[0] for theirs in compared):
        raise ConfigError(f"sweeps to join must compare the same configurations, here {', '.join(labels[0])}")
    points = [point for result in results for point in result["points"]]
    loads = [point["load"] for point in points]
    if twice := sorted({load for load in loads if loads.count(load) > 1}):
        raise ConfigError(f"sweeps to join must have loads of their own; twice: {', '.join(twice)}")
    without_logs = [{**c, "step_log": None} for c in plans[0]["configurations"]]
    return {
        **results[0],
        "plan": {**plans[0], "configurations": without_logs},
        "repetitions": min(result["repetitions"] for result in results),
        "points": points,
        "overall": _overall(labels[0], plans[0]["baseline"], points),
        "cells": [cell for result in results for cell in result["cells"]],
    }


def values_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a run that repetitions are compared by, under flat names such as `ttft_ms_p99`."""
    flat = {name: summary[name] for name in _PLAIN if name in summary}
    for name in report.LATENCIES:
        for part, value in (summary[name] or {}).items():
            flat[f"{name}_{part}"] = value
    if summary["speculation"]:
        flat["mean_acceptance_length"] = summary["speculation"]["mean_acceptance_length"]
    return flat


def _point(plan: Plan, point: Point, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians and spreads of each configuration at a load, and ratios repetition by repetition."""
    runs: dict[str, dict[int, dict[str, float]]] = {c.label: {} for c in plan.configurations}
    for cell in cells:
        if cell["load"] == point.label and "error" not in cell and cell["repetition"] < plan.repetitions:
            runs[cell["configuration"]][cell["repetition"]] = values_of(cell["summary"])
    own = [c.label for c in plan.configurations if c.is_own]
    configurations = {}
    for label, by_repetition in runs.items():
        names = dict.fromkeys(name for values in by_repetition.values() for name in values)
        numbers = {
            name: report.spread([values[name] for values in by_repetition.values() if name in values])
            for name in names
        }
        references = {
            plan.baseline: plan.baseline,
            BEST_FIXED: _best(point, runs, [other for other in own if other.startswith(FIXED)]),
            BEST_OTHER: _best(point, runs, [other for other in own if other != label]),
        }
        ratios = {
            name: {"label": other, **_ratios(by_repetition, runs[other])}
            for name, other in references.items()
            if other is not None
        }
        configurations[label] = {**numbers, "ratios": ratios}
    return {"load": point.label, "kind": point.kind, "value": point.value, "configurations": configurations}


def _best(
    point: Point, runs: Mapping[str, Mapping[int, Mapping[str, float]]], labels: Sequence[str]
) -> str | None:
    """The one with the highest median throughput, or at a given rate of arrivals the lowest mean latency."""
    name, sign = ("output_throughput", 1) if point.kind == "concurrency" else ("e2e_ms_mean", -1)
    scores = {}
    for label in labels:
        if middle := report.spread([values[name] for values in runs[label].values()]):
            scores[label] = sign * middle["median"]
    return max(scores, key=scores.__getitem__, default=None)


def _ratios(
    ours: Mapping[int, Mapping[str, float]], theirs: Mapping[int, Mapping[str, float]]
) -> dict[str, dict[str, float] | None]:
    """How many times the throughput, and how many times shorter the mean latency, over common repetitions."""
    pairs = [(ours[i], theirs[i]) for i in ours if i in theirs]
    return {
        "throughput": report.spread([a["output_throughput"] / b["output_throughput"] for a, b in pairs]),
        "latency": report.spread([b["e2e_ms_mean"] / a["e2e_ms_mean"] for a, b in pairs]),
    }


def _overall(
    labels: Sequence[str], baseline: str, points: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Geometric means of median throughput over the closed loops, where all configurations have a number."""
    closed = [point["configurations"] for point in points if point["kind"] == "concurrency"]
    whole = [at for at in closed if all("output_throughput" in at[label] for label in labels)]
    if not whole:
        return None
    means = {
        label: report.geometric_mean([at[label]["output_throughput"]["median"] for at in whole])
        for label in labels
    }
    fixed = {label: mean for label, mean in means.items() if label.startswith(FIXED)}
    best = max(fixed, key=fixed.__getitem__, default=None)
    return {
        "num_loads": len(whole),
        "output_throughput": means,
        "ratio_to_baseline": {label: mean / means[baseline] for label, mean in means.items()},
        "best_single_fixed": best,
        "ratio_to_best_single_fixed": best and {label: mean / means[best] for label, mean in means.items()},
    }


def print_points(result: Mapping[str, Any]) -> None:
    """The table of a sweep, on stdout: medians, for throughput and ratios with their range."""
    from rich.console import Console
    from rich.table import Table

    baseline = result["plan"]["baseline"]
    table = Table(title="medians of the repetitions (with their range); latencies in ms")
    table.add_column("load")
    table.add_column("configuration")
    for name in ("tokens/s", "TTFT p50", "TPOT p50", "E2E mean", "E2E p99"):
        table.add_column(name, justify="right")
    for name in (baseline, BEST_FIXED, BEST_OTHER):
        table.add_column(f"× {name}", justify="right")
    table.add_column("failed", justify="right")
    for point in result["points"]:
        for label, numbers in point["configurations"].items():
            table.add_row(point["load"], label, *_row(baseline, point["kind"], numbers))
        table.add_section()
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(table)
    if overall := result["overall"]:
        print(f"tokens/s over {overall['num_loads']} loads, geometric mean, × {baseline}:")
        print(" ", _shown(overall["ratio_to_baseline"]))
        if best := overall["best_single_fixed"]:
            print(f"the same × {best}, the best of one fixed length:")
            print(" ", _shown(overall["ratio_to_best_single_fixed"]))


def _shown(ratios: Mapping[str, float]) -> str:
    return ", ".join(f"{label} {ratio:.3f}" for label, ratio in ratios.items())


def _row(baseline: str, kind: str, numbers: Mapping[str, Any]) -> Iterator[str]:
    def shown(spread: Mapping[str, float] | None, digits: int, with_range: bool) -> str:
        if spread is None:
            return "-"
        low, middle, high = (f"{spread[name]:.{digits}f}" for name in ("min", "median", "max"))
        return f"{middle} ({low} to {high})" if with_range else middle

    yield shown(numbers.get("output_throughput"), 1, True)
    for name in ("ttft_ms_p50", "tpot_ms_p50", "e2e_ms_mean", "e2e_ms_p99"):
        yield shown(numbers.get(name), 1, False)
    what = "throughput" if kind == "concurrency" else "latency"
    for name in (baseline, BEST_FIXED, BEST_OTHER):
        yield shown(numbers["ratios"].get(name, {}).get(what), 2, True)
    failed = numbers.get("num_failed")
    yield f"{failed['max']:g}" if failed else "all"
