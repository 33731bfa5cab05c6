"""Makes a folder with a very small model of random weights: python -m tests.lmdeploy.tiny ARCHITECTURE FOLDER.

For facts that do not depend on what a model says, but on its shape. A program, so that no test imports torch.
"""

import sys
from pathlib import Path

from raylm.engines.gguf import to_folder
from raylm.models import resolve
from tests.engines.conftest import MODEL

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,  # wide enough that greedy text does not repeat one token
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

GPU_SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}  # GPU kernels want whole tiles

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def main() -> None:
    """Make the folder."""
    import torch
    import transformers

    architecture, folder = sys.argv[1], Path(sys.argv[2])
    tokenizer = transformers.AutoTokenizer.from_pretrained(to_folder(resolve(MODEL)))
    shape = {**SHAPE, "vocab_size": len(tokenizer)}
    config = {
        "llama": lambda: transformers.LlamaConfig(**shape),
        "llama-gpu": lambda: transformers.LlamaConfig(**{**shape, **GPU_SHAPE}),
        "llama3-rope": lambda: transformers.LlamaConfig(**shape, rope_parameters=ROPE),
        "qwen2": lambda: transformers.Qwen2Config(**shape),
        "qwen3": lambda: transformers.Qwen3Config(**shape),
    }[architecture]()
    torch.manual_seed(2)  # of those tried: in the regression set no two likeliest tokens are as close as float32 errs
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
