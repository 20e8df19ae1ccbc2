"""What tests of training share: tiny datasets, runs of a few steps, engines over a directory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from outpace.config import EngineConfig
from outpace.engine.engine import Engine
from outpace.training.trainer import TrainConfig


def row(*contents: str, **more: Any) -> dict[str, Any]:
    """A conversation, the user first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)], **more}


def write_rows(path: Path, rows: list[Any]) -> str:
    """A dataset; what is no text is written as JSON."""
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    text = "\n".join(lines) + "\n"
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return str(path)


def tiny_run(target: Path, data: str, out: Path, method: str = "medusa", **more: Any) -> TrainConfig:
    """A run that ends soon."""
    settings: dict[str, Any] = {
        "model": str(target),
        "max_len": 64,
        "batch_tokens": 128,
        "holdout": 4,
        "dtype": "float32",
        "hidden_cache": "none",
    }
    return TrainConfig(method, data, out, **settings | more)


def losses_of(out: Path) -> list[float]:
    """The loss of each step, from the log."""
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


def engine_of(model: Path, **settings: Any) -> Engine:
    """An engine over a directory, with drafts of a fixed length."""
    policy: dict[str, Any] = {"spec_policy": "fixed"} if "spec_method" in settings else {}
    common: Any = {"dtype": "float32", "kernels": "reference", "max_model_len": 128, "num_threads": 1}
    return Engine.from_config(EngineConfig(model=str(model), **common, **policy, **settings))
