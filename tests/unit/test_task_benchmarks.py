"""benchmarks/tasks.py and benchmarks/offline_online.py, with a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import offline_online
import pytest
import tasks

from outpace.cli import main
from tiny import write_model
from training_runs import row, write_rows

TRAIN = "--max-len 64 --batch-tokens 128 --holdout 2 --max-steps 3 --dtype float32 --hidden-cache none"
DRAFTS = ["lossless", "medusa", "redrafter", "shared"]


def test_a_task_is_done_stage_by_stage_and_an_interrupted_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[list[str]] = []
    broken = {"redrafter"}

    def here(words: list[str], **_: Any) -> Any:
        """Runs a command in this process, which has imported everything."""
        done.append(words[3:])
        code = 1 if broken & set(words) else main(words[3:])
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(tasks, "subprocess", SimpleNamespace(run=here))
    rows = [row(f"say {i}", f"it is {i}", references=[f"it is {i}"]) for i in range(40)]
    data = write_rows(tmp_path / "data.jsonl.gz", rows)
    out = tmp_path / "task"
    words = ["--train", data, "--valid", data, "--quality", "exact_match", "--out", str(out), "--rows", "30"]
    words += ["--model", str(write_model(tmp_path / "model")), "--train-args", TRAIN, "--max-tokens", "8"]
    words += ["--evaluate-args", "--spec-policy fixed --num-threads 1", "--num-prompts", "3"]
    words += ["--draft-rows", "35", "--args-of", "lossless=--settings '{\"num_streams\": 2}'"]
    tasks.main([*words, "--drafts", "lossless"])
    base, alone = (line.split(" | ") for line in (out / "table.md").read_text().splitlines()[2:4])
    assert (base[0], alone[0]) == ("| baseline", "| streaming, lossless")
    assert base[1] == alone[1], "lossless answers are the baseline's"
    del done[:]
    with pytest.raises(SystemExit, match="redrafter failed"):
        tasks.main(words)
    with pytest.raises(SystemExit, match="was begun with"):
        tasks.main([*words, "--rows", "29"])
    with pytest.raises(SystemExit, match="baseline was made by"):
        tasks.main([*words, "--epochs", "9"])
    with pytest.raises(SystemExit, match="2"):
        tasks.main([*words, "--draft-rows", "-1"])
    with pytest.raises(SystemExit, match="lossless was made by"):
        tasks.main([*words, "--args-of", "lossless=--lr 0.1"])
    broken.clear()
    del done[:-1]
    tasks.main([*words, "--args-of", "shared=--lr 0.1"])
    stages = json.loads((out / "stages.json").read_text())["stages"]
    assert list(stages) == ["baseline", "own", *(s for name in DRAFTS for s in (name, f"evaluate-{name}"))]
    assert "num_streams" in stages["lossless"]["command"]
    assert "num_streams" not in stages["shared"]["command"]
    assert stages["shared"]["command"].endswith("--lr 0.1")
    assert [command[0] for command in done] == ["train", *(["train", "evaluate"] * 2)]
    assert len((out / "train.jsonl").read_text().splitlines()) == 30
    assert json.loads((out / "own.jsonl.gz.json").read_text())["num_done"] == 35
    title, _, *lines = (out / "table.md").read_text().splitlines()
    assert title.startswith(
        "|  | exact_match | tokens per pass | speed-up at 1 | speed-up at 8 | of TPOT at 1 | of TPOT at 8 |"
    )
    names = [line.split(" | ")[0] for line in lines[:5]]
    assert names == ["| baseline", "| streaming, lossless", "| medusa", "| redrafter", "| streaming, shared"]
    extra = {
        name: int(line.split(" | ")[7].replace(",", "")) for name, line in zip(names, lines, strict=False)
    }
    assert 0 == extra["| baseline"] < extra["| streaming, shared"] < extra["| streaming, lossless"]
    assert lines[-3].startswith("Four heads of Medusa as in its paper would have")
    assert lines[-1].startswith("Shared less baseline")


def test_what_is_accepted_offline_is_accepted_over_http(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, draft = write_model(tmp_path / "target"), write_model(tmp_path / "draft", noise=0.3)
    data = write_rows(tmp_path / "data.jsonl", [row(chr(97 + i) * 3, "y") for i in range(8)])
    flags = ["--model", str(target), "--data", data, "--max-tokens", "32", "--num-prompts", "6"]
    with pytest.raises(SystemExit) as ended:
        offline_online.main(
            [str(draft), *flags, "--concurrency", "2", "--spec-tokens", "3", "--num-threads", "1"]
        )
    assert ended.value.code == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["agrees"]
    (result,) = report["results"]
    assert result["num_drafts"][0] == result["num_drafts"][1] > 50
    offline, online = result["acceptance_by_depth"]
    assert offline == pytest.approx(online[: len(offline)])
