"""Request headers that Ray Serve obeys, whoever sends them: what gets past here is ours, or harmless.

Serve reads them before the gateway's own code runs. Some have it stop watching for clients that leave, or cut a stream
after so many seconds; others it decodes, and where they are not UTF-8 it fails with status 500.

Serve's servers, which are the gateways, HAProxy's fallback and the Python proxy, put this in front of themselves by
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`. Source: ray 2.60, serve/_private/http_util.py, replica.py and proxy.py.
"""

from __future__ import annotations

import logging

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from raylm.errors import InvalidRequestError
from raylm.serve.schema import FILES_PATH, error_body

IMPORT_PATH = "raylm.serve.headers:middlewares"
"""Of what Serve is to call."""

_UNWATCHED = b"x-request-disconnect-disabled"
_OBEYED = (_UNWATCHED, b"x-request-timeout-seconds")

_DECODED = (b"x-session-id", b"x-request-id", b"serve-multiplexed-model-id", b"traceparent", b"tracestate")

_log = logging.getLogger(__name__)


def middlewares() -> list[Middleware]:
    """Return what Serve's HTTP servers have in front of them."""
    return [Middleware(ServeHeaders)]


class ServeHeaders:
    """ASGI middleware: refuses headers that Serve cannot decode, and decides itself those that Serve obeys.

    Args:
        app: What is behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = []
        for name, value in scope["headers"]:
            if name in _OBEYED:
                continue
            if not value.isascii() and name.replace(b"_", b"-") in _DECODED:
                error = InvalidRequestError(f"{name.decode()}: only ASCII")
                _log.info("a request was refused: %s", error)
                await JSONResponse(error_body(error), error.status_code)(scope, receive, send)
                return
            headers.append((name, value))
        if scope["method"] == "POST" and scope["path"].endswith(FILES_PATH):
            # To see when a client leaves, Serve reads a body into memory as fast as it comes. Files are left to us.
            headers.append((_UNWATCHED, b"?1"))
        await self._app({**scope, "headers": headers}, receive, send)
