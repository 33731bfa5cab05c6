"""The OpenAPI document: bodies as FastAPI reads them off the models, and answers as they are.

Answers are msgspec structs or are written by hand, so FastAPI cannot know them. What each route answers is said here; a
test sends requests at random and holds every answer against it.
"""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from raylm.errors import (
    AuthenticationError,
    BatchStateError,
    BatchStoreError,
    EngineError,
    ForeignPageError,
    InvalidRequestError,
    ModelNotFoundError,
    NoActorError,
    ObjectNotFoundError,
    PoisonRequestError,
    PoolSaturatedError,
    RaylmError,
    RequestCancelledError,
    RequestIncompleteError,
    RequestTimeoutError,
    RequestTooLargeError,
    SessionBusyError,
    SessionNotFoundError,
    UpstreamError,
)
from raylm.serve import schema


class Event(msgspec.Struct):
    """A server-sent event: `data` is JSON, or [DONE]. `event` is `error` where the stream could not go on."""

    data: str
    event: str = "message"


_JSON = "application/json"
_EVENTS = "text/event-stream"
_BYTES = "application/octet-stream"
_COMPONENT = "#/components/schemas/{name}"

_ALWAYS: tuple[type[RaylmError], ...] = (AuthenticationError, EngineError)
_READING = (*_ALWAYS, InvalidRequestError, RequestIncompleteError, RequestTooLargeError)
_SESSIONS = (*_READING, SessionNotFoundError, SessionBusyError, NoActorError)
_BATCHES = (*_READING, ObjectNotFoundError, BatchStateError, BatchStoreError)
_GENERATING = (
    *_SESSIONS,
    PoisonRequestError,
    PoolSaturatedError,
    RequestCancelledError,
    UpstreamError,
    RequestTimeoutError,
)

_MEANINGS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "A page of another site sent the request, or may have.",
    404: "No such model, session, file, batch or address.",
    408: "The client fell silent in the middle of the request.",
    409: "Another turn of the session is running; or the batch has ended, or a batch needs the file.",
    413: "The body is too long.",
    422: "Two actors died of the request.",
    429: "The queue is full; Retry-After says when to come again.",
    499: "The request was cancelled.",
    500: "The engine failed, or the gateway.",
    502: "The server behind an actor failed.",
    503: "No actor is there to answer; Retry-After says when to come again.",
    504: "The request's deadline passed.",
}

_TURNS = ("chat_completions", "completions", "generate", "stream_chat")

_SESSION_HEADER = {
    "name": "x-session-id",
    "in": "header",
    "description": "As session_id in the body. One of the two is enough.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 200},
}

_SECOND_ANSWERS = {"cancel_request": {202: {_JSON: schema.Cancelled}}}

_ANSWERS: dict[str, tuple[dict[str, Any], tuple[type[RaylmError], ...]]] = {
    "chat_completions": ({_JSON: schema.ChatCompletion, _EVENTS: Event}, _GENERATING),
    "completions": ({_JSON: schema.TextCompletion, _EVENTS: Event}, _GENERATING),
    "models": ({_JSON: schema.ModelList}, _ALWAYS),
    "model": ({_JSON: schema.ModelCard}, (*_READING, ModelNotFoundError, NoActorError)),
    "create_file": ({_JSON: schema.FileObject}, (*_BATCHES, RequestCancelledError)),
    "list_files": ({_JSON: schema.FileList}, _BATCHES),
    "show_file": ({_JSON: schema.FileObject}, _BATCHES),
    "file_content": ({_BYTES: bytes}, _BATCHES),
    "delete_file": ({_JSON: schema.FileDeleted}, _BATCHES),
    "create_batch": ({_JSON: schema.Batch}, _BATCHES),
    "list_batches": ({_JSON: schema.BatchList}, _BATCHES),
    "show_batch": ({_JSON: schema.Batch}, _BATCHES),
    "cancel_batch": ({_JSON: schema.Batch}, _BATCHES),
    "generate": ({_JSON: (schema.Generated, schema.GeneratedList)}, _GENERATING),
    "stream_chat": ({_EVENTS: Event}, _GENERATING),
    "tokenize": ({_JSON: schema.Tokens}, (*_SESSIONS, RequestTimeoutError, UpstreamError)),
    "show_session": ({_JSON: schema.Transcript}, _SESSIONS),
    "end_session": ({_JSON: schema.SessionEnded}, _SESSIONS),
    "fork_session": ({_JSON: schema.SessionForked}, _SESSIONS),
    "cancel_request": ({_JSON: schema.Cancelled}, (*_READING, NoActorError)),
    "health": ({_JSON: schema.Health}, (NoActorError, EngineError)),
    "state": ({_JSON: schema.State}, (*_ALWAYS, NoActorError)),
    "metrics": ({"text/plain": str}, (*_ALWAYS, NoActorError)),
}
"""By route: the kinds of a good answer, and what can go wrong."""


def describe(app: FastAPI) -> dict[str, Any]:
    """Return the document of an application whose routes are named as in `_ANSWERS`."""
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    structs = [
        kind
        for kind in vars(schema).values()
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind.__module__ == schema.__name__
    ]
    _, components = msgspec.json.schema_components([*structs, Event], ref_template=_COMPONENT)
    error = schema.ErrorBody.model_json_schema(ref_template=_COMPONENT.replace("{name}", "{model}"))
    known = document["components"]["schemas"]
    known |= components | error.pop("$defs") | {"ErrorBody": error}
    known["GeneratedList"]["properties"]["results"]["items"] = _either((schema.Generated, schema.ErrorBody))
    for unused in ("HTTPValidationError", "ValidationError"):
        known.pop(unused, None)
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["responses"] = _responses(operation["operationId"])
            if operation["operationId"] in _TURNS:
                operation.setdefault("parameters", []).append(_SESSION_HEADER)
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{}, {"key": []}]  # where no keys are configured, and where some are
    return document


def _responses(name: str) -> dict[str, Any]:
    answers, errors = _ANSWERS[name]
    errors = (*errors, ForeignPageError)
    good = {200: answers, **_SECOND_ANSWERS.get(name, {})}
    responses = {
        str(status): {
            "description": "OK",
            "content": {media: {"schema": _shown(kind)} for media, kind in kinds.items()},
        }
        for status, kinds in good.items()
    }
    content = {_JSON: {"schema": _shown(schema.ErrorBody)}}
    for status in sorted({error.status_code for error in errors}):
        responses[str(status)] = {"description": _MEANINGS[status], "content": content}
    return responses


def _shown(kind: Any) -> dict[str, Any]:
    """Return the schema of an answer; that of a stream is the schema of each of its events."""
    if isinstance(kind, tuple):
        return _either(kind)
    if kind is bytes:
        return {"type": "string", "format": "binary"}
    return {"type": "string"} if kind is str else {"$ref": _COMPONENT.format(name=kind.__name__)}


def _either(kinds: tuple[Any, ...]) -> dict[str, Any]:
    return {"anyOf": [_shown(kind) for kind in kinds]}
