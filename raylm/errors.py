"""Every error raylm raises.

    RaylmError
    |- InvalidRequestError 400      a bad argument, an unknown role, an empty prompt
    |  |- ContextLengthError 400    the prompt is longer than the model's context
    |  |- ModelNotFoundError 404    no model of that name is served
    |  |- ObjectNotFoundError 404   there is no file, or no batch, of that id
    |  |- RequestTooLargeError 413  the HTTP body is longer than the endpoint takes
    |  `- PoisonRequestError 422    the request took two actors down with it
    |- AuthenticationError 401
    |- ForeignPageError 403         a page of another site in a browser sent the request
    |- RequestIncompleteError 408   the rest of the HTTP request did not come
    |- OutputBusyError 409          another process writes that output of a batch job
    |- ClusterBusyError 409         another program changes what the cluster serves
    |- TooManyFailuresError 500     a batch job was stopped because so many rows failed
    |- BatchStateError 409          the batch has ended already, or still needs that file
    |- BatchStoreError 503          files and batches cannot be reached, or not be written
    |- SessionError
    |  |- SessionNotFoundError 404  never started, ended, or expired
    |  |- SessionBusyError 409      another turn of this session is running
    |  `- SessionStoreError 503     the session store cannot be reached
    |- CapacityError
    |  |- PoolSaturatedError 429    the queue is full; try again after `retry_after_s`
    |  |- PlacementError 503        the cluster cannot hold what was asked for
    |  `- NoActorError 503          no actor came up before the deadline
    |- EngineError 500              this generation failed; others go on
    |  |- EngineStartError 500      the engine did not start
    |  `- ActorLostError 503        the actor died and the attempts are used up
    |- UpstreamError 502            the server behind a client actor failed
    |  `- ProtocolError 502         ... or answered with something that cannot be understood
    |- RequestTimeoutError 504      the request's deadline passed
    |  `- BatchExpiredError 504     the batch expired before this row was answered
    |- RequestCancelledError 499    somebody asked for the request to be cancelled
    `- PartialFailureError          some rows of a list failed; `results` has every row

`status_code` is the HTTP status of each; `retryable` says whether the same request may succeed when sent again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec

if TYPE_CHECKING:
    from raylm.messages import Completion


class RaylmError(Exception):
    """Base of all errors raised by raylm.

    Args:
        message: What happened and what to do next.
        retry_after_s: When trying again makes sense, in seconds; None when unknown.
    """

    status_code: ClassVar[int] = 500
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions with keyword-only arguments pickle but do not unpickle without this.
        return partial(type(self), retry_after_s=self.retry_after_s), (self.message,)


class InvalidRequestError(RaylmError):
    """The request itself is wrong; sending it again cannot help."""

    status_code = 400


class ContextLengthError(InvalidRequestError):
    """The prompt is longer than the model's context."""


class ModelNotFoundError(InvalidRequestError):
    """No model of that name is served."""

    status_code = 404


class ObjectNotFoundError(InvalidRequestError):
    """There is no file, or no batch, of that id."""

    status_code = 404


class RequestTooLargeError(InvalidRequestError):
    """The body of an HTTP request is longer than the endpoint takes."""

    status_code = 413


class PoisonRequestError(InvalidRequestError):
    """The request was being worked on alone in suspicion when a second actor died."""

    status_code = 422


class AuthenticationError(RaylmError):
    """The API key is missing or wrong."""

    status_code = 401


class ForeignPageError(RaylmError):
    """A page of another site has sent the request, as a browser says, or may have, as the host it was sent to says."""

    status_code = 403


class RequestIncompleteError(RaylmError):
    """The client began an HTTP request, and fell silent before its end."""

    status_code = 408
    retryable = True


class OutputBusyError(RaylmError):
    """Another process works on the batch job with that output."""

    status_code = 409


class ClusterBusyError(RaylmError):
    """Another program is changing what the cluster serves."""

    status_code = 409
    retryable = True


class TooManyFailuresError(RaylmError):
    """A batch job was stopped because more of its rows failed than it was told to bear."""


class BatchStateError(RaylmError):
    """What was asked for cannot be done to a batch, or to its file, in the state that it is in."""

    status_code = 409


class BatchStoreError(RaylmError):
    """Files and batches cannot be reached, or not be written. Those that are there may well be whole."""

    status_code = 503
    retryable = True


class SessionError(RaylmError):
    """Base of errors about sessions."""


class SessionNotFoundError(SessionError):
    """The session was never started, has ended, or has expired."""

    status_code = 404


class SessionBusyError(SessionError):
    """Another turn of this session is still running."""

    status_code = 409
    retryable = True


class SessionStoreError(SessionError):
    """The session store cannot be reached. The sessions in it may well be whole."""

    status_code = 503
    retryable = True


class CapacityError(RaylmError):
    """Base of errors about too little room."""

    status_code = 503
    retryable = True


class PoolSaturatedError(CapacityError):
    """The pool's queue is full."""

    status_code = 429


class PlacementError(CapacityError):
    """The cluster cannot hold the actors that were asked for."""


class NoActorError(CapacityError):
    """No actor was there to take the request before its deadline."""


class EngineError(RaylmError):
    """The engine failed on this request."""

    retryable = True


class EngineStartError(EngineError):
    """The engine did not start."""

    retryable = False


class ActorLostError(EngineError):
    """The actor or its engine died while it worked on the request, and no attempt is left."""

    status_code = 503


class UpstreamError(RaylmError):
    """The server behind a client actor failed."""

    status_code = 502
    retryable = True


class ProtocolError(UpstreamError):
    """The server behind a client actor answered with something that cannot be understood."""


class RequestTimeoutError(RaylmError):
    """The request's deadline passed."""

    status_code = 504
    retryable = True


class BatchExpiredError(RequestTimeoutError):
    """The batch expired before this row of it was answered."""

    retryable = False


class RequestCancelledError(RaylmError):
    """The request was cancelled before its end."""

    status_code = 499


class PartialFailureError(RaylmError):
    """Some rows of a list failed; the answers of the others are in `results`.

    Args:
        results: One entry a row, in input order: its `Completion`, or the error that it ended with.
    """

    def __init__(self, results: Sequence[Completion | RaylmError]) -> None:
        failed = [(row, result) for row, result in enumerate(results) if isinstance(result, RaylmError)]
        row, first = failed[0]
        super().__init__(
            f"{len(failed)} of {len(results)} rows failed, first row {row} with {type(first).__name__}: {first}. "
            "`results` has every row: its completion or its error"
        )
        self.results = list(results)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.results,)


class ErrorMessage(msgspec.Struct, frozen=True):
    """An error on its way to another process.

    Attributes:
        type: Class name from this module.
        message: Its text.
        retry_after_s: As in `RaylmError`.
    """

    type: str
    message: str
    retry_after_s: float | None = None


def to_message(error: RaylmError) -> ErrorMessage:
    """Return `error` in the form that crosses processes."""
    return ErrorMessage(type(error).__name__, error.message, error.retry_after_s)


def from_message(message: ErrorMessage) -> RaylmError:
    """Return the error that `to_message` was given."""
    return _CLASSES[message.type](message.message, retry_after_s=message.retry_after_s)


def _tree(base: type[RaylmError]) -> list[type[RaylmError]]:
    return [base, *(found for child in base.__subclasses__() for found in _tree(child))]


# PartialFailureError is made by the pool's own process and never crosses.
_CLASSES = {found.__name__: found for found in _tree(RaylmError) if found is not PartialFailureError}


def first_line(error: BaseException) -> str:
    """Return what an error says in its first line; Ray's go on for pages."""
    return str(error).strip().partition("\n")[0]
