"""What the lmdeploy engine promises beyond the conformance suite."""

import asyncio
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from raylm.config import LMDeployConfig
from raylm.engines.lmdeploy import LMDeployEngine
from raylm.errors import ActorLostError, ContextLengthError, EngineStartError, InvalidRequestError
from raylm.messages import Generated, Message, Request
from tests.engines.conftest import Record, ask, check_special_stop_word, make_request, run, run_all, until
from tests.engines.test_api_server import gone

from .conftest import on_cpu, transformers_answers
from .reference import NUM_TOKENS

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

STORY = "Once upon a time"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[LMDeployEngine]:
    """An engine, started once."""
    engine = LMDeployEngine(on_cpu())
    await engine.start()
    yield engine
    await engine.close()


def children() -> list[psutil.Process]:
    """Return all processes below this one."""
    return psutil.Process().children(recursive=True)


async def new_child(before: list[psutil.Process]) -> psutil.Process:
    """Wait for one more child, and return it."""
    await until(lambda: len(children()) > len(before))
    return next(child for child in children() if child not in before)


async def test_greedy_tokens_are_those_of_transformers(engine: LMDeployEngine, model_folder: str) -> None:
    """Twenty prompts in batches give the tokens that transformers gives them one by one."""
    subjects = ["The old lighthouse", "My neighbour's cat", "In 1969", "def fibonacci(n):", "Dear Sir or Madam,"]
    ends = ["", " and the sea", " - chapter 2:", " 😀"]
    prompts = [subject + end for subject in subjects for end in ends]
    expected = await asyncio.to_thread(transformers_answers, model_folder, prompts)
    records = await run_all(engine, [make_request(prompt, max_new_tokens=NUM_TOKENS) for prompt in prompts])
    assert [record.token_ids for record in records] == expected


async def test_end_of_sequence_counts_and_does_not_show(engine: LMDeployEngine) -> None:
    """The token that ends the sequence is counted and told, and special tokens have no text."""
    record = await run(engine, make_request(ask("What is the capital of France?"), logprobs=True))
    assert record.finish_reason == "stop"
    assert record.token_ids[-1] == 2
    assert record.usage.completion_tokens == len(record.token_ids) == sum(len(d.logprobs) for d in record.deltas)
    assert record.text == "The capital of France is Paris."


@pytest.mark.parametrize("ignore_eos", [False, True])
async def test_stop_word_that_is_a_special_token(engine: LMDeployEngine, ignore_eos: bool) -> None:
    """A stop word without text, which a special token is, ends the text and the work, of a continued answer too."""
    await check_special_stop_word(engine, ignore_eos=ignore_eos)


async def test_stop_word_of_several_tokens_ends_the_work(engine: LMDeployEngine) -> None:
    """Stop words of several tokens, which lmdeploy passes over, end the text, and the work inside the engine."""
    text = (await run(engine, make_request(STORY, max_new_tokens=24, ignore_eos=True))).text
    before = engine.statistics().num_tokens
    record = await run(engine, make_request(STORY, max_new_tokens=900, ignore_eos=True, stop_words=[text[20:60]]))
    assert (record.text, record.finish_reason) == (text[:20], "stop")
    await until(lambda: engine.statistics().num_running == 0)
    assert engine.statistics().num_tokens - before < 100


async def test_continuation_without_token_ids(engine: LMDeployEngine) -> None:
    """Text alone is enough to continue."""
    whole = await run(engine, make_request(STORY, max_new_tokens=16, ignore_eos=True))
    part = whole.generated(9)
    rest = await run(
        engine, make_request(STORY, Generated(part.text, [], part.num_tokens), max_new_tokens=16, ignore_eos=True)
    )
    assert part.text + rest.text == whole.text
    assert rest.usage == whole.usage


async def test_presence_and_frequency_penalty(engine: LMDeployEngine) -> None:
    """A text that repeats a token over and over does so less with either, and is continued as if undisturbed."""
    prompt = "Count: one, one, one, one, one, one,"
    penalties: list[dict[str, float]] = [{}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}]
    requests = [make_request(prompt, max_new_tokens=32, ignore_eos=True, **penalty) for penalty in penalties]
    plain, presence, frequency = records = await run_all(engine, requests)
    assert plain.text.count("one") == 16
    assert presence.text.count("one") < 12
    assert frequency.text.count("one") < 6
    for penalty, whole in zip(penalties, records, strict=True):
        part = whole.generated(20)
        rest = await run(engine, make_request(prompt, part, max_new_tokens=32, ignore_eos=True, **penalty))
        assert part.text + rest.text == whole.text


async def test_samples_without_seed_differ(engine: LMDeployEngine) -> None:
    """Without a seed each request gets one of its own."""
    request = make_request(STORY, max_new_tokens=16, temperature=1.0, top_p=1.0, top_k=None)
    records = await run_all(engine, [request] * 4)
    assert len({record.text for record in records}) == 4


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (make_request((Message("user", "Hi"), Message("environment", "x"))), "environment"),
        (make_request("a lone surrogate: \ud800"), "Unicode"),
        (Request(request_id="neither"), "empty"),
        (make_request(STORY, temperature=2.5), "temperature"),
        (make_request(STORY, Generated("", [10**6], 1)), "token ids"),
        (make_request((504, 10**6)), "prompt_token_ids: 1000000 is no token"),
    ],
    ids=["role", "unicode", "neither", "temperature", "token-id", "prompt-token-id"],
)
async def test_invalid_requests(engine: LMDeployEngine, request_: Request, named: str) -> None:
    """What lmdeploy would pass over in silence, or die of, is an error that names it, and the engine goes on."""
    with pytest.raises(InvalidRequestError, match=named):
        await run(engine, request_)
    await until(lambda: engine.statistics().num_running == 0)
    assert (await run(engine, make_request(STORY, max_new_tokens=2))).text


async def test_prefix_cache() -> None:
    """With prefix caching a prompt is read once; the second answer is the same and says what was in the cache."""
    engine = LMDeployEngine(on_cpu(prefix_caching=True))
    await engine.start()
    request = make_request("A long story about the sea. " * 40, max_new_tokens=8)
    first, second = await run(engine, request), await run(engine, request)
    await engine.close()
    assert second.token_ids == first.token_ids
    assert (first.usage.cached_tokens, second.usage.prompt_tokens) == (0, first.usage.prompt_tokens)
    assert 64 <= second.usage.cached_tokens < second.usage.prompt_tokens


async def test_small_cache() -> None:
    """A KV cache that holds less than the session length limits the context, and the engine says so."""
    engine = LMDeployEngine(on_cpu(options={"num_gpu_blocks": 17, "block_size": 16}))
    info = await engine.start()
    assert info.max_context == 240
    record = await run(engine, make_request(STORY, max_new_tokens=900, ignore_eos=True))
    assert record.finish_reason == "length"
    assert record.usage.prompt_tokens + record.usage.completion_tokens == 240
    with pytest.raises(ContextLengthError, match="240"):
        await run(engine, make_request("word " * 300))
    await engine.close()


async def test_killed_child() -> None:
    """A child that dies fails what runs with ActorLostError, and the engine says so from then on."""
    before = children()
    engine = LMDeployEngine(on_cpu())
    await engine.start()
    child = await new_child(before)
    record = Record()
    task = asyncio.create_task(engine.generate(make_request(STORY, max_new_tokens=900, ignore_eos=True), record.emit))
    await record.wait()
    child.kill()
    with pytest.raises(ActorLostError, match="SIGKILL"):
        await task
    with pytest.raises(ActorLostError, match="SIGKILL"):
        await engine.check_health()
    assert engine.statistics().num_running == 0
    await engine.close()
    assert children() == before


async def test_failing_forward_pass() -> None:
    """An exception in a forward pass, which lmdeploy's engine does not survive, is ActorLostError and no empty text."""
    before = children()
    engine = LMDeployEngine(on_cpu())
    await engine.start()
    child = await new_child(before)
    child.rlimit(resource.RLIMIT_AS, (child.memory_info().vms, resource.RLIM_INFINITY))  # no byte more
    record = Record()
    with pytest.raises(ActorLostError, match="lmdeploy"):
        await engine.generate(make_request("word " * 900, max_new_tokens=8), record.emit)
    assert record.text == ""
    await engine.close()
    assert children() == before


async def test_child_that_dies_at_the_start_gets_a_successor() -> None:
    """A child that dies while it loads is followed by another one."""
    before = children()
    engine = LMDeployEngine(on_cpu(start_attempts=2))
    starting = asyncio.create_task(engine.start())
    (await new_child(before)).kill()
    await starting
    assert (await run(engine, make_request(STORY, max_new_tokens=2))).text
    await engine.close()
    assert children() == before


async def test_start_that_hangs() -> None:
    """A child that does not load in time is killed with all that it started, and so is its successor."""
    before = children()
    engine = LMDeployEngine(on_cpu(start_attempts=2, start_timeout_s=0.5))
    starting = asyncio.create_task(engine.start())
    (await new_child(before)).send_signal(signal.SIGSTOP)
    with pytest.raises(EngineStartError, match=r"2 attempts.*0\.5 s; raise start_timeout_s"):
        await starting
    assert children() == before


LOADING = """
import asyncio
from raylm.engines.lmdeploy import LMDeployEngine
from tests.lmdeploy.conftest import on_cpu

async def main():
    await LMDeployEngine(on_cpu()).start()
    await asyncio.Event().wait()  # to be killed, however late that comes
asyncio.run(main())
"""


async def test_parent_killed_while_loading() -> None:
    """When the parent is killed in the middle of a start, its child does not outlive it."""
    parent = await asyncio.to_thread(subprocess.Popen, [sys.executable, "-c", LOADING])
    try:
        process = psutil.Process(parent.pid)
        await until(lambda: bool(process.children()))
        (child,) = process.children()
        await until(lambda: child.memory_info().rss > 200 * 2**20)  # it has come as far as lmdeploy's libraries
    finally:
        parent.kill()
        await asyncio.to_thread(parent.wait)
    await gone([child.pid], within_s=5)


async def fail_to_start(engine: LMDeployEngine) -> str:
    """Return why an engine does not start, and see that nothing is left of it."""
    before = set(children())
    with pytest.raises((EngineStartError, InvalidRequestError)) as caught:
        await engine.start()
    assert set(children()) <= before
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("broken", ["weights", "config"])
async def test_broken_model(broken: str, model_folder: str, tmp_path: Path) -> None:
    """A folder with half of the weights, or a config that is no JSON, is an EngineStartError that names the folder."""
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if broken == "weights":
        with (Path(model_folder) / "model.safetensors").open("rb") as whole:
            (folder / "model.safetensors").write_bytes(whole.read(10_000_000))
    else:
        (folder / "config.json").write_text("{")
    why = await fail_to_start(LMDeployEngine(on_cpu(str(folder))))
    assert why.startswith("EngineStartError: lmdeploy cannot load")
    assert str(folder) in why


async def test_model_that_turbomind_lacks(tmp_path: Path) -> None:
    """A model that TurboMind does not know is an EngineStartError that says which backend to take."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["UnknownForCausalLM"]}')
    why = await fail_to_start(LMDeployEngine(LMDeployConfig(path=str(tmp_path), start_attempts=1)))
    assert why.startswith("EngineStartError: lmdeploy's turbomind engine does not know the model")
    assert 'backend="pytorch"' in why


async def test_no_such_model(tmp_path: Path) -> None:
    """A path where nothing is raises EngineStartError."""
    why = await fail_to_start(LMDeployEngine(on_cpu(str(tmp_path / "missing"))))
    assert why.startswith("EngineStartError: no model")


async def test_gguf_file_of_the_users(tmp_path: Path) -> None:
    """A GGUF file is refused, with what to give instead."""
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"GGUF")
    assert "reads no GGUF" in await fail_to_start(LMDeployEngine(on_cpu(str(file))))


async def test_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little memory for a KV cache is an EngineStartError that says what to lower."""
    monkeypatch.setenv("LMDEPLOY_CPU_MEM_GB", "0.01")
    why = await fail_to_start(LMDeployEngine(on_cpu(options={})))
    assert why.startswith("EngineStartError")
    assert "lower cache_max_entry_count" in why


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_gpu_blcks": 40}, "'num_gpu_blcks'; it has num_gpu_blocks"),
        ({"tp": 2}, "'tp' follows from raylm's own settings"),
        ({"block_size": 17}, "kernel_block_size"),
    ],
)
async def test_options_are_lmdeploys(options: dict[str, object], named: str) -> None:
    """An option that lmdeploy does not have, or not with that value, is refused by name."""
    why = await fail_to_start(LMDeployEngine(on_cpu(options=options)))
    assert why.startswith("InvalidRequestError")
    assert named in why


async def test_tensor_parallelism_needs_an_actor() -> None:
    """Outside of an actor the PyTorch engine with tp > 1 says what it needs."""
    assert "actor of a raylm pool" in await fail_to_start(LMDeployEngine(on_cpu(tp=2)))
