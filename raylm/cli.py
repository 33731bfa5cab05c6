"""`raylm`: the command line. Every verb is a thin call into the library.

Answers go to stdout, and everything else to stderr. Exit codes:

    0    everything was answered
    1    some prompts, rows or turns failed; the others were answered
    2    wrong usage or wrong input; nothing was done
    3    it could not start, or could not go on: no room in the cluster, no engine, no disk
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
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    aclosing,
    asynccontextmanager,
    closing,
    nullcontext,
    redirect_stdout,
    suppress,
)
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, Self, TextIO, TypeVar

import typer
import uvloop
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from raylm import heap
from raylm._version import __version__
from raylm.config import Backend, EngineConfig, ServeConfig
from raylm.errors import CapacityError, EngineStartError, InvalidRequestError, RaylmError
from raylm.messages import GenerationConfig, Status

if TYPE_CHECKING:
    from raylm.api import AsyncLMDeployPipeline, LMDeployPipeline
    from raylm.batch import Tally

_FAILED = 1
_WRONG = 2
_NO_START = 3

_EXIT_CODES = (
    "Exit codes: 0 everything was answered; 1 some prompts, rows or turns failed; 2 wrong usage or input; "
    "3 could not start, or could not go on; 130 interrupted. RAYLM_DEBUG=1 shows tracebacks."
)

_LINE_INTERVAL_S = 10.0
"""How often a batch tells its progress where there is no terminal."""

_CHAT_HELP = "/new begins another conversation, /exit or Ctrl-D ends, Ctrl-C stops the answer, /help shows this"

_DEFAULTS = GenerationConfig()

T = TypeVar("T")

_Prompts = Annotated[
    list[str], typer.Argument(metavar="PROMPT", help="Raw prompts; - reads one from stdin.", show_default=False)
]
_Input = Annotated[
    str, typer.Argument(metavar="IN", help="Rows, one JSON object a line; - is stdin.", show_default=False)
]
_Output = Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="Where the rows go; - is stdout.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace OUT, and what an interrupted run left of it.")]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object a prompt, with usage and receipt.")]
_System = Annotated[str | None, typer.Option(help="System message of the conversation.", show_default=False)]
_Session = Annotated[str, typer.Option(metavar="ID", help="Name of the session.")]
_Kill = Annotated[bool, typer.Option("--kill", help="Kill one actor's process in the middle; needs two replicas.")]

_Model = Annotated[
    str, typer.Option("--model", "-m", help="A built-in alias, a GGUF file, a model folder or a hub id.")
]
_Proxy = Literal["auto", "haproxy", "python"]
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
    model: _Model = "smollm2-135m-instruct",
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
    from raylm.batch import Result, encode_row

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
    model: _Model = "smollm2-135m-instruct",
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
    max_new_tokens: _MaxNewTokens = None,
    temperature: _Temperature = None,
    top_p: _TopP = None,
    top_k: _TopK = None,
    repetition_penalty: _Penalty = None,
    stop: _Stop = None,
    seed: _Seed = None,
    model: _Model = "smollm2-135m-instruct",
    replicas: _Replicas = 1,
    tp: _Tp = 1,
    backend: _Backend = "auto",
    engine_config: _EngineSettings = None,
    address: _Address = None,
) -> None:
    """Answer rows of JSON with rows of JSON, in the same order.

    IN: "prompt" (raw text) or "messages" (a conversation). If need be, "id" and generation parameters of the row.

    OUT: "id" (else the line's number, from 1), "text", "finish_reason", "usage", "receipt"; or "id" and "error".

    A wrong row fails alone. Until the last row is there, the rows are in OUT.partial.
    """
    from raylm.api import AsyncLMDeployPipeline
    from raylm.batch import Tally, output_file

    sampling = _sampling(max_new_tokens, temperature, top_p, top_k, repetition_penalty, stop, seed)
    pipeline = AsyncLMDeployPipeline(
        model, tp=tp, replicas=replicas, backend=backend, backend_config=_engine(engine_config), address=address
    )
    tally = Tally()
    with ExitStack() as files:
        target: BinaryIO
        try:
            rows = files.enter_context(_open_input(source))
        except OSError as error:
            raise typer.BadParameter(f"{source}: {error.strerror}", param_hint="IN") from None
        try:
            target = files.enter_context(
                nullcontext(sys.stdout.buffer) if output == "-" else output_file(Path(output), overwrite=overwrite)
            )
        except FileExistsError as error:
            raise typer.BadParameter(f"{error} (--overwrite)", param_hint="--output") from None
        except OSError as error:
            raise typer.BadParameter(f"{output}: {error.strerror}", param_hint="--output") from None
        # A bar and rows on one terminal would be drawn over each other.
        bar = _console.is_terminal and not target.isatty()
        progress = _BatchProgress(bar=bar, num_rows=_count_rows(source) if bar else None)
        try:
            _run(_batch(pipeline, rows, target, sampling, tally, progress))
        except BaseException:
            if output != "-" and tally.num_rows:
                _say(f"it ended early: the first {tally.num_rows} rows are in {output}.partial")
            raise
    progress.summarize(tally)
    if tally.num_failed:
        raise typer.Exit(_FAILED)


@app.command(epilog=_EXIT_CODES)
def demo(
    *,
    kill: _Kill = False,
    model: _Model = "smollm2-135m-instruct",
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
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    proxy: Annotated[
        _Proxy, typer.Option(help="What passes HTTP on to the gateways; auto is haproxy where it can run.")
    ] = "auto",
    address: _Address = None,
) -> None:
    """Serve models over HTTP, in OpenAI's protocol and the seed's, until Ctrl-C.

    Without CONFIG: smollm2-135m-instruct on this machine's CPU. A page to chat with it is at /.
    """
    from raylm.serve.run import Endpoint, serve_until_interrupted

    settings = ServeConfig() if config is None else ServeConfig.load(config)
    endpoint = Endpoint(settings, host, port, proxy, address)
    if endpoint.proxy_reason:
        _say(f"the proxy is Serve's own, in Python: {endpoint.proxy_reason}", "yellow")
    names = ", ".join(model.name for model in settings.models)

    def started() -> None:
        _say(f"serving {names} at {endpoint.url} through {endpoint.proxy}, on the Ray cluster {endpoint.cluster}")
        _say("Ctrl-C ends it")

    with redirect_stdout(sys.stderr):
        heap.settle()
        serve_until_interrupted(endpoint, started)


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
        reasons = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}".removeprefix(": ") for found in error.errors()]
        raise typer.BadParameter("; ".join(reasons), param_hint="--engine-config") from None


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


def _starting(model: str, replicas: int) -> AbstractContextManager[object]:
    return _console.status(f"starting {replicas} {'replica' if replicas == 1 else 'replicas'} of {model}")


@asynccontextmanager
async def _started(pipeline: AsyncLMDeployPipeline) -> AsyncGenerator[None, None]:
    with _starting(pipeline.path, pipeline.replicas):
        await pipeline.start()
    try:
        yield
    finally:
        await pipeline.aclose()


# Batch


def _open_input(source: str) -> AbstractContextManager[BinaryIO]:
    return nullcontext(sys.stdin.buffer) if source == "-" else Path(source).open("rb")


async def _batch(
    pipeline: AsyncLMDeployPipeline,
    rows: BinaryIO,
    target: BinaryIO,
    sampling: dict[str, Any],
    tally: Tally,
    progress: _BatchProgress,
) -> None:
    from raylm.batch import encode_row, read_rows, run_batch

    def write(line: bytes) -> None:
        target.write(line)
        target.flush()

    async with _started(pipeline):
        with progress:
            async with aclosing(run_batch(pipeline, read_rows(rows), defaults=sampling)) as results:
                async for row, result in results:
                    # In a thread: a pipe that nobody reads would stop the pool's event loop.
                    await asyncio.to_thread(write, encode_row(row.id, result))
                    tally.add(result)
                    progress.show(tally)


class _BatchProgress:
    """Tells how far a batch is: with a bar on a terminal, else with a line now and then."""

    def __init__(self, *, bar: bool, num_rows: int | None) -> None:
        self._began_at = self._told_at = self._ended_at = 0.0
        self._bar: Progress | None = None
        if bar:
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=_console,
                transient=True,
            )
            self._bar.add_task("", total=num_rows)

    def __enter__(self) -> Self:
        self._began_at = self._told_at = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended_at = time.monotonic()
        if self._bar is not None:
            self._bar.stop()

    def show(self, tally: Tally) -> None:
        """Take the latest figures."""
        now = time.monotonic()
        if self._bar is not None:
            description = f"{tally.num_failed} failed, {_rates(tally, now - self._began_at)}"
            self._bar.update(self._bar.task_ids[0], completed=tally.num_rows, description=description)
        elif now - self._told_at > _LINE_INTERVAL_S:
            self._told_at = now
            _say(f"{_counts(tally)}, {_rates(tally, now - self._began_at)}")

    def summarize(self, tally: Tally) -> None:
        """Say how it went, from entering to leaving, and which slot did how much."""
        seconds = self._ended_at - self._began_at
        _say(f"{_counts(tally)} in {seconds:.1f} s, {_rates(tally, seconds)}")
        for (slot, node), num_tokens in sorted(tally.tokens_by_slot.items()):
            share = num_tokens / max(1, tally.num_tokens)
            _say(f"slot {slot} on {node}: {tally.rows_by_slot[slot, node]} rows, {num_tokens} tokens ({share:.0%})")


def _count_rows(source: str) -> int | None:
    if not Path(source).is_file():
        return None
    with Path(source).open("rb") as file:
        return sum(1 for line in file if line.strip())


def _counts(tally: Tally) -> str:
    return f"{tally.num_rows} rows, {tally.num_failed} failed, {tally.num_tokens} tokens"


def _rates(tally: Tally, seconds: float) -> str:
    return f"{tally.num_rows / seconds:.1f} rows/s, {tally.num_tokens / seconds:.0f} tokens/s"


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
    if isinstance(error, RaylmError) and not isinstance(error, CapacityError | EngineStartError):
        return _FAILED
    return _NO_START


class _LogHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _say(self.format(record), "yellow")
