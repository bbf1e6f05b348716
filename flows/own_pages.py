"""Prefect's server as :mod:`flows.server` has uvicorn serve it: for programs, and for pages of its own.

Whatever page somebody opens in a browser on this machine reaches loopback too, and Prefect answers every origin: such a
page could rewrite a deployment, have it run, and read where the team is told. A name of somebody else's that leads to
127.0.0.1 (DNS rebinding) would make that page one of the server's own. PREFECT_SERVER_CORS_ALLOWED_ORIGINS says which
origins are let in, and with them their hosts.
"""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tasks.stage import importing

_LOOPBACK = ("127.0.0.1", "localhost")
_ALL = "*"


class OwnPages:
    """Refuses what a page of another origin asks, which a browser names; a program names none."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        self._app, self._origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] in ("http", "websocket") else None
        if origin is None or origin in self._origins or _ALL in self._origins:
            await self._app(scope, receive, send)
        else:
            await PlainTextResponse(f"pages of {origin} are not let in", 403)(scope, receive, send)


def make() -> ASGIApp:
    """Returns Prefect's application, for hosts and pages of its own; its automations ask it itself, as another host."""
    with importing():
        from prefect.server.api.server import create_app
        from prefect.settings import get_current_settings

        app = create_app()
    origins = tuple(get_current_settings().server.api.cors_allowed_origins.split(","))
    hosts = [urlsplit(origin).hostname or origin for origin in origins]
    return TrustedHostMiddleware(OwnPages(app, origins), [*_LOOPBACK, *hosts])
