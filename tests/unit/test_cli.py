from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fake_llm import FakeLLM, running_server

from outpace import cli, terminal
from outpace.config import EngineConfig, ServerConfig
from outpace.errors import ConfigError, InvalidRequestError, OverloadedError


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OUTPACE_") and name != "OUTPACE_CACHE"]:
        monkeypatch.delenv(name)


def test_the_package_is_a_program_with_help() -> None:
    command = [sys.executable, "-m", "outpace", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "serve" in result.stdout


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == "outpace 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["bake"], "invalid choice: 'bake'"),
        (["serve", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["serve", "--max-num"], "unrecognized arguments: --max-num"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--port", "http"], "--port must be an integer"),
        (["serve", "--max-num-seqs", "0"], "--max-num-seqs must be at least 1, got 0"),
        (["serve", "--config", "nowhere.yaml"], "cannot read --config nowhere.yaml"),
        (["serve", "--chat-template", "nowhere.jinja"], "cannot read --chat-template nowhere.jinja"),
        (["generate", "x", "--temperature", "hot"], "--temperature must be a number, got 'hot'"),
        (["generate", "x", "--temperature", "-1"], "temperature must be"),
        (["generate", "x", "--file", "y"], "not both"),
        (["generate", "--file", "nowhere.txt"], "cannot read the prompt"),
        (["generate", "\udcff"], "cannot read the prompt"),
        (["chat", "--url", "http://localhost", "--dtype", "float32"], "--url excludes it"),
        (["convert", "nowhere.gguf", "out"], "nowhere.gguf"),
    ],
)
def test_a_wrong_setting_is_one_line_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"outpace {arguments[0]}: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_ctrl_c_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("outpace.server.run.serve", interrupt)
    assert cli.main(["serve"]) == 130


def test_serve_hands_both_configs_over(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def serve(*configs: Any) -> int:
        given.extend(configs)
        return 0

    monkeypatch.setattr("outpace.server.run.serve", serve)
    monkeypatch.setenv("OUTPACE_API_KEY", "secret")
    assert cli.main(["serve", "a/model", "--port", "9000", "--max-num-seqs", "4"]) == 0
    assert given == [
        EngineConfig(model="a/model", max_num_seqs=4),
        ServerConfig(port=9000, api_key="secret"),
    ]


def test_convert_passes_source_and_target(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("outpace.models.convert.convert", lambda *paths: given.extend(paths))
    assert cli.main(["convert", "a.gguf", "out"]) == 0
    assert given == ["a.gguf", Path("out")]


# --- generate -------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What LLM.generate returns, as far as it is printed."""

    prompt: str
    outputs: list[Any] = field(default_factory=list)


@dataclass
class Text:
    text: str


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replaces LLM by a recorder that says "yes" n times."""
    seen = SimpleNamespace(settings=None, prompt=None, sampling=None)

    class FakeOffline:
        def __init__(self, **settings: Any) -> None:
            seen.settings = settings

        def generate(self, prompt: str, sampling: Any) -> list[Result]:
            seen.prompt, seen.sampling = prompt, sampling
            return [Result(prompt, [Text("yes")] * sampling.n)]

    monkeypatch.setattr("outpace.llm.LLM", FakeOffline)
    return seen


def test_generate_prints_the_text(offline: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--model",
        "m",
        "--temperature",
        "0",
        "--max-tokens",
        "5",
        "--stop",
        "a",
        "--stop",
        "b",
        "--n",
        "2",
    ]
    assert cli.main(["generate", "Say yes", *flags, "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == "yes\nyes\n"
    assert offline.prompt == "Say yes"
    assert offline.settings["model"] == "m"
    assert offline.settings["dtype"] == "float32"
    assert (offline.sampling.temperature, offline.sampling.max_tokens) == (0, 5)
    assert (offline.sampling.stop, offline.sampling.n) == (("a", "b"), 2)


def test_generate_prints_json(offline: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "ö", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"prompt": "ö", "outputs": [{"text": "yes"}]}


def test_generate_reads_a_file_or_stdin_less_the_last_newline(
    offline: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("from a\nfile\n")
    assert cli.main(["generate", "--file", str(path)]) == 0
    assert offline.prompt == "from a\nfile"
    monkeypatch.setattr(sys, "stdin", io.StringIO("from stdin\n"))
    assert cli.main(["generate"]) == 0
    assert offline.prompt == "from stdin"


# --- chat -----------------------------------------------------------------------------------------------


class Script:
    """A chat model that answers with what it was asked; `fail` raises, `stop` is interrupted."""

    def __init__(self) -> None:
        self.asked: list[list[dict[str, str]]] = []
        self.closed = False

    async def start(self) -> str:
        return "script"

    async def answer(self, messages: list[dict[str, str]]) -> AsyncGenerator[str]:
        self.asked.append(messages)
        last = messages[-1]["content"]
        yield "you said "
        if last == "fail":
            raise OverloadedError("the queue is full")
        if last == "stop":
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        yield f"[{last}]"

    async def close(self) -> None:
        self.closed = True


def type_in(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_a_conversation_has_several_turns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "one", "", "two", "/exit", "never")
    model = Script()
    assert terminal.talk(model, "Be kind") == 0
    roles = [message["role"] for message in model.asked[-1]]
    assert roles == ["system", "user", "assistant", "user"]
    assert model.asked[-1][2]["content"] == "you said [one]"
    assert len(model.asked) == 2
    assert "you said [two]" in capsys.readouterr().out
    assert model.closed


def test_reset_forgets_all_but_the_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    type_in(monkeypatch, "one", "/reset", "two")
    model = Script()
    assert terminal.talk(model, "Be kind") == 0  # the input's end, as Ctrl-D, leaves
    assert [message["content"] for message in model.asked[-1]] == ["Be kind", "two"]


def test_an_error_is_shown_and_its_turn_forgotten(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "fail", "two")
    model = Script()
    assert terminal.talk(model, None) == 0
    assert "error: the queue is full" in capsys.readouterr().out
    assert [message["content"] for message in model.asked[-1]] == ["two"]


def test_ctrl_c_stops_an_answer_and_keeps_what_came(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "stop", "two")
    model = Script()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        assert terminal.talk(model, None) == 0
    finally:
        signal.signal(signal.SIGINT, before)
    assert "(stopped)" in capsys.readouterr().out
    assert model.asked[-1][1] == {"role": "assistant", "content": "you said "}


def test_chat_talks_to_a_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    llm = FakeLLM()
    with running_server(llm, ServerConfig(api_key="secret")) as url:
        type_in(monkeypatch, "Hello", "/exit")
        flags = ["--api-key", "secret", "--temperature", "0.5", "--seed", "3", "--system", "Be kind"]
        assert cli.main(["chat", "--url", url, *flags]) == 0
        assert "hello wörld" in capsys.readouterr().out
        assert (llm.calls[0].sampling.temperature, llm.calls[0].sampling.seed) == (0.5, 3)
        assert "Be kind" in llm.tokenizer.decode(llm.calls[0].prompt_ids)

        type_in(monkeypatch, "Hello")
        assert cli.main(["chat", "--url", f"{url}/v1/", "--api-key", "wrong"]) == 2
        assert "the API key is missing or wrong" in capsys.readouterr().err

        llm.late_error = InvalidRequestError("something broke")
        type_in(monkeypatch, "Hello")
        assert cli.main(["chat", "fake", "--url", url, "--api-key", "secret"]) == 0
        assert "error: something broke" in capsys.readouterr().out


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "--url", "http://127.0.0.1:1"]) == 2
    assert capsys.readouterr().err.startswith("outpace chat: error: cannot reach http://127.0.0.1:1/v1")


def test_chat_runs_a_model_in_this_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = FakeLLM()
    monkeypatch.setattr("outpace.async_llm.AsyncLLM.from_config", lambda config: llm)
    type_in(monkeypatch, "Hello", "again")
    assert cli.main(["chat", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.count("hello wörld") == 2
    assert llm.tokenizer.decode(llm.calls[1].prompt_ids).count("<|im_start|>") == 4
    assert llm.shutdown_timeouts == [0]


def test_an_event_of_another_server_may_lack_text() -> None:
    assert terminal._text('{"choices": [{"delta": {"role": "assistant"}}]}') == ""
    assert terminal._text('{"choices": []}') == ""
    assert terminal._reason(502, b"<html>") == "HTTP 502: <html>"


def test_a_server_that_speaks_something_else_is_one_line() -> None:
    async def start(reply: str) -> None:
        model = terminal.RemoteModel("http://elsewhere", None, None, {})
        await model.close()
        respond = httpx.MockTransport(lambda request: httpx.Response(200, text=reply))
        async with httpx.AsyncClient(transport=respond, base_url="http://elsewhere/v1") as model._client:
            await model.start()

    for reply in ("<html>", "[]", "5", '{"data": []}'):
        with pytest.raises(ConfigError, match="http://elsewhere/v1/ lists no models"):
            asyncio.run(start(reply))
    for event in ("<html>", "[]", '{"choices": [5]}', '{"choices": 5}', '{"error": "a text"}'):
        with pytest.raises(InvalidRequestError, match="the server sent what is no chat event: "):
            terminal._text(event)


def test_leaving_a_remote_answer_closes_its_connection() -> None:
    llm = FakeLLM(answer="hello " * 500, pause=0.01)

    async def ask_and_leave(url: str) -> None:
        model = terminal.RemoteModel(url, None, None, {})
        assert await model.start() == "fake"
        answer = model.answer([{"role": "user", "content": "Hello"}])
        async for text in answer:
            if text:
                break
        assert llm.running
        await answer.aclose()
        await model.close()

    with running_server(llm) as url:
        asyncio.run(ask_and_leave(url))
        deadline = time.monotonic() + 5
        while llm.running:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert httpx.get(f"{url}/health").status_code == 200
