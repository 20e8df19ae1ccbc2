"""A request's say in its own drafts: what it may ask, that it is obeyed, and that no answer depends on it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fake_llm import FakeLLM, running_server
from prometheus_client.parser import text_string_to_metric_families

from outpace import AsyncLLM, InvalidRequestError, SamplingParams, cli
from outpace.config import EngineConfig, ServerConfig
from outpace.engine.engine import Engine
from outpace.errors import ConfigError
from outpace.llm import LLM
from outpace.request import DraftStep, Speculation
from outpace.server import draft_report, run, vllm_metrics
from outpace.server.app import create_app
from tiny import FakeModel, tiny_engine
from tiny import run as run_engine

LIMIT = 4
PROMPT = "a cat sat on a mat, a cat sat on a mat, a cat sat on a mat, "
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO: Any = [{"role": "user", "content": PROMPT}]
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40, "ignore_eos": True}


def drafting(**settings: Any) -> Engine:
    """A tiny engine that drafts four tokens wherever it can."""
    return tiny_engine(spec_method="prompt_lookup", spec_tokens=LIMIT, **settings)


def answer(
    engine: Engine, sampling: SamplingParams, speculation: Speculation | None
) -> tuple[list[int], tuple[DraftStep, ...]]:
    """Tokens and drafts of the answer to PROMPT."""
    ids = engine.tokenizer.encode(PROMPT)
    engine.add(engine.admission.requests("r", ids, sampling, speculation=speculation))
    (outputs,) = run_engine(engine).values()
    assert all(output.draft_steps == () for output in outputs[:-1])
    return [id for output in outputs for id in output.token_ids], outputs[-1].draft_steps


# --- The engine -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_cap_is_obeyed_at_every_step_and_the_answer_does_not_depend_on_it(temperature: float) -> None:
    engine = drafting()
    sampling = SamplingParams(temperature=temperature, seed=3, max_tokens=60, ignore_eos=True)
    expected, free = answer(engine, sampling, None)
    assert max(step.num_drafted for step in free) == LIMIT
    assert len(expected) == 60
    for cap in range(LIMIT + 1):
        tokens, steps = answer(engine, sampling, Speculation(max_draft_tokens=cap))
        assert tokens == expected
        assert max((step.num_drafted for step in steps), default=0) == cap
    for off in (Speculation(method="none"), Speculation(max_draft_tokens=LIMIT, method="none")):
        assert answer(engine, sampling, off) == (expected, ())
    for method in ("prompt_lookup", "ngram"):
        assert answer(engine, sampling, Speculation(method=method)) == (expected, free)


def test_requests_of_one_batch_have_their_own_caps() -> None:
    engine = FakeModel().engine(spec_method="prompt_lookup", spec_tokens=LIMIT)
    for name, cap in (("a", None), ("b", 0), ("c", 3)):
        submit_with_cap(engine, name, cap, max_tokens=20)
    submit_with_cap(engine, "d", 3, max_tokens=2)
    caps = {view.id: view.max_draft for view in engine.scheduler.plan().view().sequences}
    assert caps == {"a-0": 19, "b-0": 0, "c-0": 3, "d-0": 1}


def submit_with_cap(engine: Engine, name: str, cap: int | None, max_tokens: int) -> None:
    sampling = SamplingParams(max_tokens=max_tokens)
    engine.add(engine.admission.requests(name, [5, 6], sampling, speculation=Speculation(cap)))


def test_llm_takes_caps_for_generate_and_chat() -> None:
    llm = LLM.from_engine(drafting())
    sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    drafts = llm.engine.metrics.drafts
    capped = llm.generate(PROMPT, sampling, speculation=Speculation(0))[0].outputs[0]
    capped_chat = llm.chat(HELLO, sampling, speculation=Speculation(method="none"))[0].outputs[0]
    assert drafts.num_drafts == 0
    assert llm.generate(PROMPT, sampling)[0].outputs[0] == capped
    assert llm.chat(HELLO, sampling)[0].outputs[0] == capped_chat
    assert drafts.num_drafts > 0


@pytest.mark.parametrize(
    ("settings", "asked", "message", "param"),
    [
        (
            {"spec_method": "suffix", "spec_tokens": 4},
            {"max_draft_tokens": 5},
            r"speculation.max_draft_tokens must be at most 4 \(--spec-tokens\), got 5",
            "speculation.max_draft_tokens",
        ),
        ({}, {"max_draft_tokens": -1}, "must be at least 0, got -1", "speculation.max_draft_tokens"),
        (
            {"spec_method": "suffix"},
            {"method": "medusa"},
            r"speculation.method must be suffix or none \(--spec-method\), got 'medusa'",
            "speculation.method",
        ),
        (
            {},
            {"method": "ngram"},
            r"speculation.method must be none \(--spec-method\), got 'prompt_lookup'",
            "speculation.method",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    settings: dict[str, Any], asked: dict[str, Any], message: str, param: str
) -> None:
    engine = FakeModel().engine(**settings)
    with pytest.raises(InvalidRequestError, match=message) as caught:
        engine.admission.requests("r", [5], SamplingParams(), speculation=Speculation(**asked))
    assert caught.value.param == param


# --- Over HTTP ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server of the tiny model with drafts, that says all it knows of them."""
    llm = AsyncLLM(drafting)
    config = ServerConfig(
        metrics_compat="vllm", per_request_spec_decode_metrics="detailed", served_model_name="tiny model"
    )
    with running_server(llm, config) as url:  # type: ignore[arg-type]
        yield url
    asyncio.run(llm.shutdown(1))


def scrape(url: str) -> dict[tuple[str, str], float]:
    """Metrics by name and the one label besides model_name, engine and le."""
    return {
        (sample.name, sample.labels.get("position", "")): sample.value
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
        for sample in family.samples
    }


def test_the_openai_client_caps_drafts_in_extra_body(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        options: Any = {"model": "tiny model", "messages": HELLO, "temperature": 0, "max_tokens": 30}
        texts, drafted = set(), []
        for cap in (None, 2, 0):
            body = {"speculation": {"max_draft_tokens": cap}, "ignore_eos": True}
            completion: Any = client.chat.completions.create(extra_body=body, **options)
            texts.add(completion.choices[0].message.content)
            drafted.append(max(completion.metrics["speculative_decoding"]["per_step_drafted"], default=0))
    assert len(texts) == 1
    assert drafted == [LIMIT, 2, 0]


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("speculation", "param", "message"),
    [
        ({"max_draft_tokens": 5}, "speculation.max_draft_tokens", "must be at most 4"),
        ({"max_draft_tokens": -1}, "speculation.max_draft_tokens", "must be at least 0, got -1"),
        ({"max_draft_tokens": "2"}, "speculation.max_draft_tokens", "should be a valid integer"),
        ({"method": "suffix"}, "speculation.method", "must be prompt_lookup or none"),
        ({"method": 1}, "speculation.method", "should be a valid string"),
        ({"draft_tokens": 1}, "speculation.draft_tokens", "unknown field: speculation.draft_tokens"),
        (0, "speculation", "should be a valid dictionary"),
    ],
)
def test_a_wrong_wish_is_a_bad_request(
    url: str, path: str, speculation: Any, param: str, message: str
) -> None:
    prompt = {"messages": HELLO} if path == CHAT else {"prompt": PROMPT}
    for stream in (False, True):
        response = httpx.post(url + path, json={**prompt, "speculation": speculation, "stream": stream})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert message in response.json()["error"]["message"]


# --- What answers say of their drafts -------------------------------------------------------------------


def test_a_report_has_vllms_fields_and_counts() -> None:
    steps = [DraftStep(4, 2), DraftStep(4, 4), DraftStep(3, 0)]
    summary = {
        "mean_acceptance_length": 3.0,
        "draft_acceptance_rate": 6 / 11,
        "acceptance_histogram": [1, 0, 1, 0, 1, 0],
        "num_spec_steps": 3,
        "num_accepted_draft_tokens": 6,
        "num_draft_tokens": 11,
        "num_spec_tokens": 5,
    }
    detailed = {**summary, "per_step_accepted": [2, 4, 0], "per_step_drafted": [4, 4, 3]}
    report = draft_report.DraftReport(5, is_detailed=False).of(steps)
    assert report.model_dump() == {"speculative_decoding": summary}
    report = draft_report.DraftReport(5, is_detailed=True).of(steps)
    assert report.model_dump() == {"speculative_decoding": detailed}


def test_an_answer_without_drafts_is_reported_as_plain_decoding() -> None:
    report = draft_report.DraftReport(2, is_detailed=False).of([]).speculative_decoding
    assert (report.mean_acceptance_length, report.draft_acceptance_rate) == (1, 0)
    assert report.acceptance_histogram == [0, 0, 0]


def test_an_answer_reports_what_the_counters_counted(url: str) -> None:
    before = scrape(url)
    answer = httpx.post(url + TEXT, json=GREEDY).json()
    moved = {key: value - before[key] for key, value in scrape(url).items()}
    report = answer["metrics"]["speculative_decoding"]
    assert report["num_spec_steps"] == moved["vllm:spec_decode_num_drafts_total", ""] > 0
    assert report["num_draft_tokens"] == moved["vllm:spec_decode_num_draft_tokens_total", ""]
    accepted = report["num_accepted_draft_tokens"]
    assert accepted == moved["vllm:spec_decode_num_accepted_tokens_total", ""] > 0
    per_position = [moved["vllm:spec_decode_num_accepted_tokens_per_pos_total", str(i)] for i in range(LIMIT)]
    at_least = [sum(report["acceptance_histogram"][i + 1 :]) for i in range(LIMIT)]
    assert per_position == at_least
    assert report["mean_acceptance_length"] == 1 + accepted / report["num_spec_steps"]
    assert sum(report["per_step_accepted"]) == accepted
    assert sum(report["per_step_drafted"]) == report["num_draft_tokens"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_stream_reports_in_its_usage_chunk(url: str, path: str) -> None:
    body = {**GREEDY, "messages": HELLO}
    del body["prompt" if path == CHAT else "messages"]
    whole = httpx.post(url + path, json=body).json()
    with_usage = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(httpx.post(url + path, json={**body, **with_usage}))
    assert last["usage"] == whole["usage"] | {"prompt_tokens_details": last["usage"]["prompt_tokens_details"]}
    assert last["metrics"] == whole["metrics"]
    assert not any("metrics" in chunk for chunk in chunks)
    assert not any(
        "metrics" in chunk for chunk in events(httpx.post(url + path, json={**body, "stream": True}))
    )


def events(response: httpx.Response) -> list[Any]:
    """The chunks of a stream."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [httpx.Response(200, text=line).json() for line in lines]


@pytest.mark.parametrize("several", [{"n": 2}, {"prompt": [PROMPT, PROMPT]}])
def test_several_answers_have_no_common_report(url: str, several: dict[str, Any]) -> None:
    assert "metrics" not in httpx.post(url + TEXT, json={**GREEDY, **several}).json()


def test_by_default_nothing_is_reported_and_nothing_has_vllms_names() -> None:
    with running_server(FakeLLM()) as url:
        assert "metrics" not in httpx.post(url + CHAT, json={"messages": HELLO}).json()
        assert "vllm:" not in httpx.get(f"{url}/metrics").text


# --- vLLM's names ---------------------------------------------------------------------------------------


def test_what_vllm_counts_too_is_there_under_its_names_and_labels(url: str) -> None:
    httpx.post(url + TEXT, json=GREEDY).raise_for_status()
    families = {f.name: f for f in text_string_to_metric_families(httpx.get(f"{url}/metrics").text)}
    ours = {name.removeprefix("outpace:") for name in families if name.startswith("outpace:")}
    theirs = {name.removeprefix("vllm:") for name in families if name.startswith("vllm:")}
    assert theirs == {name.removeprefix("outpace:") for name in vllm_metrics._SHARED}
    assert ours - theirs == {
        "iteration_tokens_total",
        "step_phase_seconds",
        "step_time_seconds",
        "step_time_predicted_seconds",
        "step_time_error_ratio",
        "spec_decode_step_draft_length",
    }
    for name in theirs:
        mine, twin = families[f"outpace:{name}"], families[f"vllm:{name}"]
        assert (twin.type, len(twin.samples)) == (mine.type, len(mine.samples))
        for sample, other in zip(mine.samples, twin.samples, strict=True):
            labels = {**sample.labels, "model_name": "tiny model", "engine": "0"}
            assert (other.name, other.labels) == (sample.name.replace("outpace:", "vllm:"), labels)
            assert other.value == sample.value


# --- Start-up -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--spec-method", "nonsense"], "--spec-method must be one of"),
        (["--spec-policy", "nonsense"], "--spec-policy must be one of"),
        (["--spec-method", "no.where"], "--spec-method no.where cannot be imported"),
        (["--chat-template", "{broken}"], "the chat template has a syntax error in line 2"),
        (["--per-request-spec-decode-metrics", "summary"], "choose a method with --spec-method"),
    ],
)
def test_a_wrong_setting_is_one_line_before_the_model_is_looked_for(
    flags: list[str], message: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jinja"
    broken.write_text("line\n{% for")
    flags = [str(broken) if flag == "{broken}" else flag for flag in flags]
    assert cli.main(["serve", str(tmp_path / "no-model"), "--port", "0", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_report_is_no_setting_without_drafts() -> None:
    config = ServerConfig(per_request_spec_decode_metrics="detailed")
    run.check_draft_report(EngineConfig(spec_method="suffix"), config)
    with pytest.raises(ConfigError, match="--per-request-spec-decode-metrics detailed"):
        run.check_draft_report(EngineConfig("a/model"), config)


def test_there_is_no_page_that_needs_a_cdn() -> None:
    app = create_app(FakeLLM(), ServerConfig())  # type: ignore[arg-type]
    paths = {getattr(route, "path", "") for route in app.routes}
    assert "/openapi.json" in paths
    assert not paths & {"/docs", "/redoc"}
