"""What the engine did, as StepRecords for the policy and in Prometheus' format for everyone else.

The engine thread writes plain numbers; a scrape turns them into metric families. So a step pays for an
addition and a bisection, not for a lock and a label lookup. Names are vLLM's, with our prefix.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from outpace.batch import Batch, TargetOutput, Verdict
from outpace.engine.scheduler import Scheduler
from outpace.policy.base import BatchView, MethodRecord, StepRecord
from outpace.request import DraftStep, FinishReason, Output, Sequence

_TOKENS = tuple(float(m * 10**e) for e in range(5) for m in (1, 2, 5))
_ROWS = tuple(float(2**e) for e in range(15))
_REQUEST_S = (0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 480.0)
_FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0)
_TOKEN_S = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 1.0, 2.5)
_PHASE_S = tuple(m * 10.0**e for e in range(-6, 1) for m in (1, 2, 5))

_RATIOS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
_LENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, 10.0, 16.0, 32.0)

_PHASES = ("between", "plan", "policy", "propose", "forward", "verify", "advance")


class Histogram:
    """Counts per bucket, and the sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Adds one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, cumulative count) as Prometheus wants them."""
        names = [*map(str, self.bounds), "+Inf"]
        return list(zip(names, itertools.accumulate(self.counts), strict=True))


@dataclass(slots=True)
class _Times:
    """When an answer's first and latest tokens came, in seconds on the monotonic clock."""

    first: float
    last: float


@dataclass(slots=True)
class Drafts:
    """What became of drafts, as vLLM counts it.

    The mean acceptance length is 1 + num_accepted_tokens / num_drafts.

    Attributes:
        num_drafts: Trees verified, one per sequence and step.
        num_draft_tokens: Their nodes.
        num_accepted_tokens: Nodes on accepted paths.
        num_accepted_per_depth: The same by depth; the first entry is depth 1, vLLM's position 0.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_per_depth: list[int] = field(default_factory=list)

    def observe(self, num_nodes: int, num_accepted: int) -> None:
        """Counts one verified tree that had nodes."""
        self.num_drafts += 1
        self.num_draft_tokens += num_nodes
        self.num_accepted_tokens += num_accepted
        by_depth = self.num_accepted_per_depth
        by_depth += [0] * (num_accepted - len(by_depth))
        for depth in range(num_accepted):
            by_depth[depth] += 1


class Metrics(Collector):
    """The engine's clock and counters.

    Within a step call `start_step`, `lap` after each phase, `record`, and at the end `finish_step`.

    Attributes:
        drafts: What became of the drafts so far.
        drafts_by_method: The same by draft method, where there are several.
        registry: Prometheus' view of these metrics.
    """

    def __init__(
        self, model_name: str, scheduler: Scheduler, max_depth: int = 0, methods: tuple[str, ...] = ()
    ) -> None:
        """Starts at zero.

        Args:
            model_name: The label of that name.
            scheduler: Knows the queues and the cache.
            max_depth: Draft positions that are exposed before anything is accepted there.
            methods: The draft methods; several are told apart.
        """
        self._model_name = model_name
        self._scheduler = scheduler
        self._times: dict[str, _Times] = {}
        self._laps: dict[str, float] = {}
        self._last_lap = 0.0
        self._left_work = False
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._num_finished: Counter[FinishReason] = Counter()
        self.drafts = Drafts(num_accepted_per_depth=[0] * max_depth)
        self.drafts_by_method = {name: Drafts() for name in methods} if len(methods) > 1 else {}
        self._iteration_tokens = Histogram(_ROWS)
        self._time_to_first_token = Histogram(_FIRST_TOKEN_S)
        self._inter_token_latency = Histogram(_TOKEN_S)
        self._time_per_output_token = Histogram(_TOKEN_S)
        self._e2e_latency = Histogram(_REQUEST_S)
        self._queue_time = Histogram(_REQUEST_S)
        self._prefill_time = Histogram(_REQUEST_S)
        self._decode_time = Histogram(_REQUEST_S)
        self._request_prompt_tokens = Histogram(_TOKENS)
        self._request_generation_tokens = Histogram(_TOKENS)
        self._step_time = Histogram(_PHASE_S)
        self._predicted_step_time = Histogram(_PHASE_S)
        self._prediction_error = Histogram(_RATIOS)
        self._draft_length = Histogram(_LENGTHS)
        self._phases = {phase: Histogram(_PHASE_S) for phase in _PHASES}
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def start_step(self) -> None:
        """Starts the clock of a step."""
        now = time.perf_counter()
        self._laps = {"between": now - self._last_lap} if self._left_work else {}
        self._last_lap = now

    def resume(self) -> None:
        """Leaves out what passed since the last step: somebody else had that time."""
        self._last_lap = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Ends a phase: plan, policy, propose, forward, verify or advance. A phase may have several parts."""
        now = time.perf_counter()
        self._laps[phase] = self._laps.get(phase, 0.0) + now - self._last_lap
        self._last_lap = now

    def record(
        self,
        view: BatchView,
        limits: Iterable[int],
        batch: Batch,
        target: TargetOutput,
        verdict: Verdict,
        predicted_s: float | None,
        methods: tuple[MethodRecord, ...] = (),
    ) -> StepRecord:
        """What the step did, but for the time that learning from it takes.

        Adds its drafts to their sequences' own.
        """
        pairs = [
            (entry, decision)
            for entry, decision in zip(batch.entries, verdict.decisions, strict=True)
            if decision is not None
        ]
        self._iteration_tokens.observe(batch.num_rows)
        for entry, decision in pairs:
            if len(entry.tree):
                step = DraftStep(len(entry.tree), len(decision.path))
                self.drafts.observe(*step)
                entry.sequence.draft_steps.append(step)
        for method in methods:
            for (entry, decision), is_taken in zip(pairs, method.taken, strict=True):
                if is_taken and len(entry.tree):
                    self.drafts_by_method[method.name].observe(len(entry.tree), len(decision.path))
        total = sum(self._laps.values())
        self._step_time.observe(total)
        if pairs:
            self._draft_length.observe(sum(len(entry.tree) for entry, _ in pairs) / len(pairs))
        if predicted_s is not None:
            self._predicted_step_time.observe(predicted_s)
            self._prediction_error.observe(abs(predicted_s - total) / total)
        return StepRecord(
            view=view,
            limits=tuple(limits),
            drafts=tuple(entry.tree for entry, _ in pairs),
            paths=tuple(decision.path for _, decision in pairs),
            seconds={**self._laps, "total": total},
            num_rows=batch.num_rows,
            num_stream_rows=0.0 if target.streams is None else target.streams.num_rows,
            num_tokens=sum(len(decision.token_ids) for _, decision in pairs),
            predicted_s=predicted_s,
            methods=methods,
        )

    def finish_step(self, sequences: list[Sequence], outputs: list[Output]) -> None:
        """Counts what came out of a step.

        Args:
            sequences: Those that sampled.
            outputs: One for each of them.
        """
        for phase, seconds in self._laps.items():
            self._phases[phase].observe(seconds)
        self._left_work = self._scheduler.has_work
        now = time.monotonic()
        for sequence, output in zip(sequences, outputs, strict=True):
            self._num_generation_tokens += len(output.token_ids)
            times = self._times.get(sequence.id)
            if times is None:
                times = self._times[sequence.id] = _Times(now, now)
                self._num_prompt_tokens += sequence.num_prompt
                self._time_to_first_token.observe(now - sequence.request.arrival)
            else:
                self._inter_token_latency.observe(now - times.last)
                times.last = now
            if output.finish_reason is not None:
                self._finish(sequence, self._times.pop(sequence.id), output.finish_reason)

    def abort(self, request_id: str) -> None:
        """Counts an aborted request."""
        self._times.pop(request_id, None)
        self._num_finished[FinishReason.ABORT] += 1

    def _finish(self, sequence: Sequence, times: _Times, reason: FinishReason) -> None:
        arrival, scheduled = sequence.request.arrival, sequence.first_scheduled
        assert scheduled is not None, f"{sequence.id} ended without a step"
        decode_time = times.last - times.first
        self._num_finished[reason] += 1
        self._e2e_latency.observe(times.last - arrival)
        self._queue_time.observe(scheduled - arrival)
        self._prefill_time.observe(times.first - scheduled)
        self._decode_time.observe(decode_time)
        self._request_prompt_tokens.observe(sequence.num_prompt)
        self._request_generation_tokens.observe(sequence.num_output)
        if sequence.num_output > 1:
            self._time_per_output_token.observe(decode_time / (sequence.num_output - 1))

    def describe(self) -> list[Metric]:
        """Nothing: the registry need not collect in order to register."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metric families as of now; called by the registry on each scrape, from any thread."""
        line = self._scheduler
        yield self._gauge("num_requests_running", "Requests that hold cache blocks", line.num_running)
        yield self._gauge("num_requests_waiting", "Requests in the queue", line.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of cache blocks in use", line.kv_cache_usage)
        yield self._counter(
            "num_preemptions", "Running requests that lost their blocks", line.num_preemptions
        )
        yield self._counter("prompt_tokens", "Prompt tokens computed or found", self._num_prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated", self._num_generation_tokens)
        yield self._counter("prefix_cache_queries", "Tokens looked up", line.num_prefix_queries)
        yield self._counter("prefix_cache_hits", "Tokens found", line.num_prefix_hits)
        drafts = self.drafts
        yield self._counter("spec_decode_num_drafts", "Draft trees verified", drafts.num_drafts)
        yield self._counter("spec_decode_num_draft_tokens", "Their tokens", drafts.num_draft_tokens)
        yield self._counter(
            "spec_decode_num_accepted_tokens", "Draft tokens accepted", drafts.num_accepted_tokens
        )
        yield self._accepted_per_position()
        if self.drafts_by_method:
            yield from self._by_method()
        yield self._request_success()
        for name, help, histogram in (
            ("iteration_tokens_total", "Token rows per step", self._iteration_tokens),
            ("time_to_first_token_seconds", "From arrival to the first token", self._time_to_first_token),
            ("inter_token_latency_seconds", "Between steps that gave tokens", self._inter_token_latency),
            (
                "request_time_per_output_token_seconds",
                "Decode time per token after the first",
                self._time_per_output_token,
            ),
            ("e2e_request_latency_seconds", "From arrival to the last token", self._e2e_latency),
            ("request_queue_time_seconds", "From arrival to the first step", self._queue_time),
            ("request_prefill_time_seconds", "From the first step to the first token", self._prefill_time),
            ("request_decode_time_seconds", "From the first to the last token", self._decode_time),
            ("request_prompt_tokens", "Prompt length", self._request_prompt_tokens),
            ("request_generation_tokens", "Answer length", self._request_generation_tokens),
            ("step_time_seconds", "Duration of a step", self._step_time),
            ("step_time_predicted_seconds", "What the policy expected", self._predicted_step_time),
            (
                "step_time_error_ratio",
                "Difference of the two, divided by the duration",
                self._prediction_error,
            ),
            (
                "spec_decode_step_draft_length",
                "Draft tokens verified per sampling sequence of a step",
                self._draft_length,
            ),
        ):
            family = HistogramMetricFamily(f"outpace:{name}", help, labels=["model_name"])
            family.add_metric([self._model_name], histogram.buckets(), histogram.sum)
            yield family
        yield self._phase_seconds()

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"outpace:{name}", help, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(f"outpace:{name}", help, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _request_success(self) -> Metric:
        family = CounterMetricFamily(
            "outpace:request_success", "Requests that ended", labels=["model_name", "finished_reason"]
        )
        for reason in FinishReason:
            family.add_metric([self._model_name, reason], self._num_finished[reason])
        return family

    def _accepted_per_position(self) -> Metric:
        family = CounterMetricFamily(
            "outpace:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted, by depth - 1",
            labels=["model_name", "position"],
        )
        for position, num_accepted in enumerate(list(self.drafts.num_accepted_per_depth)):
            family.add_metric([self._model_name, str(position)], num_accepted)
        return family

    def _by_method(self) -> Iterator[Metric]:
        """What each of several draft methods had verified and accepted."""
        labels = ["model_name", "method"]
        drafted = CounterMetricFamily(
            "outpace:spec_decode_num_draft_tokens_by_method", "Their tokens, by draft method", labels=labels
        )
        accepted = CounterMetricFamily(
            "outpace:spec_decode_num_accepted_tokens_by_method",
            "Draft tokens accepted, by draft method",
            labels=labels,
        )
        for name, drafts in self.drafts_by_method.items():
            drafted.add_metric([self._model_name, name], drafts.num_draft_tokens)
            accepted.add_metric([self._model_name, name], drafts.num_accepted_tokens)
        yield from (drafted, accepted)

    def _phase_seconds(self) -> Metric:
        family = HistogramMetricFamily(
            "outpace:step_phase_seconds", "Duration of a step's phases", labels=["model_name", "phase"]
        )
        for phase, histogram in self._phases.items():
            family.add_metric([self._model_name, phase], histogram.buckets(), histogram.sum)
        return family
