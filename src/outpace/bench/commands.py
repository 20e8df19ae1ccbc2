"""The flags of `outpace bench` and what they start; heavy parts are imported when they run."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from outpace.errors import ConfigError, OutpaceError

DEFAULT_OUTPUT_LEN = 128
DEFAULT_NUM_PROMPTS = 100


class BenchError(OutpaceError):
    """Nothing could be measured."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `serve`, `sweep` and `plot`, with the function that runs each as `run`."""
    commands = parser.add_subparsers(dest="bench_command", metavar="BENCHMARK", required=True)
    _add_serve(commands)
    _add_sweep(commands)
    _add_plot(commands)


def _add(commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str) -> Any:
    parser = commands.add_parser(name, help=help, description=help + ".", allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _number(kind: type[int] | type[float], least: float, is_above: bool = False) -> Callable[[str], Any]:
    """A type for argparse that checks the range in words."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > least if is_above else value >= least) or math.isinf(value):
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"must be {what} {'above' if is_above else 'of at least'} {least:g}, got {text!r}"
            )
        return value

    return parse


_COUNT = _number(int, 1)
_POSITIVE = _number(float, 0, is_above=True)


def _rate(text: str) -> Any:
    return math.inf if text == "inf" else _POSITIVE(text)


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(parse(part) for part in text.split(","))


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def _add_queries(parser: argparse.ArgumentParser) -> None:
    """What is sent: the same flags for a run and for a sweep."""
    group = parser.add_argument_group("Queries")
    group.add_argument(
        "--dataset",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON lines (.gz) with messages, turns, conversations or prompt; several are mixed; "
        "default: 8 built-in prompts",
    )
    group.add_argument(
        "--max-prompt-chars", type=_COUNT, metavar="N", help="leave longer prompts of the dataset out"
    )
    group.add_argument("--endpoint", choices=("chat", "completions"), default="chat", help="default: chat")
    group.add_argument(
        "--output-len",
        type=_COUNT,
        metavar="N",
        help=f"most tokens of an answer (default: {DEFAULT_OUTPUT_LEN}, or what the trace says)",
    )
    group.add_argument("--ignore-eos", action="store_true", help="answers have exactly that many tokens")
    group.add_argument("--temperature", type=_number(float, 0), default=0.0, metavar="X", help="default: 0")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of choice, arrivals and sampling")
    group.add_argument(
        "--extra-body",
        type=_json_object,
        default={},
        metavar="JSON",
        help="further fields of each request",
    )
    group.add_argument(
        "--burstiness",
        type=_POSITIVE,
        metavar="X",
        help="shape of the gaps at a request rate: 1 is Poisson, less is burstier (default: 1)",
    )
    group.add_argument(
        "--duration", type=_POSITIVE, metavar="SECONDS", help="send only what is due within this time"
    )
    group.add_argument(
        "--timeout",
        type=_POSITIVE,
        default=600.0,
        metavar="SECONDS",
        help="a request without complete answer after this has failed (default: 600)",
    )
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="requests that meet these count as good: ttft:500 tpot:50 e2el:5000",
    )


# --- bench serve ----------------------------------------------------------------------------------------


def _add_serve(commands: Any) -> None:
    parser = _add(commands, "serve", _serve, "measure a running server with an OpenAI endpoint")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL", help="of the server")
    parser.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    parser.add_argument("--api-key", metavar="KEY", help="default: $OPENAI_API_KEY")
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--max-concurrency", type=_COUNT, metavar="N", help="closed loop: N clients")
    load.add_argument(
        "--request-rate", type=_rate, metavar="R", help="open loop: R requests/s on average, or inf"
    )
    load.add_argument("--trace", type=Path, metavar="FILE", help="open loop: a trace's arrivals")
    load.add_argument("--phases", metavar="N:S,...", help="closed loop whose clients change: 4:60s,32:60s")
    parser.add_argument(
        "--trace-speed", type=_POSITIVE, metavar="X", help="play the trace X times as fast (default: 1)"
    )
    parser.add_argument(
        "--num-prompts",
        type=_COUNT,
        metavar="N",
        help=f"most requests (default: {DEFAULT_NUM_PROMPTS}; with --trace or --duration all that are due; "
        "--phases repeats them, by default the whole dataset)",
    )
    parser.add_argument(
        "--num-warmups",
        type=_number(int, 0),
        default=0,
        metavar="N",
        help="sent before, not counted",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here, each request too")
    _add_queries(parser)


def _serve(args: argparse.Namespace) -> int:
    import dataclasses

    from outpace.bench import client, report, workload

    goals = report.parse_goals(args.goodput)
    api_key = args.api_key or os.environ.get("OPENAI_API_KEY")
    model = args.model or client.first_model(args.base_url, api_key)
    endpoint = client.Endpoint(args.base_url, model, api_key=api_key, **_endpoint_options(args))
    conversations = _conversations(args)
    load, lengths = _load(args, len(conversations))
    queries = workload.make_queries(conversations, lengths, args.seed)
    if args.num_warmups:
        _warm_up(args, endpoint, conversations, len(queries), load)
    before = report.read_drafts(args.base_url, api_key)
    with _progress(len(queries), load) as advance:
        run = client.run(endpoint, queries, load, args.timeout, advance)
    drafts = report.speculation(before, report.read_drafts(args.base_url, api_key))
    summary = report.summarise(run, goals, drafts)
    result = {"kind": "serve", **report.provenance(args.seed), "settings": _shown_settings(args), **summary}
    result["model"] = endpoint.model
    if isinstance(load, workload.Phased):
        result["phases"] = report.phase_throughput(run, load)
    report.print_summary(summary)
    if args.json:
        details = {
            "windows": report.windows(run),
            "requests": [dataclasses.asdict(answer) for answer in run.answers],
        }
        report.write_json(args.json, result | details)
    print(json.dumps(result))
    if not summary["num_completed"]:
        raise BenchError("no request was answered")
    return 0


def _endpoint_options(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of an Endpoint that are the same for every server."""
    return {
        "kind": args.endpoint,
        "temperature": args.temperature,
        "ignore_eos": args.ignore_eos,
        "extra_body": args.extra_body,
    }


def _conversations(args: argparse.Namespace) -> list[Any]:
    from outpace.bench import workload

    read = [conversation for path in args.dataset for conversation in workload.read_dataset(path)]
    read = read or workload.built_in_prompts()
    return read if args.max_prompt_chars is None else workload.up_to(read, args.max_prompt_chars)


def _load(args: argparse.Namespace, num_conversations: int) -> tuple[Any, list[int]]:
    """When to send, and the length of each answer."""
    from outpace.bench import workload

    _refuse_idle_flags(args)
    if args.trace:
        arrivals = workload.read_trace(args.trace, args.trace_speed or 1.0, args.duration)[: args.num_prompts]
        lengths = [args.output_len or arrival.output_tokens for arrival in arrivals]
        return workload.Open(tuple(arrival.time_s for arrival in arrivals)), lengths
    number = args.num_prompts or DEFAULT_NUM_PROMPTS
    load: workload.Load
    if args.request_rate:
        most = args.num_prompts if args.duration else number
        load = workload.poisson(args.request_rate, most, args.seed, args.burstiness or 1.0, args.duration)
        number = len(load.arrivals_s)
    elif args.phases:
        load = workload.parse_phases(args.phases)
        number = args.num_prompts or num_conversations
    else:
        load = workload.Closed(args.max_concurrency)
    return load, [args.output_len or DEFAULT_OUTPUT_LEN] * number


def _refuse_idle_flags(args: argparse.Namespace) -> None:
    """No flag is accepted and ignored.

    Raises:
        ConfigError: A flag has no meaning for this load.
    """
    if args.duration and not (args.request_rate or args.trace):
        raise ConfigError("--duration goes with --request-rate or --trace; for a closed loop see --phases")
    if args.trace_speed and not args.trace:
        raise ConfigError("--trace-speed goes with --trace")
    if args.burstiness and not args.request_rate:
        raise ConfigError("--burstiness goes with --request-rate")


def _warm_up(args: argparse.Namespace, endpoint: Any, conversations: list[Any], skip: int, load: Any) -> None:
    """Sends prompts that the run itself will not, as far as the dataset has others."""
    from outpace.bench import client
    from outpace.bench.workload import Closed, make_queries

    lengths = [args.output_len or DEFAULT_OUTPUT_LEN] * args.num_warmups
    queries = make_queries(conversations, lengths, args.seed, skip)
    concurrency = load.concurrency if isinstance(load, Closed) else len(queries)
    client.run(endpoint, queries, Closed(concurrency), args.timeout)


@contextmanager
def _progress(number: int, load: Any) -> Iterator[Callable[[], None]]:
    """A bar on stderr, drawn twice a second (it shares the cores); gives the function that advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from outpace.bench.workload import Phased

    console = Console(stderr=True)
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None if isinstance(load, Phased) else number)
        yield lambda: bar.advance(task)


def _shown_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as they were, for the result; never the key."""
    hidden = ("run", "api_key", "command", "bench_command", "version")
    shown = {name: value for name, value in vars(args).items() if name not in hidden}
    infinite = {name: str(value) for name, value in shown.items() if value == math.inf}  # JSON has none
    settings: dict[str, Any] = json.loads(json.dumps(shown | infinite, default=str))
    return settings


# --- bench sweep ----------------------------------------------------------------------------------------


def _add_sweep(commands: Any) -> None:
    parser = _add(commands, "sweep", _sweep, "compare configurations of a server over loads, interleaved")
    what = parser.add_argument_group("Configurations")
    what.add_argument(
        "--server",
        action="append",
        default=[],
        metavar="LABEL: ARGS",
        help="an outpace serve with these arguments; may be given several times",
    )
    what.add_argument(
        "--policies",
        metavar="A,B,...",
        help="short for a --server per speculation policy: off,fixed:1,fixed:3,goodput",
    )
    what.add_argument("--serve-args", default="", metavar="ARGS", help="arguments of every outpace serve")
    what.add_argument(
        "--command",
        dest="commands",
        action="append",
        default=[],
        metavar="LABEL: COMMAND",
        help="any server to start; {port} in it is replaced",
    )
    what.add_argument(
        "--base-url",
        dest="base_urls",
        action="append",
        default=[],
        metavar="LABEL=URL",
        help="a server that runs already; it is never frozen",
    )
    what.add_argument("--baseline", metavar="LABEL", help="what ratios are to (default: the first)")
    what.add_argument("--model", metavar="NAME", help="default: the first that each server lists")
    what.add_argument("--step-log", action="store_true", help="let each outpace serve write --step-log")
    loads = parser.add_argument_group("Loads")
    loads.add_argument(
        "--concurrency", type=_list_of(_COUNT), default=(), metavar="N,...", help="closed loops"
    )
    loads.add_argument(
        "--request-rates",
        type=_list_of(_POSITIVE),
        default=(),
        metavar="R,...",
        help="open loops",
    )
    loads.add_argument("--trace", type=Path, metavar="FILE", help="open loop: a trace's arrivals")
    loads.add_argument(
        "--trace-speed", type=_list_of(_POSITIVE), metavar="X,...", help="times as fast (default: 1)"
    )
    loads.add_argument(
        "--num-prompts",
        type=_COUNT,
        metavar="N",
        help="requests of a run (default: 2 per client and at least 8; rates: 60 s; traces: all)",
    )
    loads.add_argument("--repetitions", type=_COUNT, default=5, metavar="N", help="default: 5")
    loads.add_argument(
        "--restart",
        action="store_true",
        help="new servers for each repetition: their speeds differ by 1 to 3 %%",
    )
    loads.add_argument(
        "--num-warmups",
        type=_number(int, 0),
        default=4,
        metavar="N",
        help="requests before each run, not counted (default: 4)",
    )
    out = parser.add_argument_group("Results")
    out.add_argument("--json", type=Path, required=True, metavar="FILE", help="saved after every run")
    out.add_argument("--resume", action="store_true", help="go on with FILE: do only the runs it lacks")
    out.add_argument(
        "--plots", action=argparse.BooleanOptionalAction, default=True, help="draw PNG plots beside FILE"
    )
    out.add_argument("--log-dir", type=Path, metavar="DIR", help="servers' logs (default: beside FILE)")
    out.add_argument("--start-timeout", type=_POSITIVE, default=300.0, metavar="SECONDS", help="default: 300")
    _add_queries(parser)


def _sweep(args: argparse.Namespace) -> int:
    from outpace.bench import plots, sweep

    if args.plots:
        plots.require_matplotlib()
    log_dir = args.log_dir or args.json.with_suffix(".logs")
    plan = _plan(args, log_dir)
    result = sweep.run(plan, args.json, log_dir, args.start_timeout, args.resume)
    sweep.print_points(result)
    if args.plots:
        for path in plots.draw(result, args.json.parent, args.json.stem, {}):
            print(path)
    failed = sum("error" in cell for cell in result["cells"])
    print(json.dumps({name: value for name, value in result.items() if name != "cells"} | {"failed": failed}))
    if failed:
        raise BenchError(f"{failed} of {len(result['cells'])} runs failed; --resume does them again")
    return 0


def _plan(args: argparse.Namespace, log_dir: Path) -> Any:
    from outpace.bench import report, sweep

    configurations = _configurations(args, log_dir)
    kinds: tuple[tuple[Any, tuple[float, ...]], ...] = (
        ("concurrency", args.concurrency),
        ("rate", args.request_rates),
        ("trace", (args.trace_speed or (1.0,)) if args.trace else ()),
    )
    if args.trace_speed and not args.trace:
        raise ConfigError("--trace-speed goes with --trace")
    if args.duration and not (args.request_rates or args.trace):
        raise ConfigError("--duration goes with --request-rates or --trace")
    if args.burstiness and not args.request_rates:
        raise ConfigError("--burstiness goes with --request-rates")
    return sweep.Plan(
        configurations=tuple(configurations),
        points=tuple(dict.fromkeys(sweep.Point(kind, value) for kind, values in kinds for value in values)),
        repetitions=args.repetitions,
        baseline=args.baseline or (configurations[0].label if configurations else ""),
        conversations=_conversations(args),
        endpoint_options=_endpoint_options(args),
        model=args.model,
        output_len=args.output_len,
        num_prompts=args.num_prompts,
        num_warmups=args.num_warmups,
        duration_s=args.duration,
        burstiness=args.burstiness or 1.0,
        datasets=tuple(args.dataset),
        trace=args.trace,
        goals=report.parse_goals(args.goodput),
        timeout_s=args.timeout,
        seed=args.seed,
        restart=args.restart,
    )


def _configurations(args: argparse.Namespace, log_dir: Path) -> list[Any]:
    """In the order of --policies, --server, --command, --base-url."""
    from outpace.bench.client import root_url
    from outpace.bench.sweep import Configuration

    own = [(policy, _policy_flags(policy)) for policy in (args.policies or "").split(",") if policy]
    own += [(label, shlex.split(words)) for label, words in map(_labelled, args.server)]
    if (args.serve_args or args.step_log) and not own:
        raise ConfigError("--serve-args and --step-log go with --server or --policies")
    configurations = []
    for label, words in own:
        command = [sys.executable, "-m", "outpace", "serve", *shlex.split(args.serve_args), *words]
        step_log = log_dir / f"{label.replace('/', '_')}.steps.jsonl" if args.step_log else None
        command += ["--port", "{port}", *(("--step-log", str(step_log)) if step_log else ())]
        configurations.append(Configuration(label, tuple(command), is_own=True, step_log=step_log))
    for label, line in map(_labelled, args.commands):
        if "{port}" not in line:
            raise ConfigError(f"--command {label!r} must say where the port goes: {{port}}")
        configurations.append(Configuration(label, tuple(shlex.split(line))))
    for text in args.base_urls:
        label, equals, url = text.partition("=")
        if not label or not equals:
            raise ConfigError(f"--base-url takes LABEL=URL, got {text!r}")
        configurations.append(Configuration(label, base_url=root_url(url)))
    return configurations


def _policy_flags(policy: str) -> list[str]:
    """`fixed:3` names a policy and its draft length."""
    name, _, length = policy.partition(":")
    return ["--spec-policy", name, *(("--spec-tokens", length) if length else ())]


def _labelled(text: str) -> tuple[str, str]:
    """Splits `LABEL: WORDS` at the first colon before a space, since a label may be `fixed:3`."""
    label, colon, words = (text + " ").partition(": ")
    if not colon or not label.strip():
        raise ConfigError(f"a label and a colon must come first, as 'off: --spec-policy off'; got {text!r}")
    return label.strip(), words.strip()


# --- bench plot -----------------------------------------------------------------------------------------


def _add_plot(commands: Any) -> None:
    parser = _add(commands, "plot", _plot, "draw a result of bench serve or bench sweep as PNG")
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULT.json",
        help="several sweeps of the same configurations over different loads are one: their table is printed",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to (default: beside the first)")
    parser.add_argument(
        "--step-log",
        dest="step_logs",
        action="append",
        default=[],
        metavar="LABEL=FILE",
        help="a server's --step-log to draw too; those of a single sweep are found by themselves",
    )


def _plot(args: argparse.Namespace) -> int:
    from outpace.bench import plots, report, sweep

    results = [report.read_json(path) for path in args.results]
    result = sweep.join(results) if len(results) > 1 else results[0]
    pairs = [text.partition("=") for text in args.step_logs]
    if wrong := [label for label, equals, _ in pairs if not equals]:
        raise ConfigError(f"--step-log takes LABEL=FILE, got {wrong[0]!r}")
    logs = {label: Path(file) for label, _, file in pairs}
    first = args.results[0]
    for path in plots.draw(result, args.out or first.parent, first.stem, logs):
        print(path)
    if len(results) > 1:
        sweep.print_points(result)
    return 0
