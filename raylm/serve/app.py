"""The Serve application: `raylm.serve:build_app` in a Serve config file, or `raylm serve`."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from ray import serve
from ray.serve import Application

from raylm import heap
from raylm.config import ServeConfig

_MAX_ONGOING_REQUESTS = 100_000
"""Of one gateway. The pool's `max_queued` is the limit: it knows what waits and what streams."""


def build_app(args: dict[str, Any] | None = None) -> Application:
    """Return the application that serves the models of a configuration.

    Deploying it again, with other settings, updates gateways and models without a lost request.

    Args:
        args: What is in the YAML file of a `ServeConfig`. None serves the built-in model on CPU.

    Raises:
        InvalidRequestError: a setting is unknown or wrong; the text names it.
    """
    config = ServeConfig.parse(args)
    return application(config, time.time_ns(), max(model.drain_timeout_s for model in config.models))


def application(config: ServeConfig, as_of: int, drain_s: float, *, local: bool = False) -> Application:
    """Return the application that serves a configuration.

    Args:
        config: What is served.
        as_of: When that was said, in nanoseconds since 1970. Models follow the latest.
        drain_s: How long a gateway that is to end has for its streams.
        local: It is for this machine alone.
    """

    def build() -> Any:
        from raylm.serve.gateway import build_gateway

        _log_to_stderr()
        heap.settle()
        return build_gateway(config, as_of, local=local)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="gateway",
        num_replicas=config.gateway.replicas,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
        graceful_shutdown_timeout_s=drain_s,
    )
    return deployment.bind()


def _log_to_stderr() -> None:
    """Have raylm's own log written, one JSON object a line, where Ray keeps what a worker prints."""
    from raylm.serve.door import JSONLines

    logger = logging.getLogger("raylm")
    if not any(isinstance(handler.formatter, JSONLines) for handler in logger.handlers):
        # Not sys.stderr: Serve has put a buffer of a thousand lines there, which is lost with the process.
        handler = logging.StreamHandler(sys.__stderr__)
        handler.setFormatter(JSONLines())
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
