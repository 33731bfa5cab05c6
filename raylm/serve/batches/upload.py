"""Upload: a multipart body, taken apart as it comes, so that no gateway has to hold a file in memory or on disk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from raylm.errors import InvalidRequestError

CHUNK_BYTES = 2**20
"""How much of a file goes to its folder, or comes from there, at a time."""

_MAX_FIELD_BYTES = 1000
_MAX_FIELDS = 10
_MAX_NAME_LENGTH = 500


class Upload:
    """A form with one file, named `file`.

    Args:
        content_type: The header of the request, which has the boundary.

    Attributes:
        fields: The fields of the form, as far as it has been read.
        filename: Name of the file; None as long as it has not begun.

    Raises:
        InvalidRequestError: the body is no form.
    """

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise InvalidRequestError("the body has to be a form, sent with content-type: multipart/form-data")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._header = [b"", b""]  # name and value of the one that is being read
        self._disposition = b""
        self._field: str | None = None  # the one that is being read; None: the file
        self._value = b""
        self._waiting: list[bytes] = []  # parts of the file
        self._num_bytes = 0
        self._complete = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_header_field": self._on_header_name,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError as error:
            raise InvalidRequestError(f"the body is no valid form: {error}") from None

    async def chunks(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield the file in chunks of `CHUNK_BYTES`; the last one is shorter.

        Args:
            body: The body of the request.

        Raises:
            InvalidRequestError: it is no valid form, or has no file, or an empty one.
        """
        waiting = bytearray()
        async for data in body:
            for part in self._parse(data):
                waiting += part
            while len(waiting) >= CHUNK_BYTES:
                yield bytes(waiting[:CHUNK_BYTES])
                del waiting[:CHUNK_BYTES]
        if not self._complete:
            raise InvalidRequestError("the body is no valid form: it has no end")
        if self.filename is None:
            raise InvalidRequestError("file: it is missing")
        if not self._num_bytes:
            raise InvalidRequestError("file: it is empty")
        if waiting:
            yield bytes(waiting)

    def _parse(self, data: bytes) -> Iterator[bytes]:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequestError(f"the body is no valid form: {error}") from None
        parts, self._waiting = self._waiting, []
        yield from parts

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def _on_header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = self._header[1]
        self._header = [b"", b""]

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._disposition = b""
        name = options.get(b"name", b"").decode(errors="replace")
        if name == "file":
            if self.filename is not None:
                raise InvalidRequestError("file: send one")
            if b"filename" not in options:
                raise InvalidRequestError("file: send a file, with a name")
            self.filename = options[b"filename"].decode(errors="replace")
            if not 0 < len(self.filename) <= _MAX_NAME_LENGTH:
                raise InvalidRequestError(f"file: its name has 1 to {_MAX_NAME_LENGTH} characters")
            self._field = None
            return
        if name in self.fields or len(self.fields) == _MAX_FIELDS:
            raise InvalidRequestError(f"the form has too many fields, or {name[:100]} more than once")
        self._field = name
        self.fields[name] = ""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._field is None:
            self._waiting.append(data[start:end])
            self._num_bytes += end - start
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise InvalidRequestError(f"the field {self._field[:100]} is too long")

    def _on_part_end(self) -> None:
        if self._field is not None:
            self.fields[self._field] = self._value.decode(errors="replace")
        self._value = b""

    def _on_end(self) -> None:
        self._complete = True
