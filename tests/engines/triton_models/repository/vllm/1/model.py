"""Imitates vLLM's back end: deltas of whole characters and counts for each response.

What may become a stop word is held back, unless `include_stop_str_in_output` is set.
"""

import json
import os
import sys

sys.path.append(os.environ["TOY_LIB"])

import numpy as np
import triton_python_backend_utils as pb_utils
from text_model import TextModel


class TritonPythonModel(TextModel):
    def read(self, values):
        sampling = json.loads(values.get("sampling_parameters", [b"{}"])[0])
        stream = values.get("stream", [False])[0]
        exclude = values.get("exclude_input_in_output", [stream])[0]
        if stream and not exclude:
            raise ValueError("When streaming, `exclude_input_in_output` = False is not allowed.")
        self.keeps_stop_word = sampling.get("include_stop_str_in_output", False)
        greedy = sampling.get("temperature", 1.0) == 0 or sampling.get("top_k") == 1
        settings = {
            "limit": sampling.get("max_tokens", 16),
            "seed": None if greedy else sampling.get("seed", int.from_bytes(os.urandom(4))),
            "ignore_eos": sampling.get("ignore_eos", False),
            "min_tokens": sampling.get("min_tokens", 0),
        }
        return values["text_input"][0].decode(), stream, sampling.get("stop", []), exclude, settings

    def too_long(self, num_tokens):
        return (
            f"Error generating stream: The decoder prompt (length {num_tokens}) is longer than the maximum model "
            f"length of {self.context}. Make sure that `max_model_len` is no smaller than the number of text tokens."
        )

    def extras(self, job, values, num_new):
        tensors = []
        if values.get("return_finish_reason", [False])[0]:
            reason = np.array([str(job.finish_reason).encode()], dtype=np.object_)
            tensors.append(pb_utils.Tensor("finish_reason", reason))
        if values.get("return_num_input_tokens", [False])[0]:
            tensors.append(pb_utils.Tensor("num_input_tokens", np.asarray(job.num_prompt, dtype=np.uint32)))
        if values.get("return_num_output_tokens", [False])[0]:
            tensors.append(pb_utils.Tensor("num_output_tokens", np.asarray([num_new], dtype=np.uint32)))
        return tensors
