"""The api_server engine with the real lmdeploy, on CPU."""

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from raylm.config import APIServerConfig
from raylm.engines import api_server, build
from raylm.engines.api_server import APIServerEngine
from raylm.engines.gguf import to_folder
from raylm.errors import ContextLengthError, EngineStartError, InvalidRequestError, UpstreamError
from raylm.models import resolve
from tests.engines.conftest import MODEL, Prompt, Record, ask, make_request, run, run_all, until
from tests.engines.test_api_server import gone, healthy

from .conftest import on_cpu

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

STORY = "Once upon a time"
QUESTION = ask("What is the capital of France?")


def settings(path: str = MODEL, **more: object) -> APIServerConfig:
    """Return settings of a small server on CPU."""
    same = on_cpu(path).model_dump(exclude={"kind"})
    return APIServerConfig(**(same | {"server_port": 0, "start_timeout_s": 120} | more))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[APIServerEngine]:
    """A server at work."""
    engine = APIServerEngine(settings(options={"num_gpu_blocks": 160, "logprobs_mode": "raw_logprobs"}))
    info = await engine.start()
    assert (info.engine, info.engine_version, info.model) == ("api_server", "0.18.0", MODEL)
    yield engine
    await engine.close()


@pytest.mark.parametrize("prompt", [STORY, QUESTION], ids=["prompt", "messages"])
async def test_text_is_that_of_the_engine(engine: APIServerEngine, prompt: Prompt) -> None:
    """The server generates the greedy text that lmdeploy generates in process, with the same counts."""
    request = make_request(prompt, max_new_tokens=40)
    embedded = build(on_cpu())
    await embedded.start()
    expected = await run(embedded, request)
    await embedded.close()
    record = await run(engine, request)
    assert (record.text, record.finish_reason) == (expected.text, expected.finish_reason)
    assert record.usage.prompt_tokens == expected.usage.prompt_tokens


@pytest.mark.parametrize("prompt", [STORY, QUESTION], ids=["prompt", "messages"])
async def test_continuation(engine: APIServerEngine, prompt: Prompt) -> None:
    """A greedy answer continued from its text arrives at the undisturbed one."""
    whole = await run(engine, make_request(prompt, max_new_tokens=24, ignore_eos=True))
    for cut in (1, 7, len(whole.deltas) // 2, len(whole.deltas) - 1):
        generated = whole.generated(cut)
        rest = await run(engine, make_request(prompt, generated, max_new_tokens=24, ignore_eos=True))
        assert generated.text + rest.text == whole.text


async def test_parameters(engine: APIServerEngine) -> None:
    """The server honours what it is told: a seed, limits, and log-probabilities of a raw prompt."""
    sampled = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "max_new_tokens": 24, "ignore_eos": True}
    first, again, other = await run_all(engine, [make_request(STORY, seed=seed, **sampled) for seed in (7, 7, 8)])
    assert first.text == again.text != other.text
    assert first.usage.completion_tokens == 24
    least = await run(engine, make_request(QUESTION, min_new_tokens=24, max_new_tokens=48))
    assert least.usage.completion_tokens >= 24
    told = await run(engine, make_request(STORY, max_new_tokens=8, logprobs=True))
    plain = await run(engine, make_request(STORY, max_new_tokens=8))
    assert told.text == plain.text
    assert len(told.token_ids) == 8 == sum(len(delta.logprobs) for delta in told.deltas)


async def test_stop_words(engine: APIServerEngine) -> None:
    """The text ends before a stop word, over however many tokens it spans, and the counts are there all the same."""
    whole = await run(engine, make_request(STORY, max_new_tokens=24, ignore_eos=True))
    for width in (1, 5, 14):
        word = whole.text[40 : 40 + width]
        record = await run(engine, make_request(STORY, max_new_tokens=24, ignore_eos=True, stop_words=[word]))
        assert (record.text, record.finish_reason) == (whole.text.partition(word)[0], "stop")
        assert record.usage.prompt_tokens == whole.usage.prompt_tokens


async def test_too_long(engine: APIServerEngine) -> None:
    """A prompt that fills the context is refused with both numbers, and the server goes on."""
    with pytest.raises(ContextLengthError, match="1024"):
        await run(engine, make_request("word " * 1100))
    await engine.check_health()


async def test_cancellation(engine: APIServerEngine) -> None:
    """A cancelled request leaves the server; others go on."""
    victim = Record()
    task = asyncio.create_task(engine.generate(make_request("1", max_new_tokens=900, ignore_eos=True), victim.emit))
    await victim.wait(2)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert (await run(engine, make_request(STORY, max_new_tokens=4))).text


async def test_taken_port(engine: APIServerEngine) -> None:
    """A port that is taken is an error that says by whom, before anything is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineStartError, match=f"process {os.getpid()} does"):
            await APIServerEngine(settings(server_name="127.0.0.1", server_port=port)).start()


async def test_unknown_option() -> None:
    """An option that lmdeploy's command line does not know is an error that names it."""
    with pytest.raises(InvalidRequestError, match="unrecognized arguments: --num-gpu 3"):
        await APIServerEngine(settings(options={"num_gpu": 3})).start()


async def test_corrupt_model(tmp_path: Path) -> None:
    """A folder whose weights are cut off is an error with the server's own words."""
    folder = tmp_path / "corrupt"
    await asyncio.to_thread(copy_model, folder)
    weights = next(folder.glob("*.safetensors"))
    with weights.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(EngineStartError, match=r"(?s)while it started.*SafetensorError: .*The end of it:"):
        await APIServerEngine(settings(str(folder), start_attempts=1)).start()


async def test_folder_that_is_no_model(tmp_path: Path) -> None:
    """A folder without a model is an error."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(EngineStartError):
        await APIServerEngine(settings(str(tmp_path), start_attempts=1)).start()


def copy_model(folder: Path) -> None:
    """Copy the test model as a folder."""
    shutil.copytree(to_folder(resolve(MODEL)), folder)


def tree(engine: APIServerEngine) -> list[psutil.Process]:
    """Return the server's processes: the server first, then its engine's and what else it started."""
    assert engine._server is not None
    server = psutil.Process(engine._server._pid)
    return [server, *server.children(recursive=True)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_server_in_trouble(how: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that dies or hangs fails what it works on, and is started again; nothing of the first one is left."""
    monkeypatch.setattr(api_server, "_HANG_S", 3)
    engine = APIServerEngine(settings())
    await engine.start()
    record = Record()
    request = make_request(STORY, max_new_tokens=900, ignore_eos=True)
    task = asyncio.create_task(engine.generate(request, record.emit))
    await record.wait(2)
    processes = tree(engine)
    assert len(processes) > 1
    processes[0].send_signal(how)
    with pytest.raises(UpstreamError):
        await task
    await gone([process.pid for process in processes])
    await healthy(engine)
    assert (await run(engine, make_request(STORY, max_new_tokens=4))).text
    processes = tree(engine)
    await engine.close()
    await gone([process.pid for process in processes])


async def test_parent_killed_while_the_server_loads() -> None:
    """A parent that is killed in the middle takes all of the server's processes with it within five seconds."""
    code = f"""
import asyncio
from raylm.config import APIServerConfig
from raylm.engines.api_server import APIServerEngine
asyncio.run(APIServerEngine(APIServerConfig.model_validate_json({settings().model_dump_json()!r})).start())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    loading = 4  # supervisor, server, and what lmdeploy starts for its engine
    await until(lambda: len(psutil.Process(parent.pid).children(recursive=True)) >= loading)
    processes = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    await parent.wait()
    async with asyncio.timeout(5):
        await gone([process.pid for process in processes])
