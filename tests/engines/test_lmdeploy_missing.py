"""What the lmdeploy engine says where lmdeploy is not installed. Its other tests are in `tests/lmdeploy`."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from raylm.config import LMDeployConfig
from raylm.engines.lmdeploy import LMDeployEngine
from raylm.errors import EngineStartError


@pytest.mark.skipif(find_spec("lmdeploy") is not None, reason="lmdeploy is installed")
async def test_lmdeploy_is_not_installed(tmp_path: Path) -> None:
    """An EngineStartError says how to install it."""
    with pytest.raises(EngineStartError, match=r"pip install 'raylm\[lmdeploy\]'"):
        await LMDeployEngine(LMDeployConfig(path=str(tmp_path))).start()


def test_turbomind_on_cpu() -> None:
    """TurboMind on CPU is refused before anything starts, and PyTorch is what CPU takes by itself."""
    with pytest.raises(ValueError, match="TurboMind runs on GPUs alone"):
        LMDeployConfig(device="cpu", backend="turbomind")
    assert LMDeployConfig(device="cpu").backend == "pytorch"
