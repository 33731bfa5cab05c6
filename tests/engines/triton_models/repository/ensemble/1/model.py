"""Imitates TensorRT-LLM's `tensorrt_llm_bls`: deltas token by token, whatever a token splits, the stop word included.

Config parameter `accumulate_tokens`: each response repeats the text so far.
"""

import os
import sys

sys.path.append(os.environ["TOY_LIB"])

import numpy as np
import triton_python_backend_utils as pb_utils
from text_model import TextModel


class TritonPythonModel(TextModel):
    whole_characters = False
    keeps_stop_word = True
    empty_final = True
    error_is_final = False

    def initialize(self, args):
        super().initialize(args)
        self.cumulative = self.parameters.get("accumulate_tokens") == "true"
        self.whole_characters = self.cumulative

    def read(self, values):
        settings = {
            "limit": values["max_tokens"][0],
            "seed": None if values["top_k"][0] == 1 else values.get("seed", [int.from_bytes(os.urandom(4))])[0],
            "ignore_eos": values.get("end_id", [2])[0] == -1,
            "min_tokens": values.get("min_tokens", [0])[0],
        }
        stop_words = [word.decode() for word in values.get("stop_words", [])]
        stream, exclude = values.get("stream", [False])[0], values.get("exclude_input_in_output", [False])[0]
        return values["text_input"][0].decode(), stream, stop_words, exclude, settings

    def too_long(self, num_tokens):
        return (
            "Cannot process new request: [TensorRT-LLM][ERROR] Assertion failed: Prompt length "
            f"({num_tokens}) exceeds maximum input length ({self.context}). Set log level to info and check"
        )

    def extras(self, job, values, num_new):
        tensors = []
        if values.get("return_num_input_tokens", [False])[0]:
            tensors.append(pb_utils.Tensor("num_input_tokens", np.array([[job.num_prompt]], dtype=np.int32)))
        if values.get("return_num_output_tokens", [False])[0]:
            tensors.append(pb_utils.Tensor("num_output_tokens", np.array([[num_new]], dtype=np.int32)))
        return tensors
