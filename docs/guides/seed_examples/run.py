"""Runs lagent's examples, each in a process of its own, and writes what they print to `../seed-examples.md`.

From the root of the repository, with the virtual environment of `make test-lmdeploy`, on a machine without GPU. There is
no OpenVINO in it, so that `LMDeployPipeline` takes lmdeploy's PyTorch engine by itself.

    .venv-lmdeploy/bin/python -m docs.guides.seed_examples.run

The Triton server is a real one; its model is the toy of the tests, which speaks like vLLM's back end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from raylm import LMDeployServer
from tests.engines.triton_server import TritonServer

HERE = Path(__file__).parent
FIRST, LAST = 20, 10
"""Lines of a long output that are shown, from its beginning and from its end."""

HEAD = """# lagent's examples, as they run

raylm's four classes have the interface of lagent's classes for lmdeploy. Here are lagent's own examples of them: only imports,
paths, addresses and names of models are changed. What follows each is what it printed, a long output without its middle.
`stream_chat` yields the text so far, and the examples print it each time.

SmolLM2-135M-Instruct is a small model, here on lmdeploy's PyTorch engine on CPU, and the Triton server has a toy for a model:
the answers are no better than that. `.venv-lmdeploy/bin/python -m docs.guides.seed_examples.run` makes this page anew.
"""


def run(name: str, environment: Mapping[str, str]) -> str:
    """Run one example and return its part of the page."""
    file = HERE / f"{name}.py"
    result = subprocess.run(  # noqa: S603 - our own examples
        [sys.executable, str(file)], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    )
    return f"\n## {name}.py\n\n```python\n{file.read_text()}```\n\n````text\n{shortened(result.stdout)}````\n"


def shortened(output: str) -> str:
    """Return an output without its middle, where it is long."""
    lines = output.splitlines(keepends=True)
    left_out = len(lines) - FIRST - LAST
    if left_out <= 1:
        return output
    return "".join([*lines[:FIRST], f"… {left_out:,} lines like these …\n", *lines[-LAST:]])


@contextmanager
def api_server() -> Iterator[str]:
    """Run an lmdeploy api_server; yields its address."""
    with LMDeployServer("smollm2-135m-instruct", server_name="127.0.0.1", server_port=0, address="local") as server:
        yield server.statistics().slots[0].device.rpartition(" ")[2]


def main() -> None:
    """Run all four."""
    with TritonServer(models=["vllm"]) as triton:
        parts = [run("triton_client", {"TRITON": triton.address})]
    parts += [run("lmdeploy_pipeline", {}), run("lmdeploy_server", {})]
    with api_server() as url:
        parts.append(run("lmdeploy_client", {"API_SERVER": url}))
    (HERE.parent / "seed-examples.md").write_text(HEAD + "".join(parts))


if __name__ == "__main__":
    main()
