"""What the test models that take and give text have in common. Runs inside Triton."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from toy import Job, Loop, detokenize, journal, tokenize, whole_tokens


def values_of(request: Any, model: str) -> dict[str, list[Any]]:
    """Return all input tensors, flat, and write them to the journal."""
    values, told = {}, {}
    for tensor in request.inputs():
        array = tensor.as_numpy()
        values[tensor.name()] = array.reshape(-1).tolist()
        shown = [item.decode(errors="replace") if isinstance(item, bytes) else item for item in values[tensor.name()]]
        if sum(len(str(item)) for item in shown) < 5000:
            told[tensor.name()] = [str(array.dtype), list(array.shape), shown]
    journal(event="request", model=model, inputs=told)
    return values


class TextModel:
    """A model of one dialect. What the dialects differ in is in its subclasses.

    Config parameters: `context` (tokens), `pace` (seconds between two tokens of a stream), `endless` (no end of
    sequence).
    """

    cumulative = False
    whole_characters = True
    keeps_stop_word = False
    empty_final = False
    error_is_final = True

    def initialize(self, args: dict[str, str]) -> None:
        """Begin."""
        config = json.loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self.name = args["model_name"]
        self.parameters = parameters
        self.decoupled = config.get("model_transaction_policy", {}).get("decoupled", False)
        self.context = int(parameters.get("context", "1024"))
        self.loop = Loop(float(parameters.get("pace", "0.001")))
        self.batched = config.get("max_batch_size", 0) > 0

    def finalize(self) -> None:
        """End."""
        self.loop.close()

    def read(self, values: dict[str, list[Any]]) -> tuple[str, bool, list[str], bool, dict[str, Any]]:
        """Return prompt, whether to stream, stop words, whether to leave the prompt out, and the job's settings."""
        raise NotImplementedError

    def too_long(self, num_tokens: int) -> str:
        """Return what this kind of server says to an over-long prompt."""
        raise NotImplementedError

    def extras(self, job: Job, values: dict[str, list[Any]], num_new: int) -> list[Any]:
        """Return the output tensors besides the text."""
        raise NotImplementedError

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Answer requests."""
        if self.decoupled:
            for request in requests:
                self._begin(request)
            return None
        return [self._answer(request) for request in requests]

    def _parse(self, request: Any) -> tuple[dict[str, list[Any]], Job, str, bool, list[str]]:
        values = values_of(request, self.name)
        prompt, stream, stop_words, exclude, settings = self.read(values)
        if stream and not self.decoupled:  # as TensorRT-LLM's back end
            raise pb_utils.TritonModelException(
                "Streaming is only supported if model is deployed using decoupled mode."
            )
        ids = tokenize(prompt)
        if len(ids) >= self.context or "[[refuse]]" in prompt:
            raise pb_utils.TritonModelException(self.too_long(len(ids)))
        if self.parameters.get("endless") == "true":
            settings["ignore_eos"] = True
        return values, Job(ids, context=self.context, **settings), "" if exclude else prompt, stream, stop_words

    def _answer(self, request: Any) -> Any:
        try:
            values, job, echo, _, stop_words = self._parse(request)
            while job.finish_reason is None:
                job.step()
                text = detokenize(job.said).decode("utf-8", "ignore")
                if any(word in text for word in stop_words):
                    job.finish_reason = "stop"
        except Exception as error:  # noqa: BLE001 - what a model raises
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))
        text = self._cut(text, stop_words, keeps=self.keeps_stop_word)
        journal(event="end", model=self.name, reason=job.finish_reason)
        return self._response(job, values, (echo + text).encode(), len(job.said))

    def _begin(self, request: Any) -> None:
        sender = request.get_response_sender()
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            values, job, echo, stream, stop_words = self._parse(request)
        except Exception as error:  # noqa: BLE001 - what a model raises
            self._send_error(sender, str(error))
            return
        sent = {"text": b"", "tokens": 0, "echo": echo.encode() if not stream else b""}
        keeps = self.keeps_stop_word
        held = 0 if keeps else max((len(word) - 1 for word in stop_words), default=0)

        def respond(job: Job) -> None:
            reason = job.finish_reason
            if reason in {"cancelled", "error", "cut"}:
                journal(event="end", model=self.name, reason=reason)
                if reason == "error":
                    self._send_error(sender, f"failure at token {len(job.said) + 1}, as ordered")
                else:
                    sender.send(flags=final)
                return
            raw = detokenize(job.said)
            if self.whole_characters and reason is None:
                raw = detokenize(whole_tokens(job.said, keep=self.cumulative))
            text = raw.decode("utf-8", "ignore")
            hit = any(word in text for word in stop_words)
            if hit:
                job.finish_reason = reason = "stop"
                raw = self._cut(text, stop_words, keeps=keeps).encode()
            elif self.whole_characters or reason is not None:
                raw = raw.decode("utf-8", "replace" if self.cumulative else "ignore").encode()
                if reason is None and held and not self.cumulative:
                    raw = raw.decode()[: max(0, len(raw.decode()) - held)].encode()
            if reason is None and not stream:
                return
            new = raw if self.cumulative else raw[len(sent["text"]) :]
            response = self._response(job, values, sent["echo"] + new, len(job.said) - sent["tokens"])
            sent.update(text=raw, tokens=len(job.said), echo=b"")
            if reason is not None:
                journal(event="end", model=self.name, reason=reason)
            if reason is None:
                sender.send(response)
            elif self.empty_final:
                sender.send(response)
                sender.send(flags=final)
            else:
                sender.send(response, flags=final)

        self.loop.add(job, respond, sender.is_cancelled)

    def _send_error(self, sender: Any, text: str) -> None:
        response = pb_utils.InferenceResponse(error=pb_utils.TritonError(text))
        if self.error_is_final:
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        else:
            sender.send(response)
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _cut(self, text: str, stop_words: list[str], *, keeps: bool) -> str:
        hits = [(text.index(word) + len(word), text.index(word)) for word in stop_words if word in text]
        return text if not hits else text[: min(hits)[0 if keeps else 1]]

    def _response(self, job: Job, values: dict[str, list[Any]], text: bytes, num_new: int) -> Any:
        if "nonsense" in job.orders:
            text = b"\xff\xfe"
        reason = job.finish_reason
        if reason == "lapse":
            job.finish_reason = None
        tensors = self.extras(job, values, num_new)
        job.finish_reason = reason
        if "mute" not in job.orders:
            shape = (1, 1) if self.batched else (1,)
            tensors = [pb_utils.Tensor("text_output", np.array([text], dtype=np.object_).reshape(shape)), *tensors]
        return pb_utils.InferenceResponse(output_tensors=tensors)
