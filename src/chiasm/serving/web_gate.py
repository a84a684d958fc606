"""The gate before the page: who may use it, how large requests may be, and how long they may take.

uvicorn has no deadline for a request and no limit of its size.  Both are here: deadlines below HTTP (`gatekeeper`),
the other limits above it (`WebGate`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from hmac import compare_digest
from typing import Any
from urllib.parse import urlsplit

from uvicorn.protocols.http.h11_impl import H11Protocol

from chiasm.errors import ChiasmError
from chiasm.serving.web_limits import TOKEN, Page, WebLimits

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OWN_PAGE = "Open this server's own page. A proxy must pass on the name and port that the browser asked for, as Host."
#: What everybody may see: it shows nothing of any job.
OPEN = ("/", "/api/health", "/api/openapi.json")
HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
CROWDED = 5  # seconds after which a client may try again that found too many connections


class WebError(ChiasmError):
    """A request that is refused.

    Args:
        status: Of HTTP.
        what: Why.
        reason: A short code for programs.
        hint: What to do.
        headers: More that the answer says.
    """

    def __init__(
        self, status: int, what: str, reason: str, hint: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(what, reason=reason, hint=hint or None)
        self.status, self.headers = status, dict(headers or {})


def error_json(error: ChiasmError) -> dict[str, str]:
    """Describe an error as the API does: one sentence, what to do, and a code for programs."""
    hint = error.hint or ""
    return {"message": str(error).removesuffix(hint).strip(), "hint": hint, "reason": error.reason}


class WebGate:
    """An application behind checks of the sender and the size of requests; it adds safety headers to answers.

    Args:
        app: The application behind it.
        page: Says who may, and how much.
    """

    def __init__(self, app: App, page: Page) -> None:
        self._app, self._page = app, page

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on; only HTTP is served."""
        if scope["type"] != "http":
            return
        headers = _headers(scope)
        guarded = _with_headers(send)
        try:
            self._check(scope, headers)
        except WebError as error:
            await _answer(guarded, error)
            return
        if scope["method"] == "HEAD":  # as GET: uvicorn leaves the body of the answer out
            scope = {**scope, "method": "GET"}
        await self._app(scope, _Body(receive, self._page.limits).receive, guarded)

    def _check(self, scope: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        """Refuse requests without permission, and requests that are too large.

        Raises:
            WebError: If the request is refused.
        """
        check_host(headers, self._page)
        if self._page.token and scope["path"] not in OPEN:
            check_token(headers.get("authorization", ""), self._page.token)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._page.limits.body_bytes:
            raise too_large(self._page.limits)


def check_host(headers: Mapping[str, str], page: Page) -> None:
    """Refuse a request that another server's page makes a browser send.

    Raises:
        WebError: If it calls this server by another's name, or comes from another's page.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    if not page.knows(_name_in(host)):
        raise WebError(
            421,
            "this server does not answer to the name in the Host header",
            "host",
            "Use the address that chiasm serve printed, or start it with --name NAME.",
        )
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        raise WebError(403, "the request comes from a page of another server", "origin", OWN_PAGE)


def check_token(given: str, token: str) -> None:
    """Refuse a request without the token, in a time that does not depend on how much of it is right.

    Raises:
        WebError: If it is missing or wrong.
    """
    scheme, _, presented = given.partition(" ")
    is_right = compare_digest(presented.strip().encode(), token.encode())
    if scheme.lower() != "bearer" or not is_right:
        raise WebError(
            401,
            "the token is wrong" if given else "a token is needed",
            "token",
            f"Send the header Authorization: Bearer TOKEN, with the token of --token-file or {TOKEN}.",
            {"www-authenticate": 'Bearer realm="chiasm"'},
        )


def too_large(limits: WebLimits) -> WebError:
    """Return the refusal of a request that is too large."""
    most = limits.body_bytes / 2**20
    return WebError(413, "the request is too large", "too-large", f"At most {most:.0f} MiB are taken.")


class _Body:
    """The body of a request, with a limit of its size and its time."""

    def __init__(self, receive: Receive, limits: WebLimits) -> None:
        self._receive, self._limits = receive, limits
        self._bytes = 0
        self._last = asyncio.get_running_loop().time() + limits.body_s
        self._is_whole = False

    async def receive(self) -> Message:
        """Return the next piece of the body.

        Raises:
            WebError: If the request is too large, or the piece comes too late.
        """
        if self._is_whole:  # the application waits for the client to leave
            return await self._receive()
        left = self._last - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, min(left, self._limits.idle_s)))
        except TimeoutError:
            raise WebError(
                408, "the request came too slowly", "too-slow", "Send it again over a faster line."
            ) from None
        self._bytes += len(message.get("body", b""))
        self._is_whole = not message.get("more_body", False)
        if self._bytes > self._limits.body_bytes:
            raise too_large(self._limits)
        return message


def _headers(scope: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers of a request; the values of a repeated header are joined, so that no check accepts them."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        found[key] = value.decode("latin-1") if key not in found else f"{found[key]}, {value.decode('latin-1')}"
    return found


def _name_in(host: str) -> str:
    """Return the name of a Host header without its port; "" where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            own = {name.lower() for name, _ in message.get("headers", [])}
            more = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in own]
            message = {**message, "headers": [*message.get("headers", []), *more]}
        await send(message)

    return sending


async def _answer(send: Send, error: WebError) -> None:
    body = json.dumps(error_json(error)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    listed = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": listed})
    await send({"type": "http.response.body", "body": body})


def gatekeeper(limits: WebLimits) -> type[H11Protocol]:
    """Return a connection class for uvicorn that ends if a client is too slow or there are too many connections.

    Args:
        limits: How slow, how many.
    """

    class Connection(H11Protocol):
        """A connection with deadlines: for the head of each request, for its end, and for taking the answer."""

        _head: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.write(_CROWDED)
                transport.close()
            else:
                self._look()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._look()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._look()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self._stalled or self.loop.call_later(limits.idle_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            _end(self._stalled)
            self._stalled = None

        def connection_lost(self, exc: Exception | None) -> None:
            _end(self._head)
            _end(self._stalled)
            super().connection_lost(exc)

        def _look(self) -> None:
            """Run the deadline of the next request while none is being answered; the rest of the last one counts."""
            if self.cycle is not None and not self.cycle.response_complete:
                _end(self._head)
                self._head = None
            elif self._head is None:
                self._head = self.loop.call_later(limits.head_s, self.transport.abort)

    return Connection


def _end(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


_BODY = json.dumps(error_json(ChiasmError("too many connections", reason="full", hint="Try again."))).encode()
_CROWDED = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"retry-after: %d\r\ncontent-length: %d\r\n\r\n%b" % (CROWDED, len(_BODY), _BODY)
)
