"""The official OpenAI client against a running `outpace serve` with SmolLM2-135M-Instruct."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from outpace.bench.servers import Server
from outpace.bench.workload import PROMPTS

MODEL = "SmolLM2-135M-Instruct"
# Every sampled request gives a seed: what it gets is then a function of the request.
GREEDY: dict[str, Any] = {"temperature": 0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 7}
NO_DRAFTS = {"speculation": {"method": "none"}}


@pytest.fixture(scope="module")
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="-", max_retries=0) as client:
        yield client


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def ask(client: openai.OpenAI, text: str, **options: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=user(text), **options)


def metrics(url: str) -> dict[str, float]:
    """The value of each metric, summed over its labels."""
    values: dict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
        for sample in family.samples:
            values[sample.name.removeprefix("outpace:")] += sample.value
    return values


# --- Answers --------------------------------------------------------------------------------------------


def test_a_question_gets_its_answer(client: openai.OpenAI) -> None:
    answer = ask(client, "What is the capital of France?", **GREEDY)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.model == MODEL


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_streamed_chat_answer_is_the_unstreamed_one(
    client: openai.OpenAI, sampling: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"max_tokens": 40, "extra_body": {"ignore_eos": True}, **sampling}
    whole = ask(client, PROMPTS[0], **options)
    stream = ask(client, PROMPTS[0], stream=True, stream_options={"include_usage": True}, **options)
    *chunks, last = stream
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(deltas) == whole.choices[0].message.content
    assert len([delta for delta in deltas if delta]) > 10
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert last.usage.completion_tokens == whole.usage.completion_tokens == 40


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_streamed_completion_is_the_unstreamed_one(client: openai.OpenAI, sampling: dict[str, Any]) -> None:
    prompts = ["The sun rises in the", "Once upon a time"]
    options: Any = {"model": MODEL, "prompt": prompts, "max_tokens": 24, **sampling}
    whole = client.completions.create(**options)
    texts = ["", ""]
    for chunk in client.completions.create(stream=True, **options):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert all(texts)


def test_n_answers_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"n": 3, "max_tokens": 24, "temperature": 1.0, "seed": 5}
    first, again = (
        {c.index: c.message.content for c in ask(client, "Name an animal.", **options).choices}
        for _ in range(2)
    )
    assert first == again
    assert len(set(first.values())) == 3
    streamed = {0: "", 1: "", 2: ""}
    for chunk in ask(client, "Name an animal.", stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == first


def test_logprobs_belong_to_the_text_and_are_the_same_when_streamed(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "logprobs": True, "top_logprobs": 3, **GREEDY}
    choice = ask(client, PROMPTS[0], **options).choices[0]
    entries = choice.logprobs.content
    assert "".join(entry.token for entry in entries) == choice.message.content
    for entry in entries:
        assert entry.top_logprobs[0].token == entry.token  # greedy: the most probable one
        assert entry.top_logprobs[0].logprob == entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
    streamed = [
        entry
        for chunk in ask(client, PROMPTS[0], stream=True, **options)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == entries


COUNTRY = {
    "type": "object",
    "properties": {
        "capital": {"type": "string", "maxLength": 20},
        "continent": {"enum": ["Africa", "America", "Asia", "Europe", "Oceania"]},
        "is_island": {"type": "boolean"},
    },
    "required": ["capital", "continent", "is_island"],
}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_matches_the_schema_asked_for(client: openai.OpenAI, sampling: dict[str, Any]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "country", "schema": COUNTRY, "strict": True}}
    compact = {"structured_outputs": {"json": COUNTRY, "disable_any_whitespace": True}}
    for fields in ({"response_format": form}, {"extra_body": compact}):
        choice = ask(client, "Describe Japan as JSON.", max_tokens=100, **fields, **sampling).choices[0]
        country = json.loads(choice.message.content)
        assert list(country) == COUNTRY["required"]
        assert country["continent"] in COUNTRY["properties"]["continent"]["enum"]  # type: ignore[index]
        assert type(country["is_island"]) is bool
        assert choice.finish_reason == "stop"


def test_a_schema_that_cannot_be_enforced_is_refused(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "whole"}}}
    with pytest.raises(openai.BadRequestError, match='Unsupported type "whole"') as error:
        ask(client, "Hello", response_format=form)
    assert error.value.param == "response_format"


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_tool_that_must_be_called_is_called(client: openai.OpenAI, sampling: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "describe", "parameters": COUNTRY}}
    other = {"type": "function", "function": {"name": "now"}}
    options: dict[str, Any] = {
        "tools": [tool, other],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 120,
        **sampling,
    }
    choice = ask(client, "Describe Japan.", **options).choices[0]
    (call,) = choice.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert list(arguments) == (COUNTRY["required"] if call.function.name == "describe" else [])
    assert (choice.message.content, choice.finish_reason) == (None, "tool_calls")
    deltas = [
        delta
        for chunk in ask(client, "Describe Japan.", stream=True, **options)
        for delta in chunk.choices[0].delta.tool_calls or ()
    ]
    assert deltas[0].function.name == call.function.name
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    turns = [*user("Describe Japan."), choice.message.model_dump(), result]
    again = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=8, **sampling)
    assert again.choices[0].message.content


def test_a_repeated_prompt_comes_from_the_cache_and_usage_says_so(client: openai.OpenAI) -> None:
    text = "Please repeat after me: " + "a cat sat on the mat and a dog lay on the log; " * 4
    first, again = (ask(client, text, max_tokens=4, **GREEDY) for _ in range(2))
    assert first.usage.prompt_tokens == again.usage.prompt_tokens
    assert again.usage.prompt_tokens_details.cached_tokens > again.usage.prompt_tokens - 32
    assert first.choices[0].message.content == again.choices[0].message.content
    assert again.usage.total_tokens == again.usage.prompt_tokens + 4


def test_a_stop_string_ends_the_answer_and_is_never_shown(client: openai.OpenAI) -> None:
    whole = ask(client, PROMPTS[0], max_tokens=40, **GREEDY).choices[0].message.content
    stop = whole[len(whole) // 2 :][:6]  # it may begin and end within tokens
    expected = whole[: whole.index(stop)]
    choice = ask(client, PROMPTS[0], max_tokens=40, stop=[stop], **GREEDY).choices[0]
    assert (choice.message.content, choice.finish_reason) == (expected, "stop")
    assert choice.stop_reason == stop
    deltas = [
        chunk.choices[0].delta.content or ""
        for chunk in ask(client, PROMPTS[0], max_tokens=40, stop=[stop], stream=True, **GREEDY)
    ]
    assert "".join(deltas) == expected


# --- Everything else it serves --------------------------------------------------------------------------


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == MODEL
    assert client.models.retrieve(MODEL) == model


def test_text_survives_tokenize_and_detokenize(server: str) -> None:
    text = "Grüße an 🦙 und 東京, 3.14 times!\n\n  indented"
    tokens = httpx.post(f"{server}/tokenize", json={"prompt": text}).json()
    assert tokens["count"] == len(tokens["tokens"]) > 10
    assert tokens["max_model_len"] == 8192
    back = httpx.post(f"{server}/detokenize", json={"tokens": tokens["tokens"]}).json()
    assert back["prompt"] == text


def test_metrics_count_what_is_answered(client: openai.OpenAI, server: str) -> None:
    before = metrics(server)
    usage = ask(client, PROMPTS[1], max_tokens=12, extra_body=NO_DRAFTS, **GREEDY).usage
    moved = {name: value - before[name] for name, value in metrics(server).items()}
    assert moved["generation_tokens_total"] == usage.completion_tokens == 12
    assert moved["prompt_tokens_total"] == usage.prompt_tokens
    assert moved["request_success_total"] == moved["e2e_request_latency_seconds_count"] == 1
    assert moved["inter_token_latency_seconds_count"] == 11


def test_a_request_rules_its_own_drafts_and_the_answer_is_the_one_without_any(
    client: openai.OpenAI, serve: Callable[..., AbstractContextManager[Server]]
) -> None:
    text = "Repeat five times: the quick brown fox jumps over the lazy dog."
    expected = ask(client, text, max_tokens=48, extra_body=NO_DRAFTS, **SAMPLED).choices[0].message.content
    flags = "--spec-method prompt_lookup --spec-tokens 4 --per-request-spec-decode-metrics summary"
    with serve(*flags.split(), "--metrics-compat", "vllm", "--served-model-name", MODEL) as drafting:
        url = f"http://127.0.0.1:{drafting.port}"
        num_drafts = []
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as other:
            for speculation in ({}, {"max_draft_tokens": 1}, {"method": "none"}):
                before = metrics(url)
                answer = ask(other, text, max_tokens=48, extra_body={"speculation": speculation}, **SAMPLED)
                moved = {name: value - before[name] for name, value in metrics(url).items()}
                report = answer.metrics["speculative_decoding"]
                assert answer.choices[0].message.content == expected
                assert report["num_draft_tokens"] == moved["vllm:spec_decode_num_draft_tokens_total"]
                assert moved["vllm:generation_tokens_total"] == answer.usage.completion_tokens
                num_drafts.append((report["num_spec_steps"], report["num_draft_tokens"]))
    free, capped, off = num_drafts
    assert free[1] > free[0] > 0
    assert capped[1] == capped[0] > 0
    assert off == (0, 0)


# --- Refusals -------------------------------------------------------------------------------------------


def test_an_unknown_field_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="unknown field: temprature") as caught:
        ask(client, "Hello", extra_body={"temprature": 0})
    assert caught.value.param == "temprature"


def test_a_prompt_that_is_too_long_is_refused_with_the_limit(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="has 9000 tokens, the limit is 8191") as caught:
        client.completions.create(model=MODEL, prompt=[100] * 9000)
    assert caught.value.param == "prompt"


def test_a_taken_port_is_one_line_and_no_traceback(server: str) -> None:
    port = server.rpartition(":")[2]
    command = [sys.executable, "-m", "outpace", "serve", "--port", port]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in line


# --- Load, departures and the end -----------------------------------------------------------------------


def test_more_requests_than_places_get_the_bytes_they_get_alone(client: openai.OpenAI) -> None:
    def answer(number: int) -> str:
        options = SAMPLED | {"seed": number} if number % 2 else GREEDY
        text = PROMPTS[number % len(PROMPTS)]
        content: str = ask(client, text, max_tokens=20, **options).choices[0].message.content
        return content

    numbers = range(18)  # more than twice --max-num-seqs
    alone = [answer(number) for number in numbers]
    with ThreadPoolExecutor(len(numbers)) as pool:
        assert list(pool.map(answer, numbers)) == alone


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_at_once(server: str, stream: bool) -> None:
    body = {"messages": user("Count."), "ignore_eos": True, "n": 4, "stream": stream}  # a minute's work
    content = json.dumps(body).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    url = httpx.URL(server)
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        if stream:
            assert b"200 OK" in connection.recv(4096)
        wait_until(lambda: metrics(server)["num_requests_running"] == 4)
        before = metrics(server)["request_success_total"]
    wait_until(lambda: metrics(server)["num_requests_running"] == 0)
    assert metrics(server)["kv_cache_usage_perc"] == 0
    assert metrics(server)["request_success_total"] == before + 4  # as aborted


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_full_server_refuses_and_on_sigterm_finishes_what_runs(
    serve: Callable[..., AbstractContextManager[Server]],
) -> None:
    with serve("--max-num-seqs", "1", "--max-num-queued-reqs", "0", "--served-model-name", MODEL) as full:
        url = f"http://127.0.0.1:{full.port}"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
            options: dict[str, Any] = {"max_tokens": 300, "extra_body": {"ignore_eos": True}, **GREEDY}
            expected = ask(client, PROMPTS[1], **options).choices[0].message.content
            stream = ask(client, PROMPTS[1], stream=True, **options)
            chunks = [next(stream), next(stream)]
            with pytest.raises(openai.RateLimitError, match="--max-num-queued-reqs") as caught:
                ask(client, "Hello")
            assert int(caught.value.response.headers["retry-after"]) >= 1
            full.signal(signal.SIGTERM)
            wait_until(lambda: refuses_connections(full.port))
            assert full.process.poll() is None
            chunks += stream
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "length"
        assert full.process.wait(20) == 0


def refuses_connections(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
