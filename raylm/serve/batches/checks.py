"""What is wrong with a batch's file as a whole. A body that no model would take is not: its row fails alone."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from raylm.serve.schema import BatchError, Endpoint

MAX_LINE_BYTES = 16 * 2**20
"""The longest line, which is read in one piece: as long as the body of a request may be by default."""

_MAX_ERRORS = 100
"""Errors that are told of one file."""

_MAX_ID_LENGTH = 512


@dataclass(frozen=True)
class Checked:
    """A file that was read to its end, or up to too many errors.

    Attributes:
        num_rows: Rows that were read.
        model: The model that all of them name.
        errors: What is wrong; the job may begin where this is empty.
    """

    num_rows: int
    model: str | None
    errors: list[BatchError]


def check_file(path: Path, endpoint: Endpoint, models: Sequence[str]) -> Checked:
    """Read the file of a batch: JSON Lines of `custom_id`, `method`, `url` and `body`. Blocks.

    Args:
        path: The file.
        endpoint: The `url` that every row has.
        models: The models that are served. All rows name the same one; they may leave it out where there is one alone.

    Raises:
        OSError: it cannot be read.
    """
    checker = _Checker(endpoint, models)
    try:
        with path.open("rb") as file:
            number = 0
            while (line := file.readline(MAX_LINE_BYTES + 1)) and len(checker.errors) < _MAX_ERRORS:
                number += 1
                if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    checker.refuse(number, "line_too_long", f"a line has at most {MAX_LINE_BYTES} bytes")
                    while line and not line.endswith(b"\n"):
                        line = file.readline(MAX_LINE_BYTES)
                    continue
                if line.strip():
                    checker.check(number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    finally:
        checker.close()
    if not checker.num_rows and not checker.errors:
        checker.errors.append(BatchError("empty_file", "the file has no rows"))
    return Checked(checker.num_rows, checker.model, checker.errors)


class _Checker:
    def __init__(self, endpoint: Endpoint, models: Sequence[str]) -> None:
        self.num_rows = 0
        self.model: str | None = None
        self.errors: list[BatchError] = []
        self._endpoint = endpoint
        self._models = models
        # A private database, which spills to disk: memory does not grow with the file.
        self._seen = sqlite3.connect("", isolation_level=None)
        self._seen.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE seen (id TEXT PRIMARY KEY, line INT) WITHOUT ROWID;
            BEGIN;
            """
        )

    def close(self) -> None:
        self._seen.close()

    def refuse(self, line: int, code: str, message: str, param: str | None = None) -> None:
        self.errors.append(BatchError(code, message, param, line))

    def check(self, number: int, line: bytes) -> None:
        self.num_rows += 1
        try:
            row: dict[str, Any] = msgspec.json.decode(line, type=dict)
        except msgspec.ValidationError:
            self.refuse(number, "invalid_json_line", "a row is a JSON object")
            return
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            self.refuse(number, "invalid_json_line", f"not valid JSON: {error}")
            return
        for name in ("custom_id", "method", "url", "body"):
            if name not in row:
                self.refuse(number, "missing_required_parameter", f"{name} is missing", name)
                return
        self._check_id(number, row["custom_id"])
        if row["method"] != "POST":
            self.refuse(number, "invalid_method", f"method is POST, not {_shown(row['method'])}", "method")
        if row["url"] != self._endpoint:
            wrong = f"url is the batch's endpoint, {self._endpoint}, not {_shown(row['url'])}"
            self.refuse(number, "mismatched_endpoint", wrong, "url")
        if isinstance(row["body"], dict):
            self._check_model(number, row["body"].get("model"))
        else:
            self.refuse(number, "invalid_body", "body is a JSON object", "body")

    def _check_id(self, number: int, custom_id: object) -> None:
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID_LENGTH:
            self.refuse(number, "invalid_custom_id", f"a text of 1 to {_MAX_ID_LENGTH} characters", "custom_id")
            return
        try:
            self._seen.execute("INSERT INTO seen VALUES (?, ?)", (custom_id, number))
        except sqlite3.IntegrityError:
            first = self._seen.execute("SELECT line FROM seen WHERE id = ?", (custom_id,)).fetchone()[0]
            self.refuse(number, "duplicate_custom_id", f"line {first} has the same custom_id", "custom_id")

    def _check_model(self, number: int, model: object) -> None:
        if model is None and len(self._models) == 1:
            model = self._models[0]
        if model is None:
            served = ", ".join(self._models)
            self.refuse(number, "missing_required_parameter", f"say which model: {served}", "body.model")
        elif not isinstance(model, str) or model not in self._models:
            served = ", ".join(self._models)
            wrong = f"no {_shown(model)} is served here; there are: {served}"
            self.refuse(number, "model_not_found", wrong, "body.model")
        elif self.model not in (None, model):
            wrong = f"all rows of a batch name one model; the first one names {self.model}, this one {model}"
            self.refuse(number, "mismatched_model", wrong, "body.model")
        else:
            self.model = model


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
