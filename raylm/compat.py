"""What the installed lmdeploy has of the interfaces that the seed's classes were written for, and what raylm does.

lmdeploy's files are read, not imported: importing it loads PyTorch and takes seconds.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

Found = Callable[[Path], bool]


@dataclass(frozen=True)
class Interface:
    """One interface of lmdeploy.

    Attributes:
        name: As its users write it.
        used_by: Which of the seed's classes stood on it.
        instead: What raylm does, whether it is there or not.
        found: Looks for it in lmdeploy's folder.
    """

    name: str
    used_by: str
    instead: str
    found: Found


@dataclass(frozen=True)
class Finding:
    """Whether the installed lmdeploy has an interface; `present` is None where no lmdeploy is installed."""

    interface: Interface
    present: bool | None


def _function(file: str, name: str, *parameters: str) -> Found:
    """Look for a function that does more than raise, with all of these parameters."""

    def found(folder: Path) -> bool:
        for node in _walk(folder / file):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                arguments = node.args
                names = {argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
                body = [statement for statement in node.body if not isinstance(statement, ast.Expr)]
                raises = len(body) == 1 and isinstance(body[0], ast.Raise)
                return not raises and names.issuperset(parameters)
        return False

    return found


def _class(file: str, name: str) -> Found:
    return lambda folder: any(isinstance(node, ast.ClassDef) and node.name == name for node in _walk(folder / file))


def _route(path: str) -> Found:
    def found(folder: Path) -> bool:
        files = (folder / "serve/openai").rglob("*.py")
        return any(isinstance(node, ast.Constant) and node.value == path for file in files for node in _walk(file))

    return found


def _walk(file: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(file.read_text(encoding="utf-8")))) if file.is_file() else []


INTERFACES = (
    Interface(
        "lmdeploy.pipeline(path)",
        "LMDeployPipeline",
        "AsyncEngine in a child of the actor, so that health is answered while it computes",
        _function("api.py", "pipeline"),
    ),
    Interface(
        "AsyncEngine.preprocess, generate(request)",
        "LMDeployPipeline",
        "used as it is",
        _function("serve/core/async_engine.py", "preprocess"),
    ),
    Interface(
        "AsyncEngine.generate(session_id, sequence_start, sequence_end, step)",
        "LMDeployPipeline",
        "the session store keeps the transcript and sends it whole; prefix caching makes that cheap",
        _function("serve/core/async_engine.py", "generate", "session_id", "sequence_start", "sequence_end", "step"),
    ),
    Interface(
        "lmdeploy.serve(path)",
        "LMDeployServer",
        "`lmdeploy serve api_server` as a child process of the actor",
        _function("api.py", "serve"),
    ),
    Interface("lmdeploy.client(url)", "LMDeployClient", "an HTTP client of raylm's own", _function("api.py", "client")),
    Interface(
        "lmdeploy.serve.openai.api_client.APIClient",
        "LMDeployServer, LMDeployClient",
        "an HTTP client of raylm's own, for lmdeploy from 0.4 on and for OpenAI's protocol",
        _class("serve/openai/api_client.py", "APIClient"),
    ),
    Interface(
        "POST /v1/chat/interactive",
        "LMDeployServer, LMDeployClient",
        "the session store keeps the transcript; messages go to /v1/chat/completions, and here at servers before 0.5, "
        "without their sessions; raw prompts go to /v1/completions, and at 0.18 to /generate",
        _route("/v1/chat/interactive"),
    ),
    Interface(
        "lmdeploy.serve.turbomind.chatbot.Chatbot",
        "TritonClient",
        "a gRPC client of raylm's own, for TurboMind repositories and three other kinds of model",
        _class("serve/turbomind/chatbot.py", "Chatbot"),
    ),
)
"""In the order of the seed's classes. Source: lmdeploy 0.4.2 and 0.18.0, lagent 0.2 `lagent.llms.lmdepoly_wrapper`."""


def installed_version() -> str | None:
    """Return the version of the installed lmdeploy, or None."""
    try:
        return version("lmdeploy")
    except PackageNotFoundError:
        return None


def examine() -> list[Finding]:
    """Look for each of `INTERFACES` in the installed lmdeploy."""
    spec = find_spec("lmdeploy")
    if spec is None or spec.origin is None:
        return [Finding(interface, None) for interface in INTERFACES]
    folder = Path(spec.origin).parent
    return [Finding(interface, interface.found(folder)) for interface in INTERFACES]
