"""What lies between the socket and the endpoints: who may come in, how much they may send, when they left."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outpace.server.errors import ClientGoneError, http_error

MAX_BODY_BYTES = 16 * 2**20
_TOO_LARGE = f"the body is larger than {MAX_BODY_BYTES:,} bytes"


@asynccontextmanager
async def while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancels what runs inside at the moment the client disconnects.

    One task for the whole request waits for the disconnect, none per chunk. The request's body must have
    been read.

    Raises:
        ClientGoneError: The client disconnected.
    """
    body = asyncio.current_task()
    assert body is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        body.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and body.uncancel() == 0:
            raise ClientGoneError from None
        raise  # cancelled from elsewhere, too
    finally:
        watcher.cancel()


class Gate:
    """ASGI middleware that asks for the API key under /v1 and bounds the size of bodies.

    Plain ASGI because Starlette's BaseHTTPMiddleware would put a task and a queue under every chunk.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self.app = app
        self._key_digest = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses the request or hands it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if scope["path"].startswith("/v1") and not self._admits(headers.get(b"authorization", b"")):
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            await http_error(401, message, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        elif length.isdigit() and int(length) > MAX_BODY_BYTES:
            await http_error(413, _TOO_LARGE, {"Connection": "close"})(scope, receive, send)
        else:
            await self.app(scope, receive if length else _bounded(receive), send)

    def _admits(self, authorization: bytes) -> bool:
        if self._key_digest is None:
            return True
        scheme, _, key = authorization.partition(b" ")
        # Digests have one length, so the time of the comparison tells nothing about the key.
        given = hashlib.sha256(key.strip()).digest()
        return hmac.compare_digest(given, self._key_digest) and scheme.lower() == b"bearer"


def _bounded(receive: Receive) -> Receive:
    """Counts the bytes of a body that does not declare its length."""
    num_bytes = 0

    async def counted() -> Message:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_BODY_BYTES:
            raise HTTPException(413, _TOO_LARGE)
        return message

    return counted
