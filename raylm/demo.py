"""`raylm demo`: a batch of questions and three conversations, shown as they are answered.

Everything printed is what the model said and what the receipts say. A model of 135 million parameters is often wrong.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import textwrap
import time
from contextlib import aclosing

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raylm.actors.cluster import nodes
from raylm.api import AsyncLMDeployPipeline
from raylm.errors import InvalidRequestError, RaylmError
from raylm.messages import Status

QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Why is the sky blue? Answer in one sentence.",
    "Translate 'good morning' into Spanish.",
    "Write a haiku about rain.",
    "What does HTTP stand for?",
    "Give me a word that rhymes with 'light'.",
    "Who wrote Romeo and Juliet?",
    "How many legs does a spider have?",
    "Explain gravity to a five-year-old in one sentence.",
    "What is 7 times 8?",
    "List two uses of a paper clip.",
    "What is the opposite of 'ancient'?",
    "Which planet is known as the Red Planet?",
    "Suggest a name for a friendly robot.",
    "What do bees make?",
    "Complete the proverb: a stitch in time...",
    "What is the boiling point of water in Celsius?",
    "Write one line of Python that prints hello.",
    "Name an animal that lives in the desert.",
    "What is the largest ocean on Earth?",
    "Give a synonym for 'happy'.",
    "What is a prime number?",
    "Say goodbye in Italian.",
)

CHATS = {
    "cooking": (
        "I want to cook pasta tonight. What sauce is easy?",
        "Which ingredients do I need for it?",
        "How long does it take?",
    ),
    "travel": (
        "I have one day in Rome. What should I see first?",
        "And after that?",
        "Where could I eat near there?",
    ),
    "stars": (
        "What is a star made of?",
        "How hot is the surface of our Sun?",
        "Will it burn forever?",
    ),
}

_ROW_TOKENS = (24, 40, 56)
"""Limits of the questions in turn. They differ, so that some are still being answered when the first is done."""

_TURN_TOKENS = 40

_INDENT = "    "


async def run_demo(pipeline: AsyncLMDeployPipeline, console: Console, *, kill: bool = False) -> int:
    """Run the demo and print what happens, for a person.

    Args:
        pipeline: Answers; it has been started.
        console: Where to print.
        kill: End one actor's process with SIGKILL in the middle of the batch.

    Returns:
        How many questions and turns were not answered.

    Raises:
        InvalidRequestError: `kill`, and there is no second actor, or the actors are not on this machine.
    """
    if kill:
        _check_kill(pipeline)
    _show_slots(pipeline, console)
    num_failed = await _show_batch(pipeline, console, kill=kill)
    num_failed += await _show_chats(pipeline, console)
    _show_summary(pipeline, console)
    return num_failed


def _check_kill(pipeline: AsyncLMDeployPipeline) -> None:
    if len(pipeline.statistics().slots) < 2:
        raise InvalidRequestError("killing an actor shows failover only where there is a second one: use replicas=2")
    # A process id means nothing on another machine than its own.
    if [node.name for node in nodes()] != [socket.gethostname()]:
        raise InvalidRequestError("killing an actor works on a cluster of this machine alone")


def _show_slots(pipeline: AsyncLMDeployPipeline, console: Console) -> None:
    for slot in pipeline.statistics().slots:
        console.print(f"slot {slot.slot}: {slot.model}, process {slot.pid}, {slot.capacity} requests at a time")


async def _show_batch(pipeline: AsyncLMDeployPipeline, console: Console, *, kill: bool) -> int:
    console.rule(f"a batch of {len(QUESTIONS)} questions")
    requests = [
        pipeline.request(
            messages=[{"role": "user", "content": question}],
            max_new_tokens=_ROW_TOKENS[index % len(_ROW_TOKENS)],
            temperature=0,
        )
        for index, question in enumerate(QUESTIONS)
    ]
    num_tokens = num_failed = num_moved = 0
    shown_kill = kill
    began_at = time.monotonic()
    async with aclosing(pipeline.pool.as_completed(requests)) as results:
        async for index, result in results:
            if kill:
                kill = False  # once is enough
                _kill_busiest(pipeline, console)
            console.print(Text(f"{index + 1:2}  {QUESTIONS[index]}", style="bold"))
            if isinstance(result, RaylmError):
                num_failed += 1
                console.print(_failure(result, console))
                continue
            receipt = result.receipt
            num_tokens += result.usage.completion_tokens
            num_moved += receipt.why.startswith("moved")
            console.print(_said(result.text, console))
            console.print(_note(f"{result.usage.completion_tokens} tokens, slot {receipt.slot}, {receipt.why}"))
    seconds = time.monotonic() - began_at
    console.print(
        f"{len(QUESTIONS) - num_failed} of {len(QUESTIONS)} questions answered in {seconds:.1f} s, "
        f"{num_tokens} tokens, {num_tokens / seconds:.0f} tokens/s"
    )
    if shown_kill:
        console.print(f"{num_moved} of them were in the killed process and were answered by another")
    return num_failed


def _kill_busiest(pipeline: AsyncLMDeployPipeline, console: Console) -> None:
    slot = max(pipeline.statistics().slots, key=lambda slot: slot.num_running)
    if slot.pid is None or not slot.num_running:
        console.print("no actor is busy any more: there is nothing to kill", style="yellow")
        return
    os.kill(slot.pid, signal.SIGKILL)
    console.print(
        f"kill -9 {slot.pid}: the actor of slot {slot.slot}, with {slot.num_running} questions in it", style="yellow"
    )


async def _show_chats(pipeline: AsyncLMDeployPipeline, console: Console) -> int:
    num_turns = max(len(turns) for turns in CHATS.values())
    console.rule(f"{len(CHATS)} conversations of {num_turns} turns, taking turns")
    num_failed = 0
    for turn in range(num_turns):
        answers = await asyncio.gather(
            *(_answer(pipeline, name, turns[turn], first=turn == 0) for name, turns in CHATS.items())
        )
        for (name, turns), answer in zip(CHATS.items(), answers, strict=True):
            console.print(Text(f"{name}, turn {turn + 1}: {turns[turn]}", style="bold"))
            if isinstance(answer, RaylmError):
                num_failed += 1
                console.print(_failure(answer, console))
                continue
            text, num_tokens = answer
            console.print(_said(text, console))
            slot = pipeline.pool.router.pinned(name)
            console.print(_note(f"{num_tokens} tokens, session pinned to slot {slot}"))
    return num_failed


async def _answer(
    pipeline: AsyncLMDeployPipeline, session_id: str, words: str, *, first: bool
) -> tuple[str, int] | RaylmError:
    status, text, num_tokens = Status.SERVER_ERR, "", 0
    try:
        async for status, text, num_tokens in pipeline.stream_chat(  # noqa: B007  # the last one is the whole
            words,
            session_id=session_id,
            sequence_start=first,
            sequence_end=False,
            max_new_tokens=_TURN_TOKENS,
            temperature=0,
        ):
            pass
    except RaylmError as error:
        return error
    if status is not Status.END:
        return RaylmError(f"the turn ended with status {status.name}")
    return text, num_tokens


def _show_summary(pipeline: AsyncLMDeployPipeline, console: Console) -> None:
    console.rule("what the pool did")
    pool = pipeline.statistics()
    table = Table("slot", "state", "process", "tokens of this process", "deaths")
    for slot in pool.slots:
        num_tokens = slot.engine.num_tokens if slot.engine else 0
        table.add_row(str(slot.slot), slot.state, str(slot.pid), str(num_tokens), str(slot.num_deaths))
    console.print(table)
    console.print(
        f"{pool.num_finished} requests answered, {pool.num_failed} failed, {pool.num_moved} moved, "
        f"{pool.num_tokens} tokens"
    )


def _said(text: str, console: Console) -> Text:
    lines = [line for line in text.splitlines() if line.strip()]
    return Text("\n".join(_indented(line, console) for line in lines))


def _note(text: str) -> Text:
    return Text(f"{_INDENT}[{text}]", style="dim")


def _failure(error: RaylmError, console: Console) -> Text:
    return Text(_indented(f"{type(error).__name__}: {' '.join(str(error).split())}", console), style="red")


def _indented(line: str, console: Console) -> str:
    return textwrap.fill(line, console.width, initial_indent=_INDENT, subsequent_indent=_INDENT)
