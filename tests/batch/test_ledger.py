"""The ledger: what is in it stays in it, and what is torn is asked again."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.batch.ledger import Ledger, Record, checked
from raylm.errors import EngineError, OutputBusyError, to_message
from tests.batch.samples import ENGINE, answered

KNOWN = {ENGINE}


@contextmanager
def opened(path: Path) -> Iterator[Ledger]:
    """Open a ledger, for a run that begins."""
    ledger = Ledger.open(path)
    try:
        ledger.begin({}, [])
        yield ledger
    finally:
        ledger.close()


def knows(ledger: Ledger, position: int, key: str, engines: set[str]) -> bool:
    """Tell whether a position has the answer to that key, from one of these engines."""
    entry = ledger.find(position)
    return entry is not None and entry.answers(key, engines)


def test_what_was_synced_is_there(tmp_path: Path) -> None:
    """A record that was synced is known when the ledger is opened again; one that was not is not."""
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.add(answered(0))
        ledger.sync()
        ledger.add(answered(1))
    with opened(path) as ledger:
        assert knows(ledger, 0, "k", KNOWN)
        assert ledger.read(0) == answered(0)
        assert ledger.find(1) is None


def test_the_last_run_says_how_it_ended(tmp_path: Path) -> None:
    """What a run says at its end is read again, counts as no row, and holds until the next run begins."""
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.add(answered(0))
        ledger.end("too slow")
    viewed = Ledger.view(path)
    assert viewed.ended is not None
    assert viewed.ended.why == "too slow"
    assert [record.position for record in viewed.records()] == [0]
    viewed.close()
    with opened(path) as ledger:
        assert ledger.ended is None
    viewed = Ledger.view(path)
    assert (viewed.ended, len(viewed.runs), viewed.num_torn) == (None, 2, 0)
    viewed.close()


def test_what_counts_as_known(tmp_path: Path) -> None:
    """An answer is known by what was asked, at its place, from an engine that may answer now."""
    with opened(tmp_path / "ledger") as ledger:
        ledger.add(answered(3))
        assert knows(ledger, 3, "k", KNOWN)
        assert not knows(ledger, 3, "other words", KNOWN)
        assert not knows(ledger, 4, "k", KNOWN)
        assert not knows(ledger, 3, "k", {"simulated/2/m/"})
        assert ledger.equal("k", KNOWN) == answered(3)
        assert ledger.equal("k", {"simulated/2/m/"}) is None


def test_an_answer_outlives_its_position(tmp_path: Path) -> None:
    """An equal row finds a greedy answer also when another row has taken its place since."""
    with opened(tmp_path / "ledger") as ledger:
        ledger.add(answered(0, "first"))
        ledger.add(answered(0, "second"))
        assert ledger.equal("first", KNOWN) == answered(0, "first")


def test_a_later_record_counts(tmp_path: Path) -> None:
    """Of two records of a position the later one holds, also after a restart."""
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        ledger.add(answered(0, "old"))
        ledger.add(answered(0, "new"))
        ledger.sync()
    with opened(path) as ledger:
        assert knows(ledger, 0, "new", KNOWN)
        assert [record.key for record in ledger.records()] == ["new"]


def test_an_earlier_record_is_not_taken_over(tmp_path: Path) -> None:
    """A row that had failed in another ledger keeps the answer that it has got since."""
    failed = Record(position=0, key="k", id=1, at=1.0, error=to_message(EngineError("broken")))
    with opened(tmp_path / "part") as part, opened(tmp_path / "whole") as whole:
        part.add(failed)
        whole.absorb(part)
        assert whole.read(0) == failed
        whole.add(answered(0, at=2.0))
        whole.absorb(part)
        assert whole.read(0) == answered(0, at=2.0)


def test_other_words_are_taken_over(tmp_path: Path) -> None:
    """A ledger that is taken over says what the words of a row are, whatever was answered to others later."""
    with opened(tmp_path / "part") as part, opened(tmp_path / "whole") as whole:
        part.add(answered(0, "mine", at=1.0))
        whole.add(answered(0, "other", at=2.0))
        whole.absorb(part)
        assert whole.read(0).key == "mine"


@given(data=st.data())
def test_any_damage_costs_the_damaged_lines_alone(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever a crash leaves of the end of the file, or flips in it, every whole line is read and no other one."""
    path = tmp_path_factory.mktemp("ledger") / "ledger"
    with opened(path) as ledger:
        for position in range(8):
            ledger.add(answered(position, f"key {position}"))
        ledger.sync()
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, 10**6), "place") * len(content) // (10**6 + 1)
    bits = data.draw(st.integers(0, 255), "bits that flip; 0 cuts off")
    if bits:
        content[place] ^= bits
    else:
        del content[place:]
    path.write_bytes(content)
    whole = [body for line in bytes(content).splitlines(keepends=True) if (body := checked(line)) is not None]
    expected = [position for position in range(8) if any(f'"key":"key {position}"'.encode() in body for body in whole)]
    with opened(path) as ledger:
        assert [record.position for record in ledger.records()] == expected
        ledger.add(answered(9))
        ledger.sync()
    with opened(path) as ledger:
        assert [record.position for record in ledger.records()] == [*expected, 9]


def test_the_output_follows_without_a_gap(tmp_path: Path) -> None:
    """Only positions that follow each other, that this run has, and that are on disk, may be written."""
    path = tmp_path / "ledger"
    with opened(path) as ledger:
        for position in (0, 1, 3):
            ledger.add(answered(position))
        assert ledger.done_from(0, 1, 10) == []
        ledger.sync()
        assert len(ledger.done_from(0, 1, 10)) == 2
        assert len(ledger.done_from(0, 1, 1)) == 1
        assert [record.position for record in ledger.read_at(ledger.done_from(1, 2, 10))] == [1, 3]
    with opened(path) as ledger:
        assert ledger.done_from(0, 1, 10) == []  # nobody has said that they still hold
        ledger.confirm(0)
        assert len(ledger.done_from(0, 1, 10)) == 1


def test_a_record_can_be_read_before_it_is_on_disk(tmp_path: Path) -> None:
    """An equal row gets its answer also from a record that is still to be written, or is being written."""
    with opened(tmp_path / "ledger") as ledger:
        ledger.add(answered(0))
        assert ledger.read(0) == answered(0)
        block, end = ledger.take()
        assert ledger.read(0) == answered(0)
        ledger.write(block)
        ledger.written(end)
        assert ledger.read(0) == answered(0)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    """A ledger that is open elsewhere is refused, and the error tells by whom; it is free once that is killed."""
    path = tmp_path / "ledger"
    code = (
        "import sys, time; from pathlib import Path; from raylm.batch.ledger import Ledger\n"
        "ledger = Ledger.open(Path(sys.argv[1])); ledger.begin({}, []); print('open', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(OutputBusyError, match=rf"process {other.pid} on \S+ since"):
            Ledger.open(path)
        other.kill()
        other.wait()
    with opened(path) as ledger:
        assert [run.pid for run in ledger.runs] == [other.pid, os.getpid()]
