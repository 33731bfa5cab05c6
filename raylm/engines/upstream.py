"""What an HTTP server's failures are here: aiohttp's exceptions, refusals, and too many of either in a row."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC
from email.utils import parsedate_to_datetime

import aiohttp
import msgspec

from raylm.errors import (
    AuthenticationError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    ModelNotFoundError,
    PoolSaturatedError,
    ProtocolError,
    RaylmError,
    RequestTimeoutError,
    RequestTooLargeError,
    UpstreamError,
)

_OVER_LONG = re.compile(
    r"context.?length|maximum context|context.?window|longer than the maximum|too (long|many tokens)", re.IGNORECASE
)

CUT = "the connection to {url} broke ({error})"
CONNECT = "cannot connect to {url} ({error}); check that the server runs and that this node reaches it"
TLS = "no TLS with {url} ({error}); set ca_file to the certificate that signed the server's, or verify_tls to False"
SILENT = "{url} was silent for {idle_timeout_s:g} s ({error}); look at its load, or raise idle_timeout_s"
NOT_HTTP = "{url} does not answer as an HTTP server does ({error}); check the url"

ERRORS: dict[type[BaseException], tuple[type[RaylmError], str]] = {
    aiohttp.ClientError: (UpstreamError, CUT),
    aiohttp.ClientConnectionError: (UpstreamError, CUT),
    aiohttp.ClientConnectionResetError: (UpstreamError, CUT),
    aiohttp.ClientOSError: (UpstreamError, CUT),
    aiohttp.ServerConnectionError: (UpstreamError, CUT),
    aiohttp.ServerDisconnectedError: (UpstreamError, CUT),
    aiohttp.ClientPayloadError: (UpstreamError, CUT),
    aiohttp.client_exceptions.UploadAbortedError: (UpstreamError, CUT),
    aiohttp.ClientConnectorError: (UpstreamError, CONNECT),
    aiohttp.ClientConnectorDNSError: (UpstreamError, CONNECT),
    aiohttp.ClientProxyConnectionError: (UpstreamError, CONNECT),
    aiohttp.ClientHttpProxyError: (UpstreamError, CONNECT),
    aiohttp.client_exceptions.UnixClientConnectorError: (UpstreamError, CONNECT),
    aiohttp.ConnectionTimeoutError: (UpstreamError, CONNECT),
    aiohttp.ClientSSLError: (UpstreamError, TLS),
    aiohttp.ClientConnectorSSLError: (UpstreamError, TLS),
    aiohttp.ClientConnectorCertificateError: (UpstreamError, TLS),
    aiohttp.ServerFingerprintMismatch: (UpstreamError, TLS),
    aiohttp.ServerTimeoutError: (RequestTimeoutError, SILENT),
    aiohttp.SocketTimeoutError: (RequestTimeoutError, SILENT),
    aiohttp.ClientResponseError: (ProtocolError, NOT_HTTP),
    aiohttp.ContentTypeError: (ProtocolError, NOT_HTTP),
    aiohttp.WSServerHandshakeError: (ProtocolError, NOT_HTTP),
    aiohttp.TooManyRedirects: (ProtocolError, NOT_HTTP),
    aiohttp.InvalidURL: (ProtocolError, NOT_HTTP),
    aiohttp.InvalidUrlClientError: (ProtocolError, NOT_HTTP),
    aiohttp.InvalidUrlRedirectClientError: (ProtocolError, NOT_HTTP),
    aiohttp.NonHttpUrlClientError: (ProtocolError, NOT_HTTP),
    aiohttp.NonHttpUrlRedirectClientError: (ProtocolError, NOT_HTTP),
    aiohttp.client_exceptions.RedirectClientError: (ProtocolError, NOT_HTTP),
}
"""Every exception of aiohttp's own tree: what it is here, and the text of it.

Source: aiohttp 3.14, `aiohttp.client_exceptions`.
"""


def translate(error: aiohttp.ClientError, url: str, idle_timeout_s: float) -> RaylmError:
    """Return what an exception of aiohttp is here."""
    kind, text = next(ERRORS[base] for base in type(error).__mro__ if base in ERRORS)
    return kind(text.format(url=url, error=str(error) or type(error).__name__, idle_timeout_s=idle_timeout_s))


def refusal(
    url: str, status: int | None, body: bytes, *, models: Sequence[str] = (), retry_after: str | None = None
) -> RaylmError:
    """Return what an answer that is none of a model is here.

    Args:
        url: Who said it.
        status: HTTP status; None when it was 200 all the same, and what is wrong stands in the body.
        body: What was said, or the beginning of it.
        models: The models that are served.
        retry_after: The header of that name: seconds or a date.
    """
    said = _read_error(body)
    if status is None:
        if said is None:
            return ProtocolError(f"{url} sent something else than a stream of events: {excerpt(body)}; check the url")
        status = said.status or 500
    text = f"{url} answered {status}: {said.message if said else excerpt(body)}"
    retry_after_s = _seconds(retry_after)
    if status == 429:
        return PoolSaturatedError(text, retry_after_s=retry_after_s)
    if status in (401, 403):
        return AuthenticationError(f"{text}; set api_key to one that the server knows")
    if status == 404:
        return ModelNotFoundError(f"{text}; at the start it served {', '.join(models)}")
    if 300 <= status < 400:
        return ProtocolError(f"{text}; redirects are not followed, for the key would go with them: give that url")
    if status in (408, 499):  # the server has let go of the request, which another may answer
        return EngineError(f"{text}; send the request again")
    if 400 <= status < 500:
        if said is not None and (_OVER_LONG.search(said.message) or "context_length" in said.code):
            return ContextLengthError(text)
        return RequestTooLargeError(text) if status == 413 else InvalidRequestError(text)
    return UpstreamError(f"{text}; look into its log", retry_after_s=retry_after_s)


class _Said(msgspec.Struct):
    """An error object, in whatever form.

    Attributes:
        message: Its text.
        code: Its code and type, where those are words.
        status: Its code, where that is an HTTP status.
    """

    message: str
    code: str = ""
    status: int | None = None


def _read_error(body: bytes) -> _Said | None:
    """Return the error object that `body` is; None when it is none.

    lmdeploy, vllm and others put it at the top, or below `error`, or below `detail`, as FastAPI does.
    """
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    for key in ("detail", "error"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    if isinstance(found, str):
        return _Said(found)
    if isinstance(found, list) and found:  # FastAPI's list of what is wrong with a body
        return _Said(excerpt(msgspec.json.encode(found)))
    if isinstance(found, dict) and isinstance(message := found.get("message"), str):
        code = found.get("code")
        status = code if isinstance(code, int) and 300 <= code < 600 else None
        return _Said(message, f"{code} {found.get('type')}", status)
    return None


def _seconds(retry_after: str | None) -> float | None:
    if retry_after is None:
        return None
    with suppress(ValueError):
        return max(0.0, float(retry_after))
    with suppress(ValueError):
        date = parsedate_to_datetime(retry_after)
        # One that names no zone is in UTC, as all dates of HTTP are.
        return max(0.0, date.replace(tzinfo=date.tzinfo or UTC).timestamp() - time.time())
    return None


def excerpt(body: bytes) -> str:
    """Return the beginning of what a server said, for people: without tags, on one line."""
    text = " ".join(re.sub(rb"<[^>]*>", b" ", body[:2000]).decode(errors="replace").split())
    return text[:300] or "nothing"


class Breaker:
    """Counts the failures of one upstream in a row, and says when it is of no use to try.

    After `max_failures` it opens for `delay_s`; then one probe decides: it closes, or opens again for twice as long, up
    to `max_delay_s`. Time is the caller's clock, in seconds.

    Args:
        max_failures: Failures in a row that open it.
        delay_s: For how long it opens first.
        max_delay_s: For how long it opens at most.

    Attributes:
        last_error: The latest failure; None before the first.
    """

    def __init__(self, max_failures: int = 5, delay_s: float = 1.0, max_delay_s: float = 30.0) -> None:
        self._max_failures = max_failures
        self._first_delay_s = self._delay_s = delay_s
        self._max_delay_s = max_delay_s
        self._num_failures = 0
        self._opened_at: float | None = None
        self.last_error: RaylmError | None = None

    @property
    def open(self) -> bool:
        """Whether requests are to be refused."""
        return self._opened_at is not None

    def wait_s(self, now: float) -> float:
        """Return the seconds until a probe is due; 0 or less when it is."""
        return 0.0 if self._opened_at is None else self._opened_at + self._delay_s - now

    def succeed(self) -> None:
        """Take note of an answer, whatever it said."""
        self._num_failures = 0
        self._opened_at = None
        self._delay_s = self._first_delay_s

    def fail(self, error: RaylmError, now: float) -> None:
        """Take note of a failure. While it is open, only one that comes when a probe is due changes anything."""
        self.last_error = error
        self._num_failures += 1
        if self._opened_at is None:
            if self._num_failures >= self._max_failures:
                self._opened_at = now
        elif self.wait_s(now) <= 0:
            self._delay_s = min(2 * self._delay_s, self._max_delay_s)
            self._opened_at = now
