"""Imitates TensorRT-LLM's LLM-API model: each response repeats the text so far, and nobody counts tokens."""

import os
import sys

sys.path.append(os.environ["TOY_LIB"])

import numpy as np
import triton_python_backend_utils as pb_utils
from text_model import TextModel


class TritonPythonModel(TextModel):
    cumulative = True

    def read(self, values):
        seed = values.get("sampling_param_seed", [int.from_bytes(os.urandom(4))])[0]
        settings = {
            "limit": values.get("sampling_param_max_tokens", [32])[0],
            "seed": None if values.get("sampling_param_top_k", [0])[0] == 1 else seed,
        }
        stop_words = [word.decode() for word in values.get("sampling_param_stop", [])]
        exclude = values.get("sampling_param_exclude_input_from_output", [False])[0]
        return values["text_input"][0].decode(), values.get("streaming", [False])[0], stop_words, exclude, settings

    def too_long(self, num_tokens):
        return (
            f"Error generating response: The sum of prompt length ({num_tokens}) and query length (1) should be less "
            f"than max_num_tokens ({self.context})"
        )

    def extras(self, job, values, num_new):
        if not values.get("return_finish_reason", [False])[0]:
            return []
        reason = np.array([str(job.finish_reason).encode()], dtype=np.object_)
        return [pb_utils.Tensor("finish_reason", reason)]
