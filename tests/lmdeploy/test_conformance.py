"""The conformance suite of `tests/engines`, on lmdeploy's PyTorch engine on CPU."""

import pytest

from raylm.config import LMDeployConfig
from raylm.messages import EngineInfo
from tests.engines.test_conformance import *  # noqa: F403 - all of its tests and fixtures

from .conftest import on_cpu


@pytest.fixture(scope="module")
def config() -> LMDeployConfig:
    """The settings of the engine."""
    return on_cpu()


async def test_info(config: LMDeployConfig, info: EngineInfo) -> None:
    """An engine says what it is, within the limits that it was given."""
    assert (info.engine, info.engine_version, info.device) == ("lmdeploy", "0.18.0", "pytorch on cpu")
    assert (info.capacity, info.max_context) == (config.max_batch_size, config.session_len)
    assert info.model == config.path
