"""How the api_server's process is started, watched and ended. A small server stands in for lmdeploy.

The real one is tested in `tests/lmdeploy/test_api_server.py`.
"""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest

from raylm.config import APIServerConfig
from raylm.engines import api_server
from raylm.engines.api_server import APIServerEngine, arguments, listen_address, new_log, restart_pause_s, url_of
from raylm.errors import ActorLostError, EngineError, EngineStartError, InvalidRequestError, UpstreamError

from .conftest import Record, make_request, run, until
from .http_server import Toy

STORY = "Once upon a time"
STAND_IN = "tests.engines.stand_in"

Configure = Callable[..., APIServerConfig]
Start = Callable[[APIServerConfig], Awaitable[APIServerEngine]]


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configure:
    """Returns settings of a server that the stand-in plays; it does what `name` says."""
    monkeypatch.setenv("RAYLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(api_server, "_MODULES", {"cuda": STAND_IN})
    monkeypatch.setattr(api_server, "version", lambda _: "0")
    monkeypatch.setattr(api_server, "_PING_S", 0.05)
    monkeypatch.setattr(api_server, "_RESTART_S", 0.05)

    def configure(name: str = "serves", **settings: object) -> APIServerConfig:
        (tmp_path / name).mkdir(exist_ok=True)
        defaults = {"session_len": 1024, "max_batch_size": 8, "server_port": 0, "start_timeout_s": 60}
        return APIServerConfig(path=str(tmp_path / name), **(defaults | settings))

    return configure


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts engines, and closes them after the test."""
    engines = []

    async def start(config: APIServerConfig) -> APIServerEngine:
        engine = APIServerEngine(config)
        engines.append(engine)
        await engine.start()
        return engine

    yield start
    for engine in engines:
        await engine.close()


def pids(config: APIServerConfig) -> list[list[int]]:
    """Return the processes of each server so far: its own and that of its child."""
    file = Path(config.path) / "pids"
    return [[int(pid) for pid in line.split()] for line in file.read_text().splitlines()] if file.exists() else []


def lives(pid: int) -> bool:
    """Return whether a process runs."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def gone(numbers: list[int], within_s: float = 60) -> None:
    """Return when none of these processes runs."""
    deadline = time.monotonic() + within_s
    while True:
        now = time.monotonic()  # before the look: one that comes late decides all the same
        left = [pid for pid in numbers if lives(pid)]
        if not left:
            return
        assert now < deadline, left
        await asyncio.sleep(0.02)


async def healthy(engine: APIServerEngine) -> None:
    """Return when the engine is healthy; until then it may say that it is being started again, and nothing else."""
    while True:
        try:
            await engine.check_health()
        except UpstreamError:
            await asyncio.sleep(0.02)
        else:
            return


async def lost(engine: APIServerEngine) -> None:
    """Check the engine's health for as long as it may yet get well."""
    while True:
        with contextlib.suppress(UpstreamError):
            await engine.check_health()
        await asyncio.sleep(0.02)


# Arguments, address and log


def test_arguments() -> None:
    """Settings become arguments under lmdeploy's names; options are added as they are."""
    config = APIServerConfig(
        path="org/model",
        backend="pytorch",
        tp=2,
        session_len=4096,
        cache_max_entry_count=0.5,
        quant_policy=8,
        dtype="bfloat16",
        options={"eager_mode": True, "empty_init": False, "adapters": ["a=1", "b=2"], "hf_overrides": {"x": 1}},
    )
    text = " ".join(arguments(config))
    for part in (
        "--backend pytorch",
        "--tp 2",
        "--session-len 4096",
        "--cache-max-entry-count 0.5",
        "--quant-policy 8",
        "--dtype bfloat16",
        "--enable-prefix-caching",
        "--eager-mode --adapters a=1 b=2",
        '--hf-overrides {"x":1}',
        "--model-name model",
        "--distributed-executor-backend mp",
    ):
        assert part in text
    assert "--empty-init" not in text
    assert "--max-batch-size" not in text


def test_arguments_for_an_engine_that_was_not_asked_for() -> None:
    """A server that is asked for TurboMind is told what PyTorch needs, too: lmdeploy takes that for some models."""
    text = " ".join(arguments(APIServerConfig(path="m", backend="turbomind", tp=2)))
    assert "--distributed-executor-backend mp" in text
    assert "--logprobs-mode raw_logprobs" in text


@pytest.mark.parametrize("policy", [16, 17, 42])
def test_quant_policies_of_one_engine(policy: int) -> None:
    """What TurboMind cannot do with a KV cache is refused of it, and handed on to PyTorch."""
    config = APIServerConfig(path="m", backend="pytorch")
    assert f"--quant-policy {policy}" in " ".join(arguments(config.updated({"quant_policy": policy})))
    with pytest.raises(InvalidRequestError, match="pytorch"):
        config.updated({"quant_policy": policy, "backend": "turbomind"})


def test_several_ranks_on_cpu() -> None:
    """A server on CPU with tp > 1, which would never be ready, is refused, with what to take instead."""
    with pytest.raises(InvalidRequestError, match="LMDeployPipeline"):
        APIServerConfig(tp=2).updated({"backend": "pytorch", "device": "cpu"})


@pytest.mark.parametrize("name", ["tp", "server_port", "api_keys"])
def test_option_with_a_setting_of_its_own(name: str) -> None:
    """An option that would say again, or otherwise, what a setting says is an error that names it."""
    with pytest.raises(InvalidRequestError, match=name):
        arguments(APIServerConfig(path="m", options={name: 1}))


def test_free_port() -> None:
    """Port 0 is a free one, and nobody else's business: on 127.0.0.1."""
    host, port = listen_address(APIServerConfig(server_port=0))
    assert host == "127.0.0.1"
    with socket.create_server((host, port)):
        pass


def test_taken_port() -> None:
    """A taken port is an error that says who has it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineStartError, match=f"process {os.getpid()} does, .*python") as raised:
            listen_address(APIServerConfig(server_name="127.0.0.1", server_port=port))
    assert f"127.0.0.1:{port}" in str(raised.value)
    assert "server_port" in str(raised.value)


def test_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt has a log of its own, which nobody else can read, and there are never many."""
    monkeypatch.setenv("RAYLM_CACHE", str(tmp_path))
    logs = [new_log(1) for _ in range(30)]
    assert len(set(logs)) == 30
    assert logs[-1].stat().st_mode & 0o077 == 0
    assert len(list((tmp_path / "logs").iterdir())) == 20
    assert logs[-1].exists()


# At work


async def test_info(configure: Configure) -> None:
    """The model's digest is told, and no engine of lmdeploy's that was asked for alone: it may be the other one."""
    engine = APIServerEngine(configure())
    info = await engine.start()
    await engine.close()
    assert info.device.startswith("lmdeploy on cuda, at http://127.0.0.1:")
    assert info.fingerprint


async def test_restart_without_a_log(configure: Configure, start: Start) -> None:
    """A server is started again though the log of its predecessor is gone."""
    config = configure()
    engine = await start(config)
    shutil.rmtree(Path(config.path).parent / "cache")
    os.kill(pids(config)[0][0], signal.SIGKILL)
    await until(lambda: len(pids(config)) == 2)
    await healthy(engine)


async def test_log_of_a_server_that_runs(configure: Configure, start: Start) -> None:
    """However many logs come after it, the log of a server stays as long as the server does, and not longer."""
    config = configure()
    engine = await start(config)
    (log,) = (Path(config.path).parent / "cache" / "logs").iterdir()
    for _ in range(30):
        new_log(1)
    assert log.exists()
    await engine.close()

    def is_removed() -> bool:
        new_log(1)
        return not log.exists()

    await until(is_removed)  # the kernel lets go of a dead process's lock a moment after its end


async def test_start_and_close(configure: Configure, start: Start) -> None:
    """The server runs from start to close, and its child no longer than it; a client of its own is served as well."""
    config = configure(model_name="mine", api_key="secret")
    engine = APIServerEngine(config)
    info = await engine.start()
    assert (info.engine, info.engine_version, info.model) == ("api_server", "0", "mine")
    assert (info.capacity, info.max_context) == (8, 1024)
    record = await run(engine, make_request(STORY, max_new_tokens=5))
    assert record.usage.completion_tokens == engine.statistics().num_tokens == 5
    (numbers,) = pids(config)
    assert "secret" not in " ".join(psutil.Process(numbers[0]).cmdline())
    running = asyncio.create_task(run(engine, make_request(STORY, max_new_tokens=900, ignore_eos=True)))
    await until(lambda: engine.statistics().num_running == 1)
    await engine.close()
    with pytest.raises(EngineError, match="not running"):
        await running
    await gone(numbers)
    with pytest.raises(EngineError, match="not running"):
        await engine.check_health()
    await engine.close()


async def test_unknown_option(configure: Configure) -> None:
    """An option that the server does not know, or only the beginning of one, is an error with its own words."""
    for name in ("nonsense", "session"):
        with pytest.raises(InvalidRequestError, match=f"unrecognized arguments: --{name} 1"):
            await APIServerEngine(configure(options={name: 1})).start()


async def test_unknown_option_that_is_off(configure: Configure, start: Start) -> None:
    """An option that is off is one that the server knows, though it is not told of it."""
    for value in (False, None):
        with pytest.raises(InvalidRequestError, match=r"unrecognized arguments: --nonsense"):
            await APIServerEngine(configure(options={"nonsense": value})).start()
    await start(configure(options={"log_level": None}))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:7"),  # noqa: S104
        ("::", "http://[::1]:7"),
        ("::1", "http://[::1]:7"),
        ("10.0.0.1", "http://10.0.0.1:7"),
    ],
)
def test_url(host: str, url: str) -> None:
    """A server is reached where it listens; an IPv6 address is in brackets."""
    assert url_of(host, 7) == url


async def test_server_that_dies_while_it_loads(configure: Configure) -> None:
    """It is launched as often as `start_attempts` says; the error has its last words, and each attempt its log."""
    config = configure("dies", start_attempts=2)
    with pytest.raises(EngineStartError, match=r"(?s)status 1 while it started.*no weights in this folder"):
        await APIServerEngine(config).start()
    assert len(pids(config)) == 2
    await gone([pid for numbers in pids(config) for pid in numbers])
    logs = list((Path(config.path).parent / "cache" / "logs").iterdir())
    assert ["no weights" in log.read_text() for log in logs] == [True, True]


def test_restart_pause() -> None:
    """A first start waits for nothing; after each failure the pause is twice as long, up to a limit."""
    assert [restart_pause_s(failures) for failures in range(9)] == [0, 1, 2, 4, 8, 16, 30, 30, 30]


async def test_pauses_between_launches(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches of a server that does not start are further and further apart."""
    monkeypatch.setattr(api_server, "_RESTART_S", 0.5)
    config = configure("dies", start_attempts=3)
    with pytest.raises(EngineStartError):
        await APIServerEngine(config).start()
    logs = sorted((Path(config.path).parent / "cache" / "logs").iterdir())
    first, second, third = (log.stat().st_mtime for log in logs)  # when the server of each had its last word
    assert second - first > 0.5
    assert third - second > 1


async def test_server_that_hangs_while_it_loads(configure: Configure) -> None:
    """It is killed when its time is over."""
    config = configure("hangs", start_attempts=1, start_timeout_s=3)
    with pytest.raises(EngineStartError, match="start_timeout_s"):
        await APIServerEngine(config).start()
    await gone([pid for numbers in pids(config) for pid in numbers])


async def test_port_that_is_taken_while_the_server_loads(configure: Configure) -> None:
    """Another process that listens there before the server does is not taken for it, however well it answers."""
    _, port = listen_address(APIServerConfig(server_port=0))
    config = configure("hangs", start_attempts=1, server_name="127.0.0.1", server_port=port)
    starting = asyncio.create_task(APIServerEngine(config).start())
    await until(lambda: bool(pids(config)))
    async with Toy(model="hangs").running(port):
        with pytest.raises(EngineStartError, match=rf"lost 127.0.0.1:{port} .*process {os.getpid()} does"):
            await starting
    await gone(pids(config)[0])


async def test_cancelled_start(configure: Configure) -> None:
    """A start that is cancelled leaves nothing behind."""
    config = configure("hangs")
    starting = asyncio.create_task(APIServerEngine(config).start())
    await until(lambda: bool(pids(config)))
    starting.cancel()
    await asyncio.wait([starting])
    await gone(pids(config)[0])


async def test_restart_after_a_death(configure: Configure, start: Start) -> None:
    """A server that is killed is started again: what it was working on fails, what comes later is answered."""
    config = configure()
    engine = await start(config)
    record = Record()
    task = asyncio.create_task(engine.generate(make_request(STORY, max_new_tokens=900, ignore_eos=True), record.emit))
    await record.wait()
    os.kill(pids(config)[0][0], signal.SIGKILL)
    with pytest.raises(UpstreamError):
        await task
    await until(lambda: len(pids(config)) == 2)
    await gone(pids(config)[0])
    await healthy(engine)
    assert (await run(engine, make_request(STORY, max_new_tokens=3))).text


async def test_second_death_is_for_good(configure: Configure, start: Start) -> None:
    """A server that dies again soon is not started a third time: the engine is lost."""
    config = configure()
    engine = await start(config)
    os.kill(pids(config)[0][0], signal.SIGKILL)
    await until(lambda: len(pids(config)) == 2)
    await healthy(engine)
    os.kill(pids(config)[1][0], signal.SIGKILL)
    with pytest.raises(ActorLostError, match="second time"):
        await lost(engine)
    with pytest.raises(ActorLostError):
        await run(engine, make_request(STORY))
    assert len(pids(config)) == 2


async def test_hung_server(configure: Configure, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is stopped is killed and started again, and what waits for it fails."""
    config = configure()
    engine = await start(config)
    record = Record()
    task = asyncio.create_task(engine.generate(make_request(STORY, max_new_tokens=900, ignore_eos=True), record.emit))
    await record.wait()
    os.kill(pids(config)[0][0], signal.SIGSTOP)
    monkeypatch.setattr(api_server, "_HANG_S", 0.5)  # not before: a server that is only late would be killed for it
    with pytest.raises(UpstreamError):
        await task
    await until(lambda: len(pids(config)) == 2)
    await gone(pids(config)[0])


async def test_server_that_does_not_start_again(configure: Configure, start: Start) -> None:
    """A server that died and cannot be started again is lost."""
    config = configure(start_attempts=1)
    engine = await start(config)
    (numbers,) = pids(config)
    shutil.rmtree(config.path)
    os.kill(numbers[0], signal.SIGKILL)
    with pytest.raises(ActorLostError, match="does not start again"):
        await lost(engine)


async def test_unexpected_error_at_a_restart(
    configure: Configure, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong when a server is started again, the engine says that it is lost."""
    config = configure()
    engine = await start(config)

    def fail(_: int) -> Path:
        raise ValueError("no such thing was foreseen")

    monkeypatch.setattr(api_server, "new_log", fail)
    os.kill(pids(config)[0][0], signal.SIGKILL)
    with pytest.raises(ActorLostError, match="foreseen"):
        await lost(engine)


async def test_close_with_a_stopped_supervisor(
    configure: Configure, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor that does nothing any more is killed too; closing does not wait for it for ever."""
    monkeypatch.setattr(api_server, "_STOP_S", 0.2)
    config = configure()
    engine = await start(config)
    supervisor = psutil.Process(pids(config)[0][0]).parent()
    assert supervisor is not None
    supervisor.suspend()
    await engine.close()
    await gone([supervisor.pid, *pids(config)[0]])


@pytest.mark.parametrize("name", ["serves", "hangs"])
async def test_parent_killed(configure: Configure, name: str) -> None:
    """A parent that is killed takes the server and its child with it within five seconds, loading or not."""
    config = configure(name)
    code = f"""
import asyncio
from raylm.config import APIServerConfig
from raylm.engines import api_server
api_server._MODULES = {{"cuda": {STAND_IN!r}}}
api_server.version = lambda _: "0"
async def main():
    await api_server.APIServerEngine(APIServerConfig.model_validate_json({config.model_dump_json()!r})).start()
    print("up", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=subprocess.PIPE)
    try:
        if name == "serves":
            assert parent.stdout is not None
            assert await parent.stdout.readline() == b"up\n"
        await until(lambda: bool(pids(config)))
        processes = psutil.Process(parent.pid).children(recursive=True)
        assert {process.pid for process in processes} >= set(pids(config)[0])
    finally:
        parent.kill()
        await parent.wait()
    await gone([process.pid for process in processes], within_s=5)


@pytest.mark.parametrize("module", ["openvino_worker", "lmdeploy_worker", "api_server_child serve"])
async def test_parent_that_was_gone_before(module: str) -> None:
    """A child whose parent ended before the kernel was told to tell of it ends at once, before it reads anything."""
    gone = await asyncio.create_subprocess_exec("true")
    await gone.wait()
    name, *arguments = module.split()
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", f"raylm.engines.{name}", *arguments, str(gone.pid), stdin=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(120):
            assert await child.wait() == 1
    finally:
        if child.returncode is None:
            child.kill()


async def test_supervisor_killed(configure: Configure, start: Start) -> None:
    """Without its supervisor the server does not live on: it counts as dead."""
    config = configure()
    await start(config)
    supervisor = psutil.Process(pids(config)[0][0]).parent()
    assert supervisor is not None
    supervisor.kill()
    await until(lambda: len(pids(config)) == 2)
    await gone(pids(config)[0])


async def test_lmdeploy_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where lmdeploy is not installed the error says how to install it."""

    def fail(name: str) -> str:
        raise api_server.PackageNotFoundError(name)

    monkeypatch.setattr(api_server, "version", fail)
    with pytest.raises(EngineStartError, match="pip install"):
        await APIServerEngine(APIServerConfig(path="m")).start()


async def test_model_that_is_not_there(configure: Configure) -> None:
    """A path that is wrong is an error at once."""
    with pytest.raises(EngineStartError, match="no-such-model"):
        await APIServerEngine(configure().model_copy(update={"path": "/no-such-model"})).start()
