"""`outpace bench sweep` and `outpace bench plot`, with small servers in processes of their own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outpace import cli
from outpace.bench import commands, plots, report, sweep, workload
from outpace.bench.servers import Server, ServerError
from outpace.bench.sweep import Cell, Configuration, Plan, Point
from outpace.engine.step_log import line
from outpace.errors import ConfigError
from outpace.policy.base import BatchView, SequenceView, StepRecord
from outpace.tree import DraftTree

FAKE = f"{sys.executable} {Path(__file__).with_name('fake_openai.py')} {{port}}"
PNG = b"\x89PNG"


def bench(out: Path, *arguments: str) -> int:
    return cli.main(
        ["bench", "sweep", "--json", str(out), "--num-prompts", "2", "--num-warmups", "1", *arguments]
    )


def last_line(text: str) -> Any:
    return json.loads(text.splitlines()[-1])


# --- Sweeps ---------------------------------------------------------------------------------------------


def test_a_sweep_measures_compares_saves_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "result.json"
    servers = ["--command", f"off: {FAKE}", "--command", f"other: {FAKE}", "--baseline", "off"]
    loads = ["--concurrency", "1,2", "--request-rates", "100", "--goodput", "ttft:5000"]
    assert bench(out, *servers, *loads, "--repetitions", "2") == 0
    printed = capsys.readouterr()
    assert "min left" in printed.err
    assert "note: each configuration is sent 18 prompts, 8 differ" in printed.err
    result = json.loads(out.read_text())
    order = [(c["repetition"], c["load"], c["configuration"]) for c in result["cells"]]
    assert order[:2] == [(0, "c=1", "off"), (0, "c=1", "other")]
    assert order[6:8] == [(1, "c=1", "other"), (1, "c=1", "off")], "the order of configurations is reversed"
    assert len(order) == 2 * 3 * 2
    point = result["points"][0]["configurations"]
    assert point["other"]["output_throughput"]["n"] == 2
    assert point["off"]["ratios"]["off"]["throughput"]["median"] == 1
    assert point["other"]["ratios"]["off"]["latency"]["n"] == 2
    assert result["overall"]["num_loads"] == 2
    assert result["points"][2]["configurations"]["off"]["goodput"]["n"] == 2
    assert last_line(printed.out)["points"] == result["points"]
    drawn = sorted(path.name for path in out.parent.glob("*.png"))
    assert drawn == ["result-latency.png", "result-throughput.png"]
    assert all((out.parent / name).read_bytes().startswith(PNG) for name in drawn)

    assert bench(out, *servers, *loads, "--repetitions", "2", "--no-plots") == 2, (
        "it would overwrite the file"
    )
    assert "--resume" in capsys.readouterr().err
    assert bench(out, *servers, *loads, "--repetitions", "3", "--no-plots", "--resume") == 0
    more = json.loads(out.read_text())
    assert more["cells"][:12] == result["cells"], "what was done is kept"
    assert len(more["cells"]) == 18
    assert "[1/6]" in capsys.readouterr().err
    assert bench(out, *servers, "--concurrency", "4", "--repetitions", "2", "--resume") == 2
    assert "another sweep (it differs in loads, goals_ms)" in capsys.readouterr().err


def test_a_server_that_dies_costs_its_run_is_reported_and_started_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    flags = ["--concurrency", "1", "--repetitions", "2", "--no-plots"]
    dying = ["--command", f"well: {FAKE}", "--command", f"mortal: {FAKE} 3"]  # a warm-up, an answer, the end
    assert bench(out, *dying, *flags) == 1
    printed = capsys.readouterr()
    failed = [cell for cell in json.loads(out.read_text())["cells"] if "error" in cell]
    assert [cell["configuration"] for cell in failed] == ["mortal", "mortal"]
    assert all("out of requests" in cell["log_tail"] for cell in failed)
    assert "FAILED" in printed.err
    assert "2 of 4 runs failed; --resume does them again" in printed.err
    assert last_line(printed.out)["failed"] == 2


def test_each_repetition_can_have_servers_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    flags = ["--concurrency", "1", "--repetitions", "2", "--no-plots", "--restart"]
    mortal = ["--command", f"a: {FAKE} 4", "--command", f"b: {FAKE} 4"]  # a repetition is three requests
    assert bench(out, *mortal, *flags) == 0, "no server saw two repetitions"
    printed = capsys.readouterr().err
    assert printed.count("starting a:") == printed.count("starting b:") == 2
    assert "[4/4]" in printed


def test_a_server_that_does_not_start_ends_the_sweep_with_its_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = f"{sys.executable} -c 'print(\"no such model {{port}}\"); raise SystemExit(1)'"
    arguments = ["--command", f"well: {FAKE}", "--command", f"broken: {broken}", "--concurrency", "1"]
    assert bench(tmp_path / "result.json", *arguments, "--no-plots") == 1
    error = capsys.readouterr().err
    assert "broken ended at its start" in error
    assert "no such model" in error


def test_a_running_server_takes_part_by_its_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = Server("apart", shlex.split(FAKE), tmp_path)
    server.start()
    try:
        url = f"apart={server.base_url}/v1"
        arguments = ["--base-url", url, "--concurrency", "1", "--repetitions", "1", "--no-plots"]
        assert bench(tmp_path / "result.json", *arguments) == 0
        assert server.is_running
        result = last_line(capsys.readouterr().out)
        assert result["points"][0]["configurations"]["apart"]["num_failed"]["max"] == 0
    finally:
        server.stop()


# --- Servers --------------------------------------------------------------------------------------------


def state(pid: int) -> str:
    """Of a process, as /proc has it: T is stopped; empty if there is none, or a dead one."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return "" if letter == "Z" else letter


def wait_for(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_is_frozen_thawed_and_ended_even_when_frozen(tmp_path: Path) -> None:
    server = Server("fake", shlex.split(FAKE), tmp_path)
    server.start()
    pid = server.process.pid
    assert server.model == "fake"
    server.freeze()
    wait_for(lambda: state(pid) == "T")
    server.thaw()
    wait_for(lambda: state(pid) != "T")
    server.freeze()
    server.stop()
    assert not server.is_running
    assert "fake server starts" in server.log_tail()


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="cannot run /no/such"):
        Server("none", ["/no/such"], tmp_path).start()


def test_a_server_that_is_never_well_is_killed(tmp_path: Path) -> None:
    server = Server("mute", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path)
    with pytest.raises(ServerError, match=r"mute is not well after 0\.1 s"):
        server.start(timeout_s=0.1)
    assert not server.is_running


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, needs prctl")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_server_outlives_the_sweep(tmp_path: Path, number: signal.Signals) -> None:
    dataset = tmp_path / "hang.jsonl"
    dataset.write_text('{"prompt": "hang"}\n')
    command = [sys.executable, "-m", "outpace", "bench", "sweep", "--json", str(tmp_path / "r.json")]
    command += ["--command", f"one: {FAKE}", "--command", f"two: {FAKE}", "--concurrency", "1", "--no-plots"]
    running = subprocess.Popen([*command, "--dataset", str(dataset)], stderr=subprocess.DEVNULL)

    def children() -> list[int]:
        return [
            int(pid) for pid in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        ]

    wait_for(lambda: len(children()) == 2 and [state(pid) for pid in children()].count("T") == 1)
    pids = children()
    os.kill(running.pid, number)
    assert running.wait(20) == (130 if number == signal.SIGTERM else -number)
    wait_for(lambda: not any(map(state, pids)))


# --- Plans ----------------------------------------------------------------------------------------------


def plan(**changes: Any) -> Plan:
    labels = ("off", "fixed:1", "fixed:3", "goodput")
    rows: list[workload.Messages] = [({"role": "user", "content": str(i)},) for i in range(1000)]
    settings: dict[str, Any] = {
        "configurations": tuple(Configuration(label, ("serve",), is_own=True) for label in labels),
        "points": (Point("concurrency", 1), Point("concurrency", 8), Point("rate", 2)),
        "repetitions": 2,
        "baseline": "off",
        "conversations": rows,
    }
    return Plan(**settings | changes)


def test_no_two_runs_of_a_configuration_share_a_prompt_while_the_dataset_lasts() -> None:
    seen: list[str] = []
    for repetition in range(2):
        for point in plan().points:
            _, queries, warm = plan().work(point, repetition)
            seen += [str(query.messages) for query in (*queries, *warm)]
    rates = sum(len(plan().load(Point("rate", 2), repetition)[1]) for repetition in range(2))
    assert len(seen) == len(set(seen)) == 2 * (8 + 16 + 3 * 4) + rates
    assert abs(rates - 240) < 5 * 240**0.5


def test_every_configuration_gets_the_same_work_and_each_repetition_other_arrivals() -> None:
    rate = Point("rate", 2)
    assert plan().work(rate, 1) == plan().work(rate, 1)
    assert plan().work(rate, 1)[0] != plan().work(rate, 0)[0]


def test_a_trace_is_replayed_at_each_speed(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("timestamp_s,prompt_tokens,output_tokens\n0,9,5\n10,9,6\n")
    points = (Point("trace", 1), Point("trace", 4))
    load, lengths = plan(points=points, trace=trace).load(points[1], 0)
    assert load == workload.Open((0.0, 2.5))
    assert lengths == [5, 6]
    assert [point.label for point in points] == ["trace x1", "trace x4"]


def test_the_command_lines_of_the_shorthands(tmp_path: Path) -> None:
    parser = cli._parser()
    flags = [
        "--policies",
        "off,fixed:3",
        "--server",
        "deep: --spec-tokens 7",
        "--serve-args",
        "M --dtype float32",
    ]
    args = parser.parse_args(
        ["bench", "sweep", "--json", "r.json", *flags, "--step-log", "--concurrency", "1,2"]
    )
    made = commands._plan(args, tmp_path)
    words = [list(c.command[4:]) for c in made.configurations]
    end = ["--port", "{port}", "--step-log"]
    assert [c.label for c in made.configurations] == ["off", "fixed:3", "deep"]
    assert words[0] == [
        "M",
        "--dtype",
        "float32",
        "--spec-policy",
        "off",
        *end,
        str(tmp_path / "off.steps.jsonl"),
    ]
    assert words[1][3:7] == ["--spec-policy", "fixed", "--spec-tokens", "3"]
    assert words[2][3:5] == ["--spec-tokens", "7"]
    assert made.baseline == "off"
    assert made.points == (Point("concurrency", 1), Point("concurrency", 2))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--concurrency", "1"], "nothing to measure"),
        (["--policies", "off"], "no loads; give --concurrency"),
        (["--policies", "off,off", "--concurrency", "1"], "twice: off"),
        (["--policies", "off", "--concurrency", "1", "--baseline", "of"], "--baseline of is none of off"),
        (["--policies", "off", "--concurrency", "0"], "must be an integer of at least 1, got '0'"),
        (["--policies", "off", "--concurrency", "1", "--duration", "5"], "--duration goes with"),
        (["--policies", "off", "--concurrency", "1", "--trace-speed", "5"], "--trace-speed goes with"),
        (["--policies", "off", "--concurrency", "1", "--burstiness", "5"], "--burstiness goes with"),
        (["--server", "--spec-policy off", "--concurrency", "1"], "a label and a colon must come first"),
        (["--command", "vllm: vllm serve", "--concurrency", "1"], "must say where the port goes: {port}"),
        (["--base-url", "http://x", "--concurrency", "1"], "--base-url takes LABEL=URL"),
        (["--base-url", "x=ftp://x", "--concurrency", "1"], "--base-url must be like"),
        (["--base-url", "x=http://x", "--concurrency", "1", "--step-log"], "--step-log go with --server"),
    ],
)
def test_bad_flags_are_refused_before_anything_starts(
    tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["bench", "sweep", "--json", str(tmp_path / "r.json"), "--no-plots", *flags])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# --- Comparisons ----------------------------------------------------------------------------------------


def cell(repetition: int, load: str, label: str, throughput: float, e2e: float) -> dict[str, Any]:
    latency = {"mean": e2e, "p50": e2e, "p90": e2e, "p99": 2 * e2e}
    numbers = dict.fromkeys(report.LATENCIES, latency) | {
        "output_throughput": throughput,
        "request_throughput": throughput / 10,
        "num_failed": 0,
        "speculation": None,
    }
    where = {"repetition": repetition, "load": load, "configuration": label, "seconds": 60.0}
    return {**where, "summary": numbers}


def summary(made: Plan, cells: list[dict[str, Any]]) -> dict[str, Any]:
    origin = {"hardware": {"gpu": None, "cpu": "a CPU", "cores": 2}, "commit": None}
    return sweep.summarise(made, cells, origin)


# tokens/s at c=1 and c=8, mean latency at 2/s; the second repetition runs on a machine half as fast.
KNOWN = {
    "off": (100, 400, 50),
    "fixed:1": (120, 440, 40),
    "fixed:3": (150, 300, 80),
    "goodput": (150, 440, 40),
}


def known_cells() -> list[dict[str, Any]]:
    return [
        cell(repetition, load, label, *values)
        for repetition, slowness in ((0, 1), (1, 2))
        for label, (alone, many, latency) in KNOWN.items()
        for load, values in (
            ("c=1", (alone / slowness, 10 * slowness)),
            ("c=8", (many / slowness, 20 * slowness)),
            ("2/s", (50, latency * slowness)),
        )
    ]


def test_ratios_are_taken_within_a_repetition() -> None:
    result = summary(plan(), known_cells())
    alone, many, rate = (point["configurations"] for point in result["points"])
    assert alone["fixed:3"]["output_throughput"]["median"] == 112.5
    ratio = alone["fixed:3"]["ratios"]["off"]["throughput"]
    assert (ratio["min"], ratio["median"], ratio["max"]) == (1.5, 1.5, 1.5), "not the machine's changes"
    assert alone["off"]["ratios"]["best fixed"]["label"] == "fixed:3"
    assert many["goodput"]["ratios"]["best fixed"] == {
        "label": "fixed:1", "throughput": report.spread([1, 1]), "latency": report.spread([1, 1]),
    }  # fmt: skip
    assert many["goodput"]["ratios"]["best other"]["label"] == "fixed:1"
    assert rate["fixed:3"]["ratios"]["best other"]["label"] in ("fixed:1", "goodput")
    assert rate["goodput"]["ratios"]["off"]["latency"]["median"] == 50 / 40
    assert rate["goodput"]["e2e_ms_p99"]["median"] == 120


def test_the_geometric_mean_over_closed_loops_is_compared_with_one_fixed_length() -> None:
    overall = summary(plan(), known_cells())["overall"]
    assert overall["num_loads"] == 2, "an open loop has its throughput given"
    assert overall["best_single_fixed"] == "fixed:1"
    assert overall["ratio_to_best_single_fixed"]["goodput"] == pytest.approx((150 / 120) ** 0.5)
    assert overall["ratio_to_baseline"]["fixed:1"] == pytest.approx((1.2 * 1.1) ** 0.5)


def test_failed_and_missing_runs_leave_the_others_comparable() -> None:
    cells = known_cells()
    cells[0] = {**cells[0], "error": "died", "log_tail": ""}  # off at c=1, first repetition
    result = summary(plan(), [c for c in cells if c["configuration"] != "goodput"])
    alone = result["points"][0]["configurations"]
    assert alone["off"]["output_throughput"]["n"] == 1
    assert alone["fixed:3"]["ratios"]["off"]["throughput"]["n"] == 1
    assert alone["goodput"]["ratios"]["off"]["throughput"] is None
    assert result["overall"] is None


def test_the_table_shows_every_configuration_and_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    sweep.print_points(summary(plan(), [c for c in known_cells() if c["configuration"] != "goodput"]))
    rows = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert sum("fixed:3" in row for row in rows) == 3
    assert all("-" in row and "all" in row for row in rows if "goodput" in row)
    sweep.print_points(summary(plan(), known_cells()))
    assert "the same × fixed:1" in capsys.readouterr().out


def of_loads(first: int, last: int) -> dict[str, Any]:
    """The known sweep with some of its loads only."""
    points = plan().points[first:last]
    labels = [point.label for point in points]
    return summary(plan(points=points), [c for c in known_cells() if c["load"] in labels])


def test_sweeps_over_different_loads_are_joined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = summary(plan(), known_cells())
    joined = sweep.join([of_loads(0, 1), of_loads(1, 3)])
    assert joined["points"] == whole["points"]
    assert joined["overall"] == whole["overall"]
    assert joined["repetitions"] == whole["repetitions"]
    files = [tmp_path / "one.json", tmp_path / "many.json"]
    for file, result in zip(files, (of_loads(0, 1), of_loads(1, 3)), strict=True):
        report.write_json(file, result)
    assert cli.main(["bench", "plot", *map(str, files)]) == 0
    printed = capsys.readouterr().out
    assert "the same × fixed:1" in printed
    assert (tmp_path / "one-throughput.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: of_loads(0, 2), "have loads of their own; twice: c=1"),
        (lambda: {"kind": "serve"}, "only results of outpace bench sweep"),
        (
            lambda: summary(plan(configurations=plan().configurations[:2]), []),
            "compare the same configurations, here off, fixed:1, fixed:3, goodput",
        ),
    ],
)
def test_what_does_not_belong_together_is_not_joined(
    other: Callable[[], dict[str, Any]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep.join([of_loads(0, 1), other()])


def test_the_time_left_is_that_of_the_same_load() -> None:
    done = [cell(0, "c=1", "off", 1, 1) | {"seconds": 60.0}, cell(0, "c=8", "off", 1, 1) | {"seconds": 240.0}]
    one = Configuration("off")
    todo = [Cell(1, Point("concurrency", 8), one), Cell(1, Point("rate", 2), one)]
    assert sweep._minutes_left(done, todo[:1]) == "about 4 min left"
    assert sweep._minutes_left(done, todo) == "about 6 min left", "an unknown load takes the mean"


# --- Plots ----------------------------------------------------------------------------------------------


def step_log(path: Path) -> Path:
    view = BatchView((SequenceView("0-0", 99, 8), SequenceView("1-0", 5, 8)), 2, 104, 1000)
    drafts, paths = (DraftTree.chain((1, 2)), DraftTree()), ((0,), ())
    steps = [
        StepRecord(view, (2, 2), drafts, paths, {"forward": 0.01, "total": 0.01 + i / 1e6}, 4, 3, 0.011)
        for i in range(1000)
    ]
    lines = [*(json.dumps(line(step)) for step in steps), "[]", json.dumps({"sequences": 0}), '{"time": 30']
    path.write_text("\n".join(lines))
    return path


def test_a_sweep_is_drawn_with_the_step_logs_it_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = step_log(tmp_path / "goodput.steps.jsonl")
    configurations = (
        *plan().configurations[:3],
        Configuration("goodput", ("serve",), is_own=True, step_log=log),
    )
    result = summary(plan(configurations=configurations), known_cells())
    file = tmp_path / "result.json"
    report.write_json(file, result)
    assert (
        cli.main(["bench", "plot", str(file), "--out", str(tmp_path / "png"), "--step-log", f"a:b={log}"])
        == 0
    )
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == [
        "result-throughput.png", "result-latency.png", "result-steps-goodput.png", "result-steps-ab.png",
    ]  # fmt: skip
    assert all((tmp_path / "png" / name).read_bytes().startswith(PNG) for name in names)


def test_a_run_is_drawn_over_time(tmp_path: Path) -> None:
    windows = [{"start_s": i, "output_throughput": 5.0, "running": 2.0} for i in range(9)]
    result = {"kind": "serve", "model": "m", "commit": None, "windows": windows}
    (path,) = plots.draw(result, tmp_path, "run", {})
    assert path.name == "run-time.png"
    assert path.read_bytes().startswith(PNG)


def test_steps_without_drafts_or_predictions_are_drawn_too(tmp_path: Path) -> None:
    log = tmp_path / "bare.jsonl"
    view = BatchView((), 7, 0, 1000)  # a part of a prompt
    log.write_text(json.dumps(line(StepRecord(view, (), (), (), {"total": 0.01}, 7, 0))))
    (path,) = plots.draw({"kind": "serve"}, tmp_path, "run", {"bare": log})
    assert path.read_bytes().startswith(PNG)
    assert len(plots.read_steps(step_log(tmp_path / "whole.jsonl"))) == 1000, "what is no step is left out"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the result"),
        ("[]", "no JSON object"),
        ("{}", "this is no result"),
        ('{"kind": "sweep", "plan": {}, "points": []}', "it lacks repetitions, cells"),
    ],
)
def test_what_is_no_result_is_refused(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "result.json"
    file.write_text(text)
    assert cli.main(["bench", "plot", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_without_matplotlib_the_sweep_says_so_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert bench(tmp_path / "r.json", "--policies", "off", "--concurrency", "1") == 2
    assert "pip install 'outpace[bench]'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="plots need matplotlib"):
        plots.draw({}, tmp_path, "r", {})
