"""Our metrics under vLLM's names too, for dashboards and tools that know those."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

# Families that vLLM has with the same meaning. iteration_tokens_total is none: ours counts draft rows.
_SHARED = frozenset(
    f"outpace:{name}"
    for name in (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions"),
        *("prompt_tokens", "generation_tokens", "prefix_cache_queries", "prefix_cache_hits"),
        *("spec_decode_num_drafts", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens"),
        *("spec_decode_num_accepted_tokens_per_pos", "request_success"),
        *("time_to_first_token_seconds", "inter_token_latency_seconds"),
        *("request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
        *("request_queue_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
        *("request_prompt_tokens", "request_generation_tokens"),
    )
)


class WithVllmNames(Collector):
    """All families of a registry, and those that vLLM has too once more in its manner.

    Args:
        source: Where they are.
        model_name: vLLM's label of that name: the served one.
    """

    def __init__(self, source: CollectorRegistry, model_name: str) -> None:
        self._source = source
        self._labels = {"model_name": model_name, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        """The families as of now."""
        for family in self._source.collect():
            yield family
            if family.name in _SHARED:
                yield self._renamed(family)

    def _renamed(self, family: Metric) -> Metric:
        twin = Metric(_vllm_name(family.name), family.documentation, family.type)
        twin.samples = [
            sample._replace(name=_vllm_name(sample.name), labels={**sample.labels, **self._labels})
            for sample in family.samples
        ]
        return twin


def with_vllm_names(source: CollectorRegistry, model_name: str) -> CollectorRegistry:
    """A registry of what `source` has, under both names; see WithVllmNames."""
    registry = CollectorRegistry()
    registry.register(WithVllmNames(source, model_name))
    return registry


def _vllm_name(name: str) -> str:
    return f"vllm:{name.removeprefix('outpace:')}"
