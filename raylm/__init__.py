"""A Ray cluster as one pool of LLM inference actors.

Names are imported when they are first used, so that `import raylm` loads neither Ray nor an engine: an engine's own
process needs its messages alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raylm._version import __version__ as __version__

if TYPE_CHECKING:
    from raylm.api import AsyncLMDeployClient as AsyncLMDeployClient
    from raylm.api import AsyncLMDeployPipeline as AsyncLMDeployPipeline
    from raylm.api import AsyncLMDeployServer as AsyncLMDeployServer
    from raylm.api import AsyncTritonClient as AsyncTritonClient
    from raylm.api import LMDeployClient as LMDeployClient
    from raylm.api import LMDeployPipeline as LMDeployPipeline
    from raylm.api import LMDeployServer as LMDeployServer
    from raylm.api import ServedModel as ServedModel
    from raylm.api import TritonClient as TritonClient
    from raylm.api import connect as connect
    from raylm.batch import run_batch as run_batch
    from raylm.chatbot import AsyncChatbot as AsyncChatbot
    from raylm.chatbot import AsyncServedModel as AsyncServedModel
    from raylm.chatbot import Chatbot as Chatbot
    from raylm.config import APIServerConfig as APIServerConfig
    from raylm.config import EngineConfig as EngineConfig
    from raylm.config import Fault as Fault
    from raylm.config import HTTPConfig as HTTPConfig
    from raylm.config import LMDeployConfig as LMDeployConfig
    from raylm.config import OpenVINOConfig as OpenVINOConfig
    from raylm.config import PoolConfig as PoolConfig
    from raylm.config import ServeConfig as ServeConfig
    from raylm.config import SessionConfig as SessionConfig
    from raylm.config import SimulatedConfig as SimulatedConfig
    from raylm.config import TritonConfig as TritonConfig
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
    "APIServerConfig": "raylm.config",
    "AsyncChatbot": "raylm.chatbot",
    "AsyncLMDeployClient": "raylm.api",
    "AsyncLMDeployPipeline": "raylm.api",
    "AsyncLMDeployServer": "raylm.api",
    "AsyncServedModel": "raylm.chatbot",
    "AsyncTritonClient": "raylm.api",
    "CHATML_META": "raylm.template",
    "Chatbot": "raylm.chatbot",
    "Completion": "raylm.messages",
    "EngineConfig": "raylm.config",
    "Fault": "raylm.config",
    "GenerationConfig": "raylm.messages",
    "HTTPConfig": "raylm.config",
    "INTERNLM2_META": "raylm.template",
    "LMDeployClient": "raylm.api",
    "LMDeployConfig": "raylm.config",
    "LMDeployPipeline": "raylm.api",
    "LMDeployServer": "raylm.api",
    "Message": "raylm.messages",
    "OpenVINOConfig": "raylm.config",
    "Pool": "raylm.pool",
    "PoolConfig": "raylm.config",
    "RaylmError": "raylm.errors",
    "Receipt": "raylm.messages",
    "Request": "raylm.messages",
    "ServeConfig": "raylm.config",
    "ServedModel": "raylm.api",
    "SessionConfig": "raylm.config",
    "SimulatedConfig": "raylm.config",
    "Status": "raylm.messages",
    "TritonClient": "raylm.api",
    "TritonConfig": "raylm.config",
    "Usage": "raylm.messages",
    "connect": "raylm.api",
    "run_batch": "raylm.batch",
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raylm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
