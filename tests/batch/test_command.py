"""The options of `raylm batch` that say when to give up."""

import subprocess
from pathlib import Path

import pytest

from tests.test_cli import run


def batch(cluster: str | None, folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run `raylm batch` on rows that all fail."""
    source = folder / "in"
    source.write_text('{"prompt": ""}\n' * 3)
    return run(cluster, "batch", str(source), f"--output={folder / 'out'}", *args)


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ("--finish-at=99.5", "expected a percentage above 0% and up to 100%, got 99.5"),
        ("--finish-at=101%", "expected a percentage above 0% and up to 100%, got 101%"),
        ("--max-failures=-1", "expected a number of rows or a percentage, got -1"),
        ("--max-failures=2.5", "expected a number of rows or a percentage, got 2.5"),
        ("--max-failures=nan%", "expected a percentage above 0% and up to 100%, got nan%"),
    ],
)
def test_wrong_limits(tmp_path: Path, option: str, reason: str) -> None:
    """A limit that is none is told before anything is started, with exit code 2."""
    result = batch(None, tmp_path, option)
    assert result.returncode == 2
    assert reason in result.stderr


@pytest.mark.parametrize(("most", "code"), [("2", 3), ("3", 1), ("99%", 3), ("100%", 1)])
def test_most_failures(cluster: str, tmp_path: Path, most: str, code: int) -> None:
    """As many rows may fail as are said, or as large a share of them."""
    result = batch(cluster, tmp_path, f"--max-failures={most}", '--engine-config={"kind": "simulated"}')
    assert result.returncode == code, result.stderr
