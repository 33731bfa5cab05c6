"""A Ray cluster as one pool of LLM inference actors.

Names are imported when they are first used, so that `import raylm` loads neither Ray nor an engine: an engine's own
process needs its messages alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raylm._version import __version__ as __version__

if TYPE_CHECKING:
    from raylm.api import AsyncLMDeployPipeline as AsyncLMDeployPipeline
    from raylm.api import LMDeployPipeline as LMDeployPipeline
    from raylm.config import EngineConfig as EngineConfig
    from raylm.config import Fault as Fault
    from raylm.config import OpenVINOConfig as OpenVINOConfig
    from raylm.config import PoolConfig as PoolConfig
    from raylm.config import SessionConfig as SessionConfig
    from raylm.config import SimulatedConfig as SimulatedConfig
    from raylm.errors import RaylmError as RaylmError
    from raylm.messages import Completion as Completion
    from raylm.messages import GenerationConfig as GenerationConfig
    from raylm.messages import Message as Message
    from raylm.messages import Receipt as Receipt
    from raylm.messages import Request as Request
    from raylm.messages import Status as Status
    from raylm.messages import Usage as Usage
    from raylm.pool import Pool as Pool
    from raylm.template import CHATML_META as CHATML_META
    from raylm.template import INTERNLM2_META as INTERNLM2_META

_HOMES = {
    "AsyncLMDeployPipeline": "raylm.api",
    "CHATML_META": "raylm.template",
    "Completion": "raylm.messages",
    "EngineConfig": "raylm.config",
    "Fault": "raylm.config",
    "GenerationConfig": "raylm.messages",
    "INTERNLM2_META": "raylm.template",
    "LMDeployPipeline": "raylm.api",
    "Message": "raylm.messages",
    "OpenVINOConfig": "raylm.config",
    "Pool": "raylm.pool",
    "PoolConfig": "raylm.config",
    "RaylmError": "raylm.errors",
    "Receipt": "raylm.messages",
    "Request": "raylm.messages",
    "SessionConfig": "raylm.config",
    "SimulatedConfig": "raylm.config",
    "Status": "raylm.messages",
    "Usage": "raylm.messages",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raylm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
