"""Imitates LMDeploy's `preprocessing`: a text's token ids, the start of the sequence first."""

import os
import sys

sys.path.append(os.environ["TOY_LIB"])

import numpy as np
import toy
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            text = pb_utils.get_input_tensor_by_name(request, "QUERY").as_numpy().reshape(-1)[0].decode()
            ids = toy.tokenize(text)
            if text not in {"<BOS>", "<EOS>"}:
                ids = [toy.BOS, *ids]
            tensors = [
                pb_utils.Tensor("INPUT_ID", np.array([ids], dtype=np.uint32)),
                pb_utils.Tensor("REQUEST_INPUT_LEN", np.array([[len(ids)]], dtype=np.uint32)),
            ]
            responses.append(pb_utils.InferenceResponse(output_tensors=tensors))
        return responses
