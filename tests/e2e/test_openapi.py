"""No request makes a running server fail, and its answers are what /openapi.json says."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from outpace.bench.servers import Server
from outpace.server.protocol import ChatCompletion, Completion


@pytest.fixture(scope="module")
def url(serve: Callable[..., AbstractContextManager[Server]]) -> Iterator[str]:
    """A server on which no request is dear: short answers, and at most 16 of them."""
    flags = "--max-model-len 48 --max-num-seqs 8 --max-num-queued-reqs 8"
    with serve(*flags.split()) as server:
        yield f"http://127.0.0.1:{server.port}"


def test_generated_requests_are_answered_as_described(url: str, tmp_path: Path) -> None:
    """Schemathesis' generated requests, within the description and against it.

    Left out is its check that whatever the description allows is accepted: it cannot say what depends on the
    model (token ids, lengths) or on several fields at once.
    """
    command = (
        f"{sys.executable} -m schemathesis.cli run {url}/openapi.json --seed 1 --max-examples 25 "
        "--phases examples,fuzzing --checks all --exclude-checks positive_data_acceptance "
        "--continue-on-failure --request-timeout 30 --no-color"
    )
    result = subprocess.run(command.split(), capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    generated = re.search(r"(\d+) generated", result.stdout)
    assert generated is not None
    assert int(generated[1]) > 100


# For each field values that a client may well send, most of them within range.
VALUES: dict[str, list[Any]] = {
    "n": [1, 2, 5, 8, 17],
    "temperature": [0, 1e-6, 0.3, 1, 5.0, 1e30, -1],
    "top_p": [1, 0.9, 1e-9, 0, 1.5],
    "top_k": [0, -1, 1, 40, 49152, 2**62],
    "min_p": [0, 0.1, 1, 2],
    "presence_penalty": [0, 2, -2, 3],
    "frequency_penalty": [0, 2, -2],
    "repetition_penalty": [1, 0.01, 100, 0],
    "logit_bias": [{}, {"0": 100}, {"5": -100, "260": 1.5}, {"49152": 1}, {"x": 1}],
    "seed": [0, 1, -1, 2**63 - 1, -(2**63)],
    "stop": ["a", [" the", "\n"], [], "", ["e"] * 20],
    "stop_token_ids": [[], [0, 2, 260], [49151], [49152]],
    "include_stop_str_in_output": [True, False],
    "min_tokens": [0, 1, 8, 2**31],
    "max_tokens": [1, 2, 8, 0],
    "ignore_eos": [True, False],
    "bad_words": [[], ["the", " a"], [" "], ["Paris is"]],
    "allowed_token_ids": [[5], [0, 1, 2], list(range(300)), [], [2**30]],
    "skip_special_tokens": [True, False],
    "priority": [0],
    "speculation": [
        {},
        {"max_draft_tokens": 0},
        {"method": "none"},
        {"max_draft_tokens": 6},
        {"method": "x"},
    ],
    "slo": [{}, {"ttft_ms": 300, "tpot_ms": 0}, {"tpot_ms": 50}, {"e2e_ms": 1}],
    "stream": [True, False],
}
CHAT: dict[str, list[Any]] = {
    "messages": [[{"role": "user", "content": text}] for text in ("Hi", "", "🦙\x00", "a b " * 40)],
    "logprobs": [True, False],
    "top_logprobs": [0, 5, 20, 21],
    "continue_final_message": [False, True],
}
TEXT: dict[str, list[Any]] = {
    "prompt": ["Hi", "", ["a", "b c"], [1, 2, 3], [[1], [2, 3]], [49152], "a " * 100],
    "logprobs": [0, 3, 20, 21],
    "echo": [True, False],
    "add_special_tokens": [True, False],
}


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_no_combination_of_parameters_makes_it_fail(url: str, kind: str) -> None:
    rng = random.Random(kind)
    statuses: Counter[int] = Counter()
    with httpx.Client(base_url=url, timeout=60) as http:
        for _ in range(120):
            statuses[check(http, kind, draw(rng, kind))] += 1
    assert statuses[200] > 30
    assert statuses[400] > 30


def draw(rng: random.Random, kind: str) -> dict[str, Any]:
    """A request with some of the fields; usually the first values, so that many requests are served."""
    values = VALUES | (CHAT if kind == "chat" else TEXT)
    body = {}
    for name, choices in values.items():
        if rng.random() < 0.4:
            body[name] = rng.choice(choices[:3] if rng.random() < 0.9 else [*choices, None])
    source = "messages" if kind == "chat" else "prompt"
    body.setdefault(source, values[source][0])
    return body


def check(http: httpx.Client, kind: str, body: dict[str, Any]) -> int:
    """Sends a request and checks the answer's shape; returns its status."""
    response = http.post("/v1/chat/completions" if kind == "chat" else "/v1/completions", json=body)
    shown = f"{body} gave {response.status_code} {response.text}"
    if response.status_code != 200:
        assert response.status_code == 400, shown
        assert response.json()["error"]["param"].partition(".")[0] in {*VALUES, *CHAT, *TEXT}, shown
    elif body.get("stream"):
        assert response.text.endswith("data: [DONE]\n\n"), shown
        assert '"error"' not in response.text, shown
    else:
        answer = (ChatCompletion if kind == "chat" else Completion).model_validate_json(response.text)
        prompt = body.get("prompt")
        num_prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
        assert len(answer.choices) == num_prompts * (body.get("n") or 1), shown
    return response.status_code
