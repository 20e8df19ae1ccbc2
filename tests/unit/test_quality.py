"""Quality of answers: SQL as text and by execution, ROUGE, BLEU, and the interval that chance leaves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from outpace.cli import main
from outpace.errors import ConfigError
from outpace.training.quality import METRICS, Question, load_metrics, score
from outpace.training.sql import create_statements, exact_match, execution_match
from outpace.training.trainer import train
from tiny import write_model
from training_runs import row, tiny_run, write_rows

SINGERS = (
    "Write a query.\n\n"
    "CREATE TABLE singer (Singer_ID INTEGER, Name VARCHAR, Age INTEGER, PRIMARY KEY (Singer_ID))\n"
    "CREATE TABLE song (Title VARCHAR, Singer_ID INTEGER, Sales INTEGER, "
    "FOREIGN KEY (Singer_ID) REFERENCES singer(Singer_ID))\n\nQuestion: who?"
)


# --- SQL ------------------------------------------------------------------------------------------------


def test_case_and_spaces_outside_of_quotes_and_a_last_semicolon_do_not_count() -> None:
    assert exact_match("select avg(x) , Max(y) FROM t ;", "SELECT AVG( x ), MAX(y)\nfrom T")
    assert not exact_match("SELECT x FROM t WHERE y = 'A'", "SELECT x FROM t WHERE y = 'a'")
    assert not exact_match("SELECT x FROM t WHERE y = 'a b'", "SELECT x FROM t WHERE y = 'a  b'")
    assert not exact_match("SELECT x FROM t", "SELECT x, x FROM t")


def test_the_statements_of_a_prompt_end_at_their_own_parenthesis() -> None:
    statements = create_statements("CREATE TABLE a (x DECIMAL(8, 2), y INT) and create table b (z TEXT) etc.")
    assert statements == ["CREATE TABLE a (x DECIMAL(8, 2), y INT)", "create table b (z TEXT)"]
    assert create_statements("CREATE TABLE a (x INT") == []


@pytest.mark.parametrize(
    ("answer", "reference", "is_same"),
    [
        ("SELECT Name FROM singer WHERE Age > 20", "select name from singer where 20 < age", True),
        ("SELECT Name FROM singer WHERE Age > 20", "SELECT Name FROM singer WHERE Age >= 20", False),
        ("SELECT Name FROM singer WHERE Age > 20", "SELECT Name FROM singer WHERE Age > 21", False),
        ("SELECT Age FROM singer WHERE Name = 'Ann'", 'SELECT Age FROM singer WHERE Name = "Ann"', True),
        ("SELECT Age FROM singer WHERE Name = 'Bob'", 'SELECT Age FROM singer WHERE Name = "Ann"', False),
        ("SELECT Age FROM singer WHERE Name = 'A'", "SELECT Age FROM singer WHERE Name LIKE '%A%'", False),
        ("SELECT max(Sales) FROM song", "SELECT Sales FROM song ORDER BY Sales DESC LIMIT 1", True),
        ("SELECT Sales FROM song ORDER BY Sales", "SELECT Sales FROM song ORDER BY Sales DESC", False),
        ("SELECT Sales FROM song ORDER BY Sales", "SELECT Sales FROM song", True),
        ("SELECT DISTINCT Age FROM singer", "SELECT Age FROM singer", False),
        ("SELECT count(*) FROM singer", "SELECT count(Name) FROM singer", True),
        (
            "SELECT a.Name FROM singer AS a JOIN song AS b ON a.Singer_ID = b.Singer_ID WHERE Sales > 300",
            "SELECT Name FROM singer, song WHERE singer.Singer_ID = song.Singer_ID AND Sales > 300",
            True,
        ),
        (
            "SELECT Name FROM singer WHERE Singer_ID NOT IN (SELECT Singer_ID FROM song WHERE Sales > 5)",
            "SELECT Name FROM singer WHERE Singer_ID NOT IN (SELECT Singer_ID FROM song)",
            False,
        ),
    ],
)  # fmt: skip
def test_queries_are_compared_by_what_they_find(answer: str, reference: str, is_same: bool) -> None:
    assert execution_match(SINGERS, answer, reference) == is_same
    assert execution_match(SINGERS, reference, reference)


@pytest.mark.parametrize(
    "answer",
    [
        "I do not know",
        "",
        "SELECT 1; SELECT Name FROM singer",
        "SELECT \0 FROM singer",
        "SELECT \ud800 FROM singer",
        "DROP TABLE singer",
        "ATTACH 'file.db' AS other",
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n",
        "SELECT a.Name FROM singer a, song b, song c, song d, song e, song f, song g, song h",
        "SELECT zeroblob(2000000000)",
    ],
)
def test_what_cannot_be_run_is_wrong_and_harms_nothing(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not execution_match(SINGERS, answer, "SELECT Name FROM singer")
    assert not list(tmp_path.iterdir())


def test_where_the_reference_says_nothing_the_text_decides() -> None:
    nothing = "SELECT Name FROM singer WHERE Age > 5 AND Age < 3"
    assert execution_match(SINGERS, nothing.lower() + ";", nothing)
    assert not execution_match(SINGERS, "SELECT Name FROM singer WHERE Age < 3 AND Age > 5", nothing)
    assert not execution_match(SINGERS, "SELECT Name FROM singer", "SELECT broken FROM nowhere")


# --- Metrics --------------------------------------------------------------------------------------------


def measured(name: str, answers: list[str], references: list[list[str]], **more: Any) -> dict[str, Any]:
    (metric,) = load_metrics([name])
    questions = [Question("", tuple(of_one)) for of_one in references]
    return score(metric, questions, answers, **more)


def test_rouge_takes_the_reference_that_fits_best() -> None:
    pytest.importorskip("rouge_score")
    assert measured("rouge1", ["the cat sat"], [["a dog", "The cats sat."]])["value"] == 100
    assert measured("rouge1", ["the cat"], [["the dog"]])["value"] == pytest.approx(50)
    swapped, reference = "Bo sat. Al ran.", "Al ran. Bo sat."
    assert measured("rougeLsum", [swapped], [[reference]])["value"] == 100
    assert measured("rougeL", [swapped], [[reference]])["value"] == pytest.approx(50)


def test_bleu_from_summed_counts_is_that_of_the_corpus() -> None:
    bleu = pytest.importorskip("sacrebleu.metrics.bleu")
    answers = ["the cat is on the mat", "there is a dog in the park today", "no"]
    references = [["the cat sat on the mat", "a cat is on the mat"], ["a dog is in the park today"], ["yes"]]
    streams = [[of_one[min(i, len(of_one) - 1)] for of_one in references] for i in range(2)]
    expected = bleu.BLEU().corpus_score(answers, streams).score
    assert measured("bleu", answers, references)["value"] == pytest.approx(expected)


def test_the_interval_covers_what_chance_leaves_and_pairs_narrow_it() -> None:
    rng = np.random.default_rng(1)
    right = rng.random(400) < 0.5
    better = right | (rng.random(400) < 0.1)
    references = [["x"]] * 400
    answers, base = (["x" if is_right else "y" for is_right in of] for of in (better, right))
    result = measured("exact_match", answers, references, base=base)
    assert result["low"] < result["value"] < result["high"]
    assert 8 < result["high"] - result["low"] < 12  # 2 · 1.96 · √(.25 / 400)
    gain = result["difference"]
    assert gain["value"] == pytest.approx(result["value"] - result["base"]["value"])
    assert 0 < gain["low"] < gain["high"]
    assert gain["high"] - gain["low"] < 5
    assert result == measured("exact_match", answers, references, base=base)


def test_metrics_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--quality takes exact_match, .*bleu; got 'meteor'"):
        load_metrics(["meteor"])
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    for name, package in (("rouge2", "rouge-score"), ("bleu", "sacrebleu")):
        assert name in METRICS
        with pytest.raises(ConfigError, match=rf"--quality {name} needs {package}: .*'outpace\[eval\]'"):
            load_metrics([name])


# --- In outpace evaluate --------------------------------------------------------------------------------


def test_evaluation_scores_answers_and_compares_them_with_a_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, base = write_model(tmp_path / "target"), write_model(tmp_path / "base", noise=0.3)
    train(tiny_run(target, write_rows(tmp_path / "t.jsonl", [row("a", "b" * 20)] * 9), tmp_path / "draft"))
    flags = [str(tmp_path / "draft"), "--concurrency", "1", "2", "--max-tokens", "8", "--num-threads", "1"]
    flags += ["--base", str(base), "--quality", "exact_match", "--spec-policy", "fixed"]
    questions = [row(chr(97 + i), "no", references=["no", "never"]) for i in range(4)]
    questions.append(row("x", "y", references=[]))
    data = write_rows(tmp_path / "data.jsonl", questions)
    assert main(["evaluate", *flags, "--data", data]) == 2
    assert "data.jsonl:5: its references are not a list of texts" in capsys.readouterr().err
    assert main(["evaluate", *flags, "--data", data, "--max-bad-share", "0.5"]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out.splitlines()[-1])
    for result in report["results"]:
        assert result["num_answers"] == result["num_same_answers"] == 4
        assert result["speed_up_over_base"] > 0
    quality = report["quality"]
    assert (quality["num_answers"], len(quality["num_cut"])) == (4, 2)
    assert quality["metrics"]["exact_match"]["difference"]["value"] == 0
    assert "difference" in output.err


def test_execution_needs_tables_in_the_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = write_model(tmp_path / "target")
    data = write_rows(tmp_path / "data.jsonl", [row("a", "SELECT 1")])
    flags = ["--model", str(target), "--data", data, "--quality", "execution_match"]
    assert main(["evaluate", str(target), *flags]) == 2
    assert "data.jsonl:1: its prompt has no CREATE TABLE statement" in capsys.readouterr().err
