"""The processes below an actor that runs lmdeploy's api_server.

    actor -> supervisor -> server, first of a process group -> whatever lmdeploy starts

The supervisor does nothing but wait, so nothing in a library can stop it. Its stdin is a pipe from the actor, and ends
when the actor does, `kill -9` included: then it kills the server's whole group, of which lmdeploy's engine process
would otherwise live on and keep its GPU. If the supervisor itself is killed, the kernel ends the server.

The supervisor reads a `Command` from its stdin, hands it to the server the same way, for an API key has no place in a
list of processes, and prints the server's process id.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from raylm.parent import end_with_parent


class Command(msgspec.Struct):
    """What the server is to run.

    Attributes:
        module: `lmdeploy`, or what runs its command line on another device.
        path: Model folder, or the GGUF file of a built-in model.
        arguments: Arguments of `lmdeploy serve api_server`, without the model.
        off: Options that are not among the arguments because they are off; that is no reason not to know them.
    """

    module: str
    path: str
    arguments: list[str]
    off: list[str] = []


def supervise() -> None:
    """Run the server until it ends or the actor does. Ends this process with the server's status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the actor, and that ends this
    command = sys.stdin.buffer.readline()
    server = subprocess.Popen(  # noqa: S603 - this module itself
        [sys.executable, "-P", "-m", "raylm.engines.api_server_child", "serve", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=sys.stderr,
        process_group=0,
    )
    print(server.pid, flush=True)  # noqa: T201
    threading.Thread(target=_kill_when_alone, args=[server.pid], daemon=True).start()
    with contextlib.suppress(BrokenPipeError):
        server.communicate(command)
    status = server.wait()
    _kill_group(server.pid)
    # Not `sys.exit`: the thread may be reading stdin.
    os._exit(status if status >= 0 else 128 - status)


def _kill_when_alone(group: int) -> None:
    while os.read(0, 4096):
        pass
    _kill_group(group)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def serve() -> None:
    """Run lmdeploy's command line in this process."""
    end_with_parent(int(sys.argv[2]))
    command = msgspec.json.decode(sys.stdin.buffer.read(), type=Command)
    path = command.path
    if Path(path).is_file():
        from raylm.engines.gguf import to_folder

        path = str(to_folder(Path(path)))
    # A misspelt option is an error, and not taken for the one that it is the beginning of.
    argparse.ArgumentParser.__init__ = functools.partialmethod(  # type: ignore[method-assign,assignment]
        argparse.ArgumentParser.__init__, allow_abbrev=False
    )
    _refuse_unknown(command.off)
    if find_spec("lmdeploy") is not None:  # something else may stand in for it
        from raylm.engines.lmdeploy_worker import mend_server

        mend_server()
    sys.argv[1:] = ["serve", "api_server", path, *command.arguments]
    runpy.run_module(command.module, run_name="__main__", alter_sys=True)


def _refuse_unknown(options: Sequence[str]) -> None:
    """Have the server's command line refuse these options where it does not know them, as it does with arguments."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self: Any, *arguments: Any, **named: Any) -> Any:
        known = self._option_string_actions
        if "--server-port" in known and (unknown := [option for option in options if option not in known]):
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parse(self, *arguments, **named)

    argparse.ArgumentParser.parse_known_args = parse_known_args  # type: ignore[method-assign]


if __name__ == "__main__":
    serve() if sys.argv[1:2] == ["serve"] else supervise()
