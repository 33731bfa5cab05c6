"""A model that does not generate text."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        scores = pb_utils.Tensor("scores", np.zeros((1, 10), dtype=np.float32))
        return [pb_utils.InferenceResponse(output_tensors=[scores]) for _ in requests]
