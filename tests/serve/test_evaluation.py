"""The endpoint as lm-evaluation-harness uses it, with the real small model on OpenVINO."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.serve.command import ServeCommand
from tests.serve.harness import evaluate

MODEL = "smollm2-135m-instruct"
TASK = "capitals_generate"


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_generation(real_endpoint: ServeCommand, tmp_path: Path, chat: bool) -> None:
    """Every answer that the harness counts is the one that the endpoint gives to the same question."""
    path = "/v1/chat/completions" if chat else "/v1/completions"
    settings = {"model": MODEL, "base_url": real_endpoint.url + path, "tokenizer_backend": "none"}
    if chat:
        evaluation = evaluate("local-chat-completions", settings, [TASK], tmp_path, "--apply_chat_template")
    else:
        evaluation = evaluate("local-completions", settings, [TASK], tmp_path)
    samples = evaluation.samples[TASK]
    for sample in samples:
        (prompt, parameters) = sample["arguments"]["gen_args_0"].values()
        question = {"messages": json.loads(prompt[0])} if chat else {"prompt": prompt}
        body = {"model": MODEL, "temperature": 0, "max_tokens": 16, "stop": parameters["until"], **question}
        choice = real_endpoint.post(path, body).json()["choices"][0]
        assert sample["resps"] == [[choice["message"]["content"] if chat else choice["text"]]]
    assert len(samples) == 8
    assert samples[0]["resps"][0][0].strip() == "Paris"
    right = [sample["filtered_resps"] == [sample["doc"]["capital"]] for sample in samples]
    assert evaluation.scores[TASK]["exact_match,last_name"] == sum(right) / 8


def test_opencompass(real_endpoint: ServeCommand) -> None:
    """The body that OpenCompass's `OpenAI` sends, with all that it leaves at null, is answered."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 16,
        "n": 1,
        "logprobs": False,
        "top_logprobs": None,
        "stop": None,
        "temperature": 0,
    }
    answer = real_endpoint.post("/v1/chat/completions", body, headers={"api-key": "none"})
    assert answer.status_code == 200
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]


def test_log_likelihood(real_endpoint: ServeCommand) -> None:
    """What the harness asks for log-likelihoods is refused by the field's name where the engine tells no candidates."""
    body = {
        "model": MODEL,
        "prompt": [[504, 3575, 282]],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    answer = real_endpoint.post("/v1/completions", body)
    assert answer.status_code == 400
    assert answer.json() == {
        "error": {
            "message": "logprobs: OpenVINO tells none but that of the token itself; set it to 0",
            "type": "InvalidRequestError",
            "param": "logprobs",
            "code": 400,
        }
    }
