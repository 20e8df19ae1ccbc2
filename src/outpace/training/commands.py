"""The flags of `outpace train`, `distill` and `evaluate`; heavy parts are imported when they run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from outpace.errors import ConfigError


def add_train_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `outpace train`, with the function that runs it as `run`."""
    parser.set_defaults(run=_train)
    add = parser.add_argument
    add("method", metavar="METHOD", help="what to train: draft_model, medusa")
    add("--model", metavar="MODEL", help="the target (default: SmolLM2-135M-Instruct)")
    add(
        "--data",
        required=True,
        metavar="FILE|HUB_ID",
        help="JSON lines (.gz) with messages, or a hub dataset",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="where to write the draft; new or empty")
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
    add(
        "--hidden-cache",
        metavar="DIR",
        help="where the target's hidden states are kept, or none (default: below OUTPACE_CACHE)",
    )
    add("--save-every", type=_count, default=200, metavar="N", help="steps per checkpoint (default: 200)")
    add("--resume", action="store_true", help="go on from the last checkpoint in DIR, with the same settings")


def _train(args: argparse.Namespace) -> int:
    settings = _json_object(args.settings, "--settings")
    if args.mode is not None and settings.setdefault("mode", args.mode) != args.mode:
        raise ConfigError(f"mode is given twice: --mode {args.mode} and {settings['mode']} in --settings")
    from outpace.training.trainer import TrainConfig, train

    names = set(TrainConfig.__dataclass_fields__) - {"settings"}
    values = {name: value for name, value in vars(args).items() if name in names}
    report = train(TrainConfig(settings=settings, **values))
    _print_table(f"{args.method}, {report['num_steps']} steps", report["metrics"])
    print(json.dumps(report))
    return 0


def _print_table(title: str, values: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in ("", "held out"):
        table.add_column(name, justify="right")
    for name, value in values.items():
        table.add_row(name, f"{value:.4f}")
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
_share = _checked(float, lambda x: 0 <= x <= 1, "a number in [0, 1]")
