"""A conversation in the terminal, with a model in this process or a server elsewhere."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from outpace.config import EngineConfig
from outpace.errors import ConfigError, InvalidRequestError, OutpaceError

if TYPE_CHECKING:
    import httpx

Message = dict[str, str]

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
CONNECT_TIMEOUT_S = 10.0


class ChatModel(Protocol):
    """Whoever answers."""

    async def start(self) -> str:
        """Gets ready, and gives the model's name."""

    def answer(self, messages: list[Message]) -> AsyncGenerator[str]:
        """Streams the answer's text; closing the generator stops the work."""

    async def close(self) -> None:
        """Lets go of everything."""


class LocalModel:
    """A model loaded into this process.

    Args:
        config: Which, and how it runs.
        options: SamplingParams' fields.
    """

    def __init__(self, config: EngineConfig, options: dict[str, Any]) -> None:
        from outpace.async_llm import AsyncLLM
        from outpace.sampling import SamplingParams
        from outpace.server.tokens import Tokens

        self._sampling = SamplingParams(**options)
        self._llm = AsyncLLM.from_config(config)
        self._tokens = Tokens(self._llm.tokenizer)
        self._numbers = itertools.count()

    async def start(self) -> str:
        """See ChatModel."""
        return self._llm.model_name

    async def answer(self, messages: list[Message]) -> AsyncGenerator[str]:
        """See ChatModel."""
        from outpace.server.protocol import ChatMessage

        turns = [ChatMessage.model_validate(message) for message in messages]
        prompt_ids = await self._tokens.encode_chat(turns)
        request_id = f"chat-{next(self._numbers)}"
        outputs = self._llm.generate(prompt_ids, self._sampling, request_id=request_id)
        async with aclosing(outputs):
            async for output in outputs:
                yield output.text

    async def close(self) -> None:
        """See ChatModel."""
        await self._llm.shutdown(0)


class RemoteModel:
    """A model behind an OpenAI-compatible server.

    Args:
        url: The server's, with or without `/v1`.
        api_key: Sent as a bearer token, if given.
        model: Its name; None takes the first that the server lists.
        options: Sampling fields, sent as they are.
    """

    def __init__(self, url: str, api_key: str | None, model: str | None, options: dict[str, Any]) -> None:
        import httpx

        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        base = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._client = httpx.AsyncClient(base_url=base, headers=headers, timeout=timeout)
        self._model = model
        self._options = options

    async def start(self) -> str:
        """See ChatModel."""
        if self._model is None:
            response = await self._get("/models")
            try:
                self._model = str(response.json()["data"][0]["id"])
            except (ValueError, LookupError, TypeError):
                raise ConfigError(f"{self._client.base_url} lists no models; name one with --model") from None
        return self._model

    async def answer(self, messages: list[Message]) -> AsyncGenerator[str]:
        """See ChatModel."""
        import httpx

        body = {"model": self._model, "messages": messages, "stream": True, **self._options}
        try:
            async with self._client.stream("POST", "/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise InvalidRequestError(_reason(response.status_code, await response.aread()))
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield _text(line[6:])
        except httpx.HTTPError as error:
            raise InvalidRequestError(f"{self._client.base_url}: {error or type(error).__name__}") from None

    async def close(self) -> None:
        """See ChatModel."""
        await self._client.aclose()

    async def _get(self, path: str) -> httpx.Response:
        import httpx

        try:
            response = await self._client.get(path, timeout=CONNECT_TIMEOUT_S)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConfigError(f"cannot reach {self._client.base_url}: {error}") from None
        if response.status_code != 200:
            raise ConfigError(f"{self._client.base_url}: {_reason(response.status_code, response.content)}")
        return response


def talk(model: ChatModel, system: str | None) -> int:
    """Reads turns and prints answers until the user leaves.

    Args:
        model: Answers.
        system: The system message, if there is one.

    Returns:
        The exit code.
    """
    console = Console(highlight=False, soft_wrap=True)
    beginning: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(beginning)
    with asyncio.Runner() as runner:
        try:
            console.print(f"{runner.run(model.start())}: {HELP}", style="dim", markup=False)
            while (text := _read(console)) is not None:
                if text == "/reset":
                    messages = list(beginning)
                    console.print("[dim]The conversation starts anew.[/dim]")
                elif text:
                    turn = [*messages, {"role": "user", "content": text}]
                    if (answer := _answer(runner, console, model, turn)) is not None:
                        messages = [*turn, {"role": "assistant", "content": answer}]
        finally:
            runner.run(model.close())
    return 0


def _read(console: Console) -> str | None:
    """The user's next turn, or None to leave. Ctrl-C discards the line."""
    while True:
        try:
            text = console.input("[bold green]>>> [/bold green]").strip()
        except EOFError:
            console.print()
            return None
        except KeyboardInterrupt:
            console.print()
            continue
        text = text.encode(errors="replace").decode()  # a terminal may send what is not UTF-8
        return None if text == "/exit" else text


def _answer(
    runner: asyncio.Runner, console: Console, model: ChatModel, messages: list[Message]
) -> str | None:
    """Prints the answer as it comes; None if there was none. After Ctrl-C the part that came counts."""
    parts: list[str] = []

    async def stream() -> None:
        async with aclosing(model.answer(messages)) as texts:
            async for text in texts:
                parts.append(text)
                console.out(text, end="", highlight=False)
                console.file.flush()

    try:
        runner.run(stream())
    except KeyboardInterrupt:
        console.print(" [dim](stopped)[/dim]", end="")
    except OutpaceError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return None
    console.print()
    return "".join(parts)


def _reason(status: int, content: bytes) -> str:
    """What an error response says, in the OpenAI shape or in any other."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}: {content[:200].decode(errors='replace')}"


def _text(data: str) -> str:
    """The text of a streamed event.

    Raises:
        InvalidRequestError: The event is an error, or no event of a chat.
    """
    try:
        event = json.loads(data)
        if error := event.get("error"):
            raise InvalidRequestError(str(error.get("message", error)))
        return "".join(choice["delta"].get("content") or "" for choice in event.get("choices", []))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise InvalidRequestError(f"the server sent what is no chat event: {data[:200]}") from None
