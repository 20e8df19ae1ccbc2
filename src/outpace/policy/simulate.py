"""Replays a workload against a cost model and any policy: deterministic, without a model or a clock.

For tests of policies, and for planning machines that nobody here has. The cost model is the truth of the
simulation; a policy gets its own copy to predict with. Whether a draft exists and how much of it is
accepted is drawn from the seed, the request and the position in its answer alone, so that every policy
meets the same luck.
"""

from __future__ import annotations

import copy
import csv
import gzip
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from outpace.errors import ConfigError
from outpace.policy.base import BatchView, MethodRecord, SequenceView, SpeculationPolicy, StepRecord
from outpace.policy.cost import CostModel, Shape
from outpace.policy.linear_cost import DraftCost


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How drafts fare from some time on.

    Attributes:
        rates: Chance of a node at depth 1, 2, … given its parent; the last one holds for all deeper ones.
        coverage: Chance that there is a draft at all.
        spread: Each request's rates differ by up to so much, up or down.
        since_s: When it begins.
    """

    rates: tuple[float, ...] = (0.7,)
    coverage: float = 1.0
    spread: float = 0.0
    since_s: float = 0.0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ConfigError: A chance is outside [0, 1].
        """
        if not self.rates:
            raise ConfigError("an acceptance process needs at least one rate")
        for value in (*self.rates, self.coverage, self.spread):
            if not 0 <= value <= 1:
                raise ConfigError(f"rates, coverage and spread must be in [0, 1], got {value}")

    def chances(self, depth: int, luck: float) -> np.ndarray:
        """[depth]: of a request whose place within the spread is `luck`, in [-1, 1]."""
        rates = (*self.rates, *(self.rates[-1],) * max(0, depth - len(self.rates)))
        return np.clip(np.array(rates[:depth]) + luck * self.spread, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request to come.

    Attributes:
        time_s: When; with a closed loop, when it may come at the earliest.
        prompt_len: Tokens of its prompt.
        output_len: Tokens of its answer.
        method: The draft method that it insists on; empty where it leaves the choice.
    """

    time_s: float
    prompt_len: int
    output_len: int
    method: str = ""


@dataclass(frozen=True, slots=True)
class Drafter:
    """One of several draft methods; requests have their luck with each of them apart.

    Attributes:
        acceptance: How its drafts fare, by time.
        cost: What drafting costs, as `draft` of a CostModel.
    """

    acceptance: tuple[Acceptance, ...] = (Acceptance(),)
    cost: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked of a server.

    Attributes:
        arrivals: The requests, in order of time.
        acceptance: How drafts fare, by time, where there is one method to make them.
        drafters: By name the draft methods, where there are several.
        concurrency: Most requests in the system at once, the others come as these end; None: no limit.
    """

    arrivals: tuple[Arrival, ...]
    acceptance: tuple[Acceptance, ...] = (Acceptance(),)
    concurrency: int | None = None
    drafters: Mapping[str, Drafter] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Machine:
    """What serves.

    Attributes:
        cost: What steps cost in truth.
        max_num_seqs: Most sequences at once.
        max_num_batched_tokens: Most known rows of a step.
        noise: Standard deviation of the logarithm of a step's duration.
    """

    cost: CostModel
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    noise: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """A simulated step: when it ended, its duration, and what was in it."""

    time_s: float
    seconds: float
    num_sequences: int
    num_drafted: int
    num_tokens: int
    predicted_s: float | None
    num_asked: Mapping[str, int] = field(default_factory=dict)  # sequences, by method where there are several


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it.

    Attributes:
        steps: In order.
        latencies_s: From arrival to the last token, by request.
        first_token_s: From arrival to the first token.
        tpot_s: Time per later token.
    """

    steps: list[Step]
    latencies_s: list[float]
    first_token_s: list[float]
    tpot_s: list[float]

    @property
    def tokens_per_s(self) -> float:
        """Tokens emitted over the time that steps took."""
        return sum(s.num_tokens for s in self.steps) / sum(s.seconds for s in self.steps)

    def summary(self) -> dict[str, float]:
        """The row of a table."""
        drafted = sum(step.num_drafted for step in self.steps)
        sampling = sum(step.num_sequences for step in self.steps)
        return {
            "tokens_per_s": self.tokens_per_s,
            "mean_latency_s": float(np.mean(self.latencies_s)),
            "p99_latency_s": float(np.quantile(self.latencies_s, 0.99)),
            "mean_ttft_s": float(np.mean(self.first_token_s)),
            "mean_tpot_ms": 1e3 * float(np.mean(self.tpot_s)),
            "mean_draft_len": drafted / max(sampling, 1),
            "steps": len(self.steps),
        }


@dataclass(frozen=True, slots=True)
class Chain:
    """A drafted chain, as policies see it."""

    parents: tuple[int, ...]
    confidence: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Fate:
    """How a request fares with a draft method.

    Attributes:
        luck: Its place within the spread, in [-1, 1].
        covered: [output] Uniform draws: whether there is a draft at this position.
        accepted: [output] Uniform draws: whether a draft of this position's token is right.
    """

    luck: float
    covered: np.ndarray
    accepted: np.ndarray

    @classmethod
    def draw(cls, output_len: int, *seed: int) -> Fate:
        """From the numbers of the run, of the request and, of several, of the method."""
        draws = np.random.default_rng(seed)
        uniform = draws.random((2, output_len))
        return cls(2 * draws.random() - 1, uniform[0], uniform[1])


@dataclass(slots=True, eq=False)
class _Running:
    """A request on its way.

    Attributes:
        fates: By draft method; of the only one under an empty name.
    """

    id: str
    arrival: Arrival
    came_s: float
    fates: dict[str, Fate]
    num_computed: int = 0
    num_output: int = 0
    first_token_s: float | None = None

    @classmethod
    def start(
        cls, number: int, arrival: Arrival, came_s: float, seed: int, methods: Iterable[str]
    ) -> _Running:
        fates = {
            name: Fate.draw(arrival.output_len, seed, number, index) for index, name in enumerate(methods)
        }
        fates = fates or {"": Fate.draw(arrival.output_len, seed, number)}
        return cls(str(number), arrival, came_s, fates)

    @property
    def num_missing(self) -> int:
        """Known tokens that are not computed."""
        return self.arrival.prompt_len + self.num_output - self.num_computed

    @property
    def max_draft(self) -> int:
        return self.arrival.output_len - self.num_output - 1


@dataclass(slots=True)
class Simulator:
    """Runs a workload step by step, as the engine's scheduler would.

    Attributes:
        machine: What serves.
        workload: What is asked.
        policy: Who decides.
        seed: Of all luck.
    """

    machine: Machine
    workload: Workload
    policy: SpeculationPolicy
    seed: int = 0
    _now: float = 0.0
    _waiting: deque[_Running] = field(default_factory=deque)
    _running: list[_Running] = field(default_factory=list)
    _num_arrived: int = 0
    # by method and sequence its context when that last drafted
    _seen: dict[tuple[str, str], int] = field(default_factory=dict)
    _result: Result = field(default_factory=lambda: Result([], [], [], []))

    def run(self) -> Result:
        """Until the last request has ended."""
        noise = random.Random(self.seed)
        while self._arrive():
            self._step(math.exp(noise.gauss(0.0, self.machine.noise)) if self.machine.noise else 1.0)
        return self._result

    def _arrive(self) -> bool:
        """Lets in whose time has come, moving the clock if nothing else is to do; False at the end."""
        arrivals, limit = self.workload.arrivals, self.workload.concurrency
        while self._num_arrived < len(arrivals):
            arrival = arrivals[self._num_arrived]
            num_present = len(self._running) + len(self._waiting)
            if limit is not None and num_present >= limit:
                break
            if arrival.time_s > self._now and num_present:
                break
            self._now = max(self._now, arrival.time_s)
            came_s = arrival.time_s if limit is None else self._now
            names = self.workload.drafters
            self._waiting.append(_Running.start(self._num_arrived, arrival, came_s, self.seed, names))
            self._num_arrived += 1
        while self._waiting and len(self._running) < self.machine.max_num_seqs:
            self._running.append(self._waiting.popleft())
        return bool(self._running)

    def _step(self, noise: float) -> None:
        plan = self._plan()
        sampling = [r for r, num_known in plan if num_known == r.num_missing]
        view = self._view(plan, sampling)
        limits = self.policy.limits(view)
        made = self._drafts(view, sampling, limits)
        picked = self._pick(view, made)
        drafts = [made[name].trees[i] for i, name in enumerate(picked)]
        kept = self.policy.trim(view, drafts)
        if kept is not None:
            drafts = [_cut(draft, num) for draft, num in zip(drafts, kept, strict=True)]
        paths = [made[name].paths[i][: len(drafts[i].parents)] for i, name in enumerate(picked)]
        record = self._record(view, limits, drafts, paths, noise)
        if self.workload.drafters:
            record = self._with_methods(record, made, picked, noise)
        self._now += record.seconds["total"]
        self._advance(plan, sampling, paths)
        self.policy.observe(record)
        self._result.steps.append(
            Step(
                self._now,
                record.seconds["total"],
                len(sampling),
                sum(record.num_drafted),
                record.num_tokens,
                record.predicted_s,
                {name: sum(map(bool, drafted.limits)) for name, drafted in made.items()},
            )
        )

    def _drafts(self, view: BatchView, sampling: list[_Running], limits: list[int]) -> dict[str, _Drafted]:
        """What every method that is asked drafts, and how much of it is right."""
        drafters = self.workload.drafters or {"": Drafter(self.workload.acceptance)}
        asked = self.policy.methods(view)
        made = {}
        for name, drafter in drafters.items():
            wanted = limits if asked is None else asked.get(name, [0] * len(limits))
            mine = [k if s.method in ("", name) else 0 for k, s in zip(wanted, view.sequences, strict=True)]
            acceptance = next(a for a in reversed(drafter.acceptance) if a.since_s <= self._now)
            chances = acceptance.chances(max(mine, default=0), 0.0) if acceptance.spread == 0 else None
            trees = [_draft(r, name, limit, acceptance) for r, limit in zip(sampling, mine, strict=True)]
            paths = [
                _path(r, name, tree, acceptance, chances) for r, tree in zip(sampling, trees, strict=True)
            ]
            made[name] = _Drafted(mine, trees, paths)
        return made

    def _pick(self, view: BatchView, made: Mapping[str, _Drafted]) -> list[str]:
        """Whose draft is verified: where the policy does not say, that of the first who has one."""
        names = list(made)
        asked = {name: drafted.trees for name, drafted in made.items() if any(drafted.limits)}
        picked = self.policy.pick(view, asked) if asked and self.workload.drafters else None
        if picked is not None:
            return picked
        return [
            next((name for name in names if made[name].trees[i].parents), names[0])
            for i in range(len(view.sequences))
        ]

    def _with_methods(
        self, record: StepRecord, made: Mapping[str, _Drafted], picked: list[str], noise: float
    ) -> StepRecord:
        """Adds what each method did, and what that took."""
        num_came = [len(path) + 1 for path in record.paths]
        methods = []
        for name, drafted in made.items():
            if not any(drafted.limits):
                continue
            lengths = [min(len(t.parents), n) for t, n in zip(drafted.trees, num_came, strict=True)]
            methods.append(
                MethodRecord(
                    name=name,
                    limits=tuple(drafted.limits),
                    drafts=tuple(drafted.trees),
                    lengths=tuple(lengths),
                    paths=tuple(path[:n] for path, n in zip(drafted.paths, lengths, strict=True)),
                    taken=tuple(taken == name for taken in picked),
                    seconds=noise * self._draft_s(name, record.view, drafted.limits),
                )
            )
        seconds = {**record.seconds, "propose": sum(method.seconds for method in methods)}
        seconds["total"] = sum(seconds.values()) - record.seconds["total"]
        return replace(record, methods=tuple(methods), seconds=seconds)

    def _draft_s(self, name: str, view: BatchView, limits: Sequence[int]) -> float:
        """What drafting takes; the drafter has seen those sequences then."""
        asked = [limit for limit in limits if limit]
        drafting = [s for s, limit in zip(view.sequences, limits, strict=True) if limit]
        behind = sum(s.context_len - self._seen.get((name, s.id), 0) for s in drafting)
        self._seen.update(((name, s.id), s.context_len) for s in drafting)
        amounts = len(asked), sum(asked), max(asked, default=0), behind
        drafter = self.workload.drafters.get(name)
        cost = self.machine.cost.draft_s if drafter is None else DraftCost(drafter.cost).seconds
        return float(cost(*amounts))

    def _plan(self) -> list[tuple[_Running, int]]:
        budget = self.machine.max_num_batched_tokens
        plan = []
        for running in self._running:
            num_known = min(running.num_missing, budget)
            budget -= num_known
            if num_known:
                plan.append((running, num_known))
        return plan

    def _view(self, plan: list[tuple[_Running, int]], sampling: list[_Running]) -> BatchView:
        without = [r.came_s for r in (*self._running, *self._waiting) if r.num_output == 0]
        chosen = set(map(id, sampling))
        num_waiting = len(without) - sum(1 for r in sampling if r.num_output == 0)
        return BatchView(
            sequences=tuple(
                SequenceView(
                    r.id,
                    r.num_computed,
                    r.max_draft,
                    num_output=r.num_output,
                    decode_s=0.0 if r.first_token_s is None else self._now - r.first_token_s,
                    method=r.arrival.method,
                )
                for r in sampling
            ),
            num_rows=sum(num for _, num in plan),
            num_context=sum(r.num_computed for r, _ in plan),
            num_free_slots=2**31,
            num_pairs=sum(num * r.num_computed for r, num in plan),
            num_scheduled=len(plan),
            num_waiting=num_waiting,
            oldest_wait_s=max((self._now - r.came_s for r in self._waiting), default=0.0) if chosen else 0.0,
        )

    def _record(
        self,
        view: BatchView,
        limits: Sequence[int],
        drafts: Sequence[Chain],
        paths: Sequence[tuple[int, ...]],
        noise: float,
    ) -> StepRecord:
        cost, drafted = self.machine.cost, [len(draft.parents) for draft in drafts]
        pairs = sum(num * s.context_len for num, s in zip(drafted, view.sequences, strict=True))
        shape = Shape(
            view.num_rows + sum(drafted),
            len(drafts) + sum(drafted),
            view.num_context,
            view.num_pairs + pairs,
        )
        seconds = {
            "forward": noise * float(cost.target_s(shape.rows, shape.samples, shape.context, shape.pairs)),
            "propose": 0.0 if self.workload.drafters else noise * self._draft_s("", view, limits),
            "advance": noise * cost.host_s(view.num_scheduled),
        }
        return StepRecord(
            view=view,
            limits=tuple(limits),
            drafts=tuple(drafts),
            paths=tuple(paths),
            seconds={**seconds, "total": sum(seconds.values())},
            num_rows=int(shape.rows),
            num_tokens=len(drafts) + sum(map(len, paths)),
            predicted_s=self.policy.predicted_s,
        )

    def _advance(
        self, plan: list[tuple[_Running, int]], sampling: list[_Running], paths: list[tuple[int, ...]]
    ) -> None:
        for running, num_known in plan:
            running.num_computed += num_known
        for running, path in zip(sampling, paths, strict=True):
            running.num_computed += len(path)
            running.num_output += 1 + len(path)
            if running.first_token_s is None:
                running.first_token_s = self._now
            if running.num_output >= running.arrival.output_len:
                self._finish(running)

    def _finish(self, running: _Running) -> None:
        assert running.first_token_s is not None
        self._running.remove(running)
        self.policy.release(running.id)
        result = self._result
        result.latencies_s.append(self._now - running.came_s)
        result.first_token_s.append(running.first_token_s - running.came_s)
        result.tpot_s.append((self._now - running.first_token_s) / max(running.num_output - 1, 1))


@dataclass(frozen=True, slots=True)
class _Drafted:
    """What a method was asked for, per sequence, what it made of that, and the nodes that are right."""

    limits: list[int]
    trees: list[Chain]
    paths: list[tuple[int, ...]]


def _draft(running: _Running, method: str, limit: int, acceptance: Acceptance) -> Chain:
    if not limit or running.fates[method].covered[running.num_output] >= acceptance.coverage:
        return Chain(())
    return Chain(tuple(range(-1, limit - 1)))


def _cut(draft: Chain, num_nodes: int) -> Chain:
    return draft if num_nodes >= len(draft.parents) else Chain(draft.parents[:num_nodes])


def _path(
    running: _Running, method: str, draft: Chain, acceptance: Acceptance, chances: np.ndarray | None
) -> tuple[int, ...]:
    depth = len(draft.parents)
    if not depth:
        return ()
    if chances is None:
        chances = acceptance.chances(depth, running.fates[method].luck)
    draws = running.fates[method].accepted[running.num_output : running.num_output + depth]
    misses = np.flatnonzero(draws >= chances[:depth])
    return tuple(range(int(misses[0]) if len(misses) else depth))


def simulate(
    machine: Machine,
    workload: Workload,
    make_policy: Callable[[CostModel], SpeculationPolicy],
    seed: int = 0,
) -> Result:
    """Runs a workload under a policy, which predicts with a copy of the machine's cost model."""
    return Simulator(machine, workload, make_policy(copy.deepcopy(machine.cost)), seed).run()


def poisson(rate: float, num_requests: int, prompt_len: int, output_len: int, seed: int) -> list[Arrival]:
    """Requests at a mean rate per second."""
    draws = random.Random(seed)
    time_s = 0.0
    arrivals = []
    for _ in range(num_requests):
        time_s += draws.expovariate(rate)
        arrivals.append(Arrival(time_s, prompt_len, output_len))
    return arrivals


def read_trace(path: Path, num_requests: int, speed: float = 1.0) -> list[Arrival]:
    """The first requests of a CSV with columns timestamp_s, prompt_tokens and output_tokens, perhaps gzipped.

    Args:
        path: The file.
        num_requests: How many.
        speed: Factor on the rate of arrival.

    Raises:
        ConfigError: It cannot be read or is no such file.
    """
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            rows = [row for row, _ in zip(csv.DictReader(file), range(num_requests), strict=False)]
        start = float(rows[0]["timestamp_s"])
        return [
            Arrival(
                (float(row["timestamp_s"]) - start) / speed,
                max(1, int(row["prompt_tokens"])),
                max(1, int(row["output_tokens"])),
            )
            for row in rows
        ]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from None
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ConfigError(
            f"the trace {path} must have requests with columns timestamp_s, prompt_tokens and output_tokens: "
            f"{type(error).__name__} {error}"
        ) from None
