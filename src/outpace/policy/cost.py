"""What a step costs: profiled, corrected while running, monotone, and usable alone.

A step is predicted as the sum of three parts, each learnt from the phases it is made of:

    target(n)   table(n rows) + a·context + b·pairs + s·samples     forward and verify
    draft       fixed + linear in sequences, nodes, depth, behind   propose
    host        fixed + per sequence                                everything else

`table` is piecewise linear between measured row counts. Where passes are padded to known row counts, buckets,
it is the staircase that they make: flat inside a bucket, so that a policy fills one for nothing. Without
buckets a staircase stays one where both of its edges were measured. All slopes are non-negative and the
corrected table is made monotone: more work never costs less.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import sub
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outpace.errors import ConfigError
from outpace.policy.base import StepRecord
from outpace.policy.linear_cost import (
    DraftCost,
    LinearCost,
    Robust,
    asked_of,
    nonnegative_least_squares,
    varied,
)

FORMAT = 2  # of the JSON
Floats = NDArray[np.float64]

_FAR = 2**24  # rows; beyond the last measured count the table goes on with its last slope
_LEVEL_RATE, _LOCAL_RATE = 0.2, 0.03  # of corrections: all row counts alike, and those nearby
_LOCAL_DECAY = 0.999  # per step: what one row count has learnt is forgotten in favour of the profile
_TABLE_EVERY = 8  # steps, after which the corrected table is worked out
_FIRST_DRAFTS = 16  # steps that draft, before their cost counts as known
_NUM_ERRORS = 1024  # latest steps that the error statistics cover
_LEAST_S = 1e-9  # of a pass, where noise leaves its rows without any time of their own
_HOST_PHASES = ("between", "plan", "policy", "advance")


@dataclass(frozen=True, slots=True)
class Shape:
    """How much work a step is for the target model.

    Attributes:
        rows: Token rows.
        samples: Rows whose logits are wanted.
        context: Cached tokens read, summed over sequences.
        pairs: Cached tokens attended to, summed over rows.
    """

    rows: float
    samples: float
    context: float
    pairs: float


class CostModel:
    """Predicts the seconds of a step and learns from steps.

    Attributes:
        meta: What it was measured on; free text and numbers.
    """

    def __init__(
        self,
        rows: Sequence[float],
        seconds: Sequence[float],
        *,
        per_context: float = 0.0,
        per_pair: float = 0.0,
        per_sample: float = 0.0,
        draft: Sequence[float] = (0.0,) * 5,
        host: Sequence[float] = (0.0, 0.0),
        buckets: Sequence[int] = (),
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts from a profile.

        Args:
            rows: Row counts, ascending.
            seconds: Of a forward with so many rows, nothing cached; non-decreasing.
            per_context: Seconds per cached token read.
            per_pair: Seconds per row and cached token.
            per_sample: Seconds per row whose logits are wanted.
            draft: Seconds per step that drafts, per sequence asked, per node asked, per unit of the deepest
                limit, and per token of those sequences that the drafter has not seen yet.
            host: Seconds per step and per sequence outside the model.
            buckets: Row counts that passes are padded to, ascending, each of them among `rows`; passes of
                more rows are not padded.
            meta: What it was measured on.

        Raises:
            ConfigError: Something is negative, not finite or not in order.
        """
        self._buckets = _buckets(buckets, rows)
        self._rows, self._profile = _table(rows, seconds)
        self._knots: list[float] = self._rows.tolist()
        slopes = {"per_context": per_context, "per_pair": per_pair, "per_sample": per_sample}
        for name, value in (*slopes.items(), *(("draft", x) for x in draft), *(("host", x) for x in host)):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"a cost model's {name} must be finite and at least 0, got {value}")
        if len(draft) != 5 or len(host) != 2:
            raise ConfigError(f"a cost model has 5 draft and 2 host costs, got {len(draft)} and {len(host)}")
        self._slopes = tuple(map(float, slopes.values()))
        self._draft, self._host = DraftCost(draft), LinearCost(host)
        self._num_drafts_to_see = 0 if any(draft) else _FIRST_DRAFTS
        self.meta = dict(meta or {})
        self._level = 0.0  # log of the correction that all row counts share
        self._local = np.zeros(len(self._rows))  # and of each one's own
        self._first = 0
        self._dense: list[float] = []  # the table at this row count and at those after it
        self._robust = Robust()
        self._num_observed = 0
        self._errors: deque[float] = deque(maxlen=_NUM_ERRORS)
        self._correct()

    def target_s(self, rows: Any, samples: Any, context: Any, pairs: Any) -> Any:
        """Seconds of forward and verify; see Shape. Arrays give an array; non-decreasing in each argument."""
        per_context, per_pair, per_sample = self._slopes
        linear = per_context * context + per_pair * pairs + per_sample * samples
        if isinstance(rows, np.ndarray):
            return self._factor * (np.interp(self._padded(rows), self._rows, self._table) + linear)
        return self._factor * (self._between(self._padded_one(rows)) + linear)

    def _padded(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The rows that are computed for so many."""
        if not self._buckets:
            return rows
        edges = np.array(self._buckets)
        places = np.minimum(np.searchsorted(edges, rows), len(edges) - 1)
        padded: NDArray[Any] = np.maximum(edges[places], rows)
        return padded

    def _padded_one(self, rows: float) -> float:
        """The same for one count, in plain numbers."""
        place = bisect_left(self._buckets, rows)
        return self._buckets[place] if place < len(self._buckets) else rows

    def _between(self, rows: float) -> float:
        """The table at one row count, without numpy: most questions come with cold caches."""
        left = min(max(bisect_left(self._knots, rows) - 1, 0), len(self._rises) - 1)
        return self._seconds[left] + self._rises[left] * max(rows - self._knots[left], 0.0)

    def growing_s(
        self, rows: int, samples: int, context: float, pairs: Iterable[float], on_top_s: float
    ) -> list[float]:
        """Seconds of steps that grow by one sampled row each, in plain numbers: the choice of every step.

        Args:
            rows: Of the first one; `samples` and `context` likewise.
            samples: Rows whose logits are wanted.
            context: Cached tokens read, the same for all.
            pairs: Of each of them.
            on_top_s: Seconds outside the model, the same for all.
        """
        per_context, per_pair, per_sample = self._slopes
        factor, pairs = self._factor, list(pairs)
        on_top_s += factor * (per_context * context + per_sample * samples)
        table = self._from(rows, len(pairs))
        return [factor * (row + per_pair * pair) + on_top_s for row, pair in zip(table, pairs, strict=False)]

    def _from(self, rows: int, num: int) -> list[float]:
        """The table at `rows`, `rows` + 1, …, so many at least, each with its samples beyond the first."""
        if rows != self._first or num > len(self._dense):
            more = np.arange(num)
            dense = np.interp(self._padded(rows + more), self._rows, self._table) + self._slopes[2] * more
            self._first, self._dense = rows, dense.tolist()
        return self._dense

    def steepest_s(self, rows: int, more: int, context: float) -> float:
        """The most that one of `more` sampled rows beyond `rows` costs, if none attends to more `context`."""
        _, per_pair, per_sample = self._slopes
        if self._buckets and rows < self._buckets[-1]:
            table = self._from(rows, more + 1)  # a row that opens a bucket pays for all of it
            return max(map(sub, table[1 : more + 1], table), default=0.0) * self._factor + (
                self._factor * per_pair * context
            )
        first, last = bisect_right(self._knots, rows) - 1, bisect_left(self._knots, rows + more)
        rise = max(self._rises[max(first, 0) : last], default=0.0)  # level before the first measured count
        return self._factor * (rise + per_pair * context + per_sample)

    def draft_s(self, sequences: Any, nodes: Any, depth: Any, behind: Any = 0.0) -> Any:
        """Seconds of drafting: sequences, nodes in all, deepest limit and tokens to catch up with."""
        return self._draft.seconds(sequences, nodes, depth, behind)

    @property
    def knows_draft(self) -> bool:
        """Whether drafting was seen often enough to tell its usual cost from that of catching up."""
        return self._num_drafts_to_see <= 0

    def to_see(self, limits: list[int]) -> list[int]:
        """The limits as long as the cost of drafting is not known: they vary, so that its parts show."""
        return varied(limits, self._num_drafts_to_see)

    def host_s(self, sequences: int) -> float:
        """Seconds of a step's other phases."""
        fixed, each = self._host.coefficients
        return fixed + each * sequences

    @property
    def per_pair_s(self) -> float:
        """Seconds per row and cached token, corrected."""
        return self._slopes[1] * self._factor

    def step_s(self, shape: Shape, sequences: int, limits: Sequence[int] = (), behind: float = 0.0) -> float:
        """Seconds of a whole step.

        Args:
            shape: Its rows, drafts included.
            sequences: Those that are scheduled.
            limits: Draft tokens asked for, per sequence.
            behind: Tokens that the drafter has not seen yet of those that draft.
        """
        target = self.target_s(shape.rows, shape.samples, shape.context, shape.pairs)
        return float(target + self.draft_s(*asked_of(limits), behind) + self.host_s(sequences))

    def observe(self, record: StepRecord, behind: float = 0.0) -> None:
        """Learns from a finished step: each part from its own phases.

        Args:
            record: The step.
            behind: Tokens that the drafter had not seen of those that drafted.
        """
        seconds, shape, num_scheduled = record.seconds, shape_of(record), record.view.num_scheduled
        asked = asked_of(record.limits)
        target = float(self.target_s(shape.rows, shape.samples, shape.context, shape.pairs))
        predicted = target + float(self.draft_s(*asked, behind)) + self.host_s(num_scheduled)
        self._errors.append(abs(predicted - seconds["total"]) / seconds["total"])
        streams = self.streams_s(record)
        # a pass with streams teaches nothing of the target's cost but that it takes no longer
        if not record.num_stream_rows or _pass_s(record) < target:
            self._observe_target(shape.rows, target, _pass_s(record))
        if asked[0] and streams is not None:
            self._draft.observe(seconds.get("propose", 0.0) + streams, *asked, behind)
            self._num_drafts_to_see -= 1
        self._host.observe(sum(seconds.get(phase, 0.0) for phase in _HOST_PHASES), 1.0, num_scheduled)

    def streams_s(self, record: StepRecord) -> float | None:
        """Seconds by which a pass was longer for the rows in it that only draft: part of what drafting costs.

        They cost more than as many rows of the target, so the pass does not show what the target's own cost:
        plain steps would look dear as long as there are streams, and drafting cheap beside them. None beside
        prompts: a long pass is off by more than its streams take, and drafting would look dear.
        """
        if not record.num_stream_rows:
            return 0.0
        if record.view.num_rows > len(record.view.sequences):
            return None
        shape = shape_of(record)
        target = float(self.target_s(shape.rows, shape.samples, shape.context, shape.pairs))
        return max(0.0, _pass_s(record) - target)

    def errors(self) -> tuple[float, float]:
        """Median and 90th percentile of |predicted - measured| / measured, latest steps; 0 before any."""
        if not self._errors:
            return 0.0, 0.0
        median, p90 = np.quantile(list(self._errors), (0.5, 0.9))
        return float(median), float(p90)

    def _observe_target(self, rows: float, predicted: float, seconds: float) -> None:
        if seconds <= 0 or predicted <= 0:
            return
        rows = self._padded_one(rows)
        error = self._robust(math.log(seconds / predicted))
        self._level += _LEVEL_RATE * error
        self._factor = math.exp(self._level)
        right = min(bisect_left(self._knots, rows), len(self._knots) - 2)
        left = max(right - 1, 0)
        width = self._knots[right] - self._knots[left]
        share = min((rows - self._knots[left]) / width, 1.0) if width else 1.0
        self._local[left] += _LOCAL_RATE * (1 - share) * error
        self._local[right] += _LOCAL_RATE * share * error
        self._num_observed += 1
        if self._num_observed % _TABLE_EVERY == 0:
            self._local *= _LOCAL_DECAY**_TABLE_EVERY
            self._correct()

    def _correct(self) -> None:
        self._factor = math.exp(self._level)
        self._local[-1] = self._local[-2]  # the far end follows the last measured count
        self._table = np.maximum.accumulate(self._profile * np.exp(self._local))
        self._seconds: list[float] = self._table.tolist()
        self._rises: list[float] = (np.diff(self._table) / np.diff(self._rows)).tolist()
        self._first, self._dense = 0, []  # of `_from`, until the table changes

    def to_json(self) -> str:
        """Everything it knows, corrections included."""
        self._correct()
        per_context, per_pair, per_sample = self._slopes
        content = {
            "format": FORMAT,
            "meta": self.meta,
            "rows": self._rows[:-1].tolist(),
            "seconds": self._profile[:-1].tolist(),
            "per_context": per_context,
            "per_pair": per_pair,
            "per_sample": per_sample,
            "draft": self._draft.coefficients,
            "host": self._host.coefficients,
            "buckets": self._buckets,
            "level": self._level,
            "local": self._local[:-1].tolist(),
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> CostModel:
        """The inverse of `to_json`.

        Raises:
            ConfigError: The text is no cost model of this format.
        """
        try:
            content = json.loads(text)
            if not isinstance(content, dict):
                raise ConfigError(f"a cost model must be a JSON object, got {type(content).__name__}")
            if (found := content.pop("format", None)) != FORMAT:
                raise ConfigError(
                    f"a cost model needs format {FORMAT}, got {found!r}: measure it anew (outpace profile)"
                )
            level, local = float(content.pop("level", 0.0)), content.pop("local", None)
            model = cls(content.pop("rows"), content.pop("seconds"), **content)
            model._level = level
            if local is not None:
                model._local[:-1] = local
            model._correct()
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"not a cost model: {type(error).__name__}: {error}") from None
        return model

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """Reads a file.

        Raises:
            ConfigError: It cannot be read or holds no cost model.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the profile {path}: {error}") from None
        except ConfigError as error:
            raise ConfigError(f"the profile {path} is of no use: {error}") from None

    @classmethod
    def fit(
        cls,
        shapes: Sequence[Shape],
        seconds: Sequence[float],
        meta: Mapping[str, Any] | None = None,
        buckets: Sequence[int] = (),
    ) -> CostModel:
        """The model with the least relative error over measured steps; its table has their row counts.

        Non-negative least squares over the table's rises and the slopes keeps it monotone.

        Args:
            shapes: What was measured; where passes are padded, with the rows that were computed.
            seconds: How long each took.
            meta: What it was measured on.
            buckets: Row counts that passes are padded to. One that was not measured costs what the next does.

        Raises:
            ConfigError: There are fewer than two row counts.
        """
        knots = sorted({float(shape.rows) for shape in shapes})
        if len(knots) < 2:
            raise ConfigError(f"a cost model needs at least two row counts, got {knots}")
        left, right = np.array(knots[:-1]), np.array(knots[1:])
        rows = np.array([shape.rows for shape in shapes])
        rises = np.clip((rows[:, None] - left) / (right - left), 0.0, 1.0)
        linear = np.array([[shape.context, shape.pairs, shape.samples] for shape in shapes])
        design = np.hstack([np.ones((len(shapes), 1)), rises, linear])
        weights = 1 / np.array(seconds)
        unit = np.maximum(np.abs(design * weights[:, None]).max(axis=0), 1e-30)
        solution = (
            np.array(nonnegative_least_squares(design * weights[:, None] / unit, np.ones(len(shapes)))) / unit
        )
        table = np.maximum(np.cumsum(solution[: len(knots)]), _LEAST_S)
        context, pair, sample = map(float, solution[len(knots) :])
        return cls(
            knots,
            table.tolist(),
            per_context=context,
            per_pair=pair,
            per_sample=sample,
            buckets=[bucket for bucket in buckets if bucket in knots],
            meta=meta,
        )


@dataclass(frozen=True, slots=True)
class Roofline:
    """A machine and a model known by their data sheets only.

    Attributes:
        params: Weights that every row meets.
        weight_bytes: Bytes of one of them.
        bandwidth: Bytes per second that memory gives, over all devices.
        flops: Operations per second, likewise.
        kv_bytes: Bytes of the cache per token.
        pair_flops: Operations of attention per row and cached token.
        fixed_s: Seconds per step whatever its size: launches, communication.
        efficiency: Share of bandwidth and operations that is reached.
        max_rows: Largest row count of the table.
    """

    params: float
    bandwidth: float
    flops: float
    weight_bytes: float = 2.0
    kv_bytes: float = 0.0
    pair_flops: float = 0.0
    fixed_s: float = 0.0
    efficiency: float = 1.0
    max_rows: int = 8192

    @classmethod
    def from_json(cls, text: str) -> Roofline:
        """Reads an object with these keys.

        Raises:
            ConfigError: It is none, or a number is out of range.
        """
        try:
            roofline = cls(**json.loads(text))
            numbers = [getattr(roofline, name) for name in cls.__slots__]
            is_valid = all(math.isfinite(x) and x >= 0 for x in numbers) and min(numbers[:3]) > 0
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"a roofline is a JSON object with {', '.join(cls.__slots__)}: {error}"
            ) from None
        if not is_valid or not 0 < roofline.efficiency <= 1 or roofline.max_rows < 2:
            raise ConfigError(f"a roofline needs numbers above 0 and an efficiency up to 1, got {text}")
        return roofline

    def cost_model(self) -> CostModel:
        """Time to read the weights or to multiply by them, whichever is longer, and what comes on top."""
        bandwidth, flops = self.bandwidth * self.efficiency, self.flops * self.efficiency
        read_s = self.params * self.weight_bytes / bandwidth
        row_s = 2 * self.params / flops
        ridge = read_s / row_s
        counts = {1.0, float(self.max_rows), *(2.0**e for e in range(self.max_rows.bit_length())), ridge}
        rows = sorted(n for n in counts if 1 <= n <= self.max_rows)
        meta = {
            "assumption": "a roofline, not a measurement",
            **{n: getattr(self, n) for n in self.__slots__},
        }
        return CostModel(
            rows,
            [max(read_s, n * row_s) + self.fixed_s for n in rows],
            per_context=self.kv_bytes / bandwidth,
            per_pair=self.pair_flops / flops,
            meta=meta,
        )


def _pass_s(record: StepRecord) -> float:
    """Seconds of a step's pass and verification."""
    return record.seconds.get("forward", 0.0) + record.seconds.get("verify", 0.0)


def shape_of(record: StepRecord) -> Shape:
    """The target's work in a finished step."""
    view, drafted = record.view, record.num_drafted
    pairs = sum(num * s.context_len for num, s in zip(drafted, view.sequences, strict=True) if num)
    samples = len(drafted) + sum(drafted)
    return Shape(record.num_rows, samples, view.num_context, view.num_pairs + pairs)


def _buckets(buckets: Sequence[int], rows: Sequence[float]) -> list[int]:
    """The checked buckets."""
    if sorted(set(buckets)) != list(buckets) or not set(buckets) <= set(rows):
        raise ConfigError(f"a cost model's buckets must ascend and be among its row counts, got {buckets}")
    return list(buckets)


def _table(rows: Sequence[float], seconds: Sequence[float]) -> tuple[Floats, Floats]:
    """The checked table, with a point far out on its last slope."""
    x, y = np.array(rows, dtype=np.float64), np.array(seconds, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise ConfigError("a cost model needs two or more row counts and as many seconds")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (np.diff(x) > 0).all() and x[0] > 0):
        raise ConfigError("a cost model's row counts must be positive and ascending")
    if not ((np.diff(y) >= 0).all() and y[0] > 0):
        raise ConfigError("a cost model's seconds must be positive and not fall as rows grow")
    slope = (y[-1] - y[-2]) / (x[-1] - x[-2])
    return np.append(x, _FAR), np.append(y, y[-1] + slope * (_FAR - x[-1]))
