"""How many threads a pass should use, learnt from what passes took.

OpenMP's threads meet at a barrier after every operator, several hundred times per pass. When something
else wants their cores, all wait for the one that was put off, each time for a slice of the scheduler:
passes become ten times slower and more, while one thread alone loses little. Results do not depend on the
number of threads.
"""

from __future__ import annotations

import enum

MOST_ROWS = 64  # larger passes are rare and long: they use what the others have shown to be best
SLOW = 2.0  # a pass is suspect beyond this many times its usual duration
STRIKES = 3  # suspect passes in a row before one thread is tried
TRIAL = 3  # passes of a trial; the first with more threads is slow, as they have to be woken
HOPELESS = 5.0  # a trial ends with the first pass that takes this many times what one thread takes
RETRY_AFTER = 2048  # passes after which one thread is tried in any case
SHORTEST_HOLD, LONGEST_HOLD = 32, 1024  # passes with one thread before all are tried again
WEIGHT = 0.2  # of the newest duration in the moving averages


class Mode(enum.Enum):
    """What the next pass is for."""

    ALL = enum.auto()
    TRY_ONE = enum.auto()
    ONE = enum.auto()
    TRY_ALL = enum.auto()


class ThreadGovernor:
    """Chooses between all threads and one. Pure arithmetic: the caller sets the threads and measures.

    One thread is tried when passes of a size (rows, by powers of two) are new or turn slow, and kept if it
    is faster. While it is kept, all threads are tried again after a hold, which doubles each time that they
    lose.
    """

    def __init__(self, all_threads: int) -> None:
        """Starts with all threads.

        Args:
            all_threads: How many there are.
        """
        self._all = all_threads
        self._mode = Mode.ALL
        self._with_all: dict[int, float] = {}  # seconds of a pass, by size
        self._with_one: dict[int, float] = {}  # the same since the present trial began
        self._untried: dict[int, int] = {}  # passes since one thread was last tried, by size
        self._strikes = 0
        self._left = 0  # passes until the present trial or hold ends
        self._hold = SHORTEST_HOLD

    @property
    def num_threads(self) -> int:
        """What the next pass should use."""
        return 1 if self._mode in (Mode.ONE, Mode.TRY_ONE) else self._all

    def observe(self, num_rows: int, seconds: float) -> None:
        """Learns from a pass that used `num_threads`.

        Args:
            num_rows: Its rows.
            seconds: Its duration.
        """
        if self._all == 1 or num_rows > MOST_ROWS:
            return
        size = num_rows.bit_length()
        match self._mode:
            case Mode.ALL:
                self._observe_all(size, seconds)
            case Mode.TRY_ALL:
                self._try_all(size, seconds)
            case Mode.ONE | Mode.TRY_ONE:
                self._observe_one(size, seconds)

    def _observe_all(self, size: int, seconds: float) -> None:
        usual = self._with_all.get(size, seconds)
        is_slow = seconds > SLOW * usual
        self._strikes = self._strikes + 1 if is_slow else 0
        self._untried[size] = self._untried.get(size, RETRY_AFTER - STRIKES) + 1
        if not is_slow:
            self._with_all[size] = _blend(usual, seconds)
        elif self._strikes == STRIKES:  # the new usual, unless one thread is faster
            self._with_all[size] = seconds
        if self._strikes == STRIKES or self._untried[size] == RETRY_AFTER:
            self._strikes = self._untried[size] = 0
            self._with_one.clear()
            self._mode, self._left = Mode.TRY_ONE, TRIAL

    def _observe_one(self, size: int, seconds: float) -> None:
        self._with_one[size] = _blend(self._with_one.get(size, seconds), seconds)
        self._left -= 1
        if self._left:
            return
        if self._mode is Mode.ONE:
            self._mode, self._left = Mode.TRY_ALL, TRIAL
        elif self._with_one[size] < self._with_all.get(size, 0.0):
            self._mode, self._left = Mode.ONE, self._hold
        else:
            self._mode = Mode.ALL

    def _try_all(self, size: int, seconds: float) -> None:
        with_one = self._with_one.get(size, seconds)
        self._left -= 1
        if seconds <= with_one:
            self._with_all[size] = seconds
            self._hold = SHORTEST_HOLD
            self._mode = Mode.ALL
        elif self._left == 0 or seconds > HOPELESS * with_one:
            self._hold = min(2 * self._hold, LONGEST_HOLD)
            self._mode, self._left = Mode.ONE, self._hold


def _blend(average: float, newest: float) -> float:
    return average + WEIGHT * (newest - average)
