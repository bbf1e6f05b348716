"""Whom the server lets in: who has its key, or asks from this machine, with a body that is no longer than a request."""

import hmac
import os
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.serve.metrics import Metrics
from flows.serve.refused import Refused

KEY = "OVERNIGHT_API_KEY"


def guard(app: FastAPI, key: str | None, most: int, metrics: Metrics) -> None:
    """Has ``app`` refuse requests without ``key``, where there is one, and those of more than ``most`` bytes.

    Without a key, only requests that are made to this machine's own names are answered. All are counted.
    """
    app.add_middleware(_Bounded, most=most)

    @app.middleware("http")
    async def checked(request: Request, go_on: Callable[[Request], Any]) -> Response:
        # The scheme is read in any case (RFC 9110, section 11.1); headers are bytes, which Starlette reads as Latin-1.
        scheme, _, sent = request.headers.get("authorization", "").partition(" ")
        bearer = sent.encode("latin-1") if scheme.lower() == "bearer" else b""
        status = 500
        try:
            everybodys = request.url.path == "/health"
            if key is None and not everybodys and not is_loopback(_asked_at(request)):
                # A page whose name leads here (DNS rebinding) would be one of this server's own to a browser.
                told = f"without a key, this server is asked at 127.0.0.1 or localhost; set {KEY} for other names"
                response: Response = Refused(403, "permission_error", told).response()
            elif key is None or everybodys or hmac.compare_digest(bearer, os.fsencode(key)):
                response = await go_on(request)
            else:
                response = Refused(401, "authentication_error", "the API key is missing or wrong").response()
            status = response.status_code
            return response
        finally:
            # As it is declared: a path with a name in it would be a series for each name that is asked for.
            route = request.scope.get("route")
            known = route.path if route else "other"
            metrics.requests.labels(known, status).inc()


def _asked_at(request: Request) -> str:
    """Returns the host that ``request`` is made to, "" where it names none.

    Not ``request.url``: for a header that Starlette does not understand, it has the server's own address.
    """
    header = request.headers.get("host")
    if header is None:
        return request.url.hostname or ""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether ``host``, a name or an address, is this machine and nobody else's."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class _Bounded:
    """Refuses a body of more than ``most`` bytes while it comes in."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = self._most

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, f"the body is longer than {self._most:,} bytes")
            return message

        await self._app(scope, counted, send)
