"""The four classes on their real back ends: lagent's examples of them, and their forms for asyncio.

All of them answer with the same model, and greedily, so that they have to say what transformers says.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from raylm import (
    CHATML_META,
    INTERNLM2_META,
    AsyncChatbot,
    AsyncLMDeployClient,
    AsyncLMDeployPipeline,
    AsyncLMDeployServer,
    AsyncTritonClient,
    Status,
)
from raylm.actors.cluster import connect
from raylm.template import MetaTemplate, parse_messages
from tests.engines.conftest import MODEL
from tests.engines.triton_server import TritonServer

from .conftest import Server, on_cpu, server_on_cpu, transformers_texts
from .reference import NUM_TOKENS

pytestmark = pytest.mark.timeout(300)

EXAMPLES = Path("docs/guides/seed_examples")
SYSTEM = (
    "You are InternLM (书生·浦语), a helpful, honest, and harmless AI assistant developed by Shanghai AI Laboratory "
    "(上海人工智能实验室)."
)
PROMPTS = ["The old lighthouse", "In 1969"]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ASKED = {
    "example": "hello",
    "example of stream_chat": MetaTemplate.parse(INTERNLM2_META).render(
        parse_messages([{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hello"}])
    ),
    **{prompt: prompt for prompt in PROMPTS},
    "stream_chat": MetaTemplate.parse(CHATML_META).render(parse_messages(QUESTION)),
}

LESS = {"max_new_tokens=2048": f"max_new_tokens={NUM_TOKENS}", "temperature=0.8": "temperature=0"}
"""What is changed in an example."""

Expected = dict[str, str]


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    """A Ray cluster for the tests here, and not longer: other files look at all processes below this one."""
    started = connect("local")
    yield
    if started:
        ray.shutdown()


@pytest.fixture(scope="module")
def expected(model_folder: str) -> Expected:
    """What transformers generates for the prompts in `ASKED`."""
    return dict(zip(ASKED, transformers_texts(model_folder, list(ASKED.values())), strict=True))


@pytest.mark.parametrize("name", ["lmdeploy_pipeline", "lmdeploy_server", "lmdeploy_client", "triton_client"])
def test_example(name: str, server: Server, triton: TritonServer, expected: Expected) -> None:
    """An example, asked for fewer tokens and for the likeliest ones, prints what transformers generates."""
    code = (EXAMPLES / f"{name}.py").read_text()
    for asked, instead in LESS.items():
        assert asked in code
        code = code.replace(asked, instead)
    found = {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "API_SERVER": f"http://{server.address}",
        "TRITON": triton.address,
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **found}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{expected['example']}\n")
    if "stream_chat" in code:
        assert done.stdout.endswith(f"\n{expected['example of stream_chat']}\n")


Make = Callable[[Server, TritonServer], AsyncChatbot]
GREEDY = {"meta_template": CHATML_META, "max_new_tokens": NUM_TOKENS, "temperature": 0}
FACES: dict[str, Make] = {
    "pipeline": lambda _server, _triton: AsyncLMDeployPipeline(MODEL, backend_config=on_cpu(), **GREEDY),
    "server": lambda _server, _triton: AsyncLMDeployServer(
        MODEL, server_port=0, backend_config=server_on_cpu(), **GREEDY
    ),
    "client": lambda server, _triton: AsyncLMDeployClient(f"http://{server.address}", **GREEDY),
    "triton": lambda _server, triton: AsyncTritonClient(triton.address, "relay", **GREEDY),
}


@pytest.mark.parametrize("face", FACES)
async def test_form_for_asyncio(face: str, server: Server, triton: TritonServer, expected: Expected) -> None:
    """A list of prompts and a streamed chat have the text that transformers generates."""
    async with FACES[face](server, triton) as chatbot:
        texts = await chatbot.generate(PROMPTS, timeout=None)
        *_, (status, text, _) = [step async for step in chatbot.stream_chat(QUESTION, timeout=None)]
    assert texts == [expected[prompt] for prompt in PROMPTS]
    assert (status, text) == (Status.END, expected["stream_chat"])
