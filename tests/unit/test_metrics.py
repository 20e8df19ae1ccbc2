"""What is counted, under which names, and at what cost."""

from __future__ import annotations

import time

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from outpace.engine.engine import Engine
from outpace.engine.metrics import Histogram
from outpace.policy.base import StepRecord
from outpace.sampling import SamplingParams
from tiny import FakeModel, run, submit

NAMES = {
    "outpace:num_requests_running",
    "outpace:num_requests_waiting",
    "outpace:kv_cache_usage_perc",
    "outpace:num_preemptions",
    "outpace:prompt_tokens",
    "outpace:generation_tokens",
    "outpace:prefix_cache_queries",
    "outpace:prefix_cache_hits",
    "outpace:request_success",
    "outpace:spec_decode_num_drafts",
    "outpace:spec_decode_num_draft_tokens",
    "outpace:spec_decode_num_accepted_tokens",
    "outpace:spec_decode_num_accepted_tokens_per_pos",
    "outpace:time_to_first_token_seconds",
    "outpace:inter_token_latency_seconds",
    "outpace:request_time_per_output_token_seconds",
    "outpace:e2e_request_latency_seconds",
    "outpace:request_queue_time_seconds",
    "outpace:request_prefill_time_seconds",
    "outpace:request_decode_time_seconds",
    "outpace:request_prompt_tokens",
    "outpace:request_generation_tokens",
    "outpace:iteration_tokens_total",
    "outpace:step_phase_seconds",
    "outpace:step_time_seconds",
    "outpace:step_time_predicted_seconds",
    "outpace:step_time_error_ratio",
    "outpace:spec_decode_step_draft_length",
}


def scrape(engine: Engine) -> dict[tuple[str, str], float]:
    """(sample name, second label if any) to value; histograms by their _count and _sum."""
    samples = {}
    for family in text_string_to_metric_families(generate_latest(engine.metrics.registry).decode()):
        for sample in family.samples:
            labels = {key: value for key, value in sample.labels.items() if key != "model_name"}
            assert sample.labels["model_name"] == "fake"
            if "le" not in labels:
                samples[sample.name, "".join(labels.values())] = sample.value
    return samples


def test_names_are_those_dashboards_know() -> None:
    text = generate_latest(FakeModel().engine().metrics.registry).decode()
    assert {family.name for family in text_string_to_metric_families(text)} == NAMES


def test_drafts_are_counted_as_vllm_does() -> None:
    engine = FakeModel().engine()
    for num_nodes, num_accepted in ((4, 3), (5, 0), (2, 1)):
        engine.metrics.drafts.observe(num_nodes, num_accepted)
    counts = scrape(engine)
    assert counts["outpace:spec_decode_num_drafts_total", ""] == 3
    assert counts["outpace:spec_decode_num_draft_tokens_total", ""] == 11
    assert counts["outpace:spec_decode_num_accepted_tokens_total", ""] == 4
    per_position = [counts["outpace:spec_decode_num_accepted_tokens_per_pos_total", p] for p in "012"]
    assert per_position == [2, 1, 1]


def test_requests_and_tokens_are_counted() -> None:
    engine = FakeModel().engine()
    for name in "ab":
        submit(engine, name, "x" * 40, SamplingParams(max_tokens=5))
        run(engine)
    submit(engine, "c", "x" * 40, SamplingParams(max_tokens=5, n=2))
    engine.step()
    engine.abort("c-1")
    during = scrape(engine)
    assert during["outpace:num_requests_running", ""] == 1
    assert during["outpace:kv_cache_usage_perc", ""] == 3 / 64
    run(engine)
    counts = scrape(engine)
    assert counts["outpace:prompt_tokens_total", ""] == 160
    assert counts["outpace:generation_tokens_total", ""] == 16
    assert counts["outpace:prefix_cache_queries_total", ""] == 160
    assert counts["outpace:prefix_cache_hits_total", ""] == 96
    assert counts["outpace:request_success_total", "length"] == 3
    assert counts["outpace:request_success_total", "abort"] == 1
    assert counts["outpace:time_to_first_token_seconds_count", ""] == 4
    assert counts["outpace:inter_token_latency_seconds_count", ""] == 12
    assert counts["outpace:e2e_request_latency_seconds_count", ""] == 3
    assert counts["outpace:request_generation_tokens_sum", ""] == 15
    assert counts["outpace:num_requests_running", ""] == 0


def test_every_phase_of_every_step_is_timed() -> None:
    engine = FakeModel(on_forward=lambda: time.sleep(0.002)).engine()
    submit(engine, "a", "hello", SamplingParams(max_tokens=3))
    run(engine)
    counts = scrape(engine)
    for phase in ("plan", "policy", "propose", "forward", "verify", "advance"):
        assert counts["outpace:step_phase_seconds_count", phase] == 3
    assert counts["outpace:step_phase_seconds_sum", "forward"] > 0.006
    assert counts["outpace:iteration_tokens_total_sum", ""] == 7


def test_buckets_are_cumulative_and_bounds_belong_to_theirs() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 3), ("+Inf", 4)]
    assert histogram.sum == 12.0


def test_a_policy_learns_what_the_step_did() -> None:
    engine = FakeModel().engine()
    records: list[StepRecord] = []
    engine.policy.observe = records.append  # type: ignore[method-assign,assignment]
    submit(engine, "a", "hello", SamplingParams(max_tokens=2))
    run(engine)
    assert [(r.num_rows, r.view.num_context, r.num_tokens) for r in records] == [(5, 0, 1), (1, 5, 1)]
    assert all(r.num_drafted == r.num_accepted == (0,) for r in records)
    for record in records:
        parts = {phase: seconds for phase, seconds in record.seconds.items() if phase != "total"}
        assert parts.keys() >= {"plan", "policy", "propose", "forward", "verify", "advance"}
        assert abs(sum(parts.values()) - record.seconds["total"]) < 1e-9
    assert "between" not in records[0].seconds
    assert records[1].seconds["between"] > 0
