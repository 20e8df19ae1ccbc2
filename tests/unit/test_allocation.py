"""The argmax against trying everything."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from outpace.policy.allocation import Costs, Extra, Slots, allocate, take_all

ROWS = np.array([0.0, 2.0, 3.0, 6.0, 8.0, 20.0, 40.0])


def slots_of(gain: list[list[float]], context: list[float] | None = None) -> Slots:
    """Nodes that are there for certain."""
    nothing = [0.0] * len(gain)
    return Slots(gain, [[1.0] * len(row) for row in gain], context or nothing, nothing)


def instance(rng: random.Random) -> tuple[Slots, np.ndarray]:
    """Up to three sequences of up to three nodes, and a random non-decreasing cost of rows."""
    num_sequences, width = rng.randint(1, 3), rng.randint(1, 3)
    chances = np.array([[rng.random() for _ in range(width)] for _ in range(num_sequences)])
    usable = [rng.randint(0, width) for _ in range(num_sequences)]
    context = [float(rng.choice([10, 100, 3000])) for _ in range(num_sequences)]
    table = np.cumsum([rng.choice([0.0, 0.1, 1.0, 3.0]) for _ in ROWS]) + rng.uniform(0.5, 5)
    gain = [row[:number] for row, number in zip(np.cumprod(chances, axis=1).tolist(), usable, strict=True)]
    return slots_of(gain, context), table


def best_of_all(slots: Slots, table: np.ndarray, pair_s: float, num_known: int, max_rows: int) -> float:
    """The highest rate of any prefixes."""
    num_sequences = len(slots.gain)
    ranges = [range(len(row) + 1) for row in slots.gain]
    rates = []
    for counts in itertools.product(*ranges):
        if sum(counts) > max_rows:
            continue
        gain = sum(sum(slots.gain[i][:n]) for i, n in enumerate(counts))
        pairs = sum(n * c for n, c in zip(counts, slots.context, strict=True))
        seconds = np.interp(num_known + sum(counts), ROWS, table) + pair_s * pairs
        rates.append((num_sequences + gain) / seconds)
    return float(max(rates))


def chosen(slots: Slots, table: np.ndarray, pair_s: float, num_known: int, max_rows: int) -> float:
    """The rate of what `allocate` chooses, worked out anew from its counts."""

    def seconds(extra: Extra) -> np.ndarray:
        return np.asarray(np.interp(num_known + extra.rows, ROWS, table) + pair_s * extra.pairs)

    choice = allocate(slots, len(slots.gain), Costs(seconds), pair_s, max_rows)
    counts = choice.counts
    assert all(n <= len(row) for n, row in zip(counts, slots.gain, strict=True))
    assert sum(counts) <= max_rows
    gain = sum(sum(slots.gain[i][:n]) for i, n in enumerate(counts))
    duration = np.interp(num_known + sum(counts), ROWS, table) + pair_s * float(np.dot(counts, slots.context))
    assert choice.seconds == pytest.approx(duration)
    assert choice.rate == pytest.approx((len(slots.gain) + gain) / duration)
    return float((len(slots.gain) + gain) / duration)


def test_no_other_choice_of_prefixes_has_a_higher_rate() -> None:
    rng = random.Random(0)
    for _ in range(500):
        slots, table = instance(rng)
        num_known, max_rows = rng.randint(1, 4), rng.choice([0, 2, 100])
        best = best_of_all(slots, table, 0.0, num_known, max_rows)
        assert chosen(slots, table, 0.0, num_known, max_rows) == pytest.approx(best)


def test_with_rows_that_cost_by_their_context_it_is_seldom_and_little_below_the_best() -> None:
    # The order of slots depends on the rate, which is found by iteration: at stairs it may miss the best.
    rng = random.Random(1)
    ratios = []
    for _ in range(500):
        slots, table = instance(rng)
        arguments = (slots, table, rng.choice([1e-5, 1e-4, 1e-3]), rng.randint(1, 4), 100)
        ratios.append(chosen(*arguments) / best_of_all(*arguments))
    assert min(ratios) > 0.9
    assert np.mean(ratios) > 0.998
    assert np.mean(np.array(ratios) > 1 - 1e-9) > 0.95


def test_prompts_in_the_same_step_change_neither_what_a_token_is_worth_nor_what_is_drafted() -> None:
    slots = slots_of([[0.4, 0.4]] * 4)

    def linear(known: float) -> Costs:
        return Costs(lambda x: 1.0 + 0.2 * (4 + x.rows), lambda x: 1.0 + 0.2 * (known + x.rows))

    alone = allocate(slots, 4.0, Costs(linear(4).decoding), 0.0, 100)
    assert sum(alone.counts) == 0, "a draft token costs 0.2 s and wins 0.4 of one that costs 0.45 s"
    with_prompt = allocate(slots, 4.0, linear(500), 0.0, 100)
    assert sum(with_prompt.counts) == 0
    assert with_prompt.rate == alone.rate
    assert with_prompt.seconds == pytest.approx(101.0)


def test_rows_that_are_free_where_a_kernel_pads_are_used_and_not_one_more() -> None:
    slots = slots_of([[0.3] * 6])
    stairs = Costs(lambda x: np.where(1 + x.rows <= 4, 1.0, 2.0))
    assert allocate(slots, 1.0, stairs, 0.0, 100).counts == [3]


def test_a_costly_drafter_is_not_asked_for_what_would_be_cut() -> None:
    slots = slots_of([[0.9, 0.8, 0.7]])
    for depth_s, expected in ((0.0, 3), (0.75, 1), (1.0, 0)):

        def seconds(extra: Extra, each: float = depth_s) -> np.ndarray:
            return 1.0 + each * extra.depth

        costs = Costs(seconds)
        assert allocate(slots, 1.0, costs, 0.0, 100).counts == [expected]


def test_nothing_to_choose_from_is_no_draft() -> None:
    for num_sequences in (0, 2):
        slots = slots_of([[]] * num_sequences)
        choice = allocate(slots, float(num_sequences), Costs(lambda x: 1.0 + x.rows), 1e-6, 100)
        assert choice.counts == [0] * num_sequences
        assert choice.seconds == 1.0


def test_everything_is_taken_unranked_only_where_ranking_would_take_everything() -> None:
    rng = random.Random(2)
    num_taken = 0
    for _ in range(500):
        gain = [[0.9 ** rng.randint(1, 9)] * rng.randint(1, 3) for _ in range(rng.randint(1, 3))]
        slots = slots_of(gain)._replace(rows=None)
        rises = [rng.choice([0.0, 0.1, 0.5]) for _ in range(sum(map(len, gain)))]
        table = np.cumsum([rng.uniform(0.5, 5), *rises])
        everything = take_all(slots, len(gain), float(table[-1]), max(rises))
        if everything is not None:
            num_taken += 1
            costs = Costs(lambda extra: table[: len(extra.rows)])  # noqa: B023 (called in this round)
            ranked = allocate(slots, len(gain), costs, 0.0, 100)
            assert everything.counts == ranked.counts
            assert everything.rate == pytest.approx(ranked.rate)
            assert everything.seconds == pytest.approx(ranked.seconds)
    assert 50 < num_taken < 450


def test_rows_that_need_not_be_named_are_one_for_each_node() -> None:
    rng = random.Random(3)
    for _ in range(100):
        slots, table = instance(rng)
        arguments = (table, rng.choice([0.0, 1e-4]), rng.randint(1, 4), rng.choice([0, 2, 100]))
        assert chosen(slots._replace(rows=None), *arguments) == chosen(slots, *arguments)
