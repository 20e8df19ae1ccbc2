"""The HTTP API over an AsyncLLM."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import prometheus_client
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from outpace import __version__
from outpace.config import ServerConfig
from outpace.errors import ConfigError, InvalidRequestError, NotFoundError, ShuttingDownError
from outpace.sampling import SamplingParams
from outpace.server import errors
from outpace.server.answers import Chunks, EventStream, Job, merge, whole
from outpace.server.connection import Gate, while_connected
from outpace.server.draft_report import DraftReport
from outpace.server.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
    StreamOptions,
    TokenizeRequest,
    TokenizeResponse,
    VersionResponse,
)
from outpace.server.tokens import Tokens, check_template
from outpace.server.tools import Tools, load_tool_format
from outpace.server.vllm_metrics import with_vllm_names

if TYPE_CHECKING:
    from outpace.async_llm import AsyncLLM


def create_app(llm: AsyncLLM, config: ServerConfig) -> FastAPI:
    """Builds the API.

    While `app.state.is_draining` is true, /health answers 503.

    Args:
        llm: Answers the requests.
        config: Key, served name and chat template.

    Raises:
        ConfigError: The chat template cannot be used.
    """
    app = FastAPI(
        title="Outpace",
        version=__version__,
        description="An OpenAI-compatible API. Errors of any kind have one shape, ErrorResponse.",
        docs_url=None,  # FastAPI's pages are blank where their CDN cannot be reached
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.is_draining = False
    app.add_middleware(Gate, api_key=config.api_key)
    errors.install(app)
    Api(app, llm, config).install()
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
    return app


def read_chat_template(config: ServerConfig) -> str | None:
    """The text of `--chat-template`, if given.

    Raises:
        ConfigError: The file cannot be read, or has a syntax error.
    """
    if config.chat_template is None:
        return None
    try:
        template = Path(config.chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --chat-template {config.chat_template}: {error}") from None
    check_template(template)
    return template


class Api:
    """The endpoints."""

    def __init__(self, app: FastAPI, llm: AsyncLLM, config: ServerConfig) -> None:
        self._app = app
        self._llm = llm
        self._model = config.served_model_name or llm.model_name
        self._started = int(time.time())
        self._tool_format = load_tool_format(config.tool_call_parser)
        self._has_auto_tools = config.enable_auto_tool_choice
        self._tokens = Tokens(llm.tokenizer, read_chat_template(config), self._tool_format)
        level = config.per_request_spec_decode_metrics
        num_spec_tokens = llm.speculative.num_speculative_tokens
        self._draft_report = None if level == "none" else DraftReport(num_spec_tokens, level == "detailed")
        self._registry = llm.metrics.registry
        if config.metrics_compat == "vllm":
            self._registry = with_vllm_names(self._registry, self._model)

    def install(self) -> None:
        """Adds the routes."""
        app = self._app
        chat = _responses(ChatCompletion, _GENERATION_ERRORS, streams=True)
        text = _responses(Completion, _GENERATION_ERRORS, streams=True)
        app.post("/v1/chat/completions", responses=chat)(self.chat)
        app.post("/v1/completions", responses=text)(self.complete)
        app.get("/v1/models", responses=_responses(ModelList, [401]))(self.models)
        app.get("/v1/models/{model_id:path}", responses=_responses(ModelCard, [401, 404]))(self.model)
        app.post("/tokenize", responses=_responses(TokenizeResponse, [400, 404, 413]))(self.tokenize)
        app.post("/detokenize", responses=_responses(DetokenizeResponse, [400, 404, 413]))(self.detokenize)
        app.get("/health", responses=_responses(None, [503]))(self.health)
        app.get("/version", responses=_responses(VersionResponse, []))(self.version)
        app.get("/metrics", responses={200: {"content": {"text/plain": {}}}})(self.metrics)

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answers a conversation."""
        self._check_model(body.model)
        sampling, tools = body.sampling(), self._tools(body)
        if tools is not None:
            sampling = replace(sampling, structured_outputs=tools.structure())
        prompt = await self._tokens.encode_chat(
            body.messages,
            body.add_generation_prompt,
            body.continue_final_message,
            body.add_special_tokens,
            body.chat_template_kwargs,
            [tool.model_dump(exclude_none=True) for tool in body.offered_tools] or None,
        )
        job = Job(
            "chat",
            self._model,
            sampling.n,
            self._tokens,
            client_names=body.client_names,
            draft_report=self._draft_report,
            tools=tools,
            synthetic=self._llm.speculative.is_synthetic,
        )
        return await self._answer(job, [prompt], [sampling], body, request)

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Continues one or more texts."""
        self._check_model(body.model)
        sampling = body.sampling()
        prompts = await self._prompt_ids(body)
        echoes = [await self._echo(body, i, ids) for i, ids in enumerate(prompts)]
        samplings = [self._fitted(sampling, body, ids) for ids in prompts]
        job = Job(
            "text",
            self._model,
            sampling.n,
            self._tokens,
            tuple(echoes),
            client_names=body.client_names,
            draft_report=self._draft_report,
            synthetic=self._llm.speculative.is_synthetic,
        )
        return await self._answer(job, prompts, samplings, body, request)

    async def models(self) -> Response:
        """Lists the one model that is served."""
        return _json(ModelList(data=[self._card()]))

    async def model(self, model_id: str) -> Response:
        """Describes the model."""
        self._check_model(model_id)
        return _json(self._card())

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """Token ids of a prompt or of a conversation."""
        self._check_model(body.model)
        if body.prompt is not None:
            (ids,) = await self._tokens.encode([body.prompt], body.add_special_tokens is not False)
        else:
            ids = await self._tokens.encode_chat(
                body.messages or [],
                body.add_generation_prompt,
                body.continue_final_message,
                body.add_special_tokens is True,
                body.chat_template_kwargs,
            )
        strings = self._tokens.strings(ids) if body.return_token_strs else None
        length = self._llm.max_model_len
        return _json(TokenizeResponse(count=len(ids), max_model_len=length, tokens=ids, token_strs=strings))

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """Text of token ids."""
        self._check_model(body.model)
        return _json(DetokenizeResponse(prompt=await self._tokens.decode(body.tokens, "tokens")))

    async def health(self) -> Response:
        """200 while requests are served, else 503."""
        if self._app.state.is_draining:
            raise ShuttingDownError("the server is draining: it finishes what runs and takes nothing new")
        if not self._llm.is_running:
            raise ShuttingDownError("the engine has stopped")
        return Response("{}", media_type="application/json")

    async def version(self) -> Response:
        """The server's version."""
        return _json(VersionResponse(version=__version__))

    async def metrics(self) -> Response:
        """Metrics in the Prometheus text format."""
        content = prometheus_client.generate_latest(self._registry)
        return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def _answer(
        self,
        job: Job,
        prompts: list[list[int]],
        samplings: list[SamplingParams],
        body: ChatCompletionRequest | CompletionRequest,
        request: Request,
    ) -> Response:
        """Starts one engine request per prompt and sends what comes of them."""
        speculation, slo = body.wanted_speculation(), body.wanted_slo()
        streams = [
            self._llm.generate(
                ids,
                sampling,
                request_id=f"{job.public_id}-{i}",
                priority=body.priority,
                speculation=speculation,
                client=body.user or "",
                slo=slo,
            )
            for i, (ids, sampling) in enumerate(zip(prompts, samplings, strict=True))
        ]
        outputs = merge(job, streams)
        if body.stream:
            return EventStream(Chunks(job, body.stream_options or StreamOptions()), outputs)
        async with while_connected(request.receive):
            return _json(await whole(job, outputs))

    def _tools(self, body: ChatCompletionRequest) -> Tools | None:
        """The tools that a request offers, if it does."""
        if not body.offered_tools:
            return None
        must_call = body.tool_choice not in (None, "auto")
        if not must_call and not self._has_auto_tools:
            raise InvalidRequestError(
                "tool_choice auto, the default where there are tools, needs a server that is started with "
                "--enable-auto-tool-choice and the --tool-call-parser of its model; or give required, none "
                "or the name of a function",
                "tool_choice",
            )
        functions = [tool.function for tool in body.offered_tools]
        return Tools(
            self._tool_format,
            {function.name: function.parameters for function in functions},
            strict=frozenset(function.name for function in functions if function.strict),
            must_call=must_call,
            many=body.parallel_tool_calls is not False and isinstance(body.tool_choice, str | None),
        )

    def _fitted(
        self, sampling: SamplingParams, body: CompletionRequest, prompt_ids: list[int]
    ) -> SamplingParams:
        """The endpoint's default length, which no client asked for, ends where the context does."""
        room = self._llm.max_model_len - len(prompt_ids)
        if "max_tokens" in body.model_fields_set or room >= DEFAULT_COMPLETION_TOKENS:
            return sampling
        return replace(sampling, max_tokens=None)

    async def _prompt_ids(self, body: CompletionRequest) -> list[list[int]]:
        """The prompts as token ids, whichever of the four shapes they came in."""
        if isinstance(body.prompt, str):
            return await self._tokens.encode([body.prompt], body.add_special_tokens)
        if isinstance(body.prompt[0], str):
            return await self._tokens.encode(body.prompt, body.add_special_tokens)
        if isinstance(body.prompt[0], int):
            return [body.prompt]
        return body.prompt

    async def _echo(self, body: CompletionRequest, number: int, prompt_ids: list[int]) -> str:
        """What answers to a prompt begin with: the prompt as it was sent, if it is to be echoed."""
        if not body.echo:
            return ""
        if isinstance(body.prompt, str):
            return body.prompt
        given = body.prompt[number]
        return given if isinstance(given, str) else await self._tokens.decode(prompt_ids, "prompt")

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._model:
            raise NotFoundError(f"there is no model {name!r}: this server serves {self._model!r}", "model")

    def _card(self) -> ModelCard:
        return ModelCard(id=self._model, created=self._started, max_model_len=self._llm.max_model_len)


def _json(content: BaseModel) -> Response:
    return Response(content.model_dump_json(), media_type="application/json")


_ERRORS = {
    400: "The request is at fault; `param` names the field",
    401: "The API key is missing or wrong",
    404: "The model is not served",
    413: "The body is too large",
    429: "Too many requests wait; Retry-After says when to try again",
    500: "A bug, or the engine stopped on one",
    503: "The server is draining",
}


# OpenAPI 3.2's way to describe a stream by its events, as FastAPI writes it into 3.1, too.
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk or an error as JSON, or [DONE]"}},
    "required": ["data"],
}

_GENERATION_ERRORS = [400, 401, 404, 413, 429, 500, 503]


def _responses(
    model: type[BaseModel] | None, statuses: list[int], streams: bool = False
) -> dict[int | str, Any]:
    """The OpenAPI description of an endpoint's answers."""
    success: dict[str, Any] = {"description": "Success"}
    if model is not None:
        success["model"] = model
    if streams:
        success["content"] = {"text/event-stream": {"itemSchema": _EVENT}}
    failures: dict[int | str, Any] = {
        status: {"model": ErrorResponse, "description": _ERRORS[status]} for status in statuses
    }
    return {200: success, **failures}


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, without the 422 answers that FastAPI assumes and this server never gives."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(unused, None)
        app.openapi_schema = schema
    return app.openapi_schema
