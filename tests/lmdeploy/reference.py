"""What transformers says, to compare with. Programs, so that no test imports torch; input and output are JSON.

    python -m tests.lmdeploy.reference FOLDER < prompts       # of each, the token ids of a greedy answer
    python -m tests.lmdeploy.reference FOLDER score < pairs   # of each, its text's log-probability, and if it is greedy

Prompts are strings, pairs are contexts and texts. A text is greedy if each of its tokens is the likeliest one.
"""

import json
import sys
from typing import Any

NUM_TOKENS = 12


def main() -> None:
    """Answer the prompts, or score the pairs."""
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
    if sys.argv[2:] == ["score"]:
        json.dump([_score(tokenizer, model, *pair) for pair in json.load(sys.stdin)], sys.stdout)
        return
    answers = []
    for prompt in json.load(sys.stdin):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    json.dump(answers, sys.stdout)


def _score(tokenizer: Any, model: Any, context: str, text: str) -> tuple[float, bool]:
    import torch

    start = len(tokenizer(context, add_special_tokens=False).input_ids)
    token_ids = tokenizer(context + text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        logprobs = model(token_ids).logits[0, start - 1 : -1].log_softmax(dim=-1)
    scored = token_ids[0, start:]
    return logprobs.gather(1, scored[:, None]).sum().item(), bool(torch.equal(logprobs.argmax(dim=-1), scored))


if __name__ == "__main__":
    main()
