"""What steps are predicted to cost: fits, corrections, monotony, files."""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from outpace.errors import ConfigError
from outpace.policy.base import BatchView, SequenceView, StepRecord
from outpace.policy.cost import CostModel, Roofline, Shape
from outpace.policy.linear_cost import DraftCost, LinearCost, nonnegative_least_squares
from outpace.tree import DraftTree

ROWS = [1, 2, 4, 8, 9, 16, 32, 64, 128]
SECONDS = [0.010, 0.010, 0.011, 0.012, 0.016, 0.017, 0.030, 0.055, 0.110]  # a step after 8


def model() -> CostModel:
    return CostModel(
        ROWS,
        SECONDS,
        per_context=1e-8,
        per_pair=2e-7,
        per_sample=2e-5,
        draft=(0, 1e-5, 0, 1e-4, 0),
        host=(1e-3, 2e-5),
    )


def record(
    truth: CostModel, num_sequences: int, drafted: int, slowdown: float = 1.0, context: int = 100
) -> StepRecord:
    """A step as a machine of a known cost, slowed down, would do it."""
    sequences = tuple(SequenceView(str(i), context, 10) for i in range(num_sequences))
    total = num_sequences * context
    view = BatchView(sequences, num_sequences, total, 10**6, total, num_sequences)
    limits = (drafted,) * num_sequences
    rows = num_sequences * (1 + drafted)
    shape = Shape(rows, rows, total, total * (1 + drafted))
    target = slowdown * float(truth.target_s(shape.rows, shape.samples, shape.context, shape.pairs))
    propose = float(truth.draft_s(num_sequences if drafted else 0, sum(limits), drafted))
    seconds = {"forward": target, "propose": propose, "advance": truth.host_s(num_sequences)}
    return StepRecord(
        view,
        limits,
        (DraftTree.chain((0,) * drafted),) * num_sequences,
        ((),) * num_sequences,
        {**seconds, "total": sum(seconds.values())},
        rows,
        num_sequences,
    )


def assert_monotone(cost: CostModel) -> None:
    """More rows, samples, context or pairs never cost less."""
    counts = np.arange(1.0, 200.0, 0.5)
    for varied in range(4):
        arguments = [np.full_like(counts, 10.0) for _ in range(4)]
        arguments[varied] = counts
        assert (np.diff(cost.target_s(*arguments)) >= 0).all()


def test_between_measured_row_counts_cost_is_linear_and_a_step_stays_one() -> None:
    rows = np.array([1, 3, 8, 8.5, 9, 128, 256])
    expected = [0.010, 0.0105, 0.012, 0.014, 0.016, 0.110, 0.110 + 128 * 0.055 / 64]
    assert CostModel(ROWS, SECONDS).target_s(rows, 0, 0, 0) == pytest.approx(expected)


def test_the_parts_of_a_step_add_up() -> None:
    shape = Shape(16, 12, 1000, 3000)
    expected = 0.017 + 12 * 2e-5 + 1000 * 1e-8 + 3000 * 2e-7 + (2 * 1e-5 + 3 * 1e-4) + (1e-3 + 4 * 2e-5)
    assert model().step_s(shape, 4, [3, 0, 1]) == pytest.approx(expected)
    assert model().draft_s(0, 0, 0) == 0


def test_a_fit_finds_the_machine_it_was_measured_on() -> None:
    truth, rng = model(), random.Random(0)
    shapes = [
        Shape(rows, samples, context * rows, context * rows * share)
        for rows in ROWS
        for samples in (0, rows)
        for context, share in ((0, 0), (128, 1), (1024, 0.25))
    ]
    times = [float(truth.target_s(s.rows, s.samples, s.context, s.pairs)) for s in shapes]
    fitted = CostModel.fit(shapes, [t * math.exp(rng.gauss(0, 0.02)) for t in times])
    for shape, seconds in zip(shapes, times, strict=True):
        predicted = fitted.target_s(shape.rows, shape.samples, shape.context, shape.pairs)
        assert predicted == pytest.approx(seconds, rel=0.05)
    assert_monotone(fitted)


def test_a_fit_of_falling_measurements_is_monotone() -> None:
    shapes = [Shape(rows, 0, 0, 0) for rows in (1, 2, 4, 8)]
    assert_monotone(CostModel.fit(shapes, [0.02, 0.01, 0.03, 0.02]))


def test_least_squares_without_negative_solutions_match_exhaustive_search() -> None:
    rng = np.random.default_rng(0)
    for case in range(50):
        design, target = rng.normal(size=(8, 4)), rng.normal(size=8)
        if case % 2:  # one that adds nothing to another
            design[:, 3] = 3 * design[:, case % 3]
        best = math.inf
        for subset in range(16):
            columns = [i for i in range(4) if subset >> i & 1]
            x = np.zeros(4)
            if columns:
                x[columns] = np.linalg.lstsq(design[:, columns], target, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, float(np.linalg.norm(design @ x - target)))
        found = np.array(nonnegative_least_squares(design, target))
        assert (found >= 0).all()
        assert np.linalg.norm(design @ found - target) == pytest.approx(best)


@pytest.mark.parametrize("slowdown", [0.5, 1.3, 3.0])
def test_a_machine_that_turns_slow_or_fast_is_learnt_within_forty_steps(slowdown: float) -> None:
    rng, cost = random.Random(1), model()
    for _ in range(40):
        noise = math.exp(rng.gauss(0, 0.05))
        cost.observe(record(model(), rng.choice([8, 16]), rng.choice([0, 1]), slowdown * noise))
    for rows in (8, 16, 32):
        seconds = cost.target_s(rows, rows, 100 * rows, 100 * rows)
        expected = slowdown * model().target_s(rows, rows, 100 * rows, 100 * rows)
        assert seconds == pytest.approx(expected, rel=0.1)
    assert_monotone(cost)


def test_one_step_that_was_put_off_by_a_second_changes_little() -> None:
    rng, cost = random.Random(2), model()
    for _ in range(50):
        cost.observe(record(model(), 8, 1, math.exp(rng.gauss(0, 0.03))))
    before = float(cost.target_s(16, 16, 0, 0))
    cost.observe(record(model(), 8, 1, 60.0))
    assert float(cost.target_s(16, 16, 0, 0)) == pytest.approx(before, rel=0.05)


def test_corrections_of_all_kinds_keep_it_monotone() -> None:
    rng, cost = random.Random(3), model()
    for _ in range(300):
        cost.observe(record(model(), rng.choice([1, 2, 8, 30]), rng.randrange(4), rng.choice([0.3, 1, 3])))
    assert_monotone(cost)


def test_errors_are_those_of_predictions_made_before_learning() -> None:
    cost = model()
    assert cost.errors() == (0.0, 0.0)
    for _ in range(20):
        cost.observe(record(model(), 4, 0))
    assert cost.errors() == pytest.approx((0.0, 0.0), abs=1e-9)
    cost = model()
    rng = random.Random(4)
    for _ in range(400):
        cost.observe(record(model(), rng.choice([1, 4, 16]), rng.randrange(3), math.exp(rng.gauss(0, 0.04))))
    median, p90 = cost.errors()
    assert 0.01 < median < 0.05
    assert median < p90 < 0.15


def test_linear_costs_are_learnt_and_stay_at_least_zero() -> None:
    rng, cost = random.Random(5), LinearCost((0.0, 0.0))
    for _ in range(300):
        sequences = rng.choice([1, 4, 16, 64])
        cost.observe((2e-3 + 3e-5 * sequences) * rng.uniform(0.9, 1.1), 1.0, sequences)
    for sequences in (1, 16, 64):
        assert cost.seconds(1.0, sequences) == pytest.approx(2e-3 + 3e-5 * sequences, rel=0.15)
    for _ in range(50):
        cost.observe(0.0, 1.0, rng.choice([1, 64]))
    assert min(cost.coefficients) >= 0


def test_features_that_grow_together_and_one_slow_start_leave_no_lasting_error() -> None:
    for seed in range(5):
        rng, cost = random.Random(seed), LinearCost((0.0, 0.0, 0.0, 0.0))
        for step in range(64):
            sequences = min(8, 1 + step // 2)
            behind = 500 if step % 2 else 3 * sequences
            seconds = 0.11 if step == 2 else rng.uniform(1e-4, 2e-4) + 1e-6 * behind
            cost.observe(seconds, sequences, 7 * sequences, 7, behind)
        assert cost.seconds(8, 56, 7, 24) < 5e-4


def test_what_drafting_takes_for_all_is_not_taken_for_what_each_takes_while_one_drafts_alone() -> None:
    rng, cost = random.Random(7), DraftCost((0.0,) * 5)

    def seconds(sequences: int, nodes: int) -> float:  # a pass of a head, and a little of each
        return (2e-3 + 3e-4 * nodes + 5e-5 * sequences * nodes) * rng.uniform(0.95, 1.05)

    for nodes in [1 + i % 8 for i in range(200)]:
        cost.observe(seconds(1, nodes), 1, nodes, nodes, 0)
    assert cost.seconds(1, 4, 4, 0) == pytest.approx(3.4e-3, rel=0.05)
    assert 2.5e-3 < cost.seconds(8, 32, 4, 0) < 5e-3, "not eight times as much"
    for nodes in [1 + i % 4 for i in range(64)]:
        cost.observe(seconds(8, nodes), 8, 8 * nodes, nodes, 0)
    assert cost.seconds(8, 32, 4, 0) == pytest.approx(4.8e-3, rel=0.1)
    assert cost.seconds(1, 4, 4, 0) == pytest.approx(3.4e-3, rel=0.15)


def test_rows_that_only_draft_are_what_drafting_costs_and_leave_the_target_as_it_is() -> None:
    truth, cost = model(), model()
    asked = float(truth.draft_s(4, 12, 3))
    for _ in range(200):
        seen = record(truth, 4, 3)
        # dearer than as many rows of the target
        streams = 4 * (float(truth.target_s(16 + 24, 16, 400, 1600)) - seen.seconds["forward"])
        seconds = {**seen.seconds, "forward": seen.seconds["forward"] + streams}
        cost.observe(replace(seen, seconds=seconds | {"total": sum(seconds.values())}, num_stream_rows=24.0))
    assert streams > 0.01
    assert cost.target_s(16, 16, 400, 1600) == pytest.approx(truth.target_s(16, 16, 400, 1600), rel=1e-3)
    assert cost.draft_s(4, 12, 3) == pytest.approx(asked + streams, rel=0.05)


def with_streams(truth: CostModel, share: float, slowdown: float) -> StepRecord:
    """A step of four sequences whose streams take a share of the pass on top of it."""
    seen = record(truth, 4, 3, slowdown)
    streams = share * seen.seconds["forward"]
    seconds = {"forward": seen.seconds["forward"] + streams, "total": seen.seconds["total"] + streams}
    return replace(seen, seconds=seen.seconds | seconds, num_stream_rows=24.0)


def test_a_machine_faster_than_its_profile_is_found_out_though_every_pass_has_streams() -> None:
    truth, cost = model(), model()
    for _ in range(100):
        seen = with_streams(truth, 0.2, slowdown=0.6)
        cost.observe(seen)
    predicted = cost.step_s(Shape(16, 16, 400, 1600), 4, seen.limits)
    assert predicted == pytest.approx(seen.seconds["total"], rel=0.03)


def test_noise_of_passes_with_streams_does_not_make_the_target_look_cheap() -> None:
    truth, cost, rng = model(), model(), random.Random(3)
    for _ in range(1000):
        cost.observe(with_streams(truth, 0.1, slowdown=rng.gauss(1.0, 0.03)))
    assert cost.target_s(16, 16, 400, 1600) == pytest.approx(truth.target_s(16, 16, 400, 1600), rel=0.02)


def test_what_a_pass_with_a_prompt_takes_longer_is_no_cost_of_streams() -> None:
    truth, cost = model(), model()
    asked = float(truth.draft_s(4, 12, 3))
    for _ in range(50):
        seen = record(truth, 4, 3)
        view = replace(seen.view, num_rows=seen.view.num_rows + 200)
        cost.observe(
            replace(
                seen,
                view=view,
                num_rows=seen.num_rows + 200,
                seconds={"propose": asked, "forward": 1.0, "total": 1.0},
                num_stream_rows=24.0,
            )
        )
    assert cost.draft_s(4, 12, 3) == pytest.approx(asked)


def test_json_holds_everything_and_comes_back_the_same() -> None:
    cost, rng = model(), random.Random(6)
    for _ in range(50):
        cost.observe(record(model(), rng.choice([1, 8]), 1, 1.5))
    copy = CostModel.from_json(cost.to_json())
    assert copy.to_json() == cost.to_json()
    shape = Shape(37, 20, 5000, 9000)
    assert copy.step_s(shape, 20, [1, 2]) == cost.step_s(shape, 20, [1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "format 2, got 1: measure it anew"),
        ({"format": "2"}, "format 2, got '2'"),
        ({"rows": [1, 1, 2], "seconds": [1, 2, 3]}, "ascending"),
        ({"rows": [1], "seconds": [1]}, "two or more"),
        ({"rows": [1, 2], "seconds": [2.0, 1.0]}, "not fall"),
        ({"per_pair": -1.0}, "per_pair must be finite and at least 0, got -1.0"),
        ({"host": [0.0]}, "2 host costs"),
        ({"surprise": 1}, "not a cost model: TypeError"),
    ],
)
def test_what_is_no_cost_model_is_refused_in_words(change: dict[str, object], message: str) -> None:
    content = {**json.loads(model().to_json()), **change}
    content.pop("local")
    with pytest.raises(ConfigError, match=message):
        CostModel.from_json(json.dumps(content))


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the profile .*missing\.json"):
        CostModel.load(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"bad\.json is of no use"):
        CostModel.load(tmp_path / "bad.json")


def test_a_roofline_reads_the_weights_until_it_must_compute() -> None:
    text = json.dumps({"params": 1e9, "bandwidth": 1e12, "flops": 1e14, "fixed_s": 1e-3, "max_rows": 1024})
    cost = Roofline.from_json(text).cost_model()
    assert float(cost.target_s(1, 1, 0, 0)) == pytest.approx(2e9 / 1e12 + 1e-3)
    assert float(cost.target_s(99, 99, 0, 0)) == pytest.approx(2e9 / 1e12 + 1e-3)
    assert float(cost.target_s(1000, 1000, 0, 0)) == pytest.approx(1000 * 2e9 / 1e14 + 1e-3, rel=0.01)
    assert "assumption" in cost.meta
    for wrong in ("[]", '{"params": 1}', '{"params": 0, "bandwidth": 1, "flops": 1}'):
        with pytest.raises(ConfigError, match="roofline"):
            Roofline.from_json(wrong)


def test_steps_are_predicted_alike_one_by_one_side_by_side_and_growing() -> None:
    model = CostModel([2, 3, 8, 64], [1.0, 1.0, 2.0, 9.0], per_context=1e-3, per_pair=1e-4, per_sample=0.1)
    rows, pairs = np.arange(1, 101), 50.0 * np.arange(1, 101)
    together = model.target_s(rows, rows, 70, pairs)
    assert [model.target_s(int(n), int(n), 70, p) for n, p in zip(rows, pairs, strict=True)] == pytest.approx(
        together
    )
    for first in (1, 5, 90):
        grown = model.growing_s(first, first, 70, pairs[first - 1 :].tolist(), 0.25)
        assert grown == pytest.approx(together[first - 1 :] + 0.25)


def test_no_row_within_reach_costs_more_than_the_steepest() -> None:
    model = CostModel([2, 3, 8, 64], [1.0, 1.0, 2.0, 9.0], per_pair=1e-4, per_sample=0.1)
    for first, more in itertools.product(range(1, 12), range(1, 80, 7)):
        counts = np.arange(first, first + more + 1)
        seconds = model.target_s(counts, counts, 0, 300.0 * counts)
        steepest = model.steepest_s(first, more, 300)
        assert np.diff(seconds).max() <= steepest * (1 + 1e-9)
        if first == 3 and more < 5:
            assert steepest == pytest.approx(0.2 + 0.13)


def test_a_profile_whose_noise_leaves_rows_no_time_is_still_a_cost_model() -> None:
    shapes = [Shape(rows, 0, context, 0) for rows in (1, 2, 4) for context in (100, 200)]
    model = CostModel.fit(shapes, [shape.context * 1e-5 for shape in shapes])
    assert float(model.target_s(2, 0, 100, 0)) == pytest.approx(1e-3, rel=1e-3)


# --- Buckets --------------------------------------------------------------------------------------------

BUCKETS = (1, 2, 4, 8, 16, 32)


def padded() -> CostModel:
    """A machine that pads to buckets, and not beyond the last."""
    return CostModel([*BUCKETS, 33, 64], [0.01, 0.01, 0.011, 0.012, 0.014, 0.02, 0.03, 0.05], buckets=BUCKETS)


def test_a_pass_costs_what_its_bucket_costs_and_beyond_the_last_what_its_rows_cost() -> None:
    cost, exact = padded(), CostModel([*BUCKETS, 33, 64], [0.01, 0.01, 0.011, 0.012, 0.014, 0.02, 0.03, 0.05])
    rows = np.arange(1, 65)
    full = [next((bucket for bucket in BUCKETS if bucket >= n), n) for n in rows.tolist()]
    expected = exact.target_s(np.array(full), 0, 0, 0)
    assert cost.target_s(rows, 0, 0, 0) == pytest.approx(expected, abs=0)
    assert [cost.target_s(int(n), 0, 0, 0) for n in rows] == pytest.approx(expected.tolist())
    assert cost.growing_s(1, 0, 0, [0.0] * 64, 0.0) == pytest.approx(expected.tolist())
    assert float(cost.target_s(9, 0, 0, 0)) == float(cost.target_s(16, 0, 0, 0)) > cost.target_s(8, 0, 0, 0)
    assert_monotone(cost)


def test_the_dearest_row_is_the_one_that_opens_a_bucket() -> None:
    cost = padded()
    assert cost.steepest_s(9, 7, 0) == 0  # up to 16 rows
    assert cost.steepest_s(9, 8, 0) == pytest.approx(0.006)
    assert cost.steepest_s(3, 6, 0) == pytest.approx(0.002)
    assert cost.steepest_s(40, 10, 0) == pytest.approx(0.02 / 31)  # no buckets there
    rises = np.diff(cost.target_s(np.arange(20, 60), 0, 0, 0))
    assert cost.steepest_s(20, 39, 0) == pytest.approx(float(rises.max()))


def test_a_fit_over_buckets_is_exact_at_their_edges_and_flat_between() -> None:
    truth = CostModel(BUCKETS, [0.01, 0.01, 0.011, 0.012, 0.014, 0.02], per_sample=1e-5, per_pair=1e-8)
    shapes = [
        Shape(rows, samples, context, rows * context)
        for rows in BUCKETS
        for samples in (0, rows)
        for context in (0, 100)
    ]
    times = [float(truth.target_s(s.rows, s.samples, s.context, s.pairs)) for s in shapes]
    fitted = CostModel.fit(shapes, times, buckets=(*BUCKETS, 48))  # the last was not measured
    for rows in range(1, 33):
        full = next(bucket for bucket in BUCKETS if bucket >= rows)
        assert fitted.target_s(rows, 0, 0, 0) == pytest.approx(float(truth.target_s(full, 0, 0, 0)), rel=1e-6)


def test_corrections_of_a_padded_pass_go_to_its_bucket() -> None:
    cost = padded()
    for _ in range(200):
        cost.observe(record(padded(), 9, 0, 1.5))
        cost.observe(record(padded(), 4, 0, 1.0))
    rows = np.array([4, 9, 12, 16])
    slowdown = cost.target_s(rows, 0, 0, 0) / padded().target_s(rows, 0, 0, 0)
    assert slowdown[1:] == pytest.approx([slowdown[1]] * 3)
    assert slowdown[1] > 1.2 * slowdown[0]
    assert_monotone(cost)


def test_buckets_survive_a_file_and_must_be_measured_ones() -> None:
    again = CostModel.from_json(padded().to_json())
    assert again.to_json() == padded().to_json()
    assert again.target_s(9, 0, 0, 0) == padded().target_s(16, 0, 0, 0)
    for wrong in ([4, 2], [3], [2, 2]):
        with pytest.raises(ConfigError, match="buckets must ascend and be among its row counts"):
            CostModel(BUCKETS, [0.01] * 6, buckets=wrong)
