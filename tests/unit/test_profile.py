"""Measuring what steps cost, keeping it, and writing steps down."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outpace.engine import profile
from outpace.engine.engine import Engine
from outpace.errors import ConfigError
from outpace.policy.cost import CostModel
from outpace.policy.goodput import GoodputPolicy
from outpace.runtime.graphs import default_sizes
from outpace.sampling import SamplingParams
from tiny import check_idle, cost_model, run, submit, tiny_engine


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path))
    return tmp_path / "profiles"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(profile, "_ENOUGH_S", 0.0)
    return tiny_engine(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64)


def load(engine: Engine, **settings: Any) -> CostModel:
    settings = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64, **settings}
    config = replace(engine.config, **settings)
    return profile.load_or_measure(config, engine.kv, engine.runner, engine.verifier)


def test_the_grid_stays_within_what_the_engine_can_run() -> None:
    for max_num_seqs, max_rows, capacity, longest in (
        (1, 1, 32, 2),
        (4, 32, 256, 64),
        (64, 512, 65536, 8192),
    ):
        points = list(profile.grid(max_num_seqs, max_rows, capacity, longest))
        assert points
        for point in points:
            length = point.context + point.known + point.drafted
            assert 1 <= point.sequences <= max_num_seqs
            assert length <= longest
            assert point.sequences * -(-length // 16) * 16 <= capacity


def test_what_is_measured_is_kept_and_found_at_the_next_start(
    cache: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(engine)
    check_idle(engine)
    (file,) = cache.iterdir()
    assert CostModel.load(file).to_json() == first.to_json()
    assert first.meta["max_num_seqs"] == 4

    def refuse(*_: object) -> CostModel:
        raise AssertionError("measured again")

    monkeypatch.setattr(profile, "measure", refuse)
    assert load(engine).to_json() == first.to_json()
    with pytest.raises(AssertionError, match="measured again"):
        load(engine, max_num_batched_tokens=64)


def test_measured_costs_are_positive_and_do_not_fall_with_rows(engine: Engine) -> None:
    cost = profile.measure(engine.config, engine.kv, engine.runner, engine.verifier)
    seconds = [float(cost.target_s(rows, rows, 0, 0)) for rows in range(1, 64)]
    assert seconds[0] > 0
    assert seconds == sorted(seconds)
    check_idle(engine)


def test_a_given_profile_is_used_as_it_is(tmp_path: Path, engine: Engine) -> None:
    path = tmp_path / "mine.json"
    path.write_text(cost_model().to_json())
    assert load(engine, spec_profile=str(path)).to_json() == cost_model().to_json()
    with pytest.raises(ConfigError, match="cannot read the profile"):
        load(engine, spec_profile=str(tmp_path / "none.json"))


def test_a_given_profile_is_refused_where_it_is_none_or_no_policy_would_read_it(
    tmp_path: Path, engine: Engine
) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"format": 1}')
    with pytest.raises(ConfigError, match=r"mine\.json"):
        load(engine, spec_profile=str(path))
    with pytest.raises(ConfigError, match="--spec-profile is for policies that ask what steps cost: off"):
        tiny_engine(spec_profile=str(path))


def test_the_engine_learns_what_its_steps_cost_and_forgets_what_ended() -> None:
    engine = tiny_engine(spec_method="prompt_lookup", spec_policy="goodput", spec_tokens=3)
    assert isinstance(engine.policy, GoodputPolicy)
    for name in ("a", "b"):
        submit(engine, name, "one two one two one two one", SamplingParams(max_tokens=30, ignore_eos=True))
    run(engine)
    assert engine.policy.cost.errors()[0] > 0
    assert engine.policy.acceptance._requests._places == {}


def test_each_step_is_a_line_of_the_step_log(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    engine = tiny_engine(spec_method="prompt_lookup", spec_policy="fixed", spec_tokens=3, step_log=str(path))
    submit(engine, "a", "abcabcabcabc", SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
    run(engine)
    assert engine.step_log is not None
    engine.step_log.close()
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert lines[0]["known_rows"] == 12
    assert sum(line["tokens"] for line in lines) == 20
    for line in lines:
        assert line["rows"] == line["known_rows"] + line["drafted"]
        assert line["accepted"] + line["sequences"] >= line["tokens"]
        phases = sum(seconds for phase, seconds in line["seconds"].items() if phase != "total")
        assert phases == pytest.approx(line["seconds"]["total"], abs=1e-5)
    with pytest.raises(ConfigError, match="cannot write --step-log"):
        tiny_engine(step_log=str(tmp_path / "no" / "such" / "folder"))


def test_a_grid_of_buckets_fills_each_of_them_and_goes_beyond() -> None:
    for max_num_seqs, buckets in ((64, default_sizes(512)), (4, (1, 7, 8, 30)), (256, default_sizes(512))):
        points = list(profile.grid(max_num_seqs, 1024, 10**6, 4096, buckets))
        full = {point.shape.rows for point in points if point.samples}
        assert set(buckets) <= full
        inside = {point.shape.rows for point in points if point.shape.rows <= buckets[-1]}
        assert inside <= set(buckets)
        assert buckets[-1] + 1 in {point.shape.rows for point in points}
        assert all(point.sequences <= max_num_seqs for point in points)


def test_a_padded_engine_measures_its_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_ENOUGH_S", 0.0)
    engine = tiny_engine(
        max_num_seqs=4, max_num_batched_tokens=32, max_model_len=64, buckets=(1, 2, 4, 8, 16)
    )
    cost = profile.measure(engine.config, engine.kv, engine.runner, engine.verifier)
    assert float(cost.target_s(9, 0, 0, 0)) == float(cost.target_s(16, 0, 0, 0))
    assert json.loads(cost.to_json())["buckets"] == [1, 2, 4, 8, 16]
    check_idle(engine)


def test_both_edges_of_a_kernels_tile_are_measured() -> None:
    for max_num_seqs in (64, 4):
        points = list(profile.grid(max_num_seqs, 512, 10**6, 4096, tile_rows=12))
        rows = {point.shape.rows for point in points if point.samples}
        for filled in range(12, min(4 * max_num_seqs, profile.LAST_STAIR) + 1, 12):
            assert filled in rows
            above = min(r for r in (*rows, math.inf) if r > filled)
            assert above == filled + 1 or (filled >= max_num_seqs and above <= filled + 4)
