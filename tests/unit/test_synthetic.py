"""Synthetic drafts and verification: all of the work, none of the meaning, and never by accident."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fake_llm import FakeLLM, running_server

from outpace.async_llm import AsyncLLM
from outpace.config import EngineConfig, SpeculativeConfig
from outpace.engine.engine import Engine
from outpace.errors import ConfigError
from outpace.request import FinishReason, Sequence
from outpace.sampling import SamplingParams
from outpace.spec.proposers.synthetic import Synthetic
from tiny import EOS, PROMPTS, run, submit, tiny_engine, tokens

RATES = [1.0, 1.0, 0.5]


def settings(**speculative: Any) -> dict[str, Any]:
    config = {"method": "synthetic", "num_speculative_tokens": 3, "synthetic_acceptance_rates": RATES}
    return {"speculative_config": config | speculative}


def synthetic_engine() -> Engine:
    return tiny_engine(allow_synthetic=True, **settings())


def test_it_does_not_start_unless_it_is_allowed() -> None:
    with pytest.raises(ConfigError, match="answers that mean nothing: for a benchmark add --allow-synthetic"):
        EngineConfig(**settings())
    with pytest.raises(ConfigError, match="--allow-synthetic"):
        EngineConfig(**settings(method="prompt_lookup", verification="synthetic"))
    assert EngineConfig(**settings(), allow_synthetic=True).speculative.is_synthetic
    assert not EngineConfig(allow_synthetic=True).speculative.is_synthetic


@pytest.mark.parametrize(
    ("speculative", "message"),
    [
        ({"synthetic_acceptance_rates": None}, "go together: give both or neither"),
        ({"method": "suffix"}, "got verification match and \\[1.0, 1.0, 0.5\\]"),
        ({"verification": "ratio"}, "must be synthetic for the method of that name, got ratio"),
        ({"verification": "match"}, "must be synthetic for the method of that name, got match"),
        ({"synthetic_acceptance_rates": [0.5, 0.5]}, "must be 3 numbers"),
        ({"synthetic_acceptance_rates": [0.5, 0.6, 0.5]}, "none above the one before it"),
        ({"synthetic_acceptance_rates": [1.1, 0.5, 0.5]}, "must be 3 numbers"),
        ({"synthetic_acceptance_rates": [0.5, 0.5, -0.1]}, "must be 3 numbers"),
        ({"synthetic_acceptance_rates": [1, 0.5, float("nan")]}, "must be 3 numbers"),
        ({"synthetic_acceptance_rates": [True, 0.5, 0.5]}, "must be 3 numbers"),
        ({"synthetic_acceptance_rates": 0.5}, "must be 3 numbers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(speculative: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings(**speculative), allow_synthetic=True)


def test_drafts_are_as_long_as_allowed_and_repeat_the_answer() -> None:
    [request] = tiny_engine().admission.requests("a", [1, 2], SamplingParams())
    sequences = [Sequence(request, [1, 2, *answer]) for answer in ([], [5], [5, 6, 7], [5, 6, 7])]
    trees = Synthetic().propose(sequences, [3, 3, 2, 0])
    assert [tree.token_ids for tree in trees] == [(), (5, 5, 5), (6, 7), ()]
    assert all(tree.is_chain() for tree in trees)


def test_drafts_are_accepted_at_the_rates() -> None:
    engine = synthetic_engine()
    for number, prompt in enumerate(PROMPTS):
        submit(engine, str(number), prompt, SamplingParams(max_tokens=100, seed=number))
    outputs = run(engine)
    assert all(len(tokens(found)) == 100 for found in outputs.values())
    drafts = engine.metrics.drafts
    first, second, third = drafts.num_accepted_per_depth
    assert drafts.num_drafts - first <= len(PROMPTS)  # an answer's last draft may be cut to nothing
    assert first - second <= 2 * len(PROMPTS)
    assert 0.35 < third / drafts.num_drafts < 0.65  # 170 drafts: four standard deviations


def test_a_benchmarks_answer_ends_where_its_client_says_and_not_at_an_end_of_sequence() -> None:
    ending = SamplingParams(logit_bias={EOS: 100.0}, max_tokens=30)
    ordinary, engine = tiny_engine(), synthetic_engine()
    submit(ordinary, "a", PROMPTS[0], ending)
    assert tokens(run(ordinary)["a-0"]) == [EOS]
    submit(engine, "a", PROMPTS[0], ending)
    submit(
        engine, "b", PROMPTS[0], SamplingParams(logit_bias={65: 100.0}, max_tokens=30, stop_token_ids=(65,))
    )
    found = run(engine)
    assert len(tokens(found["a-0"])) == 30
    assert found["a-0"][-1].finish_reason is FinishReason.LENGTH
    assert tokens(found["b-0"]) == [65]


@pytest.mark.parametrize(("build", "is_synthetic"), [(synthetic_engine, True), (tiny_engine, False)])
def test_the_server_knows_it_from_the_engine(build: Callable[[], Engine], is_synthetic: bool) -> None:
    llm = AsyncLLM(build)
    asyncio.run(llm.shutdown(0))
    assert llm.speculative.is_synthetic is is_synthetic


def fake_llm(is_synthetic: bool) -> FakeLLM:
    rates: dict[str, Any] = {"num_speculative_tokens": 1, "synthetic_acceptance_rates": [0.5]}
    return FakeLLM(
        speculative=SpeculativeConfig("synthetic", **rates) if is_synthetic else SpeculativeConfig()
    )


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("is_synthetic", [True, False])
def test_every_answer_and_every_event_is_marked_and_no_ordinary_one(path: str, is_synthetic: bool) -> None:
    with running_server(fake_llm(is_synthetic)) as url, httpx.Client(base_url=url) as http:
        whole = http.post(path, json=BODIES[path]).json()
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        stream = http.post(path, json=BODIES[path] | usage).text
    *events, done = [line.removeprefix("data: ") for line in stream.split("\n\n") if line]
    assert done == "[DONE]"
    for answer in (whole, *map(json.loads, events)):
        assert ("synthetic" in answer) == is_synthetic
        assert answer.get("synthetic", True) is True


def test_the_openai_client_reads_the_mark() -> None:
    with (
        running_server(fake_llm(True)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client,
    ):
        answer = client.completions.create(model="fake", prompt="hello")
    assert answer.model_extra == {"synthetic": True}
