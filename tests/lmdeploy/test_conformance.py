"""The conformance suite of `tests/engines`, on lmdeploy's PyTorch engine on CPU: in process, and behind api_server."""

from contextlib import nullcontext

import pytest

from raylm.config import APIServerConfig, LMDeployConfig
from raylm.engines.base import Engine
from raylm.messages import EngineInfo
from tests.engines.conftest import NOT_HTTP, Subject, ask, make_request, run, run_all
from tests.engines.test_conformance import *  # noqa: F403 - all of its tests and fixtures
from tests.engines.test_conformance import cuts_of

from .conftest import fingerprint_on_cpu, on_cpu, server_on_cpu

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]  # a server takes a while to start

SUBJECTS = {
    "lmdeploy": Subject(lambda: nullcontext(on_cpu())),
    "api_server": Subject(lambda: nullcontext(server_on_cpu()), NOT_HTTP),
}


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    """Each engine."""
    return SUBJECTS[request.param]


async def test_info(config: LMDeployConfig | APIServerConfig, info: EngineInfo) -> None:
    """An engine says what it is, within the limits that it was given."""
    assert (info.engine, info.engine_version) == (config.kind, "0.18.0")
    assert info.device.startswith("pytorch on cpu")
    assert (info.capacity, info.max_context) == (config.max_batch_size, config.session_len)
    assert info.model == config.path
    assert info.fingerprint == fingerprint_on_cpu()


async def test_continuation_of_messages(engine: Engine) -> None:
    """A conversation's greedy answer, continued after any delta, arrives at the undisturbed one."""
    parameters = {"max_new_tokens": 24, "ignore_eos": True}
    question = ask("What is the capital of France?")
    whole = await run(engine, make_request(question, **parameters))
    cuts = cuts_of(whole, 6)
    rests = await run_all(engine, [make_request(question, whole.generated(cut), **parameters) for cut in cuts])
    for cut, rest in zip(cuts, rests, strict=True):
        assert whole.generated(cut).text + rest.text == whole.text
        assert rest.usage.completion_tokens == 24
