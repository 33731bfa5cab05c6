"""lm-evaluation-harness at an endpoint of lmdeploy on CPU: what it finds is what transformers finds."""

import json
from collections.abc import Iterator

import pytest

from tests.serve.command import ServeCommand, serve_command
from tests.serve.harness import Evaluation, evaluate

from .conftest import MODEL, on_cpu, transformers_scores

pytestmark = [pytest.mark.timeout(600)]

BEGIN = "<|im_start|>"
"""What the harness puts before a text that nothing comes before: the model's begin of sequence."""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[ServeCommand]:
    """`raylm serve` with one actor."""
    engine = json.loads(on_cpu().model_dump_json())
    with serve_command({"models": [{"name": MODEL, "engines": [engine]}]}, proxy="auto") as command:
        yield command


@pytest.fixture(scope="module")
def evaluation(endpoint: ServeCommand, model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """All tasks of the guide, run once, with more requests at a time than the engine has room for."""
    settings = {
        "model": MODEL,
        "base_url": f"{endpoint.url}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": model_folder,
        "num_concurrent": 12,
        "max_length": 1024,
    }
    tasks = ["capitals_choose", "capitals_perplexity", "capitals_generate"]
    return evaluate("local-completions", settings, tasks, tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def expected(evaluation: Evaluation, model_folder: str) -> dict[str, list[tuple[float, bool]]]:
    """What transformers makes of each text that a task is about; of an answer, it is the text that was generated."""
    pairs = {
        "capitals_choose": [
            (asked["arg_0"], asked["arg_1"])
            for sample in evaluation.samples["capitals_choose"]
            for asked in sample["arguments"].values()
        ],
        "capitals_perplexity": [(BEGIN, sample["target"]) for sample in evaluation.samples["capitals_perplexity"]],
        "capitals_generate": [
            (sample["arguments"]["gen_args_0"]["arg_0"], sample["resps"][0][0])
            for sample in evaluation.samples["capitals_generate"]
        ],
    }
    scores = iter(transformers_scores(model_folder, [pair for task in pairs.values() for pair in task]))
    return {task: [next(scores) for _ in asked] for task, asked in pairs.items()}


def test_choices(evaluation: Evaluation, expected: dict[str, list[tuple[float, bool]]]) -> None:
    """The log-likelihood of each choice, and whether it is what the model would say, are transformers' own."""
    samples = evaluation.samples["capitals_choose"]
    found = [told for sample in samples for (told,) in sample["resps"]]
    scores = expected["capitals_choose"]
    assert len(scores) == 32
    assert [float(logprob) for logprob, _ in found] == pytest.approx([logprob for logprob, _ in scores], abs=1e-3)
    assert [greedy for _, greedy in found] == [str(greedy) for _, greedy in scores]
    chosen = [max(range(4), key=lambda place: scores[4 * row + place][0]) for row in range(8)]
    right = [str(place) == sample["target"] for place, sample in zip(chosen, samples, strict=True)]
    assert evaluation.scores["capitals_choose"]["acc,none"] == sum(right) / 8


def test_whole_texts(evaluation: Evaluation, expected: dict[str, list[tuple[float, bool]]]) -> None:
    """The log-likelihood of each text from its first token on is transformers' own."""
    found = [float(sample["resps"][0][0]) for sample in evaluation.samples["capitals_perplexity"]]
    assert found == pytest.approx([logprob for logprob, _ in expected["capitals_perplexity"]], abs=1e-3)


def test_answers(evaluation: Evaluation, expected: dict[str, list[tuple[float, bool]]]) -> None:
    """Prompts of token ids are answered, and each token of the answers is the one that transformers has likeliest."""
    samples = evaluation.samples["capitals_generate"]
    assert samples[0]["filtered_resps"] == ["Paris"]
    assert all(sample["resps"][0][0] for sample in samples)
    assert [greedy for _, greedy in expected["capitals_generate"]] == [True] * 8


def test_end_of_sequence_has_its_place(endpoint: ServeCommand) -> None:
    """The one token that the harness has generated and leaves out is there also where it ends the sequence."""
    prompt = (
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n2.<|im_end|>\n<|im_start|>assistant\n2."
    )
    body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True}
    answer = endpoint.post("/v1/completions", body).json()
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["token_logprobs"]) == answer["usage"]["prompt_tokens"] + 1
    assert len(choice["logprobs"]["top_logprobs"]) == answer["usage"]["prompt_tokens"] + 1
