"""The HTTP endpoint: a Ray Serve application of gateways."""

from typing import Any


def build_app(args: dict[str, Any] | None = None) -> Any:
    """Return the Serve application of a configuration. See `raylm.serve.app.build_app`."""
    from raylm.serve.app import build_app

    return build_app(args)
