"""The commands `outpace profile` and `outpace simulate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from outpace import cli
from outpace.policy.cost import CostModel
from tiny import cost_model

ROOFLINE = '{"params": 1e9, "bandwidth": 1e12, "flops": 1e14}'


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(cost_model().to_json())
    return path


def test_a_roofline_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "machine.json"
    assert cli.main(["profile", "--roofline", ROOFLINE, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "assumption: a roofline, not a measurement" in printed
    assert "2.00" in printed, "a row takes 2 GB at 1 TB/s"
    assert float(CostModel.load(output).target_s(1, 1, 0, 0)) == pytest.approx(2e-3)


def test_a_profile_is_shown_and_drawn(profile: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    assert cli.main(["profile", "--show", str(profile), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_simulation_ends_with_json_of_every_policy(
    profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load = ["--num-requests", "4", "--output-len", "8", "--concurrency", "2"]
    assert cli.main(["simulate", str(profile), *load, "--policy", "off", "--policy", "fixed:2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    policies = json.loads(lines[-1])["policies"]
    assert list(policies) == ["off", "fixed:2"]
    assert policies["off"]["mean_draft_len"] == 0 < policies["fixed:2"]["mean_draft_len"]
    assert any("tokens_per_s" in line for line in lines[:-1])


@pytest.mark.parametrize("load", [["--request-rate", "1000"], ["--acceptance", "1"], ["--trace", "T"]])
def test_every_kind_of_load_runs(
    profile: Path, tmp_path: Path, load: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("timestamp_s,prompt_tokens,output_tokens\n0,5,6\n1,5,6\n")
    load = [str(trace) if word == "T" else word for word in load]
    common = ["--num-requests", "2", "--output-len", "6", "--policy", "goodput", "--policy", "slo"]
    assert cli.main(["simulate", str(profile), *common, *load, "--slo-tpot-ms", "50"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 2 <= result["policies"]["goodput"]["steps"] <= 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "0"], "--concurrency must be at least 1, got 0"),
        (["--concurrency", "2", "--request-rate", "1"], "give one of --concurrency, --request-rate"),
        (["--acceptance", "high"], "--acceptance must be a rate"),
        (["--acceptance", "1.5"], r"must be in [0, 1], got 1.5"),
        (["--acceptance", '[{"rates": [0.5], "since_s": 3}]'], "must begin at since_s 0"),
        (["--policy", "slow"], "must be one of"),
        (["--policy", "fixed:x"], "--policy fixed:x must be an integer"),
        (["--noise", "-1"], "--noise must be at least 0, got -1"),
    ],
)
def test_a_simulation_that_makes_no_sense_is_refused_in_one_line(
    profile: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", str(profile), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_two_sources_of_a_profile_are_one_too_many(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "--show", str(profile), "--roofline", ROOFLINE]) == 2
    assert "--show or --roofline" in capsys.readouterr().err
