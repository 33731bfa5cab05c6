"""Verify: ask a sample of a job's greedy rows again, and see whether the same is answered.

Greedy rows have one answer each as long as model, weights, engine and its settings are the same; so a text that differs
tells that something of these is not, or that the engine's arithmetic depends on what else it computes at the time. Rows
are read from the file that the job's last run has read, and one whose input is not what was asked then is told and not
compared. Who is asked is what the job's last run has noted of its engines.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import compress, count
from pathlib import Path

import msgspec

from raylm.batch.job import digest
from raylm.batch.ledger import Record, Run, engine_key
from raylm.batch.report import plural, printable, source_of, view_ledger
from raylm.batch.rows import BadRow, Reading, Row, read_file
from raylm.chatbot import AsyncChatbot
from raylm.errors import InvalidRequestError, RaylmError
from raylm.messages import Request

_BEFORE, _AFTER = 40, 80
"""Characters that are told before and after the place where two texts part."""


class Drift(msgspec.Struct, kw_only=True):
    """A row that is answered otherwise now.

    Attributes:
        id: Its name.
        position: Its place in the input, counted from 0.
        at: How many characters both texts begin with.
        before: The last of these.
        then: How the text in the ledger goes on from there; "" where it ends.
        now: How the new one does.
    """

    id: str | int
    position: int
    at: int
    before: str
    then: str
    now: str


class NotCompared(msgspec.Struct, kw_only=True):
    """A row that was not compared.

    Attributes:
        id: Its name.
        position: Its place in the input, counted from 0.
        why: The reason.
    """

    id: str | int
    position: int
    why: str


class Verification(msgspec.Struct, kw_only=True):
    """What came of asking again.

    Attributes:
        output: Name of the output.
        sampled: Rows that were chosen, at random among all greedy ones that differ.
        equal: Those with the same text again.
        drifted: Those with another one.
        changed: Those whose input is not what was asked.
        failed: Those that could not be asked again.
        engines_then: Who gave the answers of the sample.
        engines_now: Who gave the new ones.
    """

    output: str
    sampled: int
    equal: int
    drifted: list[Drift]
    changed: list[NotCompared]
    failed: list[NotCompared]
    engines_then: list[str]
    engines_now: list[str]


class Sample:
    """Greedy rows of a job, chosen at random, one of those that are equal. Reads the whole ledger, keeps the sample.

    Args:
        ledger: The ledger's file.
        size: How many rows, if there are so many.
        seed: Of the choice; None: another one each time.
        source: The file to read rows from; None: the one that the job's last run has read.

    Attributes:
        run: The job's last run, which tells what was asked, and whom.
        records: The rows, by position.

    Raises:
        InvalidRequestError: there is no ledger, no greedy row in it, or no file from which rows could be asked again.
        OSError: it cannot be read.
    """

    def __init__(self, ledger: Path, size: int, seed: int | None = None, source: Path | None = None) -> None:
        self._output = ledger.name.removesuffix(".ledger")
        opened = view_ledger(ledger)
        try:
            if not opened.runs:
                raise InvalidRequestError(f"{ledger} does not tell how its job was begun")
            self.run = opened.runs[-1]
            self._source, self._reading = _source(ledger, self.run, source)
            chosen = random.Random(seed)  # noqa: S311
            records: list[Record] = []
            num_seen = 0
            for record in opened.answers():
                if not record.greedy:
                    continue
                num_seen += 1
                if len(records) < size:
                    records.append(record)
                elif (place := chosen.randrange(num_seen)) < size:
                    records[place] = record
        finally:
            opened.close()
        if not records:
            raise InvalidRequestError(f"{ledger} has no answer of a greedy row, and only these can be compared")
        self.records = {record.position: record for record in sorted(records, key=lambda record: record.position)}

    def requests(self, chatbot: AsyncChatbot) -> tuple[dict[int, Request], list[NotCompared]]:
        """Read the rows again; return the requests of those that are what they were, and the others.

        Raises:
            InvalidRequestError: the input cannot be read any more.
            OSError: likewise.
        """
        rows = self._read()
        requests: dict[int, Request] = {}
        changed: list[NotCompared] = []
        for position, record in self.records.items():
            try:
                request = self._request(chatbot, rows.get(position))
            except InvalidRequestError as error:
                changed.append(NotCompared(id=record.id, position=position, why=str(error)))
                continue
            if digest(request) == record.key:
                request.request_id = f"verify-{position}-{request.request_id}"
                requests[position] = request
            else:
                why = f"{self._source.name} has other words or parameters there now"
                changed.append(NotCompared(id=record.id, position=position, why=why))
        if not requests:
            raise InvalidRequestError(
                f"none of {plural(len(self.records), 'sampled row')} is in {self._source} as it was asked, such as row "
                f"{changed[0].position + 1}: {changed[0].why}"
            )
        return requests, changed

    async def ask(
        self, chatbot: AsyncChatbot, requests: Mapping[int, Request], changed: list[NotCompared]
    ) -> Verification:
        """Ask rows again and compare their texts.

        Args:
            chatbot: Who answers. It has been started.
            requests: What `requests` returned.
            changed: Likewise.
        """
        found = Verification(
            output=self._output,
            sampled=len(self.records),
            equal=0,
            drifted=[],
            changed=changed,
            failed=[],
            engines_then=[],
            engines_now=[],
        )
        then, now = set(), set()
        results = await chatbot.pool.generate_many(list(requests.values()), lane="batch")
        for position, result in zip(requests, results, strict=True):
            record = self.records[position]
            if record.completion is None:
                raise AssertionError("unreachable: rows of the sample have answers")
            then.add(engine_key(record.completion.receipt))
            if isinstance(result, RaylmError):
                why = f"{type(result).__name__}: {result}"
                found.failed.append(NotCompared(id=record.id, position=position, why=why))
                continue
            now.add(engine_key(result.receipt))
            if result.text == record.completion.text:
                found.equal += 1
            else:
                found.drifted.append(_drift(record, record.completion.text, result.text))
        found.engines_then, found.engines_now = sorted(then), sorted(now)
        return found

    def _read(self) -> dict[int, Row | BadRow]:
        rows = zip(range(max(self.records) + 1), read_file(self._source, self._reading), strict=False)
        return {position: row for position, row in rows if position in self.records}

    def _request(self, chatbot: AsyncChatbot, row: Row | BadRow | None) -> Request:
        if row is None:
            raise InvalidRequestError(f"{self._source.name} has fewer rows now")
        if isinstance(row, BadRow):
            raise row.error
        return chatbot.request(**{**self.run.job.get("defaults", {}), **row.fields})


def to_lines(found: Verification) -> list[str]:
    """Return what came of it, for a terminal."""
    compared = found.equal + len(found.drifted)
    lines = [f"{found.equal:,} of {plural(compared, 'row')} have the same text again, {len(found.drifted):,} drifted"]
    for drift in found.drifted:
        lines += [
            f"row {drift.position + 1}, {drift.id!r}: the texts part after {plural(drift.at, 'character')}"
            + (f", {drift.before!r}" if drift.before else ""),
            f"  then: {drift.then!r}",
            f"  now:  {drift.now!r}",
        ]
    for what, rows in (("changed, not compared", found.changed), ("failed, not compared", found.failed)):
        lines += [f"row {row.position + 1}, {row.id!r}: {what}: {printable(row.why)}" for row in rows]
    if found.engines_now and found.engines_then != found.engines_now:
        lines += [
            f"answered then by {printable(', '.join(found.engines_then))}",
            f"answered now by {printable(', '.join(found.engines_now))}",
        ]
    return lines


def _source(ledger: Path, run: Run, given: Path | None) -> tuple[Path, Reading]:
    if given is not None:
        return given, Reading(**run.job.get("reading", {}))
    found = source_of(run)
    if found is None:
        source = run.job.get("source")
        where = "of stdin or of a program" if source is None else f"of {source}, which is no file (any more)"
        raise InvalidRequestError(
            f"{ledger}: the rows are {where}; only rows of a file can be read and asked again: write them into one, in "
            "their order, one JSON object a line, and name it with --input"
        )
    return found


def _drift(record: Record, then: str, now: str) -> Drift:
    differs = (first != second for first, second in zip(then, now, strict=False))
    at = next(compress(count(), differs), min(len(then), len(now)))
    return Drift(
        id=record.id,
        position=record.position,
        at=at,
        before=then[max(0, at - _BEFORE) : at],
        then=then[at : at + _AFTER],
        now=now[at : at + _AFTER],
    )
