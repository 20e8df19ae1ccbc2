"""From exceptions to answers in the OpenAI error shape."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from outpace.errors import (
    EngineDeadError,
    InvalidRequestError,
    NotFoundError,
    OutpaceError,
    OverloadedError,
    ShuttingDownError,
)

logger = logging.getLogger("outpace.server")

RETRY_AFTER_S = 1
CLIENT_CLOSED_REQUEST = 499  # never reaches anyone; nginx's number, for logs

# exception → (status, type, code); the first that matches counts
_KINDS: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (NotFoundError, 404, "invalid_request_error", "model_not_found"),
    (InvalidRequestError, 400, "invalid_request_error", None),
    (OverloadedError, 429, "rate_limit_error", "rate_limit_exceeded"),
    (ShuttingDownError, 503, "service_unavailable_error", "shutting_down"),
    (EngineDeadError, 500, "server_error", "engine_dead"),
    (Exception, 500, "server_error", "internal_error"),
)
_HTTP_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


def body(message: str, kind: str, param: str | None = None, code: str | None = None) -> bytes:
    """The JSON of an error; plain ASCII, so that any text a client sent can be quoted in it."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": error}).encode()


def describe(error: Exception) -> tuple[int, bytes]:
    """Status and body of an exception; an unexpected one is logged, and its text is not shown."""
    status, kind, code = next((s, k, c) for base, s, k, c in _KINDS if isinstance(error, base))
    message = str(error)
    if not isinstance(error, OutpaceError):
        logger.error("request failed", exc_info=error)
        message = "the server failed on this request; its log says why"
    return status, body(message, kind, getattr(error, "param", None), code)


def response(status: int, content: bytes, headers: dict[str, str] | None = None) -> Response:
    """A JSON error response."""
    headers = dict(headers or {})
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return Response(content, status, headers, media_type="application/json")


def http_error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    """An error that comes from HTTP itself: no such route, wrong method, wrong key, body too large."""
    return response(status, body(message, "invalid_request_error", None, _HTTP_CODES.get(status)), headers)


def install(app: FastAPI) -> None:
    """Makes every error of the app an OpenAI error."""

    async def on_error(request: Request, error: Exception) -> Response:
        return response(*describe(error))

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        message, param = explain(error.errors()[0])
        return response(400, body(message, "invalid_request_error", param))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"{message}: {request.method} {request.url.path}"
        elif error.status_code == 400:  # FastAPI's, for what is neither JSON nor a plain mistake in it
            message = (
                "the body cannot be read as JSON: it is not UTF-8, nested too deeply or holds a huge number"
            )
        return http_error(error.status_code, message, dict(error.headers or {}))

    async def on_client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    for kind in {base for base, *_ in _KINDS}:
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientGoneError, on_client_gone)


def explain(error: dict[str, Any]) -> tuple[str, str | None]:
    """A validation error of pydantic in words, and the field at fault."""
    kind, field = error["type"], _field(error["loc"])
    if kind == "json_invalid":
        return f"the body is not valid JSON: {error['ctx']['error']} at character {error['loc'][1]}", None
    if not field:
        return "the body must be a JSON object, with Content-Type: application/json", None
    if kind == "extra_forbidden":
        return f"unknown field: {field}", field
    if kind == "none_required":
        return f"{field} is not supported by this server", field
    if kind == "too_short":
        return f"{field} must not be empty", field
    if kind == "missing":
        return f"{field} is required", field
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    value = ascii(error["input"])
    return f"{field} {reason}, got {value if len(value) <= 80 else value[:77] + '...'}", field


def _field(location: tuple[str | int, ...]) -> str:
    """The path of a field as a client would write it: messages[0].content; union tags are left out."""
    parts = [part for part in location[1:] if not str(part).startswith("<")]
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
