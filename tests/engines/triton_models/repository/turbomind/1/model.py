"""Imitates the TurboMind back end of LMDeploy up to 0.5.1 with its sequences.

Config parameters: `model_name` (for clients), `session_len` (tokens), `pace` (seconds between two tokens of a stream).
"""

import json
import os
import sys
import threading

sys.path.append(os.environ["TOY_LIB"])

import numpy as np
import triton_python_backend_utils as pb_utils
from text_model import values_of
from toy import EOS, Job, Loop, journal

INVALID, CONFLICT, BUSY, INACTIVE, TOO_LONG = 1, 2, 3, 4, 6


class RefusedError(Exception):
    """A request that TurboMind refuses."""


class TritonPythonModel:
    def initialize(self, args):
        parameters = {
            name: value["string_value"] for name, value in json.loads(args["model_config"])["parameters"].items()
        }
        self.context = int(parameters["session_len"])
        self.loop = Loop(float(parameters.get("pace", "0.001")))
        self.lock = threading.Lock()
        self.histories = {}  # token ids by sequence
        self.running = {}  # jobs by sequence

    def finalize(self):
        self.loop.close()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                self.begin(values_of(request, "turbomind"), sender)
            except RefusedError as failure:
                error = pb_utils.TritonError(f"TurboMind execute failure:  {failure}")
                journal(event="refused", model="turbomind", code=failure.args[0])
                sender.send(
                    pb_utils.InferenceResponse(error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                )

    def begin(self, values, sender):
        ids, limit = values["input_ids"], values["request_output_len"][0]
        start, end, stop = (values.get(name, [0])[0] for name in ("START", "END", "STOP"))
        sequence = values.get("CORRID", [0])[0]
        with self.lock:
            if (start and stop) or (not start and sequence not in self.histories):
                raise RefusedError(INVALID)
            if stop:
                if sequence not in self.running:
                    raise RefusedError(INACTIVE)
                self.running[sequence].stopped = True
                self.send(sender, self.histories[sequence], final=True)
                if end:
                    del self.histories[sequence]
                return
            if sequence in self.running:
                raise RefusedError(BUSY)
            history = [] if start else self.histories[sequence][: max(0, values.get("step", [0])[0])]
            whole = history + ids
            if len(whole) > self.context:
                raise RefusedError(TOO_LONG)
            if start:
                self.histories[sequence] = []
            if not limit:
                self.finish(sequence, whole, end)
                self.send(sender, whole, final=True)
                return
            bad = values.get("bad_words_list", [])
            greedy = values.get("runtime_top_k", [0])[0] == 1
            seed = None if greedy else values.get("random_seed", [0])[0]
            job = Job(whole, limit, self.context, seed=seed, ignore_eos=bool(bad) and bad[0] == EOS)
            stop_ids = self.words_of(values.get("stop_words_list", []))
            self.running[sequence] = job

        def respond(job):
            if any(job.said[-len(word) :] == word for word in stop_ids):
                job.finish_reason = "stop"
            reason = job.finish_reason
            sequence_ids = whole + job.said
            if reason is not None:
                with self.lock:
                    del self.running[sequence]
                    self.finish(sequence, sequence_ids, end)
                journal(event="end", model="turbomind", reason="stopped" if job.stopped else reason, sequence=sequence)
            if reason == "error":
                error = pb_utils.TritonError("TurboMind execute failure:  5")
                sender.send(
                    pb_utils.InferenceResponse(error=error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                )
            elif reason == "cut":
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            else:
                self.send(sender, sequence_ids, final=reason is not None)

        # The back end does not look whether its client has gone.
        self.loop.add(job, respond, lambda: False)

    def finish(self, sequence, ids, end):
        if end:
            self.histories.pop(sequence, None)
        elif sequence in self.histories:
            self.histories[sequence] = ids

    def words_of(self, flat):
        half = len(flat) // 2
        words, start = [], 0
        for end in flat[half:]:
            if end > start:
                words.append(flat[start:end])
                start = end
        return words

    def send(self, sender, ids, final):
        padded = np.zeros((1, 1, self.context), dtype=np.uint32)
        padded[0, 0, : len(ids)] = ids
        tensors = [
            pb_utils.Tensor("output_ids", padded),
            pb_utils.Tensor("sequence_length", np.array([[len(ids)]], dtype=np.uint32)),
        ]
        response = pb_utils.InferenceResponse(output_tensors=tensors)
        if final:
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        else:
            sender.send(response)
