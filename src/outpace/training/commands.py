"""The flags of `outpace train`, `distill` and `evaluate`; heavy parts are imported when they run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outpace.errors import ConfigError


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `outpace train`, with the function that runs it as `run`."""
    parser.set_defaults(run=_train)
    add = parser.add_argument
    methods = sorted(file.stem for file in (Path(__file__).parent / "methods").glob("[!_]*.py"))
    add("method", metavar="METHOD", help=f"what to train: {', '.join(methods)}")
    add("--model", metavar="MODEL", help="the target (default: SmolLM2-135M-Instruct)")
    add(
        "--data",
        required=True,
        metavar="FILE|HUB_ID",
        help="JSON lines (.gz) with messages, or a hub dataset",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="where to write the draft; new or empty")
    add("--init", type=Path, metavar="DIR", help="a draft that an earlier run wrote, to train it further")
    add("--mode", metavar="NAME", help="short for this setting of the method, where it has one")
    add("--settings", default="{}", metavar="JSON", help='settings of the method, such as {"num_heads": 3}')
    add("--epochs", type=_count, default=1, metavar="N", help="passes over the data (default: 1)")
    add("--max-steps", type=_count, metavar="N", help="most steps")
    add("--lr", type=_positive, metavar="X", help="peak learning rate (default: the method's)")
    add("--batch-tokens", type=_count, default=4096, metavar="N", help="of a step per device (default: 4096)")
    add(
        "--max-len",
        type=_count,
        default=1024,
        metavar="N",
        help="longer conversations are cut (default: 1024)",
    )
    add("--holdout", type=_count, default=100, metavar="N", help="conversations to measure on (default: 100)")
    add("--max-bad-share", type=_share, default=0.01, metavar="X", help="of unusable lines (default: 0.01)")
    add("--seed", type=int, default=0, metavar="N", help="of order and initial weights (default: 0)")
    add(
        "--dtype", choices=("bfloat16", "float32"), help="of the frozen target (default: what the device can)"
    )
    add("--save-dtype", choices=("bfloat16", "float32"), help="of what is written (default: that of --dtype)")
    add(
        "--hidden-cache",
        metavar="DIR",
        help="where the target's hidden states are kept, or none (default: below OUTPACE_CACHE)",
    )
    add("--save-every", type=_count, default=200, metavar="N", help="steps per checkpoint (default: 200)")
    add(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in DIR, with the same settings; --max-steps may differ",
    )


def _train(args: argparse.Namespace) -> int:
    settings = _json_object(args.settings, "--settings")
    if args.mode is not None and settings.setdefault("mode", args.mode) != args.mode:
        raise ConfigError(f"mode is given twice: --mode {args.mode} and {settings['mode']} in --settings")
    from outpace.training.trainer import TrainConfig, train

    names = set(TrainConfig.__dataclass_fields__) - {"settings"}
    values = {name: value for name, value in vars(args).items() if name in names}
    report = train(TrainConfig(settings=settings, **values))
    rows = [[name, _shown(value)] for name, value in report["metrics"].items()]
    _print_table(f"{args.method}, {report['num_steps']} steps", ["", "held out"], rows)
    print(json.dumps(report))
    return 0


def add_distill_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `outpace distill`, with the function that runs it as `run`."""
    from outpace import settings
    from outpace.config import EngineConfig

    parser.set_defaults(run=_distill)
    add = parser.add_argument
    add(
        "--data",
        required=True,
        metavar="FILE|HUB_ID",
        help="JSON lines (.gz) with messages, or a hub dataset",
    )
    add("--out", required=True, type=Path, metavar="FILE", help="what to write, .jsonl or .jsonl.gz")
    add("--temperature", type=_not_negative, default=0.0, metavar="X", help="of the answers (default: 0)")
    add("--max-tokens", type=_count, default=512, metavar="N", help="of an answer (default: 512)")
    add("--num-conversations", type=_count, metavar="N", help="the first so many (default: all)")
    add("--max-bad-share", type=_share, default=0.01, metavar="X", help="of unusable lines (default: 0.01)")
    add("--resume", action="store_true", help="go on where an earlier run stopped, with the same settings")
    settings.add_flags(parser, [EngineConfig], model_positional=False)


def _distill(args: argparse.Namespace) -> int:
    import os

    from outpace import settings
    from outpace.config import EngineConfig

    engine = settings.load(EngineConfig, vars(args), os.environ)
    from outpace.training.distill import DistillConfig, run_distill

    names = set(DistillConfig.__dataclass_fields__) - {"seed"}
    values = {name: value for name, value in vars(args).items() if name in names}
    report = run_distill(engine, DistillConfig(seed=engine.seed, **values), sys.stderr.isatty())
    print(json.dumps(report))
    return 0


def add_evaluate_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `outpace evaluate`, with the function that runs it as `run`."""
    parser.set_defaults(run=_evaluate)
    add = parser.add_argument
    add("draft", type=Path, metavar="DIR", help="what outpace train wrote")
    add("--data", required=True, metavar="FILE|HUB_ID", help="conversations whose prompts are answered")
    add("--model", metavar="MODEL", help="the target (default: the one that the draft was trained for)")
    add("--base", metavar="MODEL", help="measure this model beside it, without drafts, such as its baseline")
    add(
        "--quality",
        nargs="+",
        default=[],
        metavar="METRIC",
        help="score answers against the data's: exact_match, execution_match (SQL), rouge1, rouge2, rougeL, "
        "rougeLsum, bleu",
    )
    add("--num-prompts", type=_count, default=80, metavar="N", help="how many (default: 80)")
    add(
        "--concurrency",
        type=_count,
        nargs="+",
        default=[1, 8, 32],
        metavar="N",
        help="requests at a time, each measured by itself (default: 1 8 32)",
    )
    add("--repeat", type=_count, default=1, metavar="N", help="how often each is measured (default: 1)")
    add("--max-tokens", type=_count, default=128, metavar="N", help="of an answer (default: 128)")
    add("--temperature", type=_not_negative, default=0.0, metavar="X", help="of the answers (default: 0)")
    add("--spec-tokens", type=_count, metavar="N", help="most draft tokens for a sequence in a step")
    add("--spec-policy", default="goodput", metavar="NAME", help="who says how many (default: goodput)")
    add("--num-threads", type=_count, metavar="N", help="of the kernels (default: one per core)")
    add("--step-log", metavar="FILE", help="append a JSON line for each step with the draft")
    add("--max-bad-share", type=_share, default=0.01, metavar="X", help="of unusable lines (default: 0.01)")
    add("--json", type=Path, metavar="FILE", help="write the report here too")


def _evaluate(args: argparse.Namespace) -> int:
    from outpace.bench.report import write_json
    from outpace.training.evaluate import EvaluateConfig, evaluate

    values = {
        name: value for name, value in vars(args).items() if name in EvaluateConfig.__dataclass_fields__
    }
    values |= {name: tuple(values[name]) for name in ("concurrency", "quality")}
    report = evaluate(EvaluateConfig(**values))
    _print_table(
        str(args.draft),
        ["concurrency", *(str(result["concurrency"]) for result in report["results"])],
        [
            [name, *(_shown(result[name]) for result in report["results"])]
            for name in report["results"][0]
            if name != "concurrency"
        ],
    )
    if "quality" in report:
        _print_quality(report["quality"])
    if args.json:
        write_json(args.json, report)
    print(json.dumps(report))
    return 0


def _print_quality(quality: dict[str, Any]) -> None:
    of = quality["metrics"]
    names = ["", *(name for name in ("base", "difference") if name in next(iter(of.values())))]
    cells = [[_interval(result[name] if name else result) for name in names] for result in of.values()]
    cut = ", ".join(map(str, quality["num_cut"]))
    title = f"quality of {quality['num_answers']} answers ({cut} cut), in percent, with 95 % intervals"
    rows = [[metric, *row] for metric, row in zip(of, cells, strict=True)]
    _print_table(title, ["", "answers", *names[1:]], rows)


def _interval(result: dict[str, float]) -> str:
    return f"{result['value']:.2f} ({result['low']:.2f} to {result['high']:.2f})"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{x:.2f}" for x in value)
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """On stderr: stdout is for the JSON."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(stderr=True).print(table)


def _json_object(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a JSON object, got {text!r}")
    return value


def _checked(kind: Callable[[str], Any], fits: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    """A type for argparse that says what it accepts."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not fits(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return parse


_count = _checked(int, lambda x: x >= 1, "an integer of at least 1")
_positive = _checked(float, lambda x: 0 < x < float("inf"), "a number above 0")
_not_negative = _checked(float, lambda x: 0 <= x < float("inf"), "a number of at least 0")
_share = _checked(float, lambda x: 0 <= x <= 1, "a number in [0, 1]")
