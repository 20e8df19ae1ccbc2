from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_llm import FakeLLM, make_tokenizer, running_server
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from outpace.config import ServerConfig
from outpace.errors import (
    ConfigError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    ShuttingDownError,
)
from outpace.server import run
from outpace.server.app import create_app
from outpace.server.connection import MAX_BODY_BYTES
from outpace.server.run import bind
from outpace.server.tokens import MAX_CHARS_ON_LOOP, Tokens

HELLO: Any = [{"role": "user", "content": "Hello"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[FakeLLM, str]]:
    llm = FakeLLM()
    with running_server(llm) as url:
        yield llm, url


@pytest.fixture
def llm(shared: tuple[FakeLLM, str]) -> FakeLLM:
    """The fake behind the server, as new."""
    fresh = FakeLLM(tokenizer=shared[0].tokenizer)
    registry = shared[0].metrics
    shared[0].__dict__.update(fresh.__dict__)
    shared[0].metrics = registry
    return shared[0]


@pytest.fixture
def http(llm: FakeLLM, shared: tuple[FakeLLM, str]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared[1]) as client:
        yield client


@pytest.fixture
def client(llm: FakeLLM, shared: tuple[FakeLLM, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{shared[1]}/v1", api_key="unused", max_retries=0) as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, which has the OpenAI shape."""
    assert response.headers["content-type"] == "application/json"
    content = response.json()
    assert content.keys() == {"error"}
    assert content["error"].keys() == {"message", "type", "param", "code"}
    return dict(content["error"])


def events_of(response: httpx.Response) -> list[Any]:
    """The events of a stream, `[DONE]` as it is."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


# --- The official client --------------------------------------------------------------------------------


def test_the_openai_client_gets_a_chat_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="fake", messages=HELLO)
    assert answer.choices[0].message.content == "hello wörld"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("chatcmpl-")
    assert abs(answer.created - time.time()) < 60
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 16


def test_the_openai_client_gets_a_streamed_chat_answer(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="fake", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello wörld"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_the_openai_client_gets_a_completion_streamed_and_not(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="fake", prompt="Hello")
    assert answer.choices[0].text == "hello wörld"
    chunks = client.completions.create(model="fake", prompt="Hello", stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "hello wörld"


def test_the_openai_client_lists_and_gets_the_model(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("error", "expected", "code"),
    [
        (InvalidRequestError("no", "seed"), openai.BadRequestError, None),
        (OverloadedError("full"), openai.RateLimitError, "rate_limit_exceeded"),
        (ShuttingDownError("draining"), openai.InternalServerError, "shutting_down"),
        (EngineDeadError("dead"), openai.InternalServerError, "engine_dead"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_of_the_engine_is_the_right_exception(
    client: openai.OpenAI, llm: FakeLLM, error: Exception, expected: Any, code: str | None, stream: bool
) -> None:
    llm.error = error
    with pytest.raises(expected) as raised:
        client.chat.completions.create(model="fake", messages=HELLO, stream=stream)
    assert raised.value.code == code
    assert str(error) in raised.value.message


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="this server serves 'fake'") as raised:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert raised.value.code == "model_not_found"
    assert raised.value.param == "model"


def test_an_error_in_mid_stream_reaches_the_openai_client(client: openai.OpenAI, llm: FakeLLM) -> None:
    llm.late_error = EngineDeadError("the engine stopped")
    with pytest.raises(openai.APIError, match="the engine stopped"):
        list(client.chat.completions.create(model="fake", messages=HELLO, stream=True))


# --- Streams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [None, {"include_usage": True}, {"continuous_usage_stats": True}])
@pytest.mark.parametrize("logprobs", [{}, {"logprobs": True, "top_logprobs": 2}])
def test_every_chat_event_has_the_shape_that_openai_documents(
    http: httpx.Client, options: Any, logprobs: dict[str, Any]
) -> None:
    body = {"messages": HELLO, "stream": True, "n": 2, "stream_options": options, **logprobs}
    *events, done = events_of(http.post(CHAT, json=body))
    assert done == "[DONE]"
    for event in events:
        ChatCompletionChunk.model_validate(event, strict=True)
    for index in (0, 1):
        mine = [e["choices"][0] for e in events if e["choices"] and e["choices"][0]["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in mine) == "hello wörld"
        assert mine[-1]["delta"] == {}
        assert mine[-1]["finish_reason"] == "stop"


def test_a_stream_without_stream_options_has_no_usage(http: httpx.Client) -> None:
    *events, _ = events_of(http.post(CHAT, json={"messages": HELLO, "stream": True}))
    assert all("usage" not in event for event in events)


def test_continuous_usage_counts_up(http: httpx.Client) -> None:
    options = {"continuous_usage_stats": True}
    *events, _ = events_of(
        http.post(CHAT, json={"messages": HELLO, "stream": True, "stream_options": options})
    )
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 7


def test_an_output_without_text_makes_no_event(http: httpx.Client) -> None:
    *events, _ = events_of(http.post(CHAT, json={"messages": HELLO, "stream": True}))
    texts = [event["choices"][0]["delta"].get("content") for event in events[1:-1]]
    assert "".join(texts) == "hello wörld"
    assert len(texts) == 6  # of seven tokens; the two that make up ö are one event
    assert all(texts)


def test_an_error_in_mid_stream_is_an_event_and_ends_the_stream(http: httpx.Client, llm: FakeLLM) -> None:
    llm.late_error = EngineDeadError("the engine stopped")
    response = http.post(CHAT, json={"messages": HELLO, "stream": True})
    assert response.status_code == 200
    last = events_of(response)[-1]
    assert last["error"] == {
        "message": "the engine stopped",
        "type": "server_error",
        "param": None,
        "code": "engine_dead",
    }


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_was_given_up_is_an_error_not_an_answer(
    http: httpx.Client, llm: FakeLLM, stream: bool
) -> None:
    llm.give_up = True
    response = http.post(CHAT, json={"messages": HELLO, "stream": stream})
    error = events_of(response)[-1]["error"] if stream else error_of(response)
    assert error["code"] == "shutting_down"
    assert response.status_code == (200 if stream else 503)


def test_whatever_text_the_model_writes_survives_the_stream(http: httpx.Client, llm: FakeLLM) -> None:
    llm.answer = 'quote " backslash \\ newline \n tab \t null \x00 emoji 🙂 line separator \u2028 end'
    body = {"messages": HELLO, "stream": True}
    *events, _ = events_of(http.post(CHAT, json=body))
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == llm.answer
    assert http.post(CHAT, json={"messages": HELLO}).json()["choices"][0]["message"]["content"] == llm.answer


# --- Disconnects ----------------------------------------------------------------------------------------


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": HELLO, "stream": True}),
        (CHAT, {"messages": HELLO}),
        (TEXT, {"prompt": ["one", "two", "three"], "stream": True}),
        (TEXT, {"prompt": ["one", "two", "three"]}),
    ],
)
@pytest.mark.parametrize("pause", [0.02, 60.0])  # while answering; while waiting for the first token
def test_a_client_that_leaves_ends_its_requests(
    shared: tuple[FakeLLM, str], llm: FakeLLM, path: str, body: dict[str, Any], pause: float
) -> None:
    llm.pause, llm.answer = pause, "hello " * 2000
    url = httpx.URL(shared[1])
    content = json.dumps(body | {"max_tokens": 2000}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_until(lambda: len(llm.running) == (3 if path == TEXT else 1))
        if pause < 1 and body.get("stream"):
            assert connection.recv(1000)
    wait_until(lambda: not llm.running)


def test_a_request_that_ends_leaves_no_task(llm: FakeLLM) -> None:
    app = create_app(llm, ServerConfig())  # type: ignore[arg-type]

    async def check() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            for stream in (False, True):
                assert (
                    await client.post(CHAT, json={"messages": HELLO, "stream": stream})
                ).status_code == 200
                assert (await client.post(TEXT, json={"prompt": ["a", "b"]})).status_code == 200
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(check())


# --- Completions ----------------------------------------------------------------------------------------


def test_several_prompts_times_n_are_indexed_prompt_by_prompt(http: httpx.Client) -> None:
    body = {"prompt": ["a", "bb"], "n": 2, "echo": True, "max_tokens": 1}
    answer = http.post(TEXT, json=body).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in answer["choices"]] == ["ahello", "ahello", "bbhello", "bbhello"]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 4
    *events, _ = events_of(http.post(TEXT, json=body | {"stream": True}))
    texts = ["", "", "", ""]
    for event in events:
        Completion.model_validate({**event, "choices": []})
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == ["ahello", "ahello", "bbhello", "bbhello"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [([70, 71], [[70, 71]]), ([[70], [71, 72]], [[70], [71, 72]])],
)
def test_prompts_may_be_token_ids(http: httpx.Client, llm: FakeLLM, prompt: Any, expected: Any) -> None:
    answer = http.post(TEXT, json={"prompt": prompt, "echo": True, "max_tokens": 1}).json()
    assert [call.prompt_ids for call in llm.calls] == expected
    assert answer["choices"][0]["text"] == llm.tokenizer.decode(expected[0]) + "hello"


def test_the_default_length_gives_way_to_a_long_prompt_but_what_is_asked_for_does_not(
    http: httpx.Client, llm: FakeLLM
) -> None:
    long = [70] * (llm.max_model_len - 10)
    http.post(TEXT, json={"prompt": [[70], long]}).raise_for_status()
    http.post(TEXT, json={"prompt": long, "max_tokens": 16}).raise_for_status()
    http.post(TEXT, json={"prompt": long, "max_tokens": None}).raise_for_status()
    assert [call.sampling.max_tokens for call in llm.calls] == [16, None, 16, None]


def test_completion_logprobs_have_the_older_format(http: httpx.Client) -> None:
    body = {"prompt": "a", "logprobs": 2, "max_tokens": 3}
    expected = {
        "text_offset": [0, 5, 6],
        "token_logprobs": [-0.5, -0.5, -0.5],
        "tokens": ["hello", " ", "w"],
        "top_logprobs": [{"hello": -0.5, "%": -1.5}, {" ": -0.5, "%": -1.5}, {"w": -0.5, "%": -1.5}],
    }
    answer = http.post(TEXT, json=body).json()
    Completion.model_validate(answer, strict=True)
    assert answer["choices"][0]["logprobs"] == expected
    *events, _ = events_of(http.post(TEXT, json=body | {"stream": True}))
    streamed = [event["choices"][0]["logprobs"] for event in events[:-1]]
    assert {key: [item for part in streamed for item in part[key]] for key in expected} == expected


# --- Chat -----------------------------------------------------------------------------------------------


def test_chat_logprobs_hold_the_bytes_of_parts_of_characters(http: httpx.Client) -> None:
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 1}
    answer = http.post(CHAT, json=body).json()
    ChatCompletion.model_validate(answer, strict=True)
    content = answer["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "hello wörld"
    assert content[3] == {
        "token": "�",
        "logprob": -0.5,
        "bytes": [0xC3],
        "top_logprobs": [{"token": "�", "logprob": -0.5, "bytes": [0xC3]}],
    }


def test_the_chat_template_lays_the_prompt_out(http: httpx.Client, llm: FakeLLM) -> None:
    system = {
        "role": "developer",
        "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": " kind"}],
    }
    body = {"messages": [system, *HELLO], "chat_template_kwargs": {"mood": "glad"}}
    http.post(CHAT, json=body).raise_for_status()
    assert llm.tokenizer.decode(llm.calls[0].prompt_ids) == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n(glad)"
    )


def test_the_last_message_may_be_continued(http: httpx.Client, llm: FakeLLM) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well,"}]
    http.post(CHAT, json={"messages": messages, "continue_final_message": True}).raise_for_status()
    assert llm.tokenizer.decode(llm.calls[0].prompt_ids).endswith("<|im_start|>assistant\nWell,")
    both = {"messages": messages, "continue_final_message": True, "add_generation_prompt": True}
    assert error_of(http.post(CHAT, json=both))["param"] == "add_generation_prompt"


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"messages": [{"role": "user", "content": "forbidden"}]}, "messages", "not this word"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "cannot set tokenize"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "cannot set messages"),
        (
            {"chat_template_kwargs": {"chat_template": "x"}},
            "chat_template_kwargs",
            "cannot set chat_template",
        ),
        ({"chat_template_kwargs": {"mood": "\ud800"}}, "messages", "the chat template refuses"),
    ],
)
def test_what_the_chat_template_refuses_is_a_bad_request(
    http: httpx.Client, fields: dict[str, Any], param: str, reason: str
) -> None:
    content = json.dumps({"messages": HELLO, **fields})
    response = http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert reason in error_of(response)["message"]


def test_a_model_without_a_chat_template_says_so() -> None:
    tokens = Tokens(make_tokenizer(template=None))
    with pytest.raises(InvalidRequestError, match="no chat template: use /v1/completions"):
        asyncio.run(tokens.encode_chat([]))


def test_a_prompt_error_is_about_the_messages_in_chat(http: httpx.Client, llm: FakeLLM) -> None:
    llm.error = InvalidRequestError("the prompt is too long", "prompt")
    assert error_of(http.post(CHAT, json={"messages": HELLO}))["param"] == "messages"
    assert error_of(http.post(TEXT, json={"prompt": "a"}))["param"] == "prompt"


def test_a_refusal_of_the_engine_names_the_field_as_the_client_wrote_it(
    http: httpx.Client, llm: FakeLLM
) -> None:
    llm.error = InvalidRequestError("max_tokens must be at most 10, got 20", "max_tokens")
    for name in ("max_tokens", "max_completion_tokens"):
        error = error_of(http.post(CHAT, json={"messages": HELLO, name: 20}))
        assert error["param"] == name
        assert error["message"] == f"{name} must be at most 10, got 20"


def test_the_user_of_a_request_is_the_client_that_policies_see(http: httpx.Client, llm: FakeLLM) -> None:
    for body in ({"user": "ada"}, {}):
        http.post(CHAT, json={"messages": HELLO, **body}).raise_for_status()
    assert [call.client for call in llm.calls] == ["ada", ""]


def test_priority_reaches_the_engine(http: httpx.Client, llm: FakeLLM) -> None:
    http.post(CHAT, json={"messages": HELLO, "priority": -3}).raise_for_status()
    assert llm.calls[0].priority == -3


def test_long_prompts_are_tokenised_off_the_event_loop_with_the_same_result(llm: FakeLLM) -> None:
    text = "hello world " * MAX_CHARS_ON_LOOP
    ids = asyncio.run(Tokens(llm.tokenizer).encode([text, "hello"], add_special_tokens=True))
    assert ids == [llm.tokenizer.encode(text), llm.tokenizer.encode("hello")]


# --- Errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"5",
        b'""',
        b"\xff\xfe",
        b'{"messages": NaN}',
        b"[" * 100_000,
        b'{"messages": ' + b"[" * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"\\ud800": 1}',
        b'{"messages": [], "\\u0000": "\\u0000"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "model": "\\ud800"}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "a"}], "logit_bias": {"\\ud800": 1}}',
        b'{"messages": [{"role": "user", "content": "a"}], "stop": ["\\ud800"]}',
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_no_body_makes_the_server_fail(http: httpx.Client, path: str, content: bytes) -> None:
    response = http.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 404)
    assert error_of(response)["message"]


def test_a_null_byte_is_text_like_any_other(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "a\0b"}], "stop": "\0"}
    assert http.post(CHAT, json=body).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/a/b", 404, "model_not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/health", 405, "method_not_allowed"),
    ],
)
def test_wrong_routes_and_methods_have_the_same_error_shape(
    http: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    response = http.request(method, path)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert ("allow" in response.headers) == (status == 405)


def test_a_body_of_another_type_than_json_is_refused(http: httpx.Client) -> None:
    response = http.post(CHAT, content=b'{"messages": []}', headers={"Content-Type": "text/plain"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in error_of(response)["message"]


def test_a_refusal_for_load_says_when_to_try_again(http: httpx.Client, llm: FakeLLM) -> None:
    for error, status in ((OverloadedError("full"), 429), (ShuttingDownError("draining"), 503)):
        llm.error = error
        response = http.post(CHAT, json={"messages": HELLO})
        assert response.status_code == status
        assert response.headers["retry-after"] == "1"


def test_one_refused_prompt_of_several_refuses_all(http: httpx.Client, llm: FakeLLM) -> None:
    llm.pause = 0.01
    response = http.post(TEXT, json={"prompt": [[70], [10_000]]})
    assert response.status_code == 400
    assert not llm.running


def test_an_unexpected_error_is_a_500_that_hides_its_text(llm: FakeLLM) -> None:
    llm.error = RuntimeError("secret")
    app = create_app(llm, ServerConfig())  # type: ignore[arg-type]

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post(CHAT, json={"messages": HELLO})

    response = asyncio.run(ask())
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text


@pytest.mark.parametrize("declared", [True, False])
def test_a_huge_body_is_refused(http: httpx.Client, declared: bool) -> None:
    chunk = b" " * 2**20
    chunks = (chunk for _ in range(MAX_BODY_BYTES // len(chunk) + 1))
    content = b"".join(chunks) if declared else chunks
    response = http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert error_of(response)["code"] == "request_too_large"


# --- Keys, names, templates -----------------------------------------------------------------------------


def test_the_api_key_is_asked_for_under_v1_only(llm: FakeLLM) -> None:
    with running_server(llm, ServerConfig(api_key="secret")) as url, httpx.Client(base_url=url) as http:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path in ("/v1/models", "/v1/models/fake", "/v1/nowhere"):
                response = http.get(path, headers=headers)
                assert response.status_code == 401
                assert error_of(response)["code"] == "invalid_api_key"
            assert http.post(CHAT, content=b"{", headers=headers).status_code == 401
        for path in ("/health", "/metrics", "/version"):
            assert http.get(path).status_code == 200
        assert http.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
            assert client.with_options(api_key="secret").models.list().data[0].id == "fake"


def test_the_served_name_replaces_the_models_own(llm: FakeLLM) -> None:
    with (
        running_server(llm, ServerConfig(served_model_name="org/name")) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client,
    ):
        assert client.models.retrieve("org/name").id == "org/name"
        answer = client.chat.completions.create(model="org/name", messages=HELLO)
        assert answer.model == "org/name"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="fake", messages=HELLO)


def test_a_chat_template_may_come_from_a_file(llm: FakeLLM, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[0].content }}!")
    with running_server(llm, ServerConfig(chat_template=str(path))) as url:
        httpx.post(f"{url}{CHAT}", json={"messages": HELLO}).raise_for_status()
    assert llm.tokenizer.decode(llm.calls[0].prompt_ids) == "Hello!"


def test_a_broken_chat_template_is_found_before_any_request(llm: FakeLLM, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("line\n{% for")
    with pytest.raises(ConfigError, match="syntax error in line 2"):
        create_app(llm, ServerConfig(chat_template=str(path)))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot read --chat-template"):
        create_app(llm, ServerConfig(chat_template=str(tmp_path / "none")))  # type: ignore[arg-type]


# --- The other endpoints --------------------------------------------------------------------------------


def test_health_follows_the_engine_and_the_drain(llm: FakeLLM) -> None:
    app = create_app(llm, ServerConfig())  # type: ignore[arg-type]

    async def status() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return (await client.get("/health")).status_code

    assert asyncio.run(status()) == 200
    app.state.is_draining = True
    assert asyncio.run(status()) == 503
    app.state.is_draining = False
    llm.is_running = False
    assert asyncio.run(status()) == 503


def test_metrics_are_prometheus_text_and_the_version_is_ours(http: httpx.Client) -> None:
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert "fake_things_total 0.0" in response.text
    assert http.get("/version").json() == {"version": "0.1.0"}


def test_tokenize_and_detokenize_are_inverse(http: httpx.Client, llm: FakeLLM) -> None:
    answer = http.post("/tokenize", json={"prompt": "hello wörld", "return_token_strs": True}).json()
    assert answer["tokens"] == llm.tokenizer.encode("hello wörld")
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == llm.max_model_len
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "hello wörld"}
    assert http.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_messages_are_tokenised_as_chat_does(http: httpx.Client, llm: FakeLLM) -> None:
    http.post(CHAT, json={"messages": HELLO}).raise_for_status()
    answer = http.post("/tokenize", json={"messages": HELLO}).json()
    assert answer["tokens"] == llm.calls[0].prompt_ids
    assert answer["token_strs"] is None
    bare = http.post("/tokenize", json={"messages": HELLO, "add_generation_prompt": False}).json()
    assert bare["count"] < answer["count"]


def test_detokenize_refuses_ids_outside_the_vocabulary(http: httpx.Client, llm: FakeLLM) -> None:
    error = error_of(http.post("/detokenize", json={"tokens": [len(llm.tokenizer)]}))
    assert "the vocabulary ends at" in error["message"]
    assert error["param"] == "tokens"


def test_the_openapi_description_knows_the_errors_and_no_422(http: httpx.Client) -> None:
    description = http.get("/openapi.json").json()
    chat = description["paths"][CHAT]["post"]
    assert set(chat["responses"]) == {"200", "400", "401", "404", "413", "429", "500", "503"}
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    event = chat["responses"]["200"]["content"]["text/event-stream"]["itemSchema"]
    assert event["required"] == ["data"]
    assert "HTTPValidationError" not in json.dumps(description)
    schema = description["components"]["schemas"]["ChatCompletionRequest"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["functions"]["type"] == "null"


# --- From start to end ----------------------------------------------------------------------------------


def test_a_port_in_use_is_a_config_error_in_one_line() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="cannot listen on"):
        bind("no.such.host.invalid", 0)


def serve_while(llm: FakeLLM, act: Callable[[str], None], config: ServerConfig | None = None) -> int:
    """Serves in this thread while `act(url)` runs in another; the exit code."""
    with bind("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

        def wait_and_act() -> None:
            transport = httpx.HTTPTransport(retries=10)
            with httpx.Client(transport=transport) as http:
                assert http.get(f"{url}/health").status_code == 200
            act(url)

        thread = threading.Thread(target=wait_and_act)
        thread.start()
        try:
            return asyncio.run(run._serve(llm, config or ServerConfig(), listener))  # type: ignore[arg-type]
        finally:
            thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_then_the_server_ends_well(
    llm: FakeLLM, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    llm.pause = 0.02
    texts: list[str] = []

    def act(url: str) -> None:
        with httpx.stream("POST", f"{url}{CHAT}", json={"messages": HELLO, "stream": True}) as response:
            os.kill(os.getpid(), number)
            texts.extend(response.iter_text())
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")

    assert serve_while(llm, act, ServerConfig(shutdown_timeout=7)) == 0
    assert "".join(texts).endswith("data: [DONE]\n\n")
    assert llm.shutdown_timeouts == [7]
    assert "Outpace serves fake at http://127.0.0.1:" in capsys.readouterr().out


def test_a_dead_engine_ends_the_server_with_an_error(llm: FakeLLM) -> None:
    def act(url: str) -> None:
        llm.is_running = False

    assert serve_while(llm, act) == 1


def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    stop = asyncio.Event()
    run._on_signal(signal.SIGTERM, stop)
    assert codes == []
    run._on_signal(signal.SIGTERM, stop)
    assert codes == [143]
