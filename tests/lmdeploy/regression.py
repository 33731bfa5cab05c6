"""Regression set of `lmdeploy_cpu`, against transformers: make test-lmdeploy-regression. To run before a new lmdeploy.

Every case is a greedy generation that must be token for token that of transformers. Not named like a test, so that
`make test-lmdeploy`, which is for every day, passes it over.
"""

import asyncio
from pathlib import Path

import pytest

from raylm.engines.lmdeploy import LMDeployEngine
from tests.engines.conftest import make_request, run_all

from .conftest import make_tiny_model, on_cpu, transformers_answers
from .reference import NUM_TOKENS

pytestmark = [pytest.mark.timeout(600)]

TOPICS = ["the sea", "an old clock", "two brothers", "the last train", "a garden", "winter", "a letter", "the moon"]
SHORT = [f"This is a story about {topic}." for topic in TOPICS]
LONG = ["It was raining, and nobody was in the street. " * 20 + prompt for prompt in SHORT]


async def tokens(prompts: list[str], path: str, **settings: object) -> list[list[int]]:
    """Return what lmdeploy generates for prompts, twice, which has to be the same."""
    engine = LMDeployEngine(on_cpu(path, **settings))
    await engine.start()
    requests = [make_request(prompt, max_new_tokens=NUM_TOKENS) for prompt in prompts]
    first, second = await run_all(engine, requests), await run_all(engine, requests)
    await engine.close()
    assert [record.token_ids for record in first] == [record.token_ids for record in second]
    return [record.token_ids for record in first]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefix_caching": True},
        {"options": {"num_gpu_blocks": 160, "max_prefill_token_num": 64}},
        {"options": {"num_gpu_blocks": 640, "block_size": 16}},
        {"options": {"num_gpu_blocks": 20}},
    ],
    ids=["batch", "prefix-caching", "chunked-prefill", "small-blocks", "little-memory"],
)
async def test_scheduling(settings: dict[str, object], model_folder: str) -> None:
    """However prompts share a batch, a cache and a prefill, the tokens are those of transformers."""
    prompts = SHORT + LONG[:4]
    expected = await asyncio.to_thread(transformers_answers, model_folder, prompts)
    assert await tokens(prompts, model_folder, **settings) == expected


@pytest.mark.parametrize("architecture", ["llama", "llama3-rope", "qwen2", "qwen3"])
async def test_architecture(architecture: str, tmp_path: Path) -> None:
    """A small model of each architecture generates what it does in transformers."""
    folder = make_tiny_model(architecture, tmp_path / architecture)
    prompts = SHORT[:4] + LONG[:1]
    expected = await asyncio.to_thread(transformers_answers, folder, prompts)
    assert await tokens(prompts, folder) == expected
