"""Server-sent events, cut out of a byte stream. Pure: no I/O."""

from __future__ import annotations

from raylm.errors import ProtocolError

_MAX_EVENT_BYTES = 8 << 20  # one event of a server that means well has some hundred bytes


class EventParser:
    """Turns the body of a `text/event-stream` into the data of its events, however the body is cut.

    Works on bytes, so that a character cut in two is no matter. Comments and fields other than `data` are passed over;
    lines end with LF or CRLF.

    Source: WHATWG HTML, section 9.2.6, "Interpreting an event stream".
    """

    __slots__ = ("_data", "_rest")

    def __init__(self) -> None:
        self._rest = b""  # of a line that has not ended
        self._data: list[bytes] = []  # of an event that has not ended

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return the data of each event that `chunk` completes.

        Raises:
            ProtocolError: an event does not end.
        """
        lines = (self._rest + chunk if self._rest else chunk).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise ProtocolError(f"the server sent an event of more than {_MAX_EVENT_BYTES >> 20} MiB")
        events = []
        for line in lines:
            content = line.removesuffix(b"\r")
            if content.startswith(b"data:"):
                self._data.append(content[5:].removeprefix(b" "))
            elif not content and self._data:
                events.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                self._data = []
        return events

    def finish(self) -> list[bytes]:
        """Return the data of the event that the end of the body cut short, which servers forget to end."""
        return self.feed(b"\n\n")


class LineParser:
    """Turns a body of one JSON object a line into those lines. Has the methods of `EventParser`."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Return each line that `chunk` completes.

        Raises:
            ProtocolError: a line does not end.
        """
        lines = (self._rest + chunk).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > _MAX_EVENT_BYTES:
            raise ProtocolError(f"the server sent a line of more than {_MAX_EVENT_BYTES >> 20} MiB")
        return [line for line in lines if line.strip()]

    def finish(self) -> list[bytes]:
        """Return the last line, if nothing ended it."""
        return self.feed(b"\n")
