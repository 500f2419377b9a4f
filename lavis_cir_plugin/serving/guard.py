"""Check each request before the application: who asks, from where, and how much is sent."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import cookie_parser
from starlette.responses import JSONResponse

from lavis_cir_plugin.serving.limits import Limits
from lavis_cir_plugin.serving.refusals import problem, refusal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

API, SESSION = "/api/", "/api/v1/session"
COOKIE = "lavis_cir_session"

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d+)?")

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass
class _Body:
    """How much of a request's body has been read, and whether that is all."""

    is_whole: bool
    bytes: int = 0


class Guard:
    """Middleware that lets a request pass to the application or refuses it.

    * A request whose ``Host`` is none of ``hosts`` is refused: the page of another site could otherwise point its own
      name at this server and read what it says.
    * A request that a browser makes for a page of another site is refused.
    * Below ``/api/`` a token is asked for, if there is one: as ``Authorization: Bearer`` or as the cookie of a session.
    * A body beyond the limit is refused, by what it says of its size or as soon as it is larger; so is one that does
      not fit beside the bodies of other requests.

    Args:
        app: The application.
        limits: Limits of the server.
        token: Token that clients have to show; none where everybody who reaches the server may ask.
        hosts: Names by which the server is reached, without port, in lower case; none for all.
    """

    def __init__(self, app: Any, limits: Limits, token: str | None, hosts: frozenset[str] | None) -> None:
        self.app, self.limits, self.token, self.hosts = app, limits, token, hosts
        self._in_memory = 0  # bytes of all bodies

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer a request, or let the application do so."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        status, message = self._verdict(str(scope["path"]), headers)
        if status:
            extra = {"www-authenticate": "Bearer"} if status == 401 else {}
            # The body is not read, so the connection cannot be used again.
            response = JSONResponse(problem(status, message), status, {**_HEADERS, **extra, "connection": "close"})
            await response(scope, receive, send)
            return
        body = _Body(is_whole=headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers)
        try:
            await self.app(scope, self._counted(receive, body), _with_headers(send, body))
        finally:
            self._in_memory -= body.bytes

    def _verdict(self, path: str, headers: dict[str, str]) -> tuple[int, str]:
        """Return the status and the sentence of a refusal; 0 lets a request pass."""
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            return 403, f"this server answers to {', '.join(sorted(self.hosts))}, not to {host[:100]!r}."
        if _is_of_another_site(headers, host):
            return 403, "pages of other sites may not ask this server; open its own page."
        length = headers.get("content-length", "0")
        if not length.isdigit():
            return 400, "the Content-Length is no number."
        if int(length) > self.limits.body_bytes:
            return 413, self._too_large()
        if path.startswith(API) and path != SESSION and not self.is_let_in(headers):
            return 401, "this server asks for its token; send it as 'Authorization: Bearer TOKEN' or open the page."
        return 0, ""

    def is_let_in(self, headers: dict[str, str]) -> bool:
        """Return whether a request shows the token, or there is none."""
        if self.token is None:
            return True
        kind, _, shown = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and is_same(shown.strip(), self.token):
            return True
        # Python's own parser drops all cookies for one that it does not like, such as another port's of this machine.
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")
        return is_same(cookie, cookie_of(self.token))

    def _too_large(self) -> str:
        return (
            f"the request is larger than {self.limits.body_bytes:,} bytes; send at most {self.limits.pictures} "
            f"pictures of {self.limits.upload_bytes:,} bytes each."
        )

    def _counted(self, receive: Receive, body: _Body) -> Receive:
        async def counted() -> Message:
            message = await receive()
            size = len(message.get("body", b""))
            body.bytes += size
            body.is_whole = not message.get("more_body", False)
            self._in_memory += size
            if body.bytes > self.limits.body_bytes:
                raise refusal(413, self._too_large())
            if self._in_memory > self.limits.bodies_bytes:
                raise refusal(503, "many pictures are being sent at this moment; try again in a second.")
            return message

        return counted


def cookie_of(token: str) -> str:
    """Return what the cookie of a session holds: not the token itself, and nothing that can be made without it."""
    return hmac.new(token.encode(), b"session", hashlib.sha256).hexdigest()


def is_same(shown: str, expected: str) -> bool:
    """Compare two secrets in a time that tells nothing about them."""
    return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), expected.encode())


def _with_headers(send: Send, body: _Body) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            # What is left of the body of a refused request is not wanted, however long it is.
            more = {**_HEADERS, **({} if body.is_whole else {"connection": "close"})}
            present = {name.lower() for name, _ in message.get("headers", [])}
            added = [(n.encode(), v.encode()) for n, v in more.items() if n.encode() not in present]
            message = {**message, "headers": [*message.get("headers", []), *added]}
        await send(message)

    return sending


def _name(host: str) -> str:
    """Return the name in a ``Host`` header, without port and brackets, in lower case; empty for what is none."""
    found = _HOST.fullmatch(host.lower())
    return found.group(1).strip("[]") if found else ""


def _is_of_another_site(headers: dict[str, str], host: str) -> bool:
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        # A link to the page, which a person clicks, is no request of another site's page.
        return not (headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document")
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc.lower() != host.lower()
