"""Writing rows."""

import csv
import gzip
import json
import os
from contextlib import suppress
from pathlib import Path

import msgspec
import pyarrow.parquet as pq
import pytest

from raylm.batch.ledger import Record
from raylm.batch.outputs import COLUMNS, encode_openai, encode_row, errors_path, open_output
from raylm.batch.rows import OpenAIForm
from raylm.errors import ContextLengthError, RequestCancelledError, to_message
from tests.batch.samples import COMPLETION, RECEIPT, USAGE, answered

FAILED = Record(position=1, key="", id="bad", error=to_message(ContextLengthError("too long")))


def test_an_answered_row() -> None:
    """An output row has the id, the text and how it came about, on one line."""
    line = encode_row("x", COMPLETION)
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    assert msgspec.json.decode(line) == {
        "id": "x",
        "text": "h\u00e9 \u2713",
        "finish_reason": "stop",
        "usage": msgspec.to_builtins(USAGE),
        "receipt": msgspec.to_builtins(RECEIPT),
    }


def test_logprobs_come_with_their_tokens() -> None:
    """A row that asked for log-probabilities has them, and the tokens they belong to."""
    told = msgspec.structs.replace(COMPLETION, token_ids=[5], logprobs=[-0.5])
    answer = msgspec.json.decode(encode_row(1, told))
    assert (answer["token_ids"], answer["logprobs"]) == ([5], [-0.5])


def test_a_failed_row_has_no_text() -> None:
    """A failed row has its id and its error, and nothing that could pass for an answer."""
    assert msgspec.json.decode(encode_row(1, ContextLengthError("too long"))) == {
        "id": 1,
        "error": {"type": "ContextLengthError", "message": "too long"},
    }


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_output_appears_complete(tmp_path: Path, name: str) -> None:
    """The file is there under its name only once the block has ended; until then it is partial."""
    path = tmp_path / name
    with open_output(path) as writer:
        writer.write([answered(0)])
        assert not path.exists()
        if name == "out.jsonl":
            assert (tmp_path / "out.jsonl.partial").read_bytes().endswith(b"}\n")
    assert [found.name for found in tmp_path.iterdir()] == [name]
    content = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    assert content == encode_row(1, COMPLETION)


def test_an_interrupted_output_stays_partial(tmp_path: Path) -> None:
    """What was written before an exception is kept, under the partial name, and what was there before stays."""
    (tmp_path / "out").write_text("old")
    with suppress(KeyboardInterrupt), open_output(tmp_path / "out") as writer:
        writer.write([answered(0)])
        raise KeyboardInterrupt
    assert sorted(found.name for found in tmp_path.iterdir()) == ["out", "out.partial"]
    assert (tmp_path / "out").read_text() == "old"


def test_an_interrupted_output_of_nothing_is_removed(tmp_path: Path) -> None:
    """A job that wrote nothing leaves nothing."""
    with pytest.raises(KeyboardInterrupt), open_output(tmp_path / "out"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_output_to_a_device() -> None:
    """A device is written to as it is: there is nothing to rename."""
    with open_output(Path(os.devnull)) as writer:
        writer.write([answered(0)])
    assert not Path(f"{os.devnull}.partial").exists()


def test_columns_of_csv(tmp_path: Path) -> None:
    """CSV has a column for each thing, and a failed row has its error and no text."""
    path = tmp_path / "out.csv"
    with open_output(path) as writer:
        writer.write([answered(0), FAILED])
    with path.open(newline="") as file:
        good, bad = csv.DictReader(file)
    assert tuple(good) == COLUMNS
    assert (good["id"], good["text"], good["completion_tokens"], good["error"]) == ("1", COMPLETION.text, "3", "")
    assert (bad["id"], bad["text"], bad["error_type"], bad["error"]) == ("bad", "", "ContextLengthError", "too long")


def test_columns_of_parquet(tmp_path: Path) -> None:
    """Parquet has the same columns, and null where there is nothing."""
    path = tmp_path / "out.parquet"
    with open_output(path) as writer:
        writer.write([answered(0), FAILED])
    good, bad = pq.read_table(path).to_pylist()
    assert (good["id"], good["text"], good["slot"], good["error"]) == ("1", COMPLETION.text, 1, None)
    assert (bad["id"], bad["text"], bad["error_type"]) == ("bad", None, "ContextLengthError")


def test_answers_to_openai(tmp_path: Path) -> None:
    """Answers to an OpenAI batch file are in one file, and failures in another, both in OpenAI's form."""
    path = tmp_path / "out.jsonl"
    chat, text = OpenAIForm("chat", "m"), OpenAIForm("text", "m")
    cancelled = to_message(RequestCancelledError("given up"))
    with open_output(path, openai=True) as writer:
        writer.write(
            [
                answered(0, openai=chat),
                answered(1, openai=text),
                msgspec.structs.replace(FAILED, openai=chat),
                Record(position=3, key="", id="late", error=cancelled, openai=chat),
            ]
        )
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["custom_id"], first["error"], first["response"]["status_code"]) == ("1", None, 200)
    assert first["response"]["body"]["choices"][0]["message"]["content"] == COMPLETION.text
    assert second["response"]["body"]["choices"][0]["text"] == COMPLETION.text
    wrong, late = map(json.loads, errors_path(path).read_text().splitlines())
    assert (wrong["custom_id"], wrong["response"]["status_code"], wrong["error"]) == ("bad", 400, None)
    assert wrong["response"]["body"]["error"]["message"] == "too long"
    assert (late["response"], late["error"]["code"]) == (None, "batch_cancelled")


def test_names_in_openais_files_differ() -> None:
    """Equal rows have the same answer, and ids of their own all the same."""
    form = OpenAIForm("chat", "m")
    lines = [json.loads(encode_openai(answered(position, openai=form))) for position in range(2)]
    assert lines[0]["id"] != lines[1]["id"]
