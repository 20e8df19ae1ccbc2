"""The table of the Speculative Streaming paper, for a task: quality, tokens per pass and speed of each draft.

    python benchmarks/tasks.py --out results/sql --quality exact_match execution_match \\
      --train sql/train.jsonl.gz --valid sql/valid.jsonl.gz

    e2e_nlg     --quality rougeL bleu
    dialogsum   --quality rouge1 rougeLsum

Stages, each one command of outpace, its output in OUT/NAME.log and its time in OUT/stages.json:

    baseline            the model fine-tuned on the task
    own                 the baseline's own answers to the training prompts
    lossless,           streams trained for the baseline on these
    medusa, redrafter   and heads as well, whose hidden states are there by then
    shared              streams fine-tuned along with the model, on the task's answers
    evaluate-NAME       each of these on the validation file; shared beside the baseline

A stage that is done is not done again, and one that was interrupted goes on where it was: call the same
command anew. At the end OUT/table.md. A change of flags needs another OUT, but for those of stages to come.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shlex
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from outpace.bench.report import read_json, write_json

_DRAFTS = ("lossless", "medusa", "redrafter", "shared")
_TRAINED = ("baseline", *_DRAFTS)
_TITLES = {"lossless": "streaming, lossless", "shared": "streaming, shared"}


class Stages:
    """Runs commands once each, and remembers how long each took."""

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self._file = out, out / "stages.json"
        self.state = read_json(self._file) if self._file.exists() else {"settings": settings, "stages": {}}
        if self.state["settings"] != settings:
            sys.exit(f"{out} was begun with {self.state['settings']}, not {settings}: choose another --out")

    def run(self, name: str, words: list[str], output: Path, checkpoint: Path | None = None) -> None:
        """Runs `outpace WORDS` unless it is done; goes on from its checkpoint, or begins its output anew."""
        command = shlex.join(["outpace", *words])
        if done := self.state["stages"].get(name):
            if done["command"] != command:
                sys.exit(f"{name} was made by {done['command']}, not {command}: choose another --out")
            return
        if checkpoint is not None and checkpoint.exists():
            words = [*words, "--resume"]
        elif output.is_dir():
            shutil.rmtree(output)
        else:
            output.unlink(missing_ok=True)
        print(f"{time.strftime('%H:%M:%S')} {name}: outpace {shlex.join(words)}", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        with (self.out / f"{name}.log").open("ab") as log:
            code = subprocess.run(
                [sys.executable, "-m", "outpace", *words], stdout=log, stderr=log, check=False
            ).returncode
        if code:
            tail = (self.out / f"{name}.log").read_text(errors="replace")[-2000:]
            sys.exit(f"{name} failed; {self.out / name}.log ends in\n{tail}")
        seconds = time.perf_counter() - begin
        self.state["stages"][name] = {"command": command, "seconds": seconds}
        write_json(self._file, self.state)


def first_rows(source: Path, target: Path, num_rows: int | None) -> Path:
    """The first lines of a dataset as a file of their own."""
    if num_rows is None:
        return source
    with gzip.open(source) if source.suffix == ".gz" else source.open("rb") as lines:
        target.write_bytes(b"".join(islice(lines, num_rows)))
    return target


def train(stages: Stages, args: argparse.Namespace, name: str, words: list[str]) -> Path:
    """A stage that trains; its directory."""
    out = stages.out / name
    words = ["train", *words, "--out", str(out), *shlex.split(args.train_args)]
    words += shlex.split(args.args_of.get(name, ""))
    stages.run(name, words, out, out / "checkpoint" / "run.json")
    return out


def of_stage(text: str) -> tuple[str, str]:
    """STAGE=FLAGS."""
    name, _, words = text.partition("=")
    if name not in _TRAINED:
        raise argparse.ArgumentTypeError(f"{text!r} must begin with one of {', '.join(_TRAINED)} and =")
    return name, words


def draft_of(out: Path, name: str) -> Path:
    """Where the draft that a stage trained is."""
    return out / name / "streams" if name == "shared" else out / name


def run_task(stages: Stages, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """All stages; the report of each evaluation."""
    out = stages.out
    data = str(first_rows(args.train, out / "train.jsonl", args.rows))
    model = [] if args.model is None else ["--model", args.model]
    tuned = ["--data", data, "--epochs", str(args.epochs), *model]
    baseline = train(stages, args, "baseline", ["finetune", *tuned])
    own = out / "own.jsonl.gz"
    num_prompts = args.draft_rows
    prompts = data if num_prompts is None else str(first_rows(args.train, out / "prompts.jsonl", num_prompts))
    words = ["distill", "--model", str(baseline), "--data", prompts, "--out", str(own)]
    words += ["--max-tokens", str(args.max_tokens)]
    stages.run("own", words, own, own.with_name(own.name + ".json"))
    for_baseline = ["--model", str(baseline), "--data", str(own), "--epochs", str(args.draft_epochs)]
    methods = {
        "lossless": ["streaming", "--mode", "lossless", *for_baseline],
        "medusa": ["medusa", *for_baseline],
        "redrafter": ["redrafter", *for_baseline],
        "shared": ["streaming", "--mode", "shared", *tuned],
    }
    reports = {}
    for name in args.drafts:
        train(stages, args, name, methods[name])
        report = out / f"evaluate-{name}.json"
        words = [str(draft_of(out, name)), "--data", str(args.valid)]
        words += ["--base", str(baseline)] if name == "shared" else []
        words += ["--quality", *args.quality, "--concurrency", "1", "8", "--max-tokens", str(args.max_tokens)]
        words += ["--num-prompts", str(args.num_prompts), "--json", str(report)]
        stages.run(f"evaluate-{name}", ["evaluate", *words, *shlex.split(args.evaluate_args)], report)
        reports[name] = read_json(report)
    return reports


def table(out: Path, reports: dict[str, dict[str, Any]]) -> str:
    """The paper's table. Speed-ups are over the same model without speculation; TPOT leaves prompts out."""
    any_report = next(iter(reports.values()))
    metrics, num_loads = list(any_report["quality"]["metrics"]), len(any_report["results"])
    speeds = [f"speed-up at {r['concurrency']}" for r in any_report["results"]]
    speeds += [f"of TPOT at {r['concurrency']}" for r in any_report["results"]]
    titles = ["", *metrics, "tokens per pass", *speeds, "extra parameters", "training, s"]
    lines = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]

    def row(name: str, quality: list[str], results: list[dict[str, float]]) -> None:
        numbers = [f"{results[0]['tokens_per_step']:.2f}", *_speeds(results)]
        extra = 0 if name == "baseline" else num_parameters(draft_of(out, name))
        seconds = read_json(out / name / "training.json")["seconds"]
        cells = [_TITLES.get(name, name), *quality, *numbers, f"{extra:,}", f"{seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")

    # what a draft answers that changes nothing is what the baseline answers
    of_base = any_report["quality"]["metrics"]
    of_shared = reports["shared"]["quality"]["metrics"] if "shared" in reports else {}
    bases = [_interval(of_shared[metric]["base"] if of_shared else of_base[metric]) for metric in metrics]
    row("baseline", bases, [{"tokens_per_step": 1.0, "speed_up": 1.0, "tpot_speed_up": 1.0}] * num_loads)
    for name, report in reports.items():
        found = report["quality"]["metrics"]
        row(name, [_interval(found[metric]) for metric in metrics], report["results"])
    heads = medusa_parameters(read_json(out / "baseline" / "config.json"))
    notes = [f"Four heads of Medusa as in its paper would have {heads:,} parameters"]
    for name in reports:
        notes[0] += f"; {name} has {heads / num_parameters(draft_of(out, name)):,.0f} times fewer"
    if of_shared:
        differences = ", ".join(f"{m} {_interval(of_shared[m]['difference'])}" for m in metrics)
        notes.append(f"Shared less baseline, 95 % intervals of pairs: {differences}")
    return "\n".join([*lines, "", "\n\n".join(notes), ""])


def _speeds(results: list[dict[str, float]]) -> list[str]:
    """Of whole answers at each concurrency, then of their tokens after the first."""
    return [f"{r[name]:.2f}" for name in ("speed_up", "tpot_speed_up") for r in results]


def num_parameters(draft: Path) -> int:
    """Of a draft as it is served; which tokens it drafts is not one."""
    weights = load_file(draft / "model.safetensors").values()
    return sum(weight.numel() for weight in weights if weight.is_floating_point())


def medusa_parameters(model: dict[str, int], num_heads: int = 4) -> int:
    """Of Medusa's heads as in the paper: a block and an output head of its own for each."""
    width = model["hidden_size"]
    return num_heads * (width * width + width * model["vocab_size"])


def _interval(result: dict[str, float]) -> str:
    return f"{result['value']:.2f} ({result['low']:.2f} to {result['high']:.2f})"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--train", type=Path, required=True, help="JSON lines (.gz) with messages")
    add("--valid", type=Path, required=True, help="the same, `references` where there are several")
    add("--quality", nargs="+", required=True, help="metrics of outpace evaluate")
    add("--out", type=Path, required=True, help="where everything is written")
    add("--model", help="what is fine-tuned; the default model if not given")
    add("--rows", type=int, help="only the first so many of --train")
    add("--draft-rows", type=int, help="the same of prompts that drafts learn from; as --rows if not given")
    add("--epochs", type=int, default=3, help="of baseline and shared")
    add("--draft-epochs", type=int, default=3, help="of the others")
    add("--drafts", nargs="+", choices=_DRAFTS, default=list(_DRAFTS), help="which of them, in this order")
    add("--num-prompts", type=int, default=500, help="of --valid")
    add("--max-tokens", type=int, default=128, help="of an answer")
    add("--train-args", default="", help="more flags of every outpace train, as one word")
    add(
        "--args-of",
        type=of_stage,
        action="append",
        default=[],
        metavar="STAGE=FLAGS",
        help="more flags of one stage",
    )
    add("--evaluate-args", default="", help="more flags of every outpace evaluate, as one word")
    args = parser.parse_args(words)
    for name in ("rows", "draft_rows"):
        if (number := getattr(args, name)) is not None and number < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {number}")
    args.args_of = dict(args.args_of)
    # all else that makes a difference is in the commands of the stages
    stages = Stages(args.out, {name: str(getattr(args, name)) for name in ("train", "rows", "draft_rows")})
    reports = run_task(stages, args)
    text = table(args.out, reports)
    (args.out / "table.md").write_text(text, encoding="utf-8")
    print(text)
    print(json.dumps({"kind": "tasks", "stages": stages.state["stages"], "out": str(args.out)}))


if __name__ == "__main__":
    main()
