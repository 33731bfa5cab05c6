"""The engines: what turns one `Request` into `Delta`s. Plain asyncio, no Ray."""

from __future__ import annotations

from raylm.config import APIServerConfig, EngineConfig, HTTPConfig, LMDeployConfig, OpenVINOConfig, TritonConfig
from raylm.engines.base import Engine


def build(config: EngineConfig) -> Engine:
    """Return the engine that `config` describes, not started.

    Engines are imported here, where they run: a driver needs none of their libraries.
    """
    if isinstance(config, LMDeployConfig):
        from raylm.engines.lmdeploy import LMDeployEngine

        return LMDeployEngine(config)
    if isinstance(config, APIServerConfig):
        from raylm.engines.api_server import APIServerEngine

        return APIServerEngine(config)
    if isinstance(config, HTTPConfig):
        from raylm.engines.http import HTTPEngine

        return HTTPEngine(config)
    if isinstance(config, TritonConfig):
        from raylm.engines.triton import TritonEngine

        return TritonEngine(config)
    if isinstance(config, OpenVINOConfig):
        from raylm.engines.openvino import OpenVINOEngine

        return OpenVINOEngine(config)
    from raylm.engines.simulated import SimulatedEngine

    return SimulatedEngine(config)
