"""What escapes its actor does not stay, on real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from raylm.actors import janitor
from raylm.actors.janitor import Memory, sweep

_MARK = f"RAYLM_TEST_OWNER_{uuid.uuid4().hex}"
"""The mark of these tests: the actors of others, which sweep this machine too, do not know it."""

_OWNER = f"""
import subprocess, sys, time
from raylm.actors import janitor
janitor._MARK = {_MARK!r}
janitor.mark()
says_when_it_runs = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", says_when_it_runs], start_new_session=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def own_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is swept here bears the mark of these tests."""
    monkeypatch.setattr(janitor, "_MARK", _MARK)


@pytest.fixture
def family() -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A process that bears the name of an owner, and one that it has started and will not take along."""
    owner = subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    child = psutil.Process(int(owner.stdout.readline()))
    yield owner, child
    for process in (owner, child):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    owner.wait()
    owner.stdout.close()


def test_an_orphan_is_ended(family: tuple[subprocess.Popen[str], psutil.Process]) -> None:
    """What a killed owner has left is killed."""
    owner, child = family
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert child.is_running()
    assert child.pid in sweep()
    child.wait(60)


def test_a_child_is_not(family: tuple[subprocess.Popen[str], psutil.Process]) -> None:
    """What has a living owner stays, and so does the owner."""
    owner, child = family
    assert child.pid not in sweep()
    assert child.is_running()
    assert owner.poll() is None


def test_the_name_of_another(family: tuple[subprocess.Popen[str], psutil.Process]) -> None:
    """A process with the owner's number that began at another time is not the owner."""
    _, child = family
    mark = child.environ()[_MARK].rpartition(":")[0] + ":1"
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, _MARK: mark})
    assert orphan.pid in sweep()
    assert orphan.wait(60) == -signal.SIGKILL


def test_another_container(family: tuple[subprocess.Popen[str], psutil.Process]) -> None:
    """What belongs to a process that cannot be seen from here is left alone."""
    mark = "pid:[1]:" + family[1].environ()[_MARK].split(":", 2)[2]
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, _MARK: mark})
    assert other.pid not in sweep()
    other.kill()
    other.wait()


def test_a_gpu_in_use() -> None:
    """A GPU is free with a little of its memory in use, and its description names who has more."""
    assert Memory(0, 2**30, 80 * 2**30).is_free
    taken = Memory(3, 40 * 2**30, 80 * 2**30, (17,))
    assert not taken.is_free
    assert str(taken) == "40.0 of 80.0 GiB of GPU 3 are in use by processes 17"
