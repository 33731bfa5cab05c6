"""`raylm compat`: what it finds in lmdeploy, as of the version that is installed, or in files that look like one."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from raylm.compat import INTERFACES, examine


def test_an_interface_that_only_raises_is_missing(tmp_path: Path) -> None:
    """A function that is still there to say that it is gone does not count."""
    (tmp_path / "api.py").write_text(
        'def serve(path):\n    """Gone."""\n    raise NotImplementedError\n\ndef client(url):\n    return url\n'
    )
    found = {interface.name: interface.found(tmp_path) for interface in INTERFACES}
    assert found["lmdeploy.client(url)"]
    assert not found["lmdeploy.serve(path)"]
    assert sum(found.values()) == 1


@pytest.mark.skipif(find_spec("lmdeploy") is not None, reason="lmdeploy is installed")
def test_without_lmdeploy_nothing_is_claimed() -> None:
    """Where no lmdeploy is installed, each answer is that it is not known."""
    assert [finding.present for finding in examine()] == [None] * len(INTERFACES)


@pytest.mark.skipif(find_spec("lmdeploy") is None, reason="lmdeploy is not installed")
def test_what_lmdeploy_has() -> None:
    """Lmdeploy 0.18 has lost all that kept sessions, its HTTP client and its Triton client."""
    assert [finding.interface.name for finding in examine() if finding.present] == [
        "lmdeploy.pipeline(path)",
        "AsyncEngine.preprocess, generate(request)",
    ]
