"""The routes of files and batches: a gateway's end of the `BatchActor`."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Annotated, Any, Literal

import msgspec
import ray.exceptions
from fastapi import Path, Query
from fastapi import Request as HTTPRequest
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from raylm.config import ServeConfig
from raylm.errors import (
    BatchStoreError,
    InvalidRequestError,
    ObjectNotFoundError,
    RaylmError,
    RequestCancelledError,
)
from raylm.serve.batches import actor as batch_actor
from raylm.serve.batches.store import Work
from raylm.serve.batches.upload import CHUNK_BYTES, Upload
from raylm.serve.door import facts
from raylm.serve.schema import Batch, BatchBody, FileObject, UploadForm

TOUCH_S = 5.0
"""How often a gateway tells that it is there."""

_CALL_TIMEOUT_S = 60.0
"""How long a call may take; an actor that is being restarted answers after some seconds."""

FORM: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 30 * 24 * 3600},
    },
}
"""What the body of `POST /v1/files` is, for the OpenAPI document."""

ObjectId = Annotated[str, Path(min_length=1, max_length=200)]
After = Annotated[str | None, Query(max_length=200, description="Go on after the object of this id.")]

_log = logging.getLogger(__name__)
_encode = msgspec.msgpack.Encoder().encode
_decode_file = msgspec.json.Decoder(FileObject).decode


class Batches:
    """Answers the routes of files and batches.

    Args:
        config: What is served, and where files and batches are kept.

    Attributes:
        counts: How many batches there are of each status, as of a few seconds ago.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._config = config.batches
        self._expires_after_s = 0.0 if config.batches is None else config.batches.expires_after_s
        self._models = [model.name for model in config.models]
        self._actor: Any = None
        self._touching: asyncio.Task[None] | None = None
        self.counts: Mapping[str, int] = {}

    async def start(self) -> None:
        """Join, or make, the actor; do nothing where there is no folder.

        Raises:
            InvalidRequestError: it keeps that folder with other settings.
            BatchStoreError: the folder cannot be opened.
        """
        if self._config is None:
            return
        self._actor = batch_actor.create(self._config)
        found = self._config.model_validate_json(await self._told(self._actor.start.remote()))
        if found != self._config:
            raise InvalidRequestError(
                f"batches: {self._config.folder} is kept with other settings already; end that endpoint first"
            )
        self._touching = asyncio.create_task(self._touch())

    async def aclose(self) -> None:
        """Leave. The actor goes on for others."""
        if self._touching is not None:
            self._touching.cancel()
            await asyncio.gather(self._touching, return_exceptions=True)

    # Files

    async def create_file(self, http: HTTPRequest) -> Response:
        """Take a file: a form with `file` and `purpose`, which is `batch`."""
        actor, file_id = self._found(), _new("file-")
        _note(file_id=file_id)
        upload = Upload(http.headers.get("content-type", ""))
        num_bytes = 0
        try:
            async for chunk in upload.chunks(http.stream()):
                await self._told(actor.write.remote(file_id, num_bytes, chunk))
                num_bytes += len(chunk)
            form = _form(upload.fields)
            now = int(time.time())
            file = FileObject(
                id=file_id,
                bytes=num_bytes,
                created_at=now,
                expires_at=None if form.expires_after is None else now + form.expires_after.seconds,
                filename=upload.filename or "",
                purpose="batch",
            )
            return _json(await self._told(actor.add_file.remote(_encode(file))))
        except BaseException as error:
            actor.drop.remote(file_id)
            if isinstance(error, ClientDisconnect):
                raise RequestCancelledError("the client left in the middle of the file") from None
            raise

    async def list_files(
        self,
        purpose: Annotated[str | None, Query(max_length=200)] = None,
        after: After = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """List files."""
        return _json(await self._told(self._found().files.remote(purpose, after, limit, order == "desc")))

    async def show_file(self, file_id: ObjectId) -> Response:
        """Say what is known of a file."""
        _note(file_id=file_id)
        return _json(await self._told(self._found().file.remote(file_id)))

    async def file_content(self, file_id: ObjectId) -> Response:
        """Return what is in a file."""
        _note(file_id=file_id)
        file = _decode_file(await self._told(self._found().file.remote(file_id)))
        headers = {"content-length": str(file.bytes), "content-disposition": "attachment"}
        return StreamingResponse(self._read(file), media_type="application/octet-stream", headers=headers)

    async def delete_file(self, file_id: ObjectId) -> Response:
        """Delete a file."""
        _note(file_id=file_id)
        return _json(await self._told(self._found().delete_file.remote(file_id)))

    # Batches

    async def create_batch(self, body: BatchBody) -> Response:
        """Begin a batch: each row of a file is answered."""
        actor, now = self._found(), int(time.time())
        batch = Batch(
            id=_new("batch_"),
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            created_at=now,
            expires_at=now + max(1, round(self._expires_after_s)),
            metadata=body.metadata,
        )
        _note(batch_id=batch.id)
        expires = body.output_expires_after
        work = Work(
            batch=batch,
            models=self._models,
            output_id=_new("file-"),
            errors_id=_new("file-"),
            output_expires_s=None if expires is None else expires.seconds,
        )
        return _json(await self._told(actor.create.remote(_encode(work))))

    async def list_batches(self, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Response:
        """List batches, the latest first."""
        return _json(await self._told(self._found().batches.remote(after, limit)))

    async def show_batch(self, batch_id: ObjectId) -> Response:
        """Say how far a batch is."""
        _note(batch_id=batch_id)
        return _json(await self._told(self._found().retrieve.remote(batch_id)))

    async def cancel_batch(self, batch_id: ObjectId) -> Response:
        """Have a batch end. What was answered until then is in its output."""
        _note(batch_id=batch_id)
        return _json(await self._told(self._found().cancel.remote(batch_id)))

    # Inside

    def _found(self) -> Any:
        if self._actor is None:
            raise ObjectNotFoundError("this endpoint takes no files and no batches; give it a folder (batches.folder)")
        return self._actor

    async def _read(self, file: FileObject) -> AsyncIterator[bytes]:
        for offset in range(0, file.bytes, CHUNK_BYTES):
            yield await self._told(self._found().read.remote(file.id, offset, CHUNK_BYTES))

    async def _touch(self) -> None:
        while True:
            try:
                self.counts = await self._told(self._found().touch.remote())
            except RaylmError as error:
                _log.warning("files and batches cannot be reached: %s", error)
                if self._config is not None:
                    self._actor = batch_actor.create(self._config)
            await asyncio.sleep(TOUCH_S)

    async def _told(self, call: Awaitable[Any]) -> Any:
        """Return what the actor says.

        Raises:
            BatchStoreError: it does not answer.
        """
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return await call
        except (TimeoutError, ray.exceptions.RayActorError) as error:
            raise BatchStoreError(
                "what keeps files and batches does not answer; try again", retry_after_s=TOUCH_S
            ) from error
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, RaylmError) else error) from None


def _form(fields: Mapping[str, str]) -> UploadForm:
    given: dict[str, Any] = {}
    for name, value in fields.items():
        outer, _, inner = name.partition("[")
        if not inner:
            given[outer] = value
        else:
            part = inner.removesuffix("]")
            known = given.setdefault(outer, {})
            is_number = part == "seconds" and value.isascii() and value.isdigit()
            if not isinstance(known, dict):
                raise InvalidRequestError(f"{outer}: given twice")
            known[part] = int(value) if is_number else value
    try:
        return UploadForm.model_validate(given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise InvalidRequestError(": ".join([*map(str, problem["loc"]), problem["msg"]])) from None


def _new(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _note(**about: str) -> None:
    """Make something part of the request's lines of log."""
    facts.get().update(about)
