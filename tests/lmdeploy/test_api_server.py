"""What becomes of the api_server engine when something is wrong with the real server, on CPU.

What it does when all is well is in `test_conformance.py` and `test_mixed_pool.py`.
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import psutil
import pytest

from raylm.engines import api_server
from raylm.engines.api_server import APIServerEngine
from raylm.engines.gguf import to_folder
from raylm.errors import EngineStartError, InvalidRequestError, UpstreamError
from raylm.models import resolve
from tests.engines.conftest import MODEL, Record, make_request, run, until
from tests.engines.test_api_server import gone, healthy

from .conftest import server_on_cpu

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

STORY = "Once upon a time"


async def test_taken_port() -> None:
    """A port that is taken is an error that says by whom, before anything is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineStartError, match=f"process {os.getpid()} does"):
            await APIServerEngine(server_on_cpu(server_name="127.0.0.1", server_port=port)).start()


async def test_unknown_option() -> None:
    """An option that lmdeploy's command line does not know is an error that names it."""
    with pytest.raises(InvalidRequestError, match="unrecognized arguments: --num-gpu 3"):
        await APIServerEngine(server_on_cpu(options={"num_gpu": 3})).start()


async def test_corrupt_model(tmp_path: Path) -> None:
    """A folder whose weights are cut off is an error with the server's own words."""
    folder = tmp_path / "corrupt"
    await asyncio.to_thread(copy_model, folder)
    weights = next(folder.glob("*.safetensors"))
    with weights.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(EngineStartError, match=r"(?s)while it started.*SafetensorError: .*The end of it:"):
        await APIServerEngine(server_on_cpu(str(folder), start_attempts=1)).start()


async def test_folder_that_is_no_model(tmp_path: Path) -> None:
    """A folder without a model is an error."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    with pytest.raises(EngineStartError):
        await APIServerEngine(server_on_cpu(str(tmp_path), start_attempts=1)).start()


async def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without memory for a KV cache is an error that says so, with the server's own words."""
    monkeypatch.setenv("LMDEPLOY_CPU_MEM_GB", "0.01")
    with pytest.raises(EngineStartError, match=r"(?s)memory for it and for its KV cache.*No enough gpu memory"):
        await APIServerEngine(server_on_cpu(options={}, start_attempts=1)).start()


def copy_model(folder: Path) -> None:
    """Copy the test model as a folder."""
    shutil.copytree(to_folder(resolve(MODEL)), folder)


def tree(engine: APIServerEngine) -> list[psutil.Process]:
    """Return the server's processes: the server first, then its engine's and what else it started."""
    assert engine._server is not None
    server = psutil.Process(engine._server.pid)
    return [server, *server.children(recursive=True)]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_server_in_trouble(how: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that dies or hangs fails what it works on, and is started again; nothing of the first one is left."""
    engine = APIServerEngine(server_on_cpu())
    await engine.start()
    record = Record()
    request = make_request(STORY, max_new_tokens=900, ignore_eos=True)
    task = asyncio.create_task(engine.generate(request, record.emit))
    await record.wait(2)
    processes = tree(engine)
    assert len(processes) > 1
    processes[0].send_signal(how)
    with monkeypatch.context() as impatient:
        impatient.setattr(api_server, "_HANG_S", 3)  # only now: a server that is busy would be killed for it
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

async def main():
    await APIServerEngine(APIServerConfig.model_validate_json({server_on_cpu().model_dump_json()!r})).start()
    await asyncio.Event().wait()  # to be killed, however late that comes
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code)
    try:
        loading = 4  # supervisor, server, and what lmdeploy starts for its engine
        await until(lambda: len(psutil.Process(parent.pid).children(recursive=True)) >= loading)
        processes = psutil.Process(parent.pid).children(recursive=True)
    finally:
        parent.kill()
        await parent.wait()
    await gone([process.pid for process in processes], within_s=5)
