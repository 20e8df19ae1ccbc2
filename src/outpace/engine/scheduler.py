"""Who runs in a step and how many known tokens each; and what becomes of the tokens that come back."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import mul

from outpace.batch import Decision, Scheduled, Verdict
from outpace.config import EngineConfig, flag
from outpace.engine.detokenizer import Detokenizer
from outpace.errors import InvalidRequestError, OverloadedError
from outpace.policy.base import BatchView, SequenceView, Wait
from outpace.request import FinishReason, Output, Request, Sequence
from outpace.runtime.block_manager import BlockManager
from outpace.sampling import SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class Plan:
    """One step, before any draft.

    Attributes:
        scheduled: Who runs, in the order of admission.
        decoding: Those of them that sample, in the same order.
        num_free_slots: Cache slots left once every known token has its own.
        num_waiting: Requests in line.
        first_arrival: Seconds on the monotonic clock when the first of them arrived, if there is one.
        targeted: Those of them that bring a target for the time to their first token.
    """

    scheduled: list[Scheduled]
    decoding: list[Sequence]
    num_free_slots: int
    num_waiting: int = 0
    first_arrival: float | None = None
    targeted: tuple[Request, ...] = ()

    def view(self) -> BatchView:
        """What a policy may see of it."""
        now = time.monotonic()
        prefilling = [s.sequence.request for s in self.scheduled if not s.samples]
        arrivals = [r.arrival for r in prefilling]
        if self.first_arrival is not None:
            arrivals.append(self.first_arrival)
        rows = [item.num_known for item in self.scheduled]
        context = [item.sequence.num_computed for item in self.scheduled]
        return BatchView(
            sequences=tuple([_show(sequence, now) for sequence in self.decoding]),
            num_rows=sum(rows),
            num_context=sum(context),
            num_free_slots=self.num_free_slots,
            num_pairs=sum(map(mul, rows, context)),
            num_scheduled=len(self.scheduled),
            num_waiting=len(prefilling) + self.num_waiting,
            oldest_wait_s=now - min(arrivals, default=now),
            own_targets=tuple(
                [
                    Wait(now - r.arrival, r.slo.ttft_ms / 1e3)
                    for r in (*prefilling, *self.targeted)
                    if r.slo.ttft_ms is not None
                ]
            ),
        )


@dataclass(slots=True, eq=False)
class _Entry:
    """A sequence, its place in line (lower runs first) and its text."""

    rank: tuple[int, int]
    sequence: Sequence
    text: Detokenizer

    def __lt__(self, other: _Entry) -> bool:
        return self.rank < other.rank


class Scheduler:
    """Continuous batching: in every step computed tokens catch up with known ones.

    There are no phases. Running sequences come first, in order of admission; then waiting ones are
    admitted while rows, places and blocks allow: by priority, and those of one priority in the order of
    their arrival (under the `fcfs` policy admission lets no request have another). A prompt is admitted
    only when there is room for all of it and for the next block of every running sequence; it is computed
    in chunks if the rows of a step do not suffice. When a running sequence finds no block, the newest one
    of the lowest priority gives its blocks back and starts again from the front of the line (its prefix is
    usually still cached).

    Attributes:
        num_preemptions: How often that happened.
        num_prefix_queries: Tokens looked up in the prefix cache at first admission.
        num_prefix_hits: How many of them were found.
    """

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockManager,
        new_detokenizer: Callable[[SamplingParams], Detokenizer],
    ) -> None:
        self._max_num_seqs = config.max_num_seqs
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._max_num_queued_reqs = config.max_num_queued_reqs
        self._blocks = blocks
        self._new_detokenizer = new_detokenizer
        self._entries: dict[str, _Entry] = {}
        self._running: list[_Entry] = []  # in order of admission
        self._waiting: list[_Entry] = []  # a heap
        self._num_added = 0
        self._num_targeted = 0  # unfinished requests with a target for their first token
        # The head of the line that found no room and the free blocks then: no use to try with no more.
        self._refused: tuple[_Entry | None, int] = (None, 0)
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences in line."""
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._entries)

    @property
    def kv_cache_usage(self) -> float:
        """Share of the cache blocks in use, in [0, 1]."""
        return self._blocks.usage

    def has_room(self, num_requests: int) -> bool:
        """Whether so many requests would be accepted now.

        A place that is free to run in is not counted as waiting, so a limit of 0 still serves.
        """
        num_places = max(0, self._max_num_seqs - len(self._running)) + self._max_num_queued_reqs
        return len(self._waiting) + num_requests <= num_places

    def add(self, requests: list[Request]) -> None:
        """Puts requests in line: all of them or none.

        Raises:
            OverloadedError: The queue has no room for them.
            InvalidRequestError: One could never run, or its id is in use.
        """
        for request in requests:
            if request.id in self._entries:
                raise InvalidRequestError(f"request id {request.id} is in use")
            num_tokens = len(request.prompt_ids) + request.max_tokens
            if num_tokens > self._blocks.capacity:
                raise InvalidRequestError(
                    f"prompt and answer may need {num_tokens} tokens, the KV cache holds "
                    f"{self._blocks.capacity}: lower max_tokens or raise {flag('kv_cache_memory_bytes')}"
                )
        if not self.has_room(len(requests)):
            raise OverloadedError(
                f"{len(self._waiting)} requests wait, the limit is {self._max_num_queued_reqs} "
                f"({flag('max_num_queued_reqs')}): try again later"
            )
        for request in requests:
            rank = (request.priority, self._num_added)
            self._num_added += 1
            entry = _Entry(rank, Sequence.start(request), self._new_detokenizer(request.sampling))
            self._entries[request.id] = entry
            self._num_targeted += request.slo.ttft_ms is not None
            heapq.heappush(self._waiting, entry)

    def abort(self, request_id: str) -> Output | None:
        """Ends a request and frees its blocks at once.

        Returns:
            Its finished Output with the text that was held back, or None if there is no such request.
        """
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return None
        if entry in self._running:
            self._running.remove(entry)
        else:
            self._waiting.remove(entry)
            heapq.heapify(self._waiting)
        self._num_targeted -= entry.sequence.request.slo.ttft_ms is not None
        self._blocks.free(entry.sequence)
        return _output(entry, entry.text.finish(), (), None, FinishReason.ABORT)

    def plan(self) -> Plan:
        """Chooses what the next step computes and reserves its blocks."""
        num_preemptions = self.num_preemptions
        scheduled = self._continue_running()
        if self.num_preemptions == num_preemptions:
            self._admit_waiting(scheduled)
        decoding = [item.sequence for item in scheduled if item.samples]
        first = self._waiting[0].sequence.request.arrival if self._waiting else None
        return Plan(
            scheduled, decoding, self._blocks.num_free_slots, len(self._waiting), first, self._targeted()
        )

    def advance(self, plan: Plan, verdict: Verdict) -> list[Output]:
        """Appends the verified tokens, ends what is to end, and frees its blocks.

        Args:
            plan: What was to run.
            verdict: One decision per scheduled sequence.

        Returns:
            One Output per sequence of `plan.decoding`, in that order.
        """
        outputs: list[Output] = []
        num_entries = len(self._entries)
        for item, decision in zip(plan.scheduled, verdict.decisions, strict=True):
            entry = self._entries[item.sequence.id]
            output = None if decision is None else _append(entry, decision)
            self._blocks.register(item.sequence)
            if output is not None:
                outputs.append(output)
                if output.finish_reason is not None:
                    self._blocks.free(item.sequence)
                    del self._entries[item.sequence.id]
                    self._num_targeted -= item.sequence.request.slo.ttft_ms is not None
        if len(self._entries) < num_entries:
            self._running = [entry for entry in self._running if entry.sequence.id in self._entries]
        return outputs

    def _targeted(self) -> tuple[Request, ...]:
        """The waiting requests with a target for their first token; looked for only if there may be one."""
        if not self._num_targeted or not self._waiting:
            return ()
        waiting = (entry.sequence.request for entry in self._waiting)
        return tuple(request for request in waiting if request.slo.ttft_ms is not None)

    def _continue_running(self) -> list[Scheduled]:
        """Schedules running sequences, preempting where blocks are short."""
        scheduled: list[Scheduled] = []  # aligned with the beginning of self._running
        budget = self._max_num_batched_tokens
        while budget > 0 and len(scheduled) < len(self._running):
            entry = self._running[len(scheduled)]
            item = _schedule(entry.sequence, budget)
            if self._blocks.reserve(entry.sequence, entry.sequence.num_computed + item.num_known):
                scheduled.append(item)
                budget -= item.num_known
            else:
                victim = self._preempt()
                if victim < len(scheduled):
                    budget += scheduled.pop(victim).num_known
        return scheduled

    def _preempt(self) -> int:
        """Sends the newest running sequence of the lowest priority back to wait; returns its old index."""
        index = max(range(len(self._running)), key=lambda i: (self._running[i].rank[0], i))
        entry = self._running.pop(index)
        self._blocks.free(entry.sequence)
        entry.sequence.num_preemptions += 1
        self.num_preemptions += 1
        heapq.heappush(self._waiting, entry)
        return index

    def _admit_waiting(self, scheduled: list[Scheduled]) -> None:
        """Admits from the front of the line while rows, places and blocks allow."""
        budget = self._max_num_batched_tokens - sum(item.num_known for item in scheduled)
        now = time.monotonic()
        while budget > 0 and self._waiting and len(self._running) < self._max_num_seqs:
            entry = self._waiting[0]
            if not self._find_room(entry):
                break
            heapq.heappop(self._waiting)
            self._running.append(entry)
            sequence = entry.sequence
            if sequence.first_scheduled is None:
                sequence.first_scheduled = now
                self.num_prefix_queries += len(sequence.token_ids)
                self.num_prefix_hits += sequence.num_cached
            item = _schedule(sequence, budget)
            scheduled.append(item)
            budget -= item.num_known

    def _find_room(self, entry: _Entry) -> bool:
        """Reserves blocks for all known tokens, if each running sequence still finds its next block."""
        blocks, sequence = self._blocks, entry.sequence
        num_free = blocks.num_free_blocks
        refused, num_free_then = self._refused
        if refused is entry and num_free <= num_free_then and self._running:
            return False
        blocks.match(sequence)
        if blocks.reserve(sequence, len(sequence.token_ids)) and blocks.num_free_blocks >= len(self._running):
            return True
        blocks.free(sequence)
        self._refused = (entry, num_free)
        return False


def _show(sequence: Sequence, now: float) -> SequenceView:
    """A sequence that samples, as a policy sees it."""
    request, num_output, first_token = sequence.request, sequence.num_output, sequence.first_token
    return SequenceView(
        request.id,
        sequence.num_computed,
        # One token of each step comes from the target, so the last one needs no draft.
        request.speculation.cap(request.max_tokens - num_output - 1),
        request.client,
        num_output,
        0.0 if first_token is None else now - first_token,
        request.speculation.method or "",
        None if request.slo.tpot_ms is None else request.slo.tpot_ms / 1e3,
    )


def _schedule(sequence: Sequence, budget: int) -> Scheduled:
    num_missing = len(sequence.token_ids) - sequence.num_computed
    return Scheduled(sequence, min(num_missing, budget), num_missing <= budget)


def _append(entry: _Entry, decision: Decision) -> Output:
    """Appends tokens up to the one that ends the answer; those after it are dropped."""
    ending: _Ending | None = None
    num_kept = 0
    if entry.sequence.first_token is None:
        entry.sequence.first_token = time.monotonic()
    for token_id in decision.token_ids:
        entry.sequence.token_ids.append(token_id)
        num_kept += 1
        ending = _ending(entry, token_id)
        if ending is not None:
            break
    logprobs = None if decision.logprobs is None else decision.logprobs[:num_kept]
    tokens = decision.token_ids[:num_kept]
    if ending is None:
        return _output(entry, entry.text.take(), tokens, logprobs)
    return _output(entry, entry.text.finish(), tokens, logprobs, *ending)


_Ending = tuple[FinishReason, int | str | None]


def _ending(entry: _Entry, token_id: int) -> _Ending | None:
    """Adds the last token's text; says whether and why it ends the answer."""
    sequence, request = entry.sequence, entry.sequence.request
    sampling = request.sampling
    is_eos = token_id in request.eos_token_ids and not sampling.ignore_eos
    # In a grammar the end is only chosen before the minimum length if there is nothing else to choose.
    may_stop = sequence.num_output > sampling.min_tokens or (is_eos and request.grammar is not None)
    if may_stop and (is_eos or token_id in sampling.stop_token_ids):
        if sampling.include_stop_str_in_output:
            entry.text.push(token_id, may_stop=False)
        return FinishReason.STOP, None if is_eos else token_id
    stop = entry.text.push(token_id, may_stop)
    if stop is not None:
        return FinishReason.STOP, stop
    if sequence.num_output >= request.max_tokens:
        return FinishReason.LENGTH, None
    return None


def _output(
    entry: _Entry,
    text: str,
    token_ids: tuple[int, ...],
    logprobs: tuple[TokenLogprob, ...] | None,
    finish_reason: FinishReason | None = None,
    stop_reason: int | str | None = None,
) -> Output:
    sequence = entry.sequence
    return Output(
        request_id=sequence.id,
        index=sequence.request.index,
        text=text,
        token_ids=token_ids,
        logprobs=logprobs,
        finish_reason=finish_reason,
        stop_reason=stop_reason,
        num_prompt_tokens=sequence.num_prompt,
        num_cached_tokens=sequence.num_cached,
        draft_steps=() if finish_reason is None else tuple(sequence.draft_steps),
    )
