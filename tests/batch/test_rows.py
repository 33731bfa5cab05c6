"""Reading rows, from every format."""

import csv
import gzip
import itertools
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.batch.rows import BadRow, Reading, Row, _read_pipe, count_rows, parse_row, read_file, read_rows, rows_of
from raylm.errors import InvalidRequestError


async def read(path: Path, reading: Reading | None = None) -> list[Row | BadRow]:
    """Return the rows of a file."""
    return [one async for one in read_rows(path, reading)]


async def test_a_row_is_named_by_its_line(tmp_path: Path) -> None:
    """A row without an id gets the number of its line; empty lines are passed over and counted."""
    path = tmp_path / "rows"
    path.write_text('\n{"prompt": "a"}\n  \n{"prompt": "b", "id": "x"}')
    assert await read(path) == [
        Row(place="rows line 2", id=2, fields={"prompt": "a"}),
        Row(place="rows line 4", id="x", fields={"prompt": "b"}),
    ]


async def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    """A file of nothing has no rows."""
    path = tmp_path / "rows"
    path.touch()
    assert await read(path) == []


async def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    """The mark with which some editors begin a file is not part of the first row."""
    path = tmp_path / "rows"
    path.write_text('{"prompt": "a"}', encoding="utf-8-sig")
    assert [one.id for one in await read(path)] == [1]


async def test_a_line_may_be_longer_than_a_block(tmp_path: Path) -> None:
    """A row of three megabytes is one row."""
    path = tmp_path / "rows"
    path.write_bytes(msgspec.json.encode({"prompt": "x" * 3_000_000}) + b'\n{"prompt": "b"}\n')
    assert [len(one.fields["prompt"]) for one in await read(path) if isinstance(one, Row)] == [3_000_000, 1]


async def test_a_pipe_yields_rows_as_they_come() -> None:
    """A row is there before the writer has closed the pipe, and waiting for the next one blocks nothing."""
    receiving, sending = os.pipe()
    with os.fdopen(receiving, "rb") as file:
        rows = _read_pipe(file, "stdin", Reading())
        os.write(sending, b'{"prompt": "a"}\n{"prompt"')
        assert (await anext(rows)).place == "stdin line 1"
        os.write(sending, b': "b"}')
        os.close(sending)
        assert [one.id async for one in rows] == [2]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not valid JSON"),
        (b'{"prompt": "\xff"}', "not valid JSON"),
        (b'{"prompt": "\\ud800"}', "not valid JSON"),
        (b'{"prompt":' * 100_000, "not valid JSON"),
        (b'["prompt"]', "a row is a JSON object"),
        (b'{"promt": "a"}', "unknown key promt; a row has prompt or messages"),
        (b'{"prompt": "a", "request_id": "x"}', "unknown key request_id"),
        (b'{"prompt": "a", "id": 1.5}', "id: expected a string or an integer"),
        (b'{"prompt": "a", "id": true}', "id: expected a string or an integer"),
        (b'{"prompt": "a", "id": 18446744073709551616}', "id: expected a string or an integer"),
    ],
)
def test_a_row_that_cannot_be_read(line: bytes, reason: str) -> None:
    """A wrong line becomes a bad row that names the file, the line and the reason."""
    bad = parse_row(line, 3, source="in.jsonl")
    assert isinstance(bad, BadRow)
    assert bad.id == 3
    assert str(bad.error).startswith(f"in.jsonl line 3: {reason}")


def test_a_bad_row_keeps_its_id() -> None:
    """A bad row whose id can be read is known by it."""
    assert parse_row('{"id": "x", "promt": "a"}', 3).id == "x"


FIELDS = st.fixed_dictionaries(
    {
        "id": st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
        "prompt": st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
    },
    optional={
        "max_new_tokens": st.integers(1, 100),
        "temperature": st.floats(0, 2),
        "stop_words": st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1), min_size=1),
    },
)


@given(rows=st.lists(FIELDS, max_size=5))
def test_every_format_says_the_same(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same rows in any format, gzipped or not, come to the same requests."""
    folder = tmp_path_factory.mktemp("rows")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    names = ["id", "prompt", "max_new_tokens", "temperature", "stop_words"]
    with (folder / "c.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            cells = {name: value if name in ("id", "prompt") else json.dumps(value) for name, value in row.items()}
            writer.writerow([cells.get(name, "") for name in names])
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("prompt", pa.string()),
            ("max_new_tokens", pa.int64()),
            ("temperature", pa.float64()),
            ("stop_words", pa.list_(pa.string())),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "d.parquet")
    for path in sorted(folder.iterdir()):
        found = list(read_file(path, Reading()))
        assert [isinstance(row, Row) and {"id": row.id, **row.fields} for row in found] == rows, path
        assert count_rows(path, Reading()) == len(rows)


def test_prompts_of_columns(tmp_path: Path) -> None:
    """A template makes prompts of columns; columns that nobody named are passed over; braces are written twice."""
    path = tmp_path / "questions.csv"
    path.write_text('id,question,answer,seed\nq1,"What, exactly?",42,no number\n')
    (raw,) = read_file(path, Reading(prompt="{{Q}}: {question}\nA:"))
    assert raw == Row(place="questions.csv line 2", id="q1", fields={"prompt": "{Q}: What, exactly?\nA:"})
    (chat,) = read_file(path, Reading(message="{question}", columns={"id": "answer"}))
    assert (chat.id, chat.fields) == ("42", {"messages": [{"role": "user", "content": "What, exactly?"}]})  # type: ignore[union-attr]
    (mapped,) = read_file(path, Reading(columns={"prompt": "question"}))
    assert mapped.fields == {"prompt": "What, exactly?"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("reading", "reason"),
    [
        ({"prompt": "a", "message": "b"}, "give one of them"),
        ({"prompt": "{question.x}"}, "not the name of a column alone"),
        ({"prompt": "{}"}, "not the name of a column alone"),
        ({"prompt": "{a"}, "a brace that is meant as one is written twice"),
        ({"columns": {"text": "a"}}, "none of prompt, messages, id"),
    ],
)
def test_a_reading_that_is_wrong(reading: dict[str, Any], reason: str) -> None:
    """What is wrong with a template or a mapping is told before anything is read."""
    with pytest.raises(InvalidRequestError, match=reason):
        Reading(**reading)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    """A row without a column that is needed is a bad row, whose error names both."""
    path = tmp_path / "in.jsonl"
    path.write_text('{"question": "a"}\n{"querstion": "b"}\n')
    good, bad = read_file(path, Reading(prompt="{question}"))
    assert isinstance(good, Row)
    assert str(bad.error) == "in.jsonl line 2: it has no column question, which the template names"  # type: ignore[union-attr]


def test_wrong_lines_of_csv(tmp_path: Path) -> None:
    """A line with too few cells, or a parameter that is no JSON, is a bad row; those after it are read."""
    path = tmp_path / "in.csv"
    path.write_text("prompt,temperature\na\nb,warm\nc,0\n")
    few, warm, good = read_file(path, Reading())
    assert str(few.error) == "in.csv line 2: it has 1 cells, and there are 2 columns"  # type: ignore[union-attr]
    assert str(warm.error) == "in.csv line 3: temperature: expected JSON, got 'warm'"  # type: ignore[union-attr]
    assert good.fields == {"prompt": "c", "temperature": 0}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9]),
        ("a.parquet", b"x"),
        ("a.csv", b"prompt\n\xff\n"),
        ("b.csv", b"a,a\n1,2\n"),
    ],
    ids=["gzip", "parquet", "encoding", "columns"],
)
def test_a_damaged_file(tmp_path: Path, name: str, content: bytes) -> None:
    """A file that cannot be read as what its name says is an error that names it."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidRequestError, match=name):
        list(read_file(path, Reading()))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
@pytest.mark.parametrize("damage", ["end", "middle", "checksum", "not gzip"])
def test_a_damaged_archive(tmp_path: Path, name: str, damage: str) -> None:
    """What is gzipped and was cut off or changed is an error that names file and line, in counting as in reading."""
    lines = [json.dumps({"prompt": f"{number * 7919 % 1000}"}) for number in range(50_000)]
    content = bytearray(gzip.compress("\n".join(["prompt"] * name.startswith("a.csv") + lines).encode(), mtime=0))
    if damage == "end":
        del content[-100:]
    elif damage == "middle":
        content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    elif damage == "checksum":
        content[-8] ^= 1
    else:
        content[:2] = b"no"
    path = tmp_path / name
    path.write_bytes(content)
    reading = Reading(prompt="{prompt}")
    for read in (lambda: list(read_file(path, reading)), lambda: count_rows(path, reading)):
        with pytest.raises(InvalidRequestError, match=rf"{name} is damaged or was cut off after line \d+: "):
            read()


def line(url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    """Return a row of an OpenAI batch file."""
    return {"custom_id": "c", "method": "POST", "url": url, "body": body}


async def test_rows_of_openai() -> None:
    """A row of an OpenAI batch file has OpenAI's defaults, and its answer will be written in its form."""
    chat = line(model="m", messages=[{"role": "user", "content": "hi"}], max_tokens=5)
    text = line("/v1/completions", model="m", prompt=[1, 2], temperature=0)
    first, second = [row async for row in rows_of([chat, text])]
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert (first.id, first.fields["max_new_tokens"], first.fields["temperature"], first.fields["top_k"]) == (
        "c",
        5,
        1.0,
        None,
    )
    assert first.openai is not None
    assert (first.openai.kind, first.openai.model) == ("chat", "m")
    assert (second.fields["prompt_token_ids"], second.fields["max_new_tokens"]) == ((1, 2), 16)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (line("/v1/embeddings"), "url: expected"),
        (line() | {"method": "GET"}, "method: expected POST"),
        (line() | {"custom_id": 5}, "custom_id: expected a string"),
        (line() | {"more": 5}, "unknown key more"),
        (line(messages=[]), "messages: List should have at least 1 item"),
        (line(messages=[{"role": "user", "content": "x"}], stream=True), "stream: not in a batch"),
        (line(messages=[{"role": "user", "content": "x"}], n=2), "n: one answer for each row"),
        (line("/v1/completions", prompt=["a", "b"]), "prompt: one for each row"),
    ],
)
async def test_rows_of_openai_that_are_wrong(row: dict[str, Any], reason: str) -> None:
    """A wrong row of an OpenAI batch file is a bad row that is still known to be OpenAI's."""
    (bad,) = [found async for found in rows_of([row])]
    assert isinstance(bad, BadRow)
    assert str(bad.error).startswith(f"row 1: {reason}")
    assert bad.openai is not None


def test_reading_takes_no_more_than_it_needs(tmp_path: Path) -> None:
    """Rows come one by one, however long the file is."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' * 1000 + b"\xff" * 1000)
    assert len(list(itertools.islice(read_file(path, Reading()), 1000))) == 1000
