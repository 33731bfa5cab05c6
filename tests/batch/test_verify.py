"""Verify: rows of a job that are asked again, on the simulated engine and on a model."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec import structs

from raylm import AsyncLMDeployPipeline, Fault, OpenVINOConfig, SimulatedConfig
from raylm.batch import Reading, ledger_path, open_ledger, run_batch_async
from raylm.batch.verify import Sample, Verification, to_lines
from raylm.engines.simulated import greedy_text
from raylm.errors import InvalidRequestError

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENGINE = SimulatedConfig(tokens_per_s=500, faults=(Fault(match="FAIL", action="fail"),))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pipeline(cluster: str) -> AsyncIterator[AsyncLMDeployPipeline]:
    """A simulated replica."""
    async with AsyncLMDeployPipeline("simulated", backend_config=ENGINE, temperature=0) as pipeline:
        yield pipeline


def write_rows(source: Path, *prompts: str, **fields: Any) -> None:
    """Write a source of rows of five tokens."""
    rows = [{"prompt": prompt, "max_new_tokens": 5, **fields} for prompt in prompts]
    source.write_text("\n".join(map(json.dumps, rows)))


def edit(output: Path, position: int, text: str) -> None:
    """Have the ledger say that a row was answered otherwise."""
    with open_ledger(output) as ledger:
        record = ledger.read(position)
        assert record.completion is not None
        ledger.add(structs.replace(record, completion=structs.replace(record.completion, text=text)))
        ledger.sync()


async def verified(
    pipeline: AsyncLMDeployPipeline, output: Path, size: int = 20, seed: int | None = None
) -> Verification:
    """Verify a job."""
    sample = Sample(ledger_path(output), size, seed)
    return await sample.ask(pipeline, *sample.requests(pipeline))


async def test_the_same_engine_answers_the_same(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """Rows of a file with a template and defaults are asked as they were, and nothing differs."""
    source = tmp_path / "in.csv"
    source.write_text("question\n" + "\n".join(f"number {number}" for number in range(30)))
    reading = Reading(prompt="Q: {question}")
    await run_batch_async(pipeline, source, tmp_path / "out", reading=reading, max_new_tokens=5)
    found = await verified(pipeline, tmp_path / "out")
    assert (found.sampled, found.equal, found.drifted, found.changed, found.failed) == (20, 20, [], [], [])
    assert found.engines_then == found.engines_now != []
    assert to_lines(found) == ["20 of 20 rows have the same text again, 0 drifted"]


async def test_drift_is_told_from_where_texts_part(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """A text that differs in the middle, one that ends sooner, and one that goes on."""
    write_rows(tmp_path / "in", *(f"row {number}" for number in range(4)))
    await run_batch_async(pipeline, tmp_path / "in", tmp_path / "out")
    texts = [greedy_text(f"row {number}", 5) for number in range(4)]
    edit(tmp_path / "out", 0, f"{texts[0][:7]}\x1b!")
    edit(tmp_path / "out", 1, texts[1][:4])
    edit(tmp_path / "out", 2, f"{texts[2]}more")
    found = await verified(pipeline, tmp_path / "out")
    assert found.equal == 1
    assert [(drift.position, drift.at, drift.before, drift.then, drift.now) for drift in found.drifted] == [
        (0, 7, texts[0][:7], "\x1b!", texts[0][7:]),
        (1, 4, texts[1][:4], "", texts[1][4:]),
        (2, len(texts[2]), texts[2], "more", ""),
    ]
    assert all(line.isprintable() for line in to_lines(found))


async def test_a_changed_input_is_not_compared(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """Rows with other words, other parameters, or none are told; when there are no others, that is an error."""
    write_rows(tmp_path / "in", "a", "b", "c", "d", "e")
    await run_batch_async(pipeline, tmp_path / "in", tmp_path / "out")
    lines = (tmp_path / "in").read_text().splitlines()
    lines[1] = lines[1].replace('"b"', '"other"')
    lines[2] = lines[2].replace("5", "6")
    lines[3] = "{"
    (tmp_path / "in").write_text("\n".join(lines[:4]))
    found = await verified(pipeline, tmp_path / "out")
    assert (found.sampled, found.equal, found.drifted) == (5, 1, [])
    assert [(row.position, row.why.partition(":")[0]) for row in found.changed] == [
        (1, "in has other words or parameters there now"),
        (2, "in has other words or parameters there now"),
        (3, "in line 4"),
        (4, "in has fewer rows now"),
    ]
    (tmp_path / "in").write_text(lines[1])
    with pytest.raises(InvalidRequestError, match=r"none of 5 sampled rows is in .* as it was asked, such as row 1: "):
        await verified(pipeline, tmp_path / "out")


async def test_a_row_that_fails_now_is_told(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """A failure is neither the same nor drift."""
    write_rows(tmp_path / "in", "a", "FAIL")
    config = SimulatedConfig(tokens_per_s=500)
    async with AsyncLMDeployPipeline("simulated", backend_config=config, temperature=0) as other:
        await run_batch_async(other, tmp_path / "in", tmp_path / "out")
    found = await verified(pipeline, tmp_path / "out")
    assert (found.equal, found.drifted) == (1, [])
    assert [(row.position, row.why.partition(":")[0]) for row in found.failed] == [(1, "EngineError")]
    assert to_lines(found)[1].startswith("row 2, 2: failed, not compared: EngineError: ")


async def test_another_model_is_named(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """When somebody else answers than did then, both are told."""
    write_rows(tmp_path / "in", "a", "b")
    await run_batch_async(pipeline, tmp_path / "in", tmp_path / "out")
    config = SimulatedConfig(tokens_per_s=500, model_name="other")
    async with AsyncLMDeployPipeline("simulated", backend_config=config, temperature=0) as other:
        found = await verified(other, tmp_path / "out")
    assert (found.equal, found.drifted) == (2, [])
    then, now = to_lines(found)[-2:]
    assert then.startswith("answered then by simulated/")
    assert now.startswith("answered now by simulated/")
    assert now.endswith("/other/")


async def test_the_sample_is_of_greedy_rows_that_were_asked(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """Sampled rows, failed ones and copies are left out; the seed decides which of the others are taken."""
    rows = [{"prompt": f"row {number // 2}", "temperature": number % 3 // 2} for number in range(60)]
    rows[0]["prompt"] = ""
    (tmp_path / "in").write_text("\n".join(map(json.dumps, rows)))
    await run_batch_async(pipeline, tmp_path / "in", tmp_path / "out", max_new_tokens=3)
    ledger = ledger_path(tmp_path / "out")
    every = Sample(ledger, 1000).records
    for record in every.values():
        assert record.greedy
        assert record.completion is not None
        assert record.same_as is None
    with open_ledger(tmp_path / "out") as opened:
        records = list(opened.records())
    assert list(every) == [
        record.position for record in records if record.greedy and record.completion and record.same_as is None
    ]
    assert any(record.same_as is not None for record in records)
    samples = [list(Sample(ledger, 5, seed).records) for seed in (1, 1, 2, 3)]
    assert samples[0] == samples[1]
    assert len({tuple(sample) for sample in samples}) > 1
    for sample in samples:
        assert len(sample) == 5
        assert sample == sorted(sample)
        assert set(sample) <= set(every)
    seen = {position for seed in range(100) for position in Sample(ledger, 5, seed).records}
    assert seen == set(every)


async def test_rows_that_moved_are_sampled(pipeline: AsyncLMDeployPipeline, tmp_path: Path) -> None:
    """A row at the top that was removed makes copies of all answers: each is sampled once, and none beyond the end."""
    write_rows(tmp_path / "in", "a", "b", "c", "b", "d")
    await run_batch_async(pipeline, tmp_path / "in", tmp_path / "out")
    write_rows(tmp_path / "in", "b", "c", "b", "d")
    await run_batch_async(pipeline, tmp_path / "in", tmp_path / "out")
    assert list(Sample(ledger_path(tmp_path / "out"), 20).records) == [0, 1, 3]
    found = await verified(pipeline, tmp_path / "out")
    assert (found.sampled, found.equal, found.changed) == (3, 3, [])


@pytest.mark.parametrize("kind", ["program", "moved", "sampled"])
async def test_what_cannot_be_verified(pipeline: AsyncLMDeployPipeline, tmp_path: Path, kind: str) -> None:
    """Rows of a program, a source that is gone, and a job without a greedy row are errors that say so."""
    source = tmp_path / "in"
    write_rows(source, "a", temperature=1 if kind == "sampled" else 0)
    rows = [{"prompt": "a", "max_new_tokens": 5}]
    await run_batch_async(pipeline, rows if kind == "program" else source, tmp_path / "out")
    if kind == "moved":
        source.unlink()
    reason = {"program": "of stdin or of a program", "moved": "no file", "sampled": "no answer of a greedy row"}[kind]
    with pytest.raises(InvalidRequestError, match=reason):
        Sample(ledger_path(tmp_path / "out"), 20)


async def test_a_model_answers_the_same(cluster: str, tmp_path: Path) -> None:
    """On a language model: nothing differs, and a ledger that was changed shows where."""
    questions = ("What is the capital of France?", "Name three colours.", "What is 2 + 2?", "Who wrote Hamlet?")
    rows = [{"messages": [{"role": "user", "content": question}]} for question in questions]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, rows)))
    engine = OpenVINOConfig(deterministic=True, num_threads=1)
    async with AsyncLMDeployPipeline("smollm2-135m-instruct", backend_config=engine, temperature=0) as model:
        await run_batch_async(model, tmp_path / "in", tmp_path / "out", max_new_tokens=24)
        found = await verified(model, tmp_path / "out")
        assert (found.sampled, found.equal, found.drifted) == (4, 4, [])
        edit(tmp_path / "out", 0, "The capital of France is Rome.")
        found = await verified(model, tmp_path / "out")
    assert found.equal == 3
    drift = found.drifted[0]
    assert (drift.position, drift.before, drift.then) == (0, "The capital of France is ", "Rome.")
    assert drift.now.startswith("Paris")
