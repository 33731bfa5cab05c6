"""Greedy answers of transformers, to compare with: python -m tests.lmdeploy.reference FOLDER < prompts > token ids.

Both are JSON: a list of strings, and the list of lists of tokens generated for them. A program, so that no test imports
torch.
"""

import json
import sys

NUM_TOKENS = 12


def main() -> None:
    """Answer the prompts."""
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
    answers = []
    for prompt in json.load(sys.stdin):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        answers.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
