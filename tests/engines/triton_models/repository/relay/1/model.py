"""Speaks as vLLM's back end does, with the tokens of lmdeploy's api_server: a real model behind a Triton server.

An event of the api_server does not say how many tokens it has, and where the machine is busy it has several: the text
so far is encoded again.

Config parameter: `address` of the server, host and port.
"""

import http.client
import json
import threading

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.address = json.loads(args["model_config"])["parameters"]["address"]["string_value"]
        self.model = json.load(self._ask("GET", "/v1/models"))["data"][0]["id"]

    def execute(self, requests):
        for request in requests:
            text, sampling = (
                pb_utils.get_input_tensor_by_name(request, name).as_numpy().reshape(-1)[0].decode()
                for name in ("text_input", "sampling_parameters")
            )
            body = {
                **json.loads(sampling),
                "prompt": text,
                "model": self.model,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            threading.Thread(target=self._answer, args=(body, request.get_response_sender()), daemon=True).start()

    def _ask(self, method, path, body=None):
        connection = http.client.HTTPConnection(self.address)
        connection.request(method, path, body, {"Content-Type": "application/json", "Connection": "close"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise RuntimeError(f"the api_server said {reply.status}: {reply.read()}")
        return reply

    def _answer(self, body, sender):
        try:
            with self._ask("POST", "/v1/completions", json.dumps(body)) as reply:
                self._relay(reply, sender, body["prompt"])
        except Exception as error:  # noqa: BLE001 - what a model raises
            response = pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _num_tokens(self, text):
        with self._ask("POST", "/v1/encode", json.dumps({"input": text})) as reply:
            return json.load(reply)["length"]

    def _relay(self, reply, sender, text):
        reason, usage, told = None, None, 0
        before = self._num_tokens(text)
        for line in reply:
            if sender.is_cancelled():
                break
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                reason = choice.get("finish_reason") or reason
                if choice["text"]:
                    text += choice["text"]
                    told, last = max(told, self._num_tokens(text) - before), told
                    sender.send(self._response(choice["text"], told - last))
        if reason is not None:
            prompt_tokens = np.asarray([usage["prompt_tokens"]], dtype=np.uint32)  # known at the end only
            last = self._response("", usage["completion_tokens"] - told, reason, num_input_tokens=prompt_tokens)
            sender.send(last)
        elif not sender.is_cancelled():
            raise RuntimeError("the api_server's answer has no end")
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _response(self, text, num_tokens, reason=None, **more):
        tensors = {
            "text_output": np.array([text.encode()], dtype=np.object_),
            "finish_reason": np.array([str(reason).encode()], dtype=np.object_),
            "num_output_tokens": np.asarray([num_tokens], dtype=np.uint32),
            **more,
        }
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor(*item) for item in tensors.items()])
