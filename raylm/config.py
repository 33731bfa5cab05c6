"""Settings, checked once, at the border. Frozen pydantic models that refuse unknown names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raylm.errors import InvalidRequestError

Backend = Literal["auto", "turbomind", "pytorch", "openvino"]
"""Engines by the name that lmdeploy's users know them by; `auto` goes by the cluster's hardware."""

PositiveFloat = Annotated[float, Field(gt=0)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    def updated(self, update: Mapping[str, Any]) -> Self:
        """Return a copy with other values of some settings, which are checked as all are.

        Raises:
            InvalidRequestError: a value is wrong. The text names each.
        """
        try:
            return self.model_validate({**self.model_dump(), **update})
        except ValidationError as error:
            raise InvalidRequestError(_problems(error)) from None


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'it'}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_context=False, include_input=False)
    )


_LabelSelector = Annotated[str, Field(pattern=r"^!?(in\([^()]+\)|[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)$")]
"""`value`, `!value`, `in(a,b)` or `!in(a,b)`, as in Ray."""

_BUILTIN_RESOURCES = {"CPU", "GPU", "memory", "object_store_memory"}


class _Placed(_Config):
    """Which nodes an engine's actors may go to.

    Attributes:
        label_selector: What their labels must be: `value`, `!value`, `in(a,b)` or `!in(a,b)` by the label's name.
        resources: Custom Ray resources that each actor takes, by name.
    """

    label_selector: dict[str, _LabelSelector] = {}
    resources: dict[str, PositiveFloat] = {}

    @model_validator(mode="after")
    def _resources_are_custom(self) -> Self:
        for name, amount in self.resources.items():
            if name in _BUILTIN_RESOURCES or name.startswith("accelerator_type:"):
                raise ValueError(f"resources: {name} follows from other settings; name custom resources only")
            if amount > 1 and amount != int(amount):
                raise ValueError(f"resources: {name} must be a whole number where it is above 1, got {amount:g}")
        return self


class OpenVINOConfig(_Placed):
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


class SimulatedConfig(_Placed):
    """Settings of the simulated engine: a clock, not a model.

    Attributes:
        model_name: Name in receipts.
        tokens_per_s: Tokens per second of each stream.
        capacity: Streams that run together.
        max_context: Prompt and generated tokens together. A word is a token.
        first_token_s: Seconds from the request to its first token, on top of one token's time.
        num_gpus: Logical GPUs that its actor reserves, or a share of one, to try out placement. Nothing runs on them.
        accelerator_type: Model of these GPUs.
        faults: What goes wrong.
    """

    kind: Literal["simulated"] = "simulated"
    model_name: str = "simulated"
    tokens_per_s: PositiveFloat = 50
    capacity: int = Field(default=1024, ge=1)
    max_context: int = Field(default=8192, ge=1)
    first_token_s: float = Field(default=0, ge=0)
    num_gpus: float = Field(default=0, ge=0)
    accelerator_type: str | None = None
    faults: tuple[Fault, ...] = ()

    @model_validator(mode="after")
    def _shares_one_gpu(self) -> Self:
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(f"num_gpus must be a whole number where it is above 1, got {self.num_gpus:g}")
        return self


LMDEPLOY_CACHE_SHARE = 0.8
"""Share of the free GPU memory that lmdeploy takes for the KV cache. Source: lmdeploy 0.18, both engine configs."""


class _LMDeployEngineConfig(_Placed):
    """What an lmdeploy engine is told, in this process or in a server of its own. Names are lmdeploy's.

    Attributes:
        path: Model: a built-in alias, a local folder, or a hub id. Pipelines fill it in.
        model_name: Name in receipts; None takes it from `path`.
        backend: lmdeploy's engine.
        device: Where it computes. `cpu` is the PyTorch engine through `raylm.engines.lmdeploy_cpu`, for development and
            tests; `ascend` is the PyTorch engine on Ascend NPUs.
        tp: GPUs, or NPUs, that hold the model together.
        num_gpus: Share of one GPU, for small models that are to share one. Their KV caches share its memory. None takes
            `tp` whole ones.
        accelerator_type: Model of the GPUs by Ray's name of it, such as `A100` or `H100`; None takes any.
        session_len: Prompt and generated tokens together; None takes the model's own limit.
        max_batch_size: Requests decoded together; None lets lmdeploy decide.
        cache_max_entry_count: Share of the free GPU memory for the KV cache; None takes lmdeploy's default, times
            `num_gpus` where GPUs are shared.
        quant_policy: How the KV cache is stored: 0 as computed, 4 or 8 bits an entry; with the PyTorch engine also 16
            (FP8), 17 (FP8 E5M2) or 42 (TurboQuant). Source: lmdeploy 0.18, `messages.QuantPolicy`.
        dtype: Of weights and activations.
        model_format: How the weights are stored; None lets lmdeploy find out.
        prefix_caching: Keep the KV cache of finished requests, which makes replayed transcripts cheap.
        options: Anything else that lmdeploy's own engine config knows, by name.
        start_timeout_s: Limit on one attempt to start.
        start_attempts: Attempts before the start has failed: lmdeploy's start can lose a race with itself.
    """

    path: str = ""
    model_name: str | None = None
    backend: Literal["turbomind", "pytorch"] = "turbomind"
    device: Literal["cuda", "ascend", "cpu"] = "cuda"
    tp: int = Field(default=1, ge=1)
    num_gpus: float | None = Field(default=None, gt=0, lt=1)
    accelerator_type: str | None = None
    session_len: int | None = Field(default=None, ge=1)
    max_batch_size: int | None = Field(default=None, ge=1)
    cache_max_entry_count: float | None = Field(default=None, gt=0, lt=1)
    quant_policy: Literal[0, 4, 8, 16, 17, 42] = 0
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    model_format: str | None = None
    prefix_caching: bool = True
    options: dict[str, Any] = {}
    start_timeout_s: PositiveFloat = 600
    start_attempts: int = Field(default=3, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _only_pytorch_without_gpu(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and (device := settings.get("device")) in ("cpu", "ascend"):
            if settings.get("backend", "pytorch") != "pytorch":
                raise ValueError(f"device {device} takes backend pytorch: TurboMind runs on GPUs alone")
            return {**settings, "backend": "pytorch"}
        return settings

    @model_validator(mode="after")
    def _shares_one_gpu(self) -> Self:
        if self.num_gpus is not None and (self.tp > 1 or self.device != "cuda"):
            raise ValueError("num_gpus is the share of one GPU; it takes tp 1 and device cuda")
        return self

    @model_validator(mode="after")
    def _engine_has_policy(self) -> Self:
        # lmdeploy itself refuses 16 and 17 there, and hands on 42, of which the engine knows nothing.
        if self.backend == "turbomind" and self.quant_policy > 8:
            raise ValueError(f"quant_policy {self.quant_policy} takes backend pytorch: TurboMind has 0, 4 and 8")
        return self

    @property
    def cache_share(self) -> float | None:
        """What lmdeploy is told as `cache_max_entry_count`; None for its default."""
        if self.cache_max_entry_count is None and self.num_gpus is not None:
            # Of what is free when the engine starts: together they never want more than one alone would.
            return LMDEPLOY_CACHE_SHARE * self.num_gpus
        return self.cache_max_entry_count


class LMDeployConfig(_LMDeployEngineConfig):
    """Settings of lmdeploy inside the actor."""

    kind: Literal["lmdeploy"] = "lmdeploy"


class APIServerConfig(_LMDeployEngineConfig):
    """Settings of an actor that runs `lmdeploy serve api_server` and talks to it.

    Attributes:
        server_name: Address that the server listens on.
        server_port: Its port; 0 takes a free one.
        api_key: The key that the server asks for; None: it asks for none.
        idle_timeout_s: Limit on the silence in a response; before its first token, on that in all responses. A long
            prompt alone on a slow machine may take longer.
    """

    kind: Literal["api_server"] = "api_server"
    server_name: str = "0.0.0.0"  # noqa: S104  (the seed's default, which is lmdeploy's)
    server_port: int = Field(default=23333, ge=0, le=65535)
    api_key: str | None = Field(default=None, repr=False)
    idle_timeout_s: PositiveFloat = 60

    @model_validator(mode="after")
    def _one_rank_on_cpu(self) -> Self:
        if self.device == "cpu" and self.tp > 1:
            # It would wait for GPUs until the start has failed.
            raise ValueError("tp: an api_server on CPU takes tp 1; several ranks run there in LMDeployPipeline alone")
        return self


class HTTPConfig(_Placed):
    """Settings of a client of an lmdeploy api_server or of any server that speaks OpenAI's protocol.

    Attributes:
        url: The server, such as `http://10.0.0.5:23333`. A trailing `/v1` is the same.
        model_name: Which of its models; None takes its first one.
        api_key: Sent as bearer token; None sends none.
        ca_file: Certificates to check the server's against; None takes the system's.
        verify_tls: Check the server's certificate.
        capacity: Requests at the server at a time, and connections to it.
        max_context: Prompt and generated tokens together; None asks the server, which may not tell.
        connect_timeout_s: Limit on connecting.
        idle_timeout_s: Limit on the silence in a response; before its first token, on that in all responses.
    """

    kind: Literal["http"] = "http"
    url: str
    model_name: str | None = None
    api_key: str | None = Field(default=None, repr=False)
    ca_file: str | None = None
    verify_tls: bool = True
    capacity: int = Field(default=256, ge=1)
    max_context: int | None = Field(default=None, ge=1)
    connect_timeout_s: PositiveFloat = 5
    idle_timeout_s: PositiveFloat = 60


class TritonConfig(_Placed):
    """Settings of a client of a Triton server.

    Attributes:
        address: `ip:port` of its gRPC endpoint.
        model_name: The model in its repository.
        session_len: Prompt and generated tokens together.
        capacity: Requests at the server at a time.
        ssl: Use TLS.
        ca_file: Certificates to check the server's against; None takes the system's.
        key_file: This client's private key, for mutual TLS.
        certificate_file: This client's certificate, for mutual TLS.
        idle_timeout_s: Limit on the silence in a response; before its first token, on that in all responses.
        start_timeout_s: How long to wait for a server that is down, and for a model that is being loaded.
    """

    kind: Literal["triton"] = "triton"
    address: str
    model_name: str
    session_len: int = Field(default=32768, ge=1)
    capacity: int = Field(default=256, ge=1)
    ssl: bool = False
    ca_file: str | None = None
    key_file: str | None = None
    certificate_file: str | None = None
    idle_timeout_s: PositiveFloat = 60
    start_timeout_s: PositiveFloat = 60


EngineConfig = Annotated[
    LMDeployConfig | APIServerConfig | HTTPConfig | TritonConfig | OpenVINOConfig | SimulatedConfig,
    Field(discriminator="kind"),
]


class SessionConfig(_Config):
    """Where sessions are kept, and its limits. The text of a `url` alone will do.

    Attributes:
        url: Database that keeps them, `redis://host:port/number` or `rediss://...` for TLS, with a password as
            `redis://:password@host`, unless `password_env` is set. None keeps them in the memory of a Ray actor.
        password_env: Name of the environment variable that holds the database's password. It is read in each process
            that connects: gateways, and programs that use the model.
        ttl_s: A session that is idle for this long is forgotten.
        turn_timeout_s: A turn that has not been renewed for so long belongs to a process that is gone; the session is
            free again. Processes renew their turns four times as often.
        max_sessions: The least recently used session makes room for one more. In memory only: a database has its own.
        max_bytes: Text of all transcripts together; the least recently used sessions make room. In memory only.
    """

    url: str | None = Field(default=None, pattern=r"^rediss?://", repr=False)
    password_env: str | None = Field(default=None, min_length=1)
    ttl_s: PositiveFloat = 3600
    turn_timeout_s: PositiveFloat = 10
    max_sessions: int = Field(default=100_000, ge=1)
    max_bytes: int = Field(default=1 << 30, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _takes_a_url(cls, given: Any) -> Any:
        return {"url": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _has_one_password(self) -> Self:
        if self.password_env is not None:
            if self.url is None:
                raise ValueError("password_env is for a database; give its url")
            if ":" in self.url.partition("://")[2].rpartition("@")[0]:
                raise ValueError("password_env is set, and url has a password too; take one of them out")
        return self


class PoolConfig(_Config):
    """How the pool queues, retries and gives up.

    Attributes:
        max_queued: Requests of a lane that wait for a slot; one more is refused with PoolSaturatedError. None: no
            limit. Lists of prompts have the batch lane, and are let in as a whole, by the room for one.
        max_attempts: Actors that may work on one request.
        first_token_timeout_s: Floor of the watchdog's bound on the first token. The bound itself follows the pool's
            own history and is never below this.
        token_gap_timeout_s: The watchdog's bound on the silence after the first token. Both bounds are ten times as
            long while other requests of the same slot get tokens.
        health_timeout_s: How long an actor under suspicion has to answer a health check before it is replaced.
        batch_share: Share of dispatches that the batch lane keeps while the interactive lane has work, 0 to 1.
        interactive_reserve: Share of each slot's capacity that the batch lane leaves free, so that an interactive
            request finds room at once whatever batch jobs run, 0 to 1. Of a capacity above 1 it is one at least.
        max_pins: Sessions whose slot the pool remembers; the least recently used is forgotten.
        placement_timeout_s: How long actors that do not fit even on idle nodes wait for nodes to join, in sight of
            Ray's autoscaler; 0 refuses them at once. None: five minutes for a model that is served, else 0.
    """

    max_queued: int | None = Field(default=None, ge=1)
    max_attempts: int = Field(default=4, ge=1)
    first_token_timeout_s: PositiveFloat = 60
    token_gap_timeout_s: PositiveFloat = 20
    health_timeout_s: PositiveFloat = 10
    batch_share: float = Field(default=0.1, ge=0, le=1)
    interactive_reserve: float = Field(default=0, ge=0, lt=1)
    max_pins: int = Field(default=1_000_000, ge=1)
    placement_timeout_s: float | None = Field(default=None, ge=0)


class ServedPoolConfig(PoolConfig):
    """That of a model that is served, to people who do not know of each other."""

    max_queued: int | None = Field(default=10_000, ge=1)
    interactive_reserve: float = Field(default=1 / 16, ge=0, lt=1)


class BatchConfig(_Config):
    """How a batch job retries and when it gives up.

    Attributes:
        retries: How often a row that failed is asked again, where that may help. The pool has tried several actors by
            then. A row that is refused for want of room is asked until it is taken, which counts as no try. What is
            wrong with the row itself, has taken longer than `timeout_s`, or took two actors down is not asked again.
        timeout_s: Limit on the time since an actor first got a row; None: no limit.
        max_failures: The job stops when more rows than this have failed; a share of all rows where it is below 1.
            None: no limit. Rows that `finish_at` gives up do not count.
        finish_at: Share of the rows, above 0 to 1. When so many are answered, the rest is given up, listed as failed.
        share_equal: Ask equal greedy rows once, and give each the answer.
        hedge: Send the last rows to a second slot when the first is much slower than usual; the first answer counts.
    """

    retries: int = Field(default=3, ge=0)
    timeout_s: PositiveFloat | None = None
    max_failures: float | None = Field(default=None, ge=0)
    finish_at: float = Field(default=1, gt=0, le=1)
    share_equal: bool = True
    hedge: bool = True


class AutoscalingConfig(_Config):
    """How many actors a group has, by the work that there is.

    Attributes:
        min_replicas: As few at least. 0 ends the last one when there is nothing to do; the next request waits for a new
            one to start.
        max_replicas: As many at most.
        target_outstanding_tokens: Work that one actor is meant to have: tokens of prompts and answers of the requests
            that it runs, and of its share of those that wait.
        upscale_delay_s: There has been more work than that for so long before actors are added. With none there, the
            first comes at once.
        downscale_delay_s: There has been less for so long before some end. They finish what they have.
    """

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(ge=1)
    target_outstanding_tokens: int = Field(default=16_384, ge=1)
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=300, ge=0)

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, above max_replicas, {self.max_replicas}")
        return self


class EngineGroup(_Config):
    """Actors with the same engine.

    In a file it is flat: the engine's own settings, and `replicas` or `autoscaling` beside them.

    Attributes:
        engine: Settings of the engine.
        replicas: Actors that host one each. With `autoscaling`, how many there are at first.
        autoscaling: Has their number follow the work. None: it is changed by hand alone.
    """

    engine: EngineConfig
    replicas: int = Field(default=1, ge=0)
    autoscaling: AutoscalingConfig | None = None

    @property
    def most(self) -> int:
        """As many actors as there may ever be."""
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas

    @model_validator(mode="before")
    @classmethod
    def _from_flat(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and "engine" not in settings:
            own = {name: settings[name] for name in ("replicas", "autoscaling") if name in settings}
            settings = {"engine": {name: value for name, value in settings.items() if name not in own}, **own}
        if isinstance(settings, dict) and "replicas" not in settings and settings.get("autoscaling"):
            least = settings["autoscaling"]
            least = least.get("min_replicas", 1) if isinstance(least, dict) else least.min_replicas
            settings = {**settings, "replicas": least}
        return settings

    @model_validator(mode="after")
    def _begins_within_bounds(self) -> Self:
        scaling = self.autoscaling
        if scaling is not None and not scaling.min_replicas <= self.replicas <= scaling.max_replicas:
            raise ValueError(
                f"replicas is {self.replicas}, outside min_replicas {scaling.min_replicas} to max_replicas "
                f"{scaling.max_replicas} of autoscaling"
            )
        return self


class ModelConfig(_Config):
    """A model that is served.

    Attributes:
        name: What clients call it.
        engines: The actors that answer for it. They may be of different kinds.
        meta_template: How messages become a prompt: `internlm2`, `chatml`, or a list in lagent's form. None uses the
            model's own chat template.
        pool: Limits of each gateway's pool.
        sessions: Limits of its session store.
        drain_timeout_s: An actor that is to end may work so long on what it has; what is left then moves to another.
    """

    name: str = Field(min_length=1, max_length=200)
    engines: tuple[EngineGroup, ...] = Field(min_length=1)
    meta_template: Literal["internlm2", "chatml"] | list[dict[str, Any]] | None = None
    pool: ServedPoolConfig = ServedPoolConfig()
    sessions: SessionConfig = SessionConfig()
    drain_timeout_s: float = Field(default=300, ge=0)

    @model_validator(mode="after")
    def _one_group_scales(self) -> Self:
        if sum(group.autoscaling is not None for group in self.engines) > 1:
            raise ValueError("engines: only one group can have autoscaling, for they share the work")
        for group in self.engines:
            others = [other.engine for other in self.engines if other is not group]
            if group.autoscaling is not None and group.engine in others:
                raise ValueError(
                    "engines: the group that has autoscaling has the engine of another one, and whose actors are whose "
                    "cannot be told; make one group of both, with min_replicas for those that stay"
                )
        return self

    def slots(self, *, most: bool = False) -> list[EngineConfig]:
        """Return the engine of each slot.

        Args:
            most: With as many actors as autoscaling may ask for, not those that there are at first.
        """
        return [group.engine for group in self.engines for _ in range(group.most if most else group.replicas)]


class NodeConfig(_Config):
    """Nodes of a cluster that is not there, to plan for.

    Attributes:
        name: Of one node; several are numbered.
        count: How many there are.
        num_cpus: CPUs of each.
        num_gpus: GPUs of each.
        accelerator_type: Model of the GPUs by Ray's name of it.
        resources: Other resources of each, such as `NPU`.
        labels: Labels of each.
    """

    name: str = "node"
    count: int = Field(default=1, ge=1)
    num_cpus: float = Field(ge=0)
    num_gpus: int = Field(default=0, ge=0)
    accelerator_type: str | None = None
    resources: dict[str, PositiveFloat] = {}
    labels: dict[str, str] = {}


class GatewayConfig(_Config):
    """How the endpoint answers HTTP.

    Attributes:
        replicas: Gateways. Any of them answers any request.
        api_keys_env: Name of the environment variable that holds the API keys, separated by commas.
        api_keys_file: File with one API key a line. Without keys from either, the endpoint asks for none.
        max_body_bytes: A longer request body is refused with status 413.
        body_timeout_s: When no more of a request's body comes for so long, it is refused with status 408.
        max_prompts: Prompts and choices in one request, together.
        request_timeout_s: Limit on queue and generation of one request; None: no limit.
        heartbeat_s: A stream that is silent for this long gets a comment, so that nothing on the way closes it.
        cors_origins: Origins whose pages may use the endpoint; none by default.
        log_prompts: Write the text of requests into the log. Off by default.
    """

    replicas: int = Field(default=1, ge=1)
    api_keys_env: str | None = None
    api_keys_file: str | None = None
    max_body_bytes: int = Field(default=16 * 2**20, ge=1)
    body_timeout_s: PositiveFloat = 30
    max_prompts: int = Field(default=2048, ge=1)
    request_timeout_s: PositiveFloat | None = 3600
    heartbeat_s: PositiveFloat = 15
    cors_origins: tuple[str, ...] = ()
    log_prompts: bool = False


class BatchesConfig(_Config):
    """Where the endpoint keeps files and batches (`/v1/files`, `/v1/batches`), and its limits.

    Attributes:
        folder: A folder on the Ray cluster's head node, and on a disk of that node, for SQLite locks files in it. It is
            made where there is none. It begins with `/`, or with `~` for the home folder there.
        max_file_bytes: A longer file is refused with status 413.
        max_running: Batches that run at a time. Those that come later wait.
        expires_after_s: Time that a batch has from its creation, up to the 24 h of OpenAI's `completion_window`. Rows
            that are not answered by then fail.
    """

    folder: str = Field(pattern=r"^[~/]")
    max_file_bytes: int = Field(default=200 * 2**20, ge=1)
    max_running: int = Field(default=4, ge=1)
    expires_after_s: PositiveFloat = Field(default=24 * 3600, le=24 * 3600)


class ServeConfig(_Config):
    """What `raylm serve` serves: the one config of the endpoint.

    Attributes:
        models: The models, by the names that clients use.
        gateway: How the endpoint answers HTTP.
        batches: Where files and batches are kept. None: the endpoint takes none, for what is uploaded stays on disk.
    """

    models: tuple[ModelConfig, ...] = Field(
        default=(
            ModelConfig(
                name="smollm2-135m-instruct",
                engines=(EngineGroup(engine=OpenVINOConfig(path="smollm2-135m-instruct")),),
            ),
        ),
        min_length=1,
    )
    gateway: GatewayConfig = GatewayConfig()
    batches: BatchesConfig | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            raise ValueError(f"models: two have the same name among {', '.join(names)}")
        return self

    @classmethod
    def parse(cls, settings: Any, where: str = "the configuration") -> Self:
        """Return checked settings.

        Args:
            settings: What was read from a file or given as keyword arguments.
            where: Where they are from, for error messages.

        Raises:
            InvalidRequestError: a name is unknown, or a value is wrong. The text names each.
        """
        try:
            return cls.model_validate({} if settings is None else settings)
        except ValidationError as error:
            raise InvalidRequestError(f"{where} is wrong: {_problems(error)}") from None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Return the settings in a YAML file.

        Raises:
            InvalidRequestError: it cannot be read, is not YAML, or says something wrong.
        """
        try:
            settings = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InvalidRequestError(f"{path} cannot be read: {error}") from None
        return cls.parse(settings, str(path))
