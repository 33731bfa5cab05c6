"""Settings, checked once, at the border. Frozen pydantic models that refuse unknown names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Backend = Literal["auto", "turbomind", "pytorch", "openvino"]
"""Engines by the name that lmdeploy's users know them by; `auto` goes by the cluster's hardware."""

PositiveFloat = Annotated[float, Field(gt=0)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class OpenVINOConfig(_Config):
    """Settings of the OpenVINO engine, the embedded default on CPU.

    Attributes:
        path: Model: a built-in alias, a GGUF file, a folder with an OpenVINO model, or a hub id. Pipelines fill it in.
        model_name: Name in receipts; None takes it from `path`.
        capacity: Requests decoded together. Fewer give each more tokens/s, more give more in all.
        max_context: Prompt and generated tokens together; None takes the model's own limit.
        cache_size_gb: Memory for the KV cache, in GiB.
        num_threads: CPU threads for inference; None lets OpenVINO decide.
        deterministic: Greedy text that does not depend on what else is in the batch, at about 60 % of the speed.
        prefix_caching: Keep the KV cache of finished requests, so that a later turn of a conversation costs only what
            is new in it. Not where requests are cancelled or branch off one text: openvino-genai 2026.4 then reuses
            wrong entries, and the text is wrong without an error.
        start_timeout_s: Limit on loading the model once its files are there.
    """

    kind: Literal["openvino"] = "openvino"
    path: str = ""
    model_name: str | None = None
    capacity: int = Field(default=128, ge=1)
    max_context: int | None = Field(default=None, ge=1)
    cache_size_gb: int = Field(default=1, ge=1)
    num_threads: int | None = Field(default=None, ge=1)
    deterministic: bool = False
    prefix_caching: bool = False
    start_timeout_s: PositiveFloat = 300


class Fault(_Config):
    """Something that goes wrong in the simulated engine, on purpose.

    Attributes:
        match: The fault strikes requests whose prompt contains this text; empty strikes every request.
        at_token: When the request is about to produce this token, counted from 1.
        action: `die` kills the engine's process, `hang` stops the engine's clock for good and fails its health check,
            `fail` raises EngineError for the request.
    """

    match: str = ""
    at_token: int = Field(default=1, ge=1)
    action: Literal["die", "hang", "fail"]


class SimulatedConfig(_Config):
    """Settings of the simulated engine: a clock, not a model.

    Attributes:
        model_name: Name in receipts.
        tokens_per_s: Tokens per second of each stream.
        capacity: Streams that run together.
        max_context: Prompt and generated tokens together. A word is a token.
        first_token_s: Seconds from the request to its first token, on top of one token's time.
        num_gpus: Logical GPUs that its actor reserves, for trying out placement. Nothing runs on them.
        faults: What goes wrong.
    """

    kind: Literal["simulated"] = "simulated"
    model_name: str = "simulated"
    tokens_per_s: PositiveFloat = 50
    capacity: int = Field(default=1024, ge=1)
    max_context: int = Field(default=8192, ge=1)
    first_token_s: float = Field(default=0, ge=0)
    num_gpus: int = Field(default=0, ge=0)
    faults: tuple[Fault, ...] = ()


EngineConfig = Annotated[OpenVINOConfig | SimulatedConfig, Field(discriminator="kind")]


class SessionConfig(_Config):
    """Limits of the session store.

    Attributes:
        ttl_s: A session that is idle for this long is forgotten.
        turn_timeout_s: A turn that has not ended by then belongs to a client that is gone; the session is free again.
        max_sessions: The least recently used session makes room for one more.
        max_bytes: Text of all transcripts together; the least recently used sessions make room.
    """

    ttl_s: PositiveFloat = 3600
    turn_timeout_s: PositiveFloat = 3600
    max_sessions: int = Field(default=100_000, ge=1)
    max_bytes: int = Field(default=1 << 30, ge=1)


class PoolConfig(_Config):
    """How the pool queues, retries and gives up.

    Attributes:
        max_queued: Requests waiting for a slot; one more is refused with PoolSaturatedError. None: no limit.
        max_attempts: Actors that may work on one request.
        first_token_timeout_s: Floor of the watchdog's bound on the first token. The bound itself follows the pool's
            own history and is never below this.
        token_gap_timeout_s: The watchdog's bound on the silence after the first token.
        health_timeout_s: How long an actor under suspicion has to answer a health check before it is replaced.
        batch_share: Share of dispatches that the batch lane keeps while the interactive lane has work, 0 to 1.
        max_pins: Sessions whose slot the pool remembers; the least recently used is forgotten.
    """

    max_queued: int | None = Field(default=None, ge=1)
    max_attempts: int = Field(default=4, ge=1)
    first_token_timeout_s: PositiveFloat = 60
    token_gap_timeout_s: PositiveFloat = 30
    health_timeout_s: PositiveFloat = 10
    batch_share: float = Field(default=0.1, ge=0, le=1)
    max_pins: int = Field(default=1_000_000, ge=1)
