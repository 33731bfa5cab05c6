"""Imitates LMDeploy's `postprocessing`: the text of token ids without the first few."""

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
            ids = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy().reshape(-1).tolist()
            skipped = int(pb_utils.get_input_tensor_by_name(request, "sequence_length").as_numpy().reshape(-1)[0])
            text = toy.detokenize(ids[skipped:]).decode("utf-8", "replace")
            tensor = pb_utils.Tensor("OUTPUT", np.array([text.encode()], dtype=np.object_))
            responses.append(pb_utils.InferenceResponse(output_tensors=[tensor]))
        return responses
