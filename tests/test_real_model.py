"""The pipeline on a real model: two OpenVINO actors, real kills. Greedy text is compared in `deterministic` mode."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from raylm import INTERNLM2_META, LMDeployPipeline, OpenVINOConfig, Status
from raylm.errors import ContextLengthError, EngineStartError
from tests.serve.command import wait_for

MODEL = "smollm2-135m-instruct"
LONG = 400
"""Tokens of an answer that takes the model so long that the test gets round to killing it meanwhile."""


@pytest.fixture(scope="module")
def chatbot(cluster: str) -> Iterator[LMDeployPipeline]:
    """Two deterministic replicas, greedy."""
    with LMDeployPipeline(
        MODEL,
        replicas=2,
        temperature=0,
        max_new_tokens=32,
        backend_config=OpenVINOConfig(deterministic=True, num_threads=1),
    ) as pipeline:
        yield pipeline


def kill(chatbot: LMDeployPipeline, slot: int) -> None:
    """Kill -9 the actor in a slot."""
    pid = chatbot.statistics().slots[slot].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def actors(chatbot: LMDeployPipeline) -> list[psutil.Process]:
    """Return the processes of all slots, once those that were killed before have been replaced."""

    def are_up() -> bool:
        slots = chatbot.statistics().slots
        return all(slot.state == "up" and slot.pid is not None and psutil.pid_exists(slot.pid) for slot in slots)

    wait_for(are_up, timeout_s=240)
    return [psutil.Process(slot.pid) for slot in chatbot.statistics().slots]


def test_it_knows_the_capital_of_france(chatbot: LMDeployPipeline) -> None:
    """The model's own chat template is applied, and a real model answers."""
    assert chatbot.chat([{"role": "user", "content": "What is the capital of France?"}]) == (
        "The capital of France is Paris."
    )


def test_text_survives_a_kill_in_mid_stream(chatbot: LMDeployPipeline) -> None:
    """Kill -9 in mid-stream: the greedy text equals the undisturbed text, and so does the token count."""
    messages = [{"role": "user", "content": "Tell me a story about a lighthouse keeper and a whale."}]
    undisturbed = list(chatbot.stream_chat(messages, ignore_eos=True, max_new_tokens=LONG))[-1]
    killed = False
    for step in chatbot.stream_chat(messages, ignore_eos=True, max_new_tokens=LONG):  # the last one counts
        if step[2] >= 20 and not killed:
            kill(chatbot, next(slot.slot for slot in chatbot.statistics().slots if slot.num_running))
            killed = True
    assert step == undisturbed
    assert chatbot.statistics().num_moved == 1


def test_a_batch_survives_a_kill(chatbot: LMDeployPipeline) -> None:
    """Kill -9 of one of two actors in mid-batch: every row is there once, in order, with its undisturbed text."""
    prompts = [f"Question {row}: what is {row} plus {row}? Answer:" for row in range(24)]
    undisturbed = chatbot.generate(prompts)
    stream = chatbot.stream_chat("Count to a hundred.", ignore_eos=True, max_new_tokens=LONG)
    next(stream)  # something is running in one of the slots when it dies
    kill(chatbot, next(slot.slot for slot in chatbot.statistics().slots if slot.num_running))
    assert chatbot.generate(prompts) == undisturbed
    assert list(stream)[-1][0] is Status.END


def test_engines_that_died_while_nothing_ran(chatbot: LMDeployPipeline) -> None:
    """Nobody is to blame for engines that were dead before, however many: their actors are replaced."""
    words = [{"role": "user", "content": "What is the capital of France?"}]
    undisturbed = chatbot.chat(words)
    for actor in actors(chatbot):
        for engine in actor.children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has gone with another one
                engine.kill()
    assert chatbot.chat(words) == undisturbed


def converse(chatbot: LMDeployPipeline, session_id: int, turns: list[str], *, kill_before_last: bool) -> list[str]:
    """Hold a conversation of several turns and return the answers."""
    answers = []
    for number, text in enumerate(turns):
        if kill_before_last and number == len(turns) - 1:
            owner = chatbot._chatbot.pool.router.pinned(str(session_id))
            assert owner is not None
            kill(chatbot, owner)
        steps = chatbot.stream_chat(
            text, session_id=session_id, sequence_start=number == 0, sequence_end=False, timeout=None
        )
        status, answer, _ = list(steps)[-1]
        assert status is Status.END
        answers.append(answer)
    return answers


def test_a_session_survives_its_owner(chatbot: LMDeployPipeline) -> None:
    """Three turns, the owner killed between two of them: the third still knows the first."""
    turns = ["My dog is called Rex.", "Say hello to him.", "What did I tell you?"]
    undisturbed = converse(chatbot, 7, turns, kill_before_last=False)
    assert converse(chatbot, 8, turns, kill_before_last=True) == undisturbed
    assert [message["content"] for message in chatbot.history(8)[::2]] == turns
    # The first turn matters: without it the last answer is another one.
    assert converse(chatbot, 9, turns[1:], kill_before_last=False)[-1] != undisturbed[-1]


def test_the_seeds_example_runs(chatbot: LMDeployPipeline) -> None:
    """The documented LMDeployPipeline example works with its import lines and path changed."""
    seeds = LMDeployPipeline(
        path=MODEL,
        model_name="internlm2-chat-7b",
        meta_template=INTERNLM2_META,
        max_new_tokens=1024,
        top_p=0.8,
        top_k=None,
        temperature=0,
        repetition_penalty=1.0,
        stop_words=["<|im_end|>"],
    )
    with seeds as bot:
        response = bot.generate(inputs="hello", max_new_tokens=20, temperature=0.8)
        assert isinstance(response, str)
        assert response
        assert (
            bot.generate(inputs="hello", max_new_tokens=1, return_dict=True)["receipt"]["model"] == "internlm2-chat-7b"
        )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Repeat after me: \u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u4f60\u597d"),
        ("Repeat exactly: \U0001f600\U0001f680\U0001f600\U0001f680", "\U0001f680"),
    ],
)
def test_text_is_whole_characters(chatbot: LMDeployPipeline, text: str, shown: str) -> None:
    """Chinese and emoji that are cut at token borders come out whole, and each step extends the one before."""
    earlier = ""
    for _, answer, _ in chatbot.stream_chat(text):
        assert answer.startswith(earlier)
        assert "\ufffd" not in answer
        earlier = answer
    assert shown in earlier


def test_a_stop_word_never_shows(chatbot: LMDeployPipeline) -> None:
    """A stop word that the model spells in several tokens ends the text, and no part of it is ever shown."""
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    for _, text, _ in chatbot.stream_chat(messages, stop_words=["France is Par"]):
        assert not text.endswith(("France", "France ", "France is", "France is Par"))
    assert text == "The capital of "


def test_an_over_long_prompt_is_an_error(chatbot: LMDeployPipeline) -> None:
    """A prompt longer than the context raises ContextLengthError with both lengths."""
    with pytest.raises(ContextLengthError, match="8192"):
        chatbot.generate("word " * 9000)


def test_a_model_that_is_not_there(cluster: str) -> None:
    """A path that leads nowhere raises EngineStartError that says what to do."""
    with pytest.raises(EngineStartError, match="nowhere"):
        LMDeployPipeline("/nowhere/model.gguf", backend="openvino")
