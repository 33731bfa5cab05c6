"""What `APIServerEngine` starts in place of lmdeploy where lmdeploy is not installed: the toy server as a process.

It takes some of the arguments of `lmdeploy serve api_server`, has a child of its own as lmdeploy has, and does what the
name of its model says: `dies` while it loads, `hangs` while it loads, or serves.
"""

import argparse
import asyncio
import os
import subprocess
import sys
from pathlib import Path

from tests.engines.http_server import Toy


async def serve(host: str, port: int, name: str, api_key: str | None) -> None:
    """Serve until this process is killed. Slowly: what a test breaks off does not end by itself before."""
    async with Toy(model=name, api_key=api_key, tokens_per_s=20).running(port, host=host):
        await asyncio.Event().wait()


def main() -> None:
    """Run as `lmdeploy serve api_server` would."""
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs=3)
    parser.add_argument("--server-name")
    parser.add_argument("--server-port", type=int)
    parser.add_argument("--model-name")
    parser.add_argument("--api-keys")
    for flag in ("--backend", "--tp", "--session-len", "--max-batch-size", "--dtype", "--logprobs-mode", "--log-level"):
        parser.add_argument(flag)
    parser.add_argument("--enable-prefix-caching", action="store_true")
    arguments = parser.parse_args()
    model = Path(arguments.words[2])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with (model / "pids").open("a") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    if model.name == "dies":
        sys.exit("no weights in this folder")
    if model.name == "hangs":
        child.wait()
    asyncio.run(serve(arguments.server_name, arguments.server_port, arguments.model_name, arguments.api_keys))


if __name__ == "__main__":
    main()
