"""`raylm`: the command line. Every verb is a thin call into the library.

Answers go to stdout, and everything else to stderr. Exit codes:

    0    everything was answered
    1    some prompts, rows or turns failed; the others were answered. Of `plan`: it does not fit
    2    wrong usage or wrong input; nothing was done
    3    it could not start, or could not go on: no room in the cluster, no engine, no disk, or another
         command changes what the cluster serves
    130  interrupted by Ctrl-C or SIGTERM

An error is one line. With RAYLM_DEBUG=1 it is a traceback.

Ray takes seconds to import, so verbs import what needs it themselves and `raylm --help` answers at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import (
    AbstractContextManager,
    asynccontextmanager,
    closing,
    contextmanager,
    nullcontext,
    redirect_stdout,
    suppress,
)
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TextIO, TypeVar

import msgspec
import typer
import uvloop
import yaml
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from raylm import heap
from raylm._version import __version__
from raylm.config import Backend, BatchConfig, EngineConfig, NodeConfig, ServeConfig
from raylm.errors import (
    CapacityError,
    ClusterBusyError,
    EngineStartError,
    InvalidRequestError,
    OutputBusyError,
    RaylmError,
    TooManyFailuresError,
)
from raylm.messages import GenerationConfig, Status

if TYPE_CHECKING:
    from raylm.api import LMDeployPipeline
    from raylm.batch import Reading, Tally
    from raylm.chatbot import AsyncChatbot

_FAILED = 1
_WRONG = 2
_NO_START = 3

_EXIT_CODES = (
    "Exit codes: 0 everything was answered; 1 some prompts, rows or turns failed; 2 wrong usage or input; "
    "3 could not start, or could not go on; 130 interrupted. RAYLM_DEBUG=1 shows tracebacks."
)

_VERIFY_CODES = (
    "Exit codes: 0 the same texts; 1 some differ, or could not be asked; 2 wrong usage, or nothing to compare; "
    "3 could not start; 130 interrupted. RAYLM_DEBUG=1 shows tracebacks."
)

_OPERATE_CODES = (
    "Exit codes: 0 done; 2 wrong usage, or no such model; 3 no cluster, no room, no engine, or another command changes "
    "what is served; 130 interrupted. RAYLM_DEBUG=1 shows tracebacks."
)

_LINE_INTERVAL_S = 10.0
"""How often a batch tells its progress where there is no terminal."""

_SHOW_INTERVAL_S = 0.25

_CHAT_HELP = "/new begins another conversation, /exit or Ctrl-D ends, Ctrl-C stops the answer, /help shows this"

_DEFAULTS = GenerationConfig()
_DEFAULT_MODEL = "smollm2-135m-instruct"
_BATCH = BatchConfig()

T = TypeVar("T")

_Prompts = Annotated[
    list[str], typer.Argument(metavar="PROMPT", help="Raw prompts; - reads one from stdin.", show_default=False)
]
_Input = Annotated[str, typer.Argument(metavar="IN", help="Rows; - is stdin, JSON Lines.", show_default=False)]
_Output = Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="Where the rows go; - is stdout.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin anew: forget OUT and what it was made of.")]
_Prompt = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help=r"Raw prompt, with columns in braces: 'Q: {question}\nA:'", show_default=False),
]
_Message = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="The same, for a conversation of one message.", show_default=False),
]
_Column = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=COLUMN", help="Which column is prompt, messages or id.", show_default=False),
]
_Format = Annotated[
    Literal["jsonl", "csv", "parquet"] | None,
    typer.Option("--format", help="Of IN; else by its name.", show_default=False),
]
_Retries = Annotated[int, typer.Option(min=0, help="How often a failed row is asked again, where that may help.")]
_Timeout = Annotated[
    float | None, typer.Option(min=0.001, help="Seconds for a row, since an actor got it.", show_default=False)
]
_MaxFailures = Annotated[
    str | None, typer.Option(metavar="N|P%", help="Stop when more rows have failed.", show_default=False)
]
_FinishAt = Annotated[str, typer.Option(metavar="P%", help="Give the rest up when so many rows are answered.")]
_ShareEqual = Annotated[bool, typer.Option(help="Ask equal greedy rows once.")]
_Hedge = Annotated[bool, typer.Option(help="Send the last slow rows to a second actor too.")]
_Shard = Annotated[
    str | None, typer.Option(metavar="I/N", help="Answer one of N parts, into a ledger of its own.", show_default=False)
]
_Merge = Annotated[bool, typer.Option("--merge", help="Put the parts together; asks nothing.")]
_Pool = Annotated[
    str | None, typer.Option(metavar="NAME", help="Ask a model that is being served.", show_default=False)
]
_Url = Annotated[
    str | None,
    typer.Option(
        metavar="URL", help="Ask a server of OpenAI's protocol; its key is in RAYLM_API_KEY.", show_default=False
    ),
]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object a prompt, with usage and receipt.")]
_Job = Annotated[str, typer.Argument(metavar="OUT", help="The output of a batch.", show_default=False)]
_JsonFigures = Annotated[bool, typer.Option("--json", help="Print the figures as one JSON object.")]
_System = Annotated[str | None, typer.Option(help="System message of the conversation.", show_default=False)]
_Session = Annotated[str, typer.Option(metavar="ID", help="Name of the session.")]
_Kill = Annotated[bool, typer.Option("--kill", help="Kill one actor's process in the middle; needs two replicas.")]

_Model = Annotated[
    str, typer.Option("--model", "-m", help="A built-in alias, a GGUF file, a model folder or a hub id.")
]
_OptionalModel = Annotated[
    str | None, typer.Option("--model", "-m", help="As in the other verbs.", show_default=_DEFAULT_MODEL)
]
_Proxy = Literal["auto", "haproxy", "python"]
_Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")]
_Port = Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")]
_Served = Annotated[str, typer.Argument(metavar="MODEL", help="A model that is served.", show_default=False)]
_Replicas = Annotated[int, typer.Option(min=1, help="Actors that serve the model.")]
_Tp = Annotated[int, typer.Option(min=1, help="GPUs of one replica; 1 on CPU.")]
_Backend = Annotated[Backend, typer.Option(help="Engine; auto goes by the hardware.")]
_EngineSettings = Annotated[
    str | None,
    typer.Option("--engine-config", metavar="JSON", help="Settings of the engine, with its kind.", show_default=False),
]
_Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster; else RAY_ADDRESS, one on this machine, or a new local one.", show_default=False),
]

_MaxNewTokens = Annotated[
    int | None, typer.Option(help="Limit on generated tokens.", show_default=str(_DEFAULTS.max_new_tokens))
]
_Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy decoding.", show_default=str(_DEFAULTS.temperature))
]
_TopP = Annotated[
    float | None, typer.Option(help="Nucleus of probability mass, up to 1.", show_default=str(_DEFAULTS.top_p))
]
_TopK = Annotated[int | None, typer.Option(help="Likeliest tokens to sample.", show_default=str(_DEFAULTS.top_k))]
_Penalty = Annotated[
    float | None,
    typer.Option("--repetition-penalty", help="1.0 is none.", show_default=str(_DEFAULTS.repetition_penalty)),
]
_Stop = Annotated[
    list[str] | None, typer.Option(help="Text that ends the generation; may be repeated.", show_default=False)
]
_Seed = Annotated[int | None, typer.Option(help="Seed of the sampling.", show_default=False)]

app = typer.Typer(
    help="LLM inference on the actors of a Ray cluster.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_console = Console(stderr=True, highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line: the console script `raylm`."""
    logging.basicConfig(handlers=[_LogHandler()], level=logging.WARNING, format="%(message)s")
    if (Path.home() / ".ray" / "auth_token").exists():
        # As `ray start` does: a cluster of this user checks this token. Ray reads the mode when it is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        app(prog_name="raylm")
    except Exception as error:  # the border to a person, who gets one line
        if os.environ.get("RAYLM_DEBUG") == "1":
            raise
        _say_error(error)
        sys.exit(_exit_code(error))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"raylm {__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(epilog=_EXIT_CODES)
def generate(
    prompts: _Prompts,
    *,
    as_json: _Json = False,
    max_new_tokens: _MaxNewTokens = None,
    temperature: _Temperature = None,
    top_p: _TopP = None,
    top_k: _TopK = None,
    repetition_penalty: _Penalty = None,
    stop: _Stop = None,
    seed: _Seed = None,
    model: _Model = _DEFAULT_MODEL,
    replicas: _Replicas = 1,
    tp: _Tp = 1,
    backend: _Backend = "auto",
    engine_config: _EngineSettings = None,
    address: _Address = None,
) -> None:
    """Continue raw prompts, without a chat template, and print the texts in their order.

    A conversation is `raylm chat`'s, which reads stdin too: echo "What is a star?" | raylm chat
    """
    from raylm.api import AsyncLMDeployPipeline
    from raylm.batch.outputs import Result, encode_row

    sampling = _sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed)
    pipeline = AsyncLMDeployPipeline(
        model, tp=tp, replicas=replicas, backend=backend, backend_config=_engine(engine_config), address=address
    )
    if prompts.count("-") > 1:
        raise typer.BadParameter("stdin is one prompt; give - once", param_hint="PROMPT")
    texts = [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in prompts]
    requests = [pipeline.request(prompt=text, **sampling) for text in texts]

    async def answer() -> list[Result]:
        async with _started(pipeline):
            return await pipeline.pool.generate_many(requests, lane="interactive")

    results = _run(answer())
    for number, result in enumerate(results, 1):
        if as_json:
            sys.stdout.buffer.write(encode_row(number, result))
        elif not isinstance(result, RaylmError):
            print(result.text)  # noqa: T201
        if isinstance(result, RaylmError):
            _say(f"prompt {number}: {type(result).__name__}: {result}", "red")
    if any(isinstance(result, RaylmError) for result in results):
        raise typer.Exit(_FAILED)


@app.command(epilog=_EXIT_CODES)
def chat(
    *,
    system: _System = None,
    session: _Session = "chat",
    max_new_tokens: _MaxNewTokens = None,
    temperature: _Temperature = None,
    top_p: _TopP = None,
    top_k: _TopK = None,
    repetition_penalty: _Penalty = None,
    stop: _Stop = None,
    seed: _Seed = None,
    model: _Model = _DEFAULT_MODEL,
    replicas: _Replicas = 1,
    tp: _Tp = 1,
    backend: _Backend = "auto",
    engine_config: _EngineSettings = None,
    address: _Address = None,
) -> None:
    """Hold a conversation, token by token.

    Without a terminal, each line of stdin is a turn and only the answers are printed. /new begins another conversation.
    """
    from raylm.api import LMDeployPipeline

    sampling = _sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed)
    engine = _engine(engine_config)
    interactive, answers = sys.stdin.isatty(), sys.stdout
    # As in `_run`; but input() edits lines only while sys.stdout is the terminal.
    with nullcontext() if interactive else redirect_stdout(sys.stderr):
        with _starting(model, replicas):
            pipeline = LMDeployPipeline(
                model, tp=tp, replicas=replicas, backend=backend, backend_config=engine, address=address
            )
        with pipeline:
            talk = _Chat(pipeline, session, system, sampling, answers, interactive=interactive)
            if not talk.run():
                raise typer.Exit(_FAILED)


@app.command(epilog=_EXIT_CODES)
def batch(
    source: _Input,
    *,
    output: _Output = "-",
    overwrite: _Overwrite = False,
    prompt: _Prompt = None,
    message: _Message = None,
    column: _Column = None,
    file_format: _Format = None,
    max_new_tokens: _MaxNewTokens = None,
    temperature: _Temperature = None,
    top_p: _TopP = None,
    top_k: _TopK = None,
    repetition_penalty: _Penalty = None,
    stop: _Stop = None,
    seed: _Seed = None,
    retries: _Retries = _BATCH.retries,
    timeout: _Timeout = None,
    max_failures: _MaxFailures = None,
    finish_at: _FinishAt = "100%",
    share_equal: _ShareEqual = True,
    hedge: _Hedge = True,
    shard: _Shard = None,
    merge: _Merge = False,
    pool: _Pool = None,
    url: _Url = None,
    model: _OptionalModel = None,
    replicas: _Replicas = 1,
    tp: _Tp = 1,
    backend: _Backend = "auto",
    engine_config: _EngineSettings = None,
    address: _Address = None,
) -> None:
    """Answer every row of a file once, in order, whatever dies on the way: the same command goes on where it was.

    IN: JSON Lines, CSV, Parquet, gzipped or not, or an OpenAI batch file. A row has "prompt" (raw text) or "messages"
    (a conversation), and if need be "id" and generation parameters; or --prompt, --message and --column say what is
    made of its columns.

    OUT: for each row "id" (else its line's number, from 1), "text", "finish_reason", "usage", "receipt"; or "id" and
    "error". What was answered is in OUT.ledger; until the last row is there, the first ones are in OUT.partial.
    """
    from raylm.batch import Reading, merge_shards
    from raylm.batch.rows import count_rows

    sampling = _sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed)
    part = _parse_shard(shard)
    config = BatchConfig(
        retries=retries,
        timeout_s=timeout,
        max_failures=_parse_failures(max_failures),
        finish_at=_parse_share(finish_at, "--finish-at"),
        share_equal=share_equal,
        hedge=hedge,
    )
    columns = dict(_parse_column(text) for text in column or ())
    reading = Reading(
        format=file_format, columns=columns, prompt=_with_newlines(prompt), message=_with_newlines(message)
    )
    path = None if source == "-" else Path(source)
    if path is not None and not path.exists():
        raise typer.BadParameter(f"{source}: No such file", param_hint="IN")
    if output == "-" and (part[1] > 1 or merge or overwrite):
        raise typer.BadParameter("a job in parts, or one that goes on, needs a file", param_hint="--output")
    total = count_rows(path, reading) if path is not None and path.is_file() else None
    if merge:
        tally = merge_shards(Path(output), total, overwrite=overwrite)
        _say(f"{tally.num_rows} rows of all shards are in {output}, {tally.num_failed} failed")
    else:
        target = _target(pool, url, model, replicas, tp, backend, engine_config, address)
        tally = _run_batch(target, path, output, reading, config, part, total, sampling, overwrite=overwrite)
    if part[1] == 1 and Path(output).is_file():  # neither a pipe nor a device
        _report_batch(Path(output))
    if tally.num_failed:
        raise typer.Exit(_FAILED)


@app.command(epilog=_EXIT_CODES)
def report(output: _Job, *, as_json: _JsonFigures = False) -> None:
    """Tell how a batch went, or how it goes: rows, failures, rates, latencies, lengths, and who answered what.

    The figures are those of OUT.ledger. They are written to OUT.report.json, and as a page to OUT.report.html.
    """
    from raylm.batch import ledger_path
    from raylm.batch.report import read_report, to_table, write_report

    ledger = ledger_path(Path(output))
    found = read_report(ledger)
    _, page = write_report(ledger, found)
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
    else:
        Console(file=sys.stdout, highlight=False, markup=False).print(to_table(found))
    _say(f"the page is {page}")


@app.command(epilog=_VERIFY_CODES)
def verify(
    output: _Job,
    *,
    sample: Annotated[int, typer.Option(min=1, metavar="N", help="How many rows.")] = 20,
    seed: Annotated[int | None, typer.Option(help="Of their choice.", show_default=False)] = None,
    as_json: _JsonFigures = False,
    source: Annotated[
        Path | None,
        typer.Option("--input", metavar="IN", help="Rows, where the batch has read no file, or it is elsewhere now."),
    ] = None,
    pool: _Pool = None,
    url: _Url = None,
    model: _OptionalModel = None,
    tp: _Tp = 1,
    backend: _Backend = "auto",
    engine_config: _EngineSettings = None,
    address: _Address = None,
) -> None:
    """Ask some of a batch's greedy rows again, chosen at random, and tell those that are answered otherwise now.

    Their inputs are read from the file that the batch has read, and the same engines are started, or the same endpoint
    is asked, as the batch did last, unless options name others.
    """
    from raylm.batch import ledger_path
    from raylm.batch.verify import Sample, Verification, to_lines

    if source is not None and not source.is_file():
        raise typer.BadParameter(f"{source}: No such file", param_hint="--input")
    chosen = Sample(ledger_path(Path(output)), sample, seed, source)
    if pool or url or model or engine_config or (tp, backend) != (1, "auto"):
        target = _target(pool, url, model, 1, tp, backend, engine_config, address)
    elif (noted := chosen.run.job.get("target")) is not None:
        target = {**noted, "address": address or noted["address"]}
    else:
        raise InvalidRequestError(
            f"{output}: its ledger does not say who is to be asked; say it: --pool NAME for a model that is being "
            "served, --url URL for a server, or --model and --engine-config for actors of this command's own"
        )
    chatbot = _chatbot(target)
    requests, changed = chosen.requests(chatbot)

    async def ask() -> Verification:
        async with _started(chatbot, target):
            return await chosen.ask(chatbot, requests, changed)

    found = _run(ask())
    if as_json:
        sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
    else:
        for line in to_lines(found):
            print(line)  # noqa: T201
    if found.drifted or found.failed:
        raise typer.Exit(_FAILED)


@app.command(epilog=_EXIT_CODES)
def demo(
    *,
    kill: _Kill = False,
    model: _Model = _DEFAULT_MODEL,
    replicas: _Replicas = 1,
    tp: _Tp = 1,
    backend: _Backend = "auto",
    engine_config: _EngineSettings = None,
    address: _Address = None,
) -> None:
    """Answer a batch of questions and hold three conversations, and show who answered what."""
    from raylm.api import AsyncLMDeployPipeline
    from raylm.demo import run_demo

    if kill and replicas < 2:
        raise typer.BadParameter("needs --replicas 2 or more", param_hint="--kill")
    pipeline = AsyncLMDeployPipeline(
        model, tp=tp, replicas=replicas, backend=backend, backend_config=_engine(engine_config), address=address
    )

    console = Console(file=sys.stdout, highlight=False)

    async def show() -> int:
        async with _started(pipeline):
            return await run_demo(pipeline, console, kill=kill)

    if _run(show()):
        raise typer.Exit(_FAILED)


@app.command(epilog=_EXIT_CODES)
def serve(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file of what to serve.", show_default=False)
    ] = None,
    *,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    proxy: Annotated[
        _Proxy, typer.Option(help="What passes HTTP on; auto: haproxy where it can run. A running cluster has its own.")
    ] = "auto",
    address: _Address = None,
) -> None:
    """Serve models over HTTP, in OpenAI's protocol and that of lagent's classes, until Ctrl-C.

    Without CONFIG: smollm2-135m-instruct on this machine's CPU. A page to chat with it is at /.
    """
    from raylm.serve.run import Endpoint, serve_until_interrupted

    settings = ServeConfig() if config is None else ServeConfig.load(config)
    endpoint = Endpoint(settings, host, port, proxy, address)
    if endpoint.proxy_reason:
        _say(f"the proxy is Serve's own, in Python: {endpoint.proxy_reason}", "yellow")
    names = ", ".join(model.name for model in settings.models)

    def started() -> None:
        _say(f"serving {names} at {endpoint.url} through {endpoint.through}, on the Ray cluster {endpoint.cluster}")
        _say("Ctrl-C ends it")

    with redirect_stdout(sys.stderr):
        heap.settle()
        serve_until_interrupted(endpoint, started)


@app.command(
    epilog="Exit codes: 0 it fits as it starts; 1 it does not; 2 wrong usage or input; 3 there is no such cluster.",
)
def plan(
    config: Annotated[
        Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file, as for serve.", show_default=False)
    ] = None,
    *,
    nodes: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|JSON",
            help='Plan for these nodes in place of a cluster\'s: [{"count": 4, "num_cpus": 64, "num_gpus": 8}, ...].',
            show_default=False,
        ),
    ] = None,
    address: _Address = None,
) -> None:
    """Show, node by node, which replica's ranks would go where, and what is missing. Starts no actor.

    It plans with what is free now: what is running already keeps its place. Models are placed as they start; where
    autoscaling may make more of them, the last line says whether the most would fit.
    """
    from raylm.actors.placement import Node, nodes_of, outlook, replicas_of
    from raylm.actors.placement import plan as place

    settings = ServeConfig() if config is None else ServeConfig.load(config)
    found: list[Node]
    if nodes is not None:
        if address is not None:
            raise typer.BadParameter("give --nodes or --address", param_hint="--nodes")
        found = nodes_of(_nodes(nodes))
    else:
        import ray

        from raylm.actors import cluster

        with redirect_stdout(sys.stderr):
            cluster.connect(address)
            found = cluster.nodes()
            ray.shutdown()
    planned = place(found, replicas_of(settings.models))
    print(planned.text())  # noqa: T201
    if not planned.fits:
        raise typer.Exit(_FAILED)
    if most := outlook(found, settings.models):
        print(most)  # noqa: T201


@app.command(epilog=_OPERATE_CODES)
def up(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, as for serve.", show_default=False)],
    *,
    host: _Host = "127.0.0.1",
    port: _Port = 8000,
    proxy: Annotated[_Proxy, typer.Option(help="As for serve; a running Serve keeps its own.")] = "auto",
    address: _Address = None,
) -> None:
    """Serve models on a running cluster, and leave them there; or bring what is served to what CONFIG says.

    Models whose settings have changed are updated actor by actor, without a lost request. `raylm down` ends them.
    """
    from raylm.actors.manager_actor import served_models
    from raylm.operate import settled
    from raylm.serve.run import Endpoint

    settings = ServeConfig.load(config)
    endpoint = Endpoint(settings, host, port, proxy, address)
    names = [model.name for model in settings.models]
    with redirect_stdout(sys.stderr):
        endpoint.connect(start=False)
        with endpoint.alone(), _console.status(f"starting {', '.join(names)}"):
            endpoint.start(update=True)
            asyncio.run(settled(settings.models))
        others = sorted(set(served_models()) - set(names))
    _say(f"serving {', '.join(names)} at {endpoint.url}")
    if others:
        _say(f"not in {config}, and about to end unless somebody else uses it: {', '.join(others)}", "yellow")


@app.command(epilog=_OPERATE_CODES)
def status(*, as_json: _JsonFigures = False, address: _Address = None) -> None:
    """Show what is served on a cluster: models, their actors, and what they do."""
    from raylm.operate import states, table

    with _joined(address):
        found = asyncio.run(states())
    if as_json:
        sys.stdout.buffer.write(msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    else:
        Console(file=sys.stdout, highlight=False).print(table(found))


@app.command(epilog=_OPERATE_CODES)
def top(
    *,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    address: _Address = None,
) -> None:
    """Watch the actors at work, until Ctrl-C. Without a terminal it prints one look after another."""
    from rich.live import Live

    from raylm.operate import Rates, states, table

    async def watch() -> None:
        rates = Rates()
        with Live(console=screen, screen=True, auto_refresh=False) if screen.is_terminal else nullcontext() as live:
            while True:
                shown = table(await states(), rates)
                if live is None:
                    screen.print(shown)
                else:
                    live.update(shown, refresh=True)
                await asyncio.sleep(interval)

    screen = Console(file=sys.stdout, highlight=False)
    with _joined(address), suppress(KeyboardInterrupt):
        asyncio.run(watch())


@app.command(epilog=_OPERATE_CODES)
def logs(
    model: _Served,
    slot: Annotated[int, typer.Argument(metavar="SLOT", help="As in status.", min=0, show_default=False)],
    *,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last ones.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with those that come, until Ctrl-C.")] = False,
    address: _Address = None,
) -> None:
    """Print what the actor in a slot has written."""
    from raylm.operate import actor_of, log_lines

    answers = sys.stdout
    with _joined(address):
        actor = asyncio.run(actor_of(model, slot))
        for text in log_lines(actor, num_lines=lines, follow=follow):
            answers.write(text)
            answers.flush()


@app.command(epilog=_OPERATE_CODES)
def scale(
    model: _Served,
    replicas: Annotated[int, typer.Argument(metavar="N", help="How many actors there are to be.", min=0)],
    *,
    group: Annotated[
        int | None,
        typer.Option(min=0, help="Which of the model's groups of actors, from 0.", show_default=False),
    ] = None,
    address: _Address = None,
) -> None:
    """Have a model consist of N actors. Those that end finish what they have; with none, requests wait."""
    from raylm.operate import scale as rescale

    with _joined(address):
        asyncio.run(rescale(model, replicas, group))
    _say(f"{model} is to have {replicas} {'actor' if replicas == 1 else 'actors'}; raylm status shows how far it is")


@app.command(epilog=_OPERATE_CODES)
def drain(
    model: _Served,
    slot: Annotated[int, typer.Argument(metavar="SLOT", help="As in status.", min=0, show_default=False)],
    *,
    address: _Address = None,
) -> None:
    """Have the actor in a slot finish what it has and end, and another take its place."""
    from raylm.operate import drain as see_off

    with _joined(address):
        asyncio.run(see_off(model, slot))
    _say(f"slot {slot} of {model} gets no more requests, and ends when it has done what it has")


@app.command(epilog=_OPERATE_CODES)
def down(*, address: _Address = None) -> None:
    """End what raylm serves on a cluster, and leave nothing of it there. The cluster goes on."""
    from raylm.actors.cluster import operating
    from raylm.operate import down as end_all

    with _joined(address), operating(), _console.status("ending"):
        ended = asyncio.run(end_all())
    _say(f"ended: {', '.join(ended)}" if ended else "nothing was served on this cluster")


@app.command()
def compat() -> None:
    """Show what the installed lmdeploy has and lacks of what the four classes need, and what raylm does instead."""
    from raylm.compat import examine, installed_version

    found = installed_version()
    table = Table(
        "lmdeploy's interface", "for", "there", "what raylm does", box=None, pad_edge=False, title_justify="left"
    )
    table.title = f"lmdeploy {found}" if found else "lmdeploy is not installed; pip install 'raylm[lmdeploy]' brings it"
    words = {True: "yes", False: "no", None: "?"}
    for finding in examine():
        interface = finding.interface
        table.add_row(interface.name, interface.used_by, words[finding.present], interface.instead)
    Console(file=sys.stdout, highlight=False, markup=False).print(table)


# What the verbs share


def _sampling(
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    stop: list[str] | None,
    seed: int | None,
) -> dict[str, Any]:
    """Return the parameters that were given, checked."""
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "stop_words": stop or None,
        "seed": seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    _DEFAULTS.updated(given)
    return given


def _engine(settings: str | None) -> EngineConfig | None:
    if settings is None:
        return None
    adapter: TypeAdapter[EngineConfig] = TypeAdapter(EngineConfig)
    try:
        return adapter.validate_json(settings)
    except ValidationError as error:
        raise _wrong(error, "--engine-config") from None


def _nodes(described: str) -> list[NodeConfig]:
    """Return nodes that are described in JSON, or in a file of JSON or YAML."""
    try:
        text = described if described.lstrip().startswith(("[", "{")) else Path(described).read_text()
        return TypeAdapter(list[NodeConfig]).validate_python(yaml.safe_load(text))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(" ".join(str(error).split()), param_hint="--nodes") from None
    except ValidationError as error:
        raise _wrong(error, "--nodes") from None


def _wrong(error: ValidationError, option: str) -> typer.BadParameter:
    reasons = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}".removeprefix(": ") for found in error.errors()]
    return typer.BadParameter("; ".join(reasons), param_hint=option)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end. Ctrl-C and SIGTERM cancel it, so that it leaves nothing behind."""

    async def cancellable() -> T:
        task = asyncio.current_task()
        if task is None:
            raise AssertionError("unreachable: a coroutine runs in a task")
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        with redirect_stdout(sys.stderr):  # Ray prints there when an actor dies, among the answers
            heap.settle()
            return uvloop.run(cancellable())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


@contextmanager
def _joined(address: str | None) -> Iterator[None]:
    """Be connected to a cluster that runs, for as long as the block lasts."""
    import ray

    from raylm.actors import cluster

    with redirect_stdout(sys.stderr):
        cluster.connect(address, start=False)
        try:
            yield
        finally:
            ray.shutdown()


def _starting(model: str, replicas: int) -> AbstractContextManager[object]:
    return _console.status(f"starting {replicas} {'replica' if replicas == 1 else 'replicas'} of {model}")


@asynccontextmanager
async def _started(chatbot: AsyncChatbot, target: dict[str, Any] | None = None) -> AsyncGenerator[None, None]:
    with _waiting_for(chatbot, target):
        await chatbot.start()
    try:
        yield
    finally:
        await chatbot.aclose()


def _waiting_for(chatbot: AsyncChatbot, target: dict[str, Any] | None) -> AbstractContextManager[object]:
    from raylm.api import AsyncLMDeployPipeline

    if isinstance(chatbot, AsyncLMDeployPipeline):
        return _starting(chatbot.path, chatbot.replicas)
    if target is not None and target["kind"] == "engines":
        return _console.status("starting the engines that the batch had")
    named = {} if target is None else target
    return _console.status(f"connecting to {named.get('name') or named.get('url')}")


# Batch


def _parse_shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 1, 1
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise typer.BadParameter(f"expected I/N with I from 1 to N, got {text}", param_hint="--shard")
    return int(number), int(count)


def _parse_failures(text: str | None) -> float | None:
    """Return a number of rows, or a share below 1 for a percentage; None where any number of rows may fail."""
    if text is None:
        return None
    if text.isdecimal():
        return int(text)
    if not text.endswith("%"):
        raise typer.BadParameter(f"expected a number of rows or a percentage, got {text}", param_hint="--max-failures")
    share = _parse_share(text, "--max-failures")
    return None if share == 1 else share


def _parse_share(text: str, option: str) -> float:
    """Return a share of 1 for a percentage."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = 0.0
    if not (text.endswith("%") and 0 < share <= 1):
        raise typer.BadParameter(f"expected a percentage above 0% and up to 100%, got {text}", param_hint=option)
    return share


def _parse_column(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"expected NAME=COLUMN, got {text}", param_hint="--column")
    return name, column


def _with_newlines(text: str | None) -> str | None:
    """Return what is meant by a template in which a shell has left newlines and tabs spelled out."""
    return None if text is None else text.replace("\\n", "\n").replace("\\t", "\t")


def _target(
    pool: str | None,
    url: str | None,
    model: str | None,
    replicas: int,
    tp: int,
    backend: Backend,
    engine_config: str | None,
    address: str | None,
) -> dict[str, Any]:
    """Return who is to answer."""
    if pool is not None and url is not None:
        raise typer.BadParameter("either --pool or --url", param_hint="--pool")
    if pool is not None or url is not None:
        started = {
            "--engine-config": engine_config is not None,
            "--backend": backend != "auto",
            "--replicas": replicas != 1,
            "--tp": tp != 1,
            "--model": pool is not None and model is not None,
        }
        for option, is_given in started.items():
            if is_given:
                raise typer.BadParameter("it is for actors that this command starts", param_hint=option)
    if pool is not None:
        return {"kind": "pool", "name": pool, "address": address}
    if url is not None:
        return {"kind": "url", "url": url, "model": model, "address": address}
    engine = _engine(engine_config)
    return {
        "kind": "pipeline",
        "path": model or _DEFAULT_MODEL,
        "tp": tp,
        "replicas": replicas,
        "backend": backend,
        "engine_config": None if engine is None else engine.model_dump(mode="json"),
        "address": address,
    }


def _chatbot(target: dict[str, Any]) -> AsyncChatbot:
    from raylm.api import AsyncLMDeployClient, AsyncLMDeployPipeline
    from raylm.chatbot import made_of

    key = os.environ.get("RAYLM_API_KEY")
    if target["kind"] in ("pool", "engines"):
        if target.get("has_key") and not key:
            raise InvalidRequestError("the batch has asked servers with an API key: put it into RAYLM_API_KEY")
        return made_of(target, key)
    if target["kind"] == "url":
        return AsyncLMDeployClient(target["url"], target["model"], api_key=key, address=target["address"])
    config = target["engine_config"]
    return AsyncLMDeployPipeline(
        target["path"],
        tp=target["tp"],
        replicas=target["replicas"],
        backend=target["backend"],
        backend_config=None if config is None else TypeAdapter(EngineConfig).validate_python(config),
        address=target["address"],
    )


def _run_batch(
    target: dict[str, Any],
    source: Path | None,
    output: str,
    reading: Reading,
    config: BatchConfig,
    shard: tuple[int, int],
    total: int | None,
    sampling: dict[str, Any],
    *,
    overwrite: bool,
) -> Tally:
    from raylm.batch import Tally, check_output, run_batch_async

    chatbot = _chatbot(target)
    chatbot.request(prompt="x", **sampling)
    if output != "-":
        check_output(Path(output), shard, overwrite=overwrite)
    tally = Tally()

    async def work() -> Tally:
        nonlocal tally
        async with _started(chatbot, target):
            # A bar and rows on one terminal would be drawn over each other.
            bar = _console.is_terminal and not (output == "-" and stdout.isatty())

            def begun(present: Tally) -> None:
                nonlocal tally
                tally = present

            async with _BatchProgress(lambda: tally, chatbot, bar=bar) as progress:
                await run_batch_async(
                    chatbot,
                    source,
                    stdout if output == "-" else Path(output),
                    config=config,
                    reading=reading,
                    overwrite=overwrite,
                    shard=shard,
                    total=total,
                    begun=begun,
                    **sampling,
                )
            progress.summarize()
            return tally

    stdout = sys.stdout.buffer
    try:
        return _run(work())
    except BaseException:
        if output != "-" and tally.num_rows:
            _say(f"it ended early: {_counts(tally)}. The same command goes on from there")
            if shard[1] == 1 and (Path(output).is_file() or not Path(output).exists()):
                _report_batch(Path(output))
        raise


def _report_batch(output: Path) -> None:
    """Write a batch's report, and say what there is to say beyond counts."""
    from raylm.batch import ledger_path
    from raylm.batch.report import percentiles, read_report, span, write_report

    ledger = ledger_path(output)
    try:
        found = read_report(ledger)
        _, page = write_report(ledger, found)
    except OSError as error:  # the disk is full: what was answered is there all the same
        _say(f"there is no report: {error}", "red")
        return
    if found.failures:
        _say("failed: " + ", ".join(f"{failure.rows} {failure.type}" for failure in found.failures))
    if found.latency_s.num:
        _say(f"latency: {percentiles(found.latency_s, span)}")
    _say(f"the report is {page}")


class _BatchProgress:
    """Tells how far a batch is, a few times a second: with a bar on a terminal, else with a line now and then."""

    def __init__(self, tally: Callable[[], Tally], chatbot: AsyncChatbot, *, bar: bool) -> None:
        self._tally = tally
        self._chatbot = chatbot
        self._began_at = self._told_at = self._ended_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._bar: Progress | None = None
        if bar:
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=_console,
                transient=True,
            )
            self._bar.add_task("", total=None)

    async def __aenter__(self) -> Self:
        self._began_at = self._told_at = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        self._task = asyncio.create_task(self._tell())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended_at = time.monotonic()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._bar is not None:
            self._show()
            self._bar.stop()

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(_SHOW_INTERVAL_S)
            self._show()

    def _show(self) -> None:
        tally, now = self._tally(), time.monotonic()
        seconds = max(now - self._began_at, 0.001)
        left = tally.tokens_left
        rate = tally.num_tokens / seconds
        eta = f", {_duration(left / rate)} left" if left is not None and rate and tally.num_answered else ""
        slots = self._chatbot.statistics().slots
        num_up = sum(slot.state == "up" for slot in slots)
        down = "" if num_up == len(slots) else f", {num_up} of {len(slots)} actors up"
        if self._bar is not None:
            retried = f", {tally.num_retries} retried" if tally.num_retries else ""
            description = f"{tally.num_failed} failed{retried}, {_rates(tally, seconds)}{eta}{down}"
            self._bar.update(
                self._bar.task_ids[0], completed=tally.num_done, total=tally.total, description=description
            )
        elif now - self._told_at > _LINE_INTERVAL_S:
            self._told_at = now
            _say(f"{_counts(tally)}, {_rates(tally, seconds)}{eta}{down}")

    def summarize(self) -> None:
        """Say how it went, from entering to leaving, and which slot did how much."""
        tally = self._tally()
        seconds = max(self._ended_at - self._began_at, 0.001)
        _say(f"{_counts(tally)} in {seconds:.1f} s, {_rates(tally, seconds)}")
        for (slot, node), num_tokens in sorted(tally.tokens_by_slot.items()):
            share = num_tokens / max(1, tally.num_tokens)
            _say(f"slot {slot} on {node}: {tally.rows_by_slot[slot, node]} rows, {num_tokens} tokens ({share:.0%})")


def _counts(tally: Tally) -> str:
    more = {
        "answered before": tally.num_kept,
        "changed since": tally.num_changed,
        "the same as another": tally.num_shared,
        "retries": tally.num_retries,
        "sent twice": tally.num_hedged,
    }
    told = "".join(f", {count} {what}" for what, count in more.items() if count)
    return f"{tally.num_done} rows, {tally.num_failed} failed, {tally.num_tokens} tokens{told}"


def _rates(tally: Tally, seconds: float) -> str:
    return f"{(tally.num_answered + tally.num_failed) / seconds:.1f} rows/s, {tally.num_tokens / seconds:.0f} tokens/s"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# Chat


class _Chat:
    """One conversation at a time: words from stdin, answers to where answers go."""

    def __init__(
        self,
        pipeline: LMDeployPipeline,
        session_id: str,
        system: str | None,
        sampling: dict[str, Any],
        answers: TextIO,
        *,
        interactive: bool,
    ) -> None:
        self._pipeline = pipeline
        self._session_id = session_id
        self._system = system
        self._sampling = sampling
        self._answers = answers
        self._interactive = interactive
        self._begun = False  # the session has an answered turn

    def run(self) -> bool:
        """Answer until the input ends; return whether every turn was answered."""
        answered = True
        if self._interactive:
            _say(_CHAT_HELP)
        for words in self._read():
            if words == "/exit":
                break
            if words == "/help":
                _say(_CHAT_HELP)
            elif words == "/new":
                self._begun = False
            elif words:
                answered = self._turn(words) and answered
        return answered

    def _read(self) -> Iterator[str]:
        if not self._interactive:
            yield from map(str.strip, sys.stdin)
            return
        with suppress(ImportError):
            import readline  # noqa: F401  # gives input() its line editing
        while True:
            try:
                words = input("> " if sys.stdout.isatty() else "")
            except EOFError:
                _say("")
                return
            except KeyboardInterrupt:
                _say("")
                _say(_CHAT_HELP)
                continue
            yield words.strip()

    def _turn(self, words: str) -> bool:
        messages = [{"role": "user", "content": words}]
        if self._system and not self._begun:
            messages.insert(0, {"role": "system", "content": self._system})
        status, num_shown = Status.STREAM_ING, 0
        steps = self._pipeline.stream_chat(
            messages,
            session_id=self._session_id,
            sequence_start=not self._begun,
            sequence_end=False,
            **self._sampling,
        )
        try:
            with closing(steps):
                for status, text, _ in steps:  # noqa: B007
                    print(text[num_shown:], end="", flush=True, file=self._answers)
                    num_shown = len(text)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            print(file=self._answers)
            _say("stopped; the conversation is as it was before this turn")
            return True
        except RaylmError as error:
            if num_shown:
                print(flush=True, file=self._answers)
            _say_error(error)
            return False
        if status is Status.END:
            print(flush=True, file=self._answers)
            self._begun = True
            return True
        if status is Status.SESSION_OUT_OF_LIMIT:
            _say("the conversation has outgrown the model's context; /new begins another", "red")
        else:
            _say("the conversation has expired; the next turn begins another", "red")
            self._begun = False
        return False


# What people read


def _say(text: str, style: str = "") -> None:
    _console.print(Text(text, style))


def _say_error(error: BaseException) -> None:
    text = " ".join(str(error).split())
    if not isinstance(error, RaylmError | OSError):
        text = f"{type(error).__name__}: {text} (RAYLM_DEBUG=1 shows where)"
    _say(f"error: {text}", "red")


def _exit_code(error: Exception) -> int:
    if isinstance(error, InvalidRequestError):
        return _WRONG
    stops = CapacityError | ClusterBusyError | EngineStartError | OutputBusyError | TooManyFailuresError
    if isinstance(error, RaylmError) and not isinstance(error, stops):
        return _FAILED
    return _NO_START


class _LogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say(self.format(record), "yellow")
