"""APIServerEngine: lmdeploy's own api_server as a child process, and an HTTP client of it.

What keeps the child from outliving this process is in `api_server_child.py`; how it is talked to, in `http.py`. Here it
is started, watched, started again, and stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import signal
import sys
import time
from collections import deque
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from raylm.config import APIServerConfig, HTTPConfig
from raylm.engines.api_server_child import Command
from raylm.engines.base import Emit
from raylm.engines.child import child_environment
from raylm.engines.http import HTTPEngine
from raylm.engines.lmdeploy import find_model
from raylm.errors import ActorLostError, EngineError, EngineStartError, InvalidRequestError, RaylmError, UpstreamError
from raylm.messages import EngineInfo, EngineStatistics, Request
from raylm.models import cache_folder, max_context, model_name
from raylm.ports import belongs_to_another, free_port, holder, refusal

_POLL_S = 0.1  # between two looks at whether a starting server listens
_PING_S = 2.0  # between two health checks of a running one
_HANG_S = 20.0  # without a good answer after which it is taken to hang
_STOP_S = 5.0  # for it to end in order, and again when it is killed

_RESTART_S = 1.0  # between a death, or a start that failed, and the next start; twice that after the next failure
_MAX_RESTART_S = 30.0  # at most, however many fail
_MAX_DEATHS = 2  # within `_DEATHS_S`: this one dies for a reason that a start does not cure
_DEATHS_S = 300.0

_CPU_BATCH_SIZE = 32  # what lmdeploy takes where none is set. Source: `lmdeploy_cpu`
_CUDA_BATCH_SIZE = 128  # ... on the smaller GPUs. Source: lmdeploy 0.18.0, `lmdeploy.utils.get_max_batch_size`

_MAX_LOGS = 20
_LOG_BYTES = 1 << 18  # of the log's end that are looked at for an error message
_TAIL_CHARS = 1500  # of it that are shown
_ERROR_LINE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception)\b.*", re.MULTILINE)  # with which a traceback ends

_USAGE_STATUS = 2  # with which argparse ends a process
_MODULES = {"cuda": "lmdeploy", "ascend": "lmdeploy", "cpu": "raylm.engines.lmdeploy_cpu"}

_log = logging.getLogger(__name__)


class _Server:
    """One process of the server, from its launch to its end.

    Attributes:
        pid: The server's process, and the group of all that it starts; 0 when there was not even that.
        url: Where it listens, or will.
        log: Where it writes what it has to say.
        client: Talks to it; None until it is ready.
    """

    def __init__(self, supervisor: asyncio.subprocess.Process, pid: int, url: str, log: Path) -> None:
        self._supervisor = supervisor
        self.pid = pid
        self.url = url
        self.log = log
        self.client: HTTPEngine | None = None
        self.ended = asyncio.create_task(supervisor.wait())

    @classmethod
    async def launch(cls, command: Command, url: str, log: Path) -> _Server:
        """Start the processes."""
        with log.open("ab") as output:
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(output, fcntl.LOCK_EX)  # which its processes inherit: see `new_log`
            supervisor = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # this process's sys.path, below, is all there is to it
                "-m",
                "raylm.engines.api_server_child",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                env={"UVICORN_LOG_LEVEL": "warning", **child_environment()},  # no line for each request
                start_new_session=True,  # Ctrl-C at a terminal is for this process
            )
        if supervisor.stdin is None or supervisor.stdout is None:
            raise AssertionError("unreachable: both are pipes")
        try:
            supervisor.stdin.write(msgspec.json.encode(command) + b"\n")
            pid = int(await supervisor.stdout.readline() or 0)
        except BaseException:
            supervisor.stdin.close()
            raise
        return cls(supervisor, pid, url, log)

    @property
    def status(self) -> str:
        """How it ended, for people."""
        code = self.ended.result() if self.ended.done() else 0
        return f"signal {signal.Signals(code - 128).name}" if code > 128 else f"status {code}"

    @property
    def last_words(self) -> str:
        """The errors in its log and the log's end, and where it is."""
        try:
            text = self.log.read_bytes()[-_LOG_BYTES:].decode(errors="replace").strip()
        except OSError as error:
            return f"Its log, {self.log}, cannot be read ({error.strerror})"
        if not text:
            return f"Its log, {self.log}, is empty"
        # The cause comes first: lmdeploy's engine dies in a process of its own, and the server of that afterwards.
        errors = "\n".join(dict.fromkeys(_ERROR_LINE.findall(text)))[:_TAIL_CHARS]
        return f"Errors in its log, {self.log}:\n{errors or 'none'}\nThe end of it:\n{text[-_TAIL_CHARS:]}"

    async def stop(self, *, in_order: bool) -> None:
        """End it and all that it started, and wait until nothing is left, for as long as that may take.

        Args:
            in_order: Ask it first, and give it some seconds.
        """
        if in_order and not self.ended.done() and self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)
            await asyncio.wait([self.ended], timeout=_STOP_S)
        if self._supervisor.stdin is not None:
            self._supervisor.stdin.close()  # upon which the supervisor kills the group
        await asyncio.wait([self.ended], timeout=_STOP_S)
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)  # if the supervisor was killed or stopped before it could
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._supervisor.pid, signal.SIGKILL)
            await asyncio.wait([self.ended], timeout=_STOP_S)
        if self.client is not None:
            await self.client.close()


class APIServerEngine:
    """Runs `lmdeploy serve api_server`, and generates with it over HTTP. What `HTTPEngine` says holds here.

    Anybody else may talk to the server, too, at `server_name` and `server_port`. With port 0 it gets a free one on
    127.0.0.1, so that several fit on one node.

    A server that dies or hangs is killed with all its processes and started again, after a pause; requests that it was
    working on fail with UpstreamError, and a pool takes them elsewhere. If it dies again within five minutes, or cannot
    be started again, the engine is lost: ActorLostError, and its actor is replaced. So a prompt that kills servers is
    found out by the pool, and a GPU that went bad is not tried for ever.

    Args:
        config: Model, resources and address.

    Source: lmdeploy 0.18.0, `lmdeploy.cli.serve`.
    """

    def __init__(self, config: APIServerConfig) -> None:
        self._config = config
        self._server: _Server | None = None
        self._watching: asyncio.Task[None] | None = None
        self._command: Command | None = None
        self._context: int | None = None
        # Why nothing can be asked of the engine now; None when it works. Raised as a copy.
        self._down: RaylmError | None = _not_running()
        self._num_tokens = 0  # of servers that are gone

    async def start(self) -> EngineInfo:
        """Start the server and wait until it is healthy. See `engines.base.Engine.start`.

        A server that dies or takes longer than `start_timeout_s` is killed and launched again, `start_attempts` times
        in all, each with a log of its own.

        Raises:
            InvalidRequestError: the server's command line has no such option, or not with that value.
            EngineStartError: no such model, no lmdeploy, the port is taken, or the server does not become healthy.
        """
        config = self._config
        try:
            lmdeploy_version = version("lmdeploy")
        except PackageNotFoundError as error:
            raise EngineStartError("lmdeploy is not installed; pip install 'raylm[lmdeploy]'") from error
        path, identity = await asyncio.to_thread(find_model, config)
        self._context = config.session_len or await asyncio.to_thread(max_context, path, "session_len")
        off = [_flag(name) for name, value in config.options.items() if value is None or value is False]
        self._command = Command(_MODULES[config.device], str(path), arguments(config), off)
        server, info = await self._start_server()
        self._run(server)
        # A server that is asked for TurboMind takes PyTorch where TurboMind lacks the model, and does not tell.
        backend = "lmdeploy" if config.backend == "turbomind" else config.backend
        return msgspec.structs.replace(
            info,
            engine="api_server",
            engine_version=lmdeploy_version,
            device=f"{backend} on {config.device}{f', tp {config.tp}' if config.tp > 1 else ''}, at {server.url}",
            fingerprint=identity,
        )

    def _run(self, server: _Server) -> None:
        self._server = server
        self._down = None
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())

    async def _start_server(self, num_failures: int = 0) -> tuple[_Server, EngineInfo]:
        """Return a server that is healthy, after up to `start_attempts` launches, each after a longer pause.

        Args:
            num_failures: How many servers have failed just before.
        """
        attempts = self._config.start_attempts
        for attempt in range(1, attempts + 1):
            await asyncio.sleep(restart_pause_s(num_failures))
            num_failures += 1
            try:
                return await self._attempt()
            except EngineStartError as error:
                if attempt == attempts:
                    raise
                _log.warning("attempt %d of %d to start the api_server failed: %s", attempt, attempts, error)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _attempt(self) -> tuple[_Server, EngineInfo]:
        """Launch a server and wait until it is healthy."""
        config, command = self._config, self._command
        if command is None:
            raise AssertionError("unreachable: start sets it")
        host, port = listen_address(config)
        where = ["--server-name", host, "--server-port", str(port)]
        server = await _Server.launch(
            msgspec.structs.replace(command, arguments=[*command.arguments, *where]),
            url_of(host, port),
            await asyncio.to_thread(new_log, port),
        )
        try:
            async with asyncio.timeout(config.start_timeout_s):
                return server, await self._ready(server)
        except TimeoutError:
            await server.stop(in_order=False)
            raise EngineStartError(
                f"the api_server was not healthy within {config.start_timeout_s:g} s; raise start_timeout_s, or take "
                f"a smaller model. {server.last_words}"
            ) from None
        except BaseException:
            await server.stop(in_order=False)
            raise

    async def _ready(self, server: _Server) -> EngineInfo:
        """Return what a server says of itself, once it is healthy."""
        config = self._config
        address = server.url.removeprefix("http://")
        host, _, port = address.rpartition(":")
        while not await _listens(host.strip("[]"), int(port)):
            self._check_alive(server)
            await asyncio.sleep(_POLL_S)
        # The port was free when it was chosen. Loading takes so long that somebody else may have it by now.
        if await asyncio.to_thread(belongs_to_another, int(port), server.pid):
            who = await asyncio.to_thread(holder, int(port))
            raise EngineStartError(
                f"the api_server lost {address} to another process while it started{who}; end that, or set server_port "
                "to another one, or to 0 for any that is free"
            )
        server.client = HTTPEngine(
            HTTPConfig(
                url=server.url,
                model_name=config.model_name or model_name(config.path),
                api_key=config.api_key,
                capacity=config.max_batch_size or (_CPU_BATCH_SIZE if config.device == "cpu" else _CUDA_BATCH_SIZE),
                max_context=self._context,
                idle_timeout_s=config.idle_timeout_s,
            )
        )
        info = await server.client.start()
        while True:
            self._check_alive(server)
            try:
                await server.client.check_health()
            except UpstreamError:
                await asyncio.sleep(_POLL_S)
            else:
                return info

    def _check_alive(self, server: _Server) -> None:
        if not server.ended.done():
            return
        if server.ended.result() == _USAGE_STATUS:
            raise InvalidRequestError(
                "the command line of lmdeploy's api_server refuses an option; `lmdeploy serve api_server --help` lists "
                f"those it knows. {server.last_words}"
            )
        raise EngineStartError(
            f"the api_server ended with {server.status} while it started; check that the model is complete, and that "
            f"there is memory for it and for its KV cache. {server.last_words}"
        )

    async def _watch(self) -> None:
        """Keep a server running, until it is of no use. What goes wrong here ends the engine, and is told."""
        try:
            await self._keep_running()
        except Exception as error:  # noqa: BLE001 - nobody else would see it
            _log.exception("nobody watches the api_server any more")
            self._down = ActorLostError(f"raylm could not watch the api_server: {error!r}; its actor is replaced")

    async def _keep_running(self) -> None:
        deaths: deque[float] = deque(maxlen=_MAX_DEATHS)
        while self._server is not None:
            server = self._server
            what = await self._trouble(server)
            deaths.append(time.monotonic())
            self._down = UpstreamError(f"the api_server {what}; it is being started again")
            _log.error("the api_server %s; it is started again. %s", what, server.last_words)
            await self._stop_server()
            if len(deaths) == _MAX_DEATHS and deaths[-1] - deaths[0] < _DEATHS_S:
                self._down = ActorLostError(
                    f"the api_server {what}, for the second time in {deaths[-1] - deaths[0]:.0f} s; its actor is "
                    f"replaced. {server.last_words}"
                )
                return
            try:
                server, _ = await self._start_server(num_failures=1)
            except RaylmError as error:
                self._down = ActorLostError(f"the api_server {what}, and does not start again: {error}")
                return
            self._run(server)

    async def _trouble(self, server: _Server) -> str:
        """Wait until a server is dead or hangs; return which."""
        client = server.client
        if client is None:
            raise AssertionError("unreachable: a server that runs has a client")
        good_at = time.monotonic()
        while True:
            await asyncio.wait([server.ended], timeout=_PING_S)
            if server.ended.done():
                return f"ended with {server.status}"
            try:
                async with asyncio.timeout(_HANG_S):
                    await client.check_health()
                good_at = time.monotonic()
            except (UpstreamError, TimeoutError) as error:
                if time.monotonic() - good_at > _HANG_S:
                    return f"gave no sign of health for {_HANG_S:g} s ({error or 'silence'})"

    async def generate(self, request: Request, emit: Emit) -> None:
        """Generate one request. See `HTTPEngine.generate`.

        Raises:
            ActorLostError: the server has died for good.
        """
        client = self._client()
        try:
            await client.generate(request, emit)
        except EngineError:
            self._client()  # says what the server died of, if its client was closed before the request has met its end
            raise

    async def tokenize(self, request: Request) -> tuple[int, ...]:
        """Return the ids of the prompt's tokens. See `HTTPEngine.tokenize`.

        Raises:
            ActorLostError: the server has died for good.
        """
        return await self._client().tokenize(request)

    async def check_health(self) -> None:
        """Return when the server says that it works.

        Raises:
            ActorLostError: the server has died for good.
            UpstreamError: it does not work, or is being started again.
            EngineError: the engine has not started, or was closed.
        """
        await self._client().check_health()

    def statistics(self) -> EngineStatistics:
        """Return the load."""
        client = self._server.client if self._server is not None else None
        if client is None:
            return EngineStatistics(num_running=0, num_tokens=self._num_tokens)
        current = client.statistics()
        return msgspec.structs.replace(current, num_tokens=current.num_tokens + self._num_tokens)

    async def close(self) -> None:
        """Stop the server. Requests that still run fail with EngineError."""
        self._down = _not_running()
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            await asyncio.wait([watching])
        if self._server is not None and self._server.client is not None:
            await self._server.client.close()
        await self._stop_server(in_order=True)

    async def _stop_server(self, *, in_order: bool = False) -> None:
        server = self._server
        if server is not None:
            await server.stop(in_order=in_order)
            if server.client is not None:
                self._num_tokens += server.client.statistics().num_tokens
            self._server = None

    def _client(self) -> HTTPEngine:
        if self._down is not None:
            raise type(self._down)(self._down.message)  # a copy: an exception collects the traceback of each raise
        if self._server is None or self._server.client is None:
            raise AssertionError("unreachable: an engine that is not down has a server with a client")
        return self._server.client


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def restart_pause_s(num_failures: int) -> float:
    """Return the pause before a start when the last `num_failures` servers have died or did not start."""
    return min(_RESTART_S * 2 ** (num_failures - 1), _MAX_RESTART_S) if num_failures else 0.0


def arguments(config: APIServerConfig) -> list[str]:
    """Return the arguments of `lmdeploy serve api_server`, without model and address.

    Raises:
        InvalidRequestError: an option has a setting of its own.
    """
    named: dict[str, Any] = {
        "backend": config.backend,
        "device": None if config.device == "cuda" else config.device,
        "model_name": config.model_name or model_name(config.path),
        "tp": config.tp,
        "session_len": config.session_len,
        "max_batch_size": config.max_batch_size,
        "cache_max_entry_count": config.cache_share,
        "quant_policy": config.quant_policy or None,
        "dtype": config.dtype,
        "model_format": config.model_format,
        "enable_prefix_caching": config.prefix_caching,
        "api_keys": config.api_key,
    }
    if taken := sorted({*named, "server_name", "server_port"} & config.options.keys()):
        raise InvalidRequestError(f"options: {', '.join(taken)} has a setting of its own; set that")
    # For the PyTorch engine, which a server takes where TurboMind lacks the model. TurboMind passes both over.
    # Source: lmdeploy 0.18.0, `lmdeploy.cli.serve.SubCliServe.api_server`.
    defaults = {"logprobs_mode": "raw_logprobs"}  # without a mode it tells none
    if config.tp > 1:
        # Its default, Ray, would ask this actor's cluster for GPUs that this actor holds.
        named["distributed_executor_backend"] = "mp"
    found = []
    for name, value in {**defaults, **named, **config.options}.items():
        flag = _flag(name)
        if value is True:
            found.append(flag)
        elif isinstance(value, dict):
            found += [flag, msgspec.json.encode(value).decode()]
        elif isinstance(value, list | tuple):
            found += [flag, *map(str, value)]
        elif value is not None and value is not False:
            found += [flag, str(value)]
    return found


def url_of(host: str, port: int) -> str:
    """Return where a server on this machine that listens on `host` is reached."""
    reachable = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def listen_address(config: APIServerConfig) -> tuple[str, int]:
    """Return where the server is to listen.

    Raises:
        EngineStartError: the port is taken; the text says by whom.
    """
    host, port = config.server_name, config.server_port or free_port()
    if config.server_port == 0 and host == "0.0.0.0":  # noqa: S104
        host = "127.0.0.1"
    if why := refusal(host, port):
        raise EngineStartError(
            f"the api_server cannot listen on {host}:{port} ({why}); end that, or set "
            "server_port to another one, or to 0 for any that is free"
        )
    return host, port


async def _listens(host: str, port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


def new_log(port: int) -> Path:
    """Return an empty file for a server's log. The oldest ones are removed, but for those of servers that run.

    Raises:
        EngineStartError: the cache folder cannot be written.
    """
    folder = cache_folder() / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time_ns()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now // 10**9))
        log = folder / f"api_server-{stamp}.{now % 10**9:09d}-port-{port}.log"
        log.touch(mode=0o600, exist_ok=False)
        for old in sorted(folder.glob("api_server-*.log"))[:-_MAX_LOGS]:
            _remove_unless_locked(old)
    except OSError as error:
        raise EngineStartError(f"cannot keep a log in {folder}: {error}; set RAYLM_CACHE to a folder") from error
    return log


def _remove_unless_locked(log: Path) -> None:
    with contextlib.suppress(OSError), log.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        log.unlink()


def _not_running() -> EngineError:
    return EngineError("the engine is not running: it has not started, or was closed; start it")
