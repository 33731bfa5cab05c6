"""Door: what every request has to pass, and what is told of it when it leaves.

API keys, the limit on bodies, pages of other sites, header tricks, and one line of log for each request. Plain ASGI, so
that a stream costs one more function call a write and no task.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import re
import time
import uuid
from collections.abc import Sequence
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
from starlette._utils import get_route_path  # what its router goes by
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raylm.config import BatchesConfig, GatewayConfig
from raylm.errors import (
    AuthenticationError,
    ForeignPageError,
    InvalidRequestError,
    RaylmError,
    RequestTooLargeError,
)
from raylm.messages import FinishReason, Receipt
from raylm.serve.schema import BUG, FILES_PATH, error_body

_OPEN_PATHS = ("/", "/docs", "/health")
"""Served without a key, and so is what the pages need."""

_LEAST_BYTES_PER_S = 1000
"""A body that comes more slowly, after `body_timeout_s` of patience, is taken for one that is meant to hold us up."""

_FORM_BYTES = 2**16
"""What a form may have beside its file."""

_SESSION_HEADER = b"x-session-id"

_PAGE_POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'"

facts: ContextVar[dict[str, Any]] = ContextVar("raylm_request")
"""What is known of the request that the current task works on; every line of log has it."""

_log = logging.getLogger(__name__)


def note(receipt: Receipt, finish_reason: FinishReason) -> None:
    """Make how an answer came about part of the current request's lines of log."""
    facts.get().update(slot=receipt.slot, why=receipt.why, attempts=receipt.attempts, finish=finish_reason)


class Keys:
    """The API keys, as hashes: what is in memory opens nothing.

    Args:
        config: Says where they are.

    Raises:
        InvalidRequestError: they are nowhere to be found.
    """

    def __init__(self, config: GatewayConfig) -> None:
        keys: list[str] = []
        if config.api_keys_env is not None:
            keys += os.environ.get(config.api_keys_env, "").split(",")
        if config.api_keys_file is not None:
            try:
                keys += Path(config.api_keys_file).read_text().splitlines()
            except OSError as error:
                raise InvalidRequestError(f"api_keys_file: {error}") from None
        self._hashes = [sha256(key.strip().encode()).digest() for key in keys if key.strip()]
        self.needed = config.api_keys_env is not None or config.api_keys_file is not None
        if self.needed and not self._hashes:
            raise InvalidRequestError(
                f"no API key in {config.api_keys_env or config.api_keys_file}; put one there, or drop the setting"
            )

    def check(self, authorization: str) -> None:
        """Check the `authorization` header.

        Raises:
            AuthenticationError: it has no key, or a wrong one.
        """
        if not self.needed:
            return
        kind, _, key = authorization.partition(" ")
        given = sha256(key.strip().encode()).digest()
        # Every hash is compared, so that the time tells nothing.
        matches = [hmac.compare_digest(given, known) for known in self._hashes]
        if kind.lower() != "bearer" or not any(matches):
            raise AuthenticationError("the API key is missing or wrong; send it as `Authorization: Bearer KEY`")


class Door:
    """ASGI middleware.

    Args:
        app: What is behind it.
        config: Limits and keys.
        batches: The limit of files that are uploaded.
        local: It is for this machine alone.
    """

    def __init__(
        self, app: ASGIApp, config: GatewayConfig, batches: BatchesConfig | None = None, *, local: bool = False
    ) -> None:
        self._app = app
        self._keys = Keys(config)
        self._origins = frozenset(config.cors_origins)
        # Without keys, its address is what keeps others out.
        self._checks_host = local and not self._keys.needed and "*" not in self._origins
        self._hosts = {origin.partition("://")[2].lower() for origin in self._origins}
        self._max_body_bytes = config.max_body_bytes
        self._body_timeout_s = config.body_timeout_s
        self._max_form_bytes = config.max_body_bytes if batches is None else batches.max_file_bytes + _FORM_BYTES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        about: dict[str, Any] = {"method": scope["method"], "path": scope["path"], "http_request_id": uuid.uuid4().hex}
        limit = self._limit(scope)
        visit = _Visit(send, limit, self._body_timeout_s, receive, about)
        token = facts.set(about)
        try:
            try:
                session_id = self._check(scope, scope["headers"], limit)
            except RaylmError as error:
                response = JSONResponse(error_body(error), error.status_code, _refusal_headers(error))
                await response(scope, receive, visit.send)
                return
            scope.setdefault("state", {})["session_id"] = session_id
            if session_id is not None:
                about["session_id"] = session_id
            try:
                await self._app(scope, visit.receive, visit.send)
            except Exception:
                _log.exception("a request met an error of the gateway itself")
                if visit.status:
                    raise  # the server then cuts the connection, so that no half answer looks whole
                await JSONResponse({"error": BUG}, BUG["code"])(scope, receive, visit.send)
        finally:
            about["status"] = visit.status or 499  # the client left before there was one
            about["num_bytes"] = visit.num_bytes
            about["duration_ms"] = round((time.perf_counter() - visit.began) * 1e3, 1)
            _log.info("request")
            facts.reset(token)

    def _limit(self, scope: Scope) -> int:
        """Return how many bytes the body may have."""
        return self._max_form_bytes if get_route_path(scope) == FILES_PATH else self._max_body_bytes

    def _check(self, scope: Scope, headers: Sequence[tuple[bytes, bytes]], max_body_bytes: int) -> str | None:
        """Return the session that the header names."""
        found: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            found.setdefault(name.lower(), []).append(value)
        path = get_route_path(scope) or "/"  # without Serve's route_prefix
        if path not in _OPEN_PATHS and not path.startswith("/static/"):
            keys = found.get(b"authorization", [b""])
            if len(keys) > 1:
                raise AuthenticationError("authorization: sent more than once")
            self._keys.check(keys[0].decode("latin-1"))
        if scope["method"] == "POST" and self._is_foreign(found):
            raise ForeignPageError(
                "a page of another site may not send this; put its origin into the gateway's cors_origins if it may"
            )
        if self._checks_host and not self._is_own_host(found.get(b"host", [b""])[0].decode("latin-1").lower()):
            raise ForeignPageError(
                "this endpoint is for its own machine alone, at its address or localhost: another name that leads here "
                "may be a foreign site's. Set API keys, or put that name's origin into the gateway's cors_origins"
            )
        length = found.get(b"content-length", [b"0"])[0]
        if not length.isdigit():
            raise InvalidRequestError("content-length: not a number")
        if int(length) > max_body_bytes:
            raise RequestTooLargeError(f"the body has {int(length)} bytes; at most {max_body_bytes} are taken")
        variants = [name for name in found if name != _SESSION_HEADER and name.replace(b"_", b"-") == _SESSION_HEADER]
        if variants:
            # Whatever is in front may take the two for one; which of them counts must not be luck.
            raise InvalidRequestError(f"{variants[0].decode('latin-1')}: spell the header x-session-id")
        sessions = found.get(_SESSION_HEADER, [])
        if len(sessions) > 1:
            raise InvalidRequestError("x-session-id: sent more than once")
        if not sessions:
            return None
        try:
            session_id = sessions[0].decode("ascii").strip()
        except UnicodeDecodeError:
            raise InvalidRequestError("x-session-id: only ASCII") from None
        if not session_id or len(session_id) > 200:
            raise InvalidRequestError("x-session-id: 1 to 200 characters")
        return session_id

    def _is_own_host(self, host: str) -> bool:
        """Return whether no other site can have this host: its pages would be taken for the endpoint's own.

        A site can have any name of its own lead to 127.0.0.1 ("DNS rebinding"), but has neither numbers nor a name
        without a dot.
        """
        name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
        if "." not in name or name.endswith(".localhost") or host in self._hosts:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    def _is_foreign(self, headers: dict[bytes, list[bytes]]) -> bool:
        """Return whether a browser would let a page of any site send this POST without asking for leave first.

        It does so with forms, files and what has no body. Before it sends JSON it asks, and CORS answers.
        """
        content_type = headers.get(b"content-type", [b""])[0].lower()
        origin = headers.get(b"origin", [b""])[0].decode("latin-1")
        if content_type.startswith(b"application/json") or not self._origins.isdisjoint((origin, "*")):
            return False
        if b"sec-fetch-site" in headers:  # which also knows what a proxy in front has made of the host
            return headers[b"sec-fetch-site"][0] not in (b"same-origin", b"none")
        host = headers.get(b"host", [b""])[0].decode("latin-1")
        return bool(origin) and origin.partition("://")[2].lower() != host.lower()


class _Visit:
    """One request on its way through the door."""

    def __init__(
        self, send: Send, max_body_bytes: int, body_timeout_s: float, receive: Receive, about: dict[str, Any]
    ) -> None:
        self.began = time.perf_counter()
        self.status = 0
        self.num_bytes = 0
        self._send = send
        self._receive = receive
        self._bytes_left = max_body_bytes
        self._body_timeout_s = self._patience_s = body_timeout_s
        self._body_ended = False
        self._about = about

    async def send(self, message: Message) -> None:
        """Pass a part of the response on."""
        if message["type"] == "http.response.body":
            self.num_bytes += len(message.get("body", b""))
        elif message["type"] == "http.response.start":
            self.status = message["status"]
            headers = message.setdefault("headers", [])
            headers += _SAFETY_HEADERS
            request_id = str(self._about.get("request_id", ""))
            if request_id and all("!" <= char <= "~" for char in request_id):  # else it is one that was refused
                headers.append((b"x-raylm-request-id", request_id.encode()))
        await self._send(message)

    async def receive(self) -> Message:
        """Pass a part of the body on, as long as it comes and is not too long."""
        if self._body_ended:
            return await self._receive()  # only returns when the client leaves
        asked_at = time.perf_counter()
        try:
            async with asyncio.timeout(self._patience_s):
                message = await self._receive()
        except TimeoutError:
            # What may still come belongs to this request, so the connection is of no more use.
            raise HTTPException(
                408,
                f"no more of the body has come for {self._body_timeout_s:g} s, or less than {_LEAST_BYTES_PER_S} bytes "
                "a second",
                {"connection": "close"},
            ) from None
        num_bytes = len(message.get("body", b""))
        left_s = self._patience_s - (time.perf_counter() - asked_at) + num_bytes / _LEAST_BYTES_PER_S
        self._patience_s = min(self._body_timeout_s, left_s)
        self._body_ended = not message.get("more_body", False)
        self._bytes_left -= num_bytes
        if self._bytes_left < 0:
            raise HTTPException(413, "the body is too long")
        return message


_SAFETY_HEADERS = [
    (b"content-security-policy", _PAGE_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


def _refusal_headers(error: RaylmError) -> dict[str, str]:
    return {"www-authenticate": "Bearer"} if isinstance(error, AuthenticationError) else {}


class JSONLines(logging.Formatter):
    """One JSON object a line, with what is known of the request that it is about."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **facts.get({}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=str).decode()
