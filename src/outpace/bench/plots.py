"""Results as PNG files, by matplotlib (the extra `bench`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from outpace.bench.report import LATENCIES
from outpace.errors import ConfigError

DPI = 120
NUM_BINS = 400  # of k over time
MAX_DOTS = 20_000  # of predicted against measured
_NEEDED = {"sequences", "drafted", "seconds", "predicted_s"}  # of a line of a step log


def require_matplotlib() -> None:
    """Says early that plots cannot be drawn.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'outpace[bench]'") from None


def draw(result: Mapping[str, Any], directory: Path, stem: str, step_logs: Mapping[str, Path]) -> list[Path]:
    """Draws what a result holds.

    Args:
        result: Of `bench serve` or `bench sweep`, as in its file.
        directory: Where to; made if it is not there.
        stem: Beginning of the files' names.
        step_logs: Files of `--step-log` by label; a sweep's own need not be named.

    Returns:
        The files written.

    Raises:
        ConfigError: matplotlib is not installed, it is no result, or a step log cannot be read.
    """
    require_matplotlib()
    directory.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    if result.get("kind") == "sweep":
        figures.update(_sweep_figures(result))
        own = {c["label"]: c["step_log"] for c in result["plan"]["configurations"] if c["step_log"]}
        logs = {label: Path(file) for label, file in own.items() if Path(file).exists()} | dict(step_logs)
    elif result.get("kind") == "serve":
        if "windows" in result:
            figures["time"] = _time_figure(result)
        logs = dict(step_logs)
    else:
        raise ConfigError("this is no result of outpace bench serve or bench sweep")
    for label, file in logs.items():
        if steps := read_steps(file):
            figures[f"steps-{label.replace(':', '').replace('/', '_')}"] = _steps_figure(label, steps)
    paths = []
    for name, figure in figures.items():
        path = directory / f"{stem}-{name}.png"
        figure.savefig(path, dpi=DPI)
        paths.append(path)
    return paths


def _figure(columns: int, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * columns, 4.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


# --- Sweeps ---------------------------------------------------------------------------------------------


def _sweep_figures(result: Mapping[str, Any]) -> dict[str, Any]:
    figures = {}
    for kind, name in (("concurrency", "throughput"), ("rate", "latency"), ("trace", "trace")):
        points = sorted((p for p in result["points"] if p["kind"] == kind), key=lambda p: p["value"])
        if points:
            make = _throughput_figure if kind == "concurrency" else _latency_figure
            figures[name] = make(result, points)
    return figures


def _title(result: Mapping[str, Any]) -> str:
    hardware = result["hardware"]
    where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['cores']} cores"
    return f"{where}; {result['commit']}; medians and range of {result['repetitions']} repetitions"


def _lines(axes: Any, points: Sequence[Mapping[str, Any]], find: Any) -> None:
    """A line per configuration: the median at each load, with the range of repetitions."""
    for label in points[0]["configurations"]:
        found = [(p["value"], find(p["configurations"][label])) for p in points]
        found = [(x, spread) for x, spread in found if spread is not None]
        if not found:
            continue
        middle = np.array([spread["median"] for _, spread in found])
        low = middle - [spread["min"] for _, spread in found]
        high = [spread["max"] for _, spread in found] - middle
        axes.errorbar([x for x, _ in found], middle, (low, high), label=label, marker="o", markersize=3,
                      linewidth=1.2, capsize=2)  # fmt: skip
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _throughput_figure(result: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> Any:
    baseline = result["plan"]["baseline"]
    figure, (left, right) = _figure(2, _title(result))
    _lines(left, points, lambda numbers: numbers.get("output_throughput"))
    _lines(right, points, lambda numbers: numbers["ratios"].get(baseline, {}).get("throughput"))
    left.set_ylabel("output tokens/s")
    right.set_ylabel(f"throughput / that of {baseline}")
    right.axhline(1, color="black", linewidth=0.8)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks([p["value"] for p in points], [f"{p['value']:g}" for p in points])
        axes.set_xlabel("concurrency (closed loop)")
    return figure


def _latency_figure(result: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> Any:
    has_goals = bool(result["plan"]["goals_ms"])
    figure, panels = _figure(3 if has_goals else 2, _title(result))
    what = "request rate, requests/s" if points[0]["kind"] == "rate" else "times as fast as the trace"
    for axes, part in zip(panels, ("mean", "p99"), strict=False):
        _lines(axes, points, lambda numbers, part=part: numbers.get(f"{LATENCIES[-1]}_{part}"))
        axes.set_xlabel(what)
        axes.set_ylabel(f"{part} end-to-end latency, ms")
        axes.set_yscale("log")
    if has_goals:
        _lines(panels[2], points, lambda numbers: numbers.get("goodput"))
        goals = ", ".join(f"{name} {limit:g} ms" for name, limit in result["plan"]["goals_ms"].items())
        panels[2].set_xlabel(what)
        panels[2].set_ylabel(f"goodput, requests/s ({goals})")
    return figure


# --- Over time ------------------------------------------------------------------------------------------


def _time_figure(result: Mapping[str, Any]) -> Any:
    figure, (axes,) = _figure(1, f"{result['model']}; {result['commit']}")
    windows = result["windows"]
    starts = [window["start_s"] for window in result["windows"]]
    axes.step(
        starts, [window["output_throughput"] for window in result["windows"]], where="post", linewidth=1
    )
    axes.set_xlabel("s")
    axes.set_ylabel("output tokens/s")
    other = axes.twinx()
    other.step(starts, [window["running"] for window in windows], where="post", color="gray",
               linewidth=1, linestyle=":")  # fmt: skip
    other.set_ylabel("requests under way (dotted)")
    axes.grid(alpha=0.3)
    return figure


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The steps of a `--step-log`; a line that is not whole, as the last of a killed server, is left out.

    Raises:
        ConfigError: The file cannot be read.
    """
    steps = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    step = json.loads(line)
                except ValueError:
                    continue
                if isinstance(step, dict) and step.keys() >= _NEEDED:
                    steps.append(step)
    except OSError as error:
        raise ConfigError(f"cannot read the step log {path}: {error.strerror or error}") from None
    return steps


def _steps_figure(label: str, steps: Sequence[Mapping[str, Any]]) -> Any:
    """K over the time spent in steps, and predicted against measured times of steps."""
    figure, (left, right) = _figure(2, f"{label}: {len(steps)} steps")
    drafting = [s for s in steps if s["sequences"]]
    if drafting:
        when = np.cumsum([s["seconds"]["total"] for s in drafting])
        lengths = np.array([s["drafted"] / s["sequences"] for s in drafting])
        edges = np.linspace(0, len(drafting), min(NUM_BINS, len(drafting)) + 1).astype(int)[:-1]
        counts = np.diff([*edges, len(drafting)])
        left.step(when[edges], np.add.reduceat(lengths, edges) / counts, where="post", linewidth=0.8)
    left.set_xlabel("s, time in steps")
    left.set_ylabel("k: draft tokens per sequence")
    both = [(s["predicted_s"], s["seconds"]["total"]) for s in steps if s["predicted_s"]]
    if both:
        predicted, measured = np.array(both).T * 1e3
        errors = np.abs(predicted / measured - 1)
        stride = max(1, len(both) // MAX_DOTS)
        right.loglog(measured[::stride], predicted[::stride], ".", markersize=2, alpha=0.4)
        ends = [min(predicted.min(), measured.min()), max(predicted.max(), measured.max())]
        right.loglog(ends, ends, color="black", linewidth=0.8)
        median, p90 = np.percentile(errors, (50, 90))
        right.set_title(f"error: median {median:.1%}, p90 {p90:.1%}", fontsize=9)
    right.set_xlabel("measured step, ms")
    right.set_ylabel("predicted step, ms")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure
