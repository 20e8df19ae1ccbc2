"""The governor of threads against machines that it does not know."""

from __future__ import annotations

from collections.abc import Callable

from outpace.runtime.threads import LONGEST_HOLD, ThreadGovernor


def drive(
    governor: ThreadGovernor, passes: int, seconds: Callable[[int, int], float], rows: int = 8
) -> list[int]:
    """Runs passes on a machine given as (threads, pass) -> seconds; returns the threads used."""
    used = []
    for number in range(passes):
        used.append(governor.num_threads)
        governor.observe(rows, seconds(governor.num_threads, number))
    return used


def quiet(threads: int, number: int) -> float:
    return {1: 0.016, 2: 0.010}[threads]


def crowded(threads: int, number: int) -> float:
    return {1: 0.017, 2: 0.150}[threads]


def test_on_a_quiet_machine_nearly_every_pass_uses_all_threads() -> None:
    used = drive(ThreadGovernor(2), 3000, quiet)
    assert used.count(1) <= 6


def test_on_a_machine_crowded_from_the_start_one_thread_is_found_within_a_few_passes() -> None:
    used = drive(ThreadGovernor(2), 3000, crowded)
    assert used[:8].count(2) <= 3
    assert used.count(2) <= 15


def test_it_leaves_a_crowd_within_three_passes_and_comes_back_when_it_is_gone() -> None:
    governor = ThreadGovernor(2)
    drive(governor, 100, quiet)
    in_crowd = drive(governor, 500, crowded)
    assert in_crowd[3:].count(2) <= 5
    after = drive(governor, 3 * LONGEST_HOLD, quiet)
    assert after[-LONGEST_HOLD:].count(1) <= 3


def test_the_slow_first_pass_of_woken_threads_does_not_keep_them_asleep() -> None:
    governor = ThreadGovernor(2)
    drive(governor, 100, crowded)
    before = 1

    def waking(threads: int, number: int) -> float:
        nonlocal before
        seconds = 0.040 if threads > before else quiet(threads, number)
        before = threads
        return seconds

    assert drive(governor, 2 * LONGEST_HOLD, waking)[-LONGEST_HOLD:].count(1) <= 3


def test_longer_contexts_are_not_taken_for_a_crowd() -> None:
    governor = ThreadGovernor(2)
    drive(governor, 100, quiet)
    used = drive(governor, 300, lambda threads, number: 5 * quiet(threads, number))
    assert used.count(1) <= 3


def test_long_passes_are_not_experimented_with() -> None:
    assert set(drive(ThreadGovernor(2), 100, crowded, rows=512)) == {2}


def test_with_one_core_there_is_nothing_to_choose() -> None:
    assert set(drive(ThreadGovernor(1), 100, lambda threads, number: 0.01)) == {1}
