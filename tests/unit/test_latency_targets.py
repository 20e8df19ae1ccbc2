"""A request's own latency targets: what it may ask, who heeds it, and how they reach the policy."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fake_llm import FakeLLM, running_server

from outpace import InvalidRequestError, LatencyTargets, SamplingParams
from outpace.engine.engine import Engine
from outpace.llm import LLM
from outpace.policy.base import BatchView
from tiny import GREEDY, FakeModel, answers, run, tiny_engine

SLO: dict[str, Any] = {"spec_method": "prompt_lookup", "spec_policy": "slo"}


def add(engine: Engine, name: str, slo: LatencyTargets | None = None, num_prompt: int = 8) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    engine.add(engine.admission.requests(name, list(range(num_prompt)), sampling, slo=slo))


def views(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[BatchView]:
    """What its policy sees from now on."""
    seen: list[BatchView] = []
    limits = engine.policy.limits

    def noted(view: BatchView) -> list[int]:
        seen.append(view)
        return limits(view)

    monkeypatch.setattr(engine.policy, "limits", noted)
    return seen


@pytest.mark.parametrize("value", [0, -5.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["ttft_ms", "tpot_ms"])
def test_a_target_is_above_zero_and_finite(name: str, value: float) -> None:
    with pytest.raises(InvalidRequestError, match=rf"slo.{name} must be above 0 and finite, got") as caught:
        LatencyTargets(**{name: value})
    assert caught.value.param == f"slo.{name}"


@pytest.mark.parametrize("policy", ["goodput", "fixed"])
def test_another_policy_refuses_them_in_words(policy: str) -> None:
    engine = FakeModel().engine(spec_method="prompt_lookup", spec_policy=policy)
    message = rf"slo.tpot_ms is only for the policy slo, this server runs {policy}: .* --spec-policy slo"
    with pytest.raises(InvalidRequestError, match=message) as caught:
        add(engine, "a", LatencyTargets(tpot_ms=50))
    assert caught.value.param == "slo.tpot_ms"
    add(engine, "b", LatencyTargets())  # asks for nothing
    run(engine)


def test_the_policy_sees_them_of_requests_that_decode_and_of_those_that_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = FakeModel().engine(max_num_seqs=2, max_num_batched_tokens=16, **SLO)
    seen = views(engine, monkeypatch)
    add(engine, "first", LatencyTargets(tpot_ms=40))
    engine.step()
    assert [s.tpot_s for s in seen[-1].sequences] == [0.04]
    assert list(seen[-1].own_targets) == []
    add(engine, "long", LatencyTargets(ttft_ms=300), num_prompt=40)
    add(engine, "none")
    add(engine, "waits", LatencyTargets(ttft_ms=700))
    engine.step()
    assert seen[-1].num_waiting == 3, "a prompt in parts and two in line"
    assert [target.ttft_s for target in seen[-1].own_targets] == [0.3, 0.7]
    assert all(0 <= target.wait_s <= seen[-1].oldest_wait_s for target in seen[-1].own_targets)
    engine.abort("waits-0")
    engine.step()
    assert [target.ttft_s for target in seen[-1].own_targets] == [0.3]
    run(engine)
    assert list(seen[-1].own_targets) == []
    assert engine.scheduler._num_targeted == 0


def test_answers_do_not_depend_on_them() -> None:
    llm = LLM.from_engine(tiny_engine(**SLO))
    prompts = ["a cat sat on a mat, a cat sat", "Once upon a time"]
    plain, wanted = (
        [result.outputs[0].token_ids for result in llm.generate(prompts, GREEDY, slo=slo)]
        for slo in (None, LatencyTargets(ttft_ms=1, tpot_ms=0.1))
    )
    assert plain == wanted
    message: Any = [{"role": "user", "content": "Hello"}]
    assert llm.chat(message, GREEDY, slo=LatencyTargets(tpot_ms=5))[0].outputs[0].token_ids
    assert answers(tiny_engine(**SLO), GREEDY) == answers(tiny_engine(), GREEDY)


# --- Over HTTP ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ],
)
def test_a_body_carries_them_to_the_engine(path: str, body: dict[str, Any]) -> None:
    llm = FakeLLM()
    with running_server(llm) as url:
        for slo in ({"ttft_ms": 500, "tpot_ms": 50.5}, {"tpot_ms": 20}, {}, None):
            httpx.post(url + path, json={**body, "slo": slo}).raise_for_status()
        httpx.post(url + path, json=body).raise_for_status()
    none = LatencyTargets()
    assert [call.slo for call in llm.calls] == [
        LatencyTargets(500, 50.5),
        LatencyTargets(tpot_ms=20),
        none,
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("slo", "param"),
    [
        ({"ttft_ms": 0}, "slo.ttft_ms"),
        ({"tpot_ms": -1}, "slo.tpot_ms"),
        ({"tpot_ms": "fast"}, "slo.tpot_ms"),
        ({"e2e_ms": 5}, "slo.e2e_ms"),
    ],
)
def test_a_wrong_target_is_a_400_that_names_it(slo: dict[str, Any], param: str) -> None:
    with running_server(FakeLLM()) as url:
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi", "slo": slo})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
