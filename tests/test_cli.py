"""The command line, as a process with a real stdin, stdout and exit code."""

import codecs
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from msgspec import structs

from raylm import INTERNLM2_META, AsyncLMDeployClient, LMDeployPipeline, SimulatedConfig
from raylm._version import __version__
from raylm.batch import open_ledger, run_batch
from raylm.compat import examine, installed_version
from raylm.engines.simulated import greedy_text
from tests.batch.samples import answered

RAYLM = str(Path(sys.executable).with_name("raylm"))
TIMEOUT_S = 120.0


def engine(**settings: Any) -> str:
    """Return the option that makes it the simulated engine."""
    return "--engine-config=" + json.dumps({"kind": "simulated", "tokens_per_s": 500, **settings})


def run(cluster: str | None, *args: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run `raylm` to its end on a cluster, or where that is None on none."""
    return subprocess.run(
        [RAYLM, *args],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
        env=environment(cluster, **env),
    )


def environment(cluster: str | None, **env: str) -> dict[str, str]:
    """Return the environment of a process that finds `cluster`, and a terminal of fixed width."""
    outer = {name: value for name, value in os.environ.items() if name not in {"RAY_ADDRESS", "RAYLM_DEBUG"}}
    return {**outer, **({} if cluster is None else {"RAY_ADDRESS": cluster}), "COLUMNS": "200", **env}


def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` is true. The test's timeout is the limit."""
    while not condition():
        time.sleep(0.02)


def names_of(processes: list[psutil.Process]) -> list[str]:
    """Return the names of processes, without those that have ended meanwhile."""
    names = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            names.append(process.name())
    return names


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def state_of(output: Path) -> tuple[str, str, int]:
    """Return what the report beside a batch's output says: its state, why it ended, and how many rows have ended."""
    report = json.loads(output.with_name(f"{output.name}.report.json").read_text())
    return report["state"], report["why"], report["rows"]


ON_TERMINAL = """
import os, sys
terminal = os.open(sys.argv[1], os.O_RDWR)  # the first terminal that a session opens controls it
for descriptor in range(3):
    os.dup2(terminal, descriptor)
os.execv(sys.argv[2], sys.argv[2:])
"""


@pytest.fixture(scope="module", autouse=True)
def heed_interrupts() -> Iterator[None]:
    """Let child processes be interrupted: a shell starts its background jobs, such as tests, with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Terminal:
    """`raylm` on a pseudo-terminal, and a person at it."""

    def __init__(self, cluster: str, *args: str) -> None:
        self._ours, theirs = os.openpty()
        self._decode = codecs.getincrementaldecoder("utf-8")().decode  # a read may end within a character
        self._process = subprocess.Popen(
            [sys.executable, "-c", ON_TERMINAL, os.ttyname(theirs), RAYLM, *args],
            env=environment(cluster, TERM="xterm"),
            start_new_session=True,
        )
        self._seen = self._decode(os.read(self._ours, 4096))
        os.close(theirs)  # only now that the process has it too: reading ends when nobody has

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._ours, text.encode())

    def wait(self, pattern: str) -> None:
        """Return when `pattern` has been shown, after what the last wait ended with."""
        while (match := re.search(pattern, self._seen)) is None:
            self._seen += self._decode(os.read(self._ours, 4096))
        self._seen = self._seen[match.end() :]

    def end(self) -> int:
        """Return the exit code, once it has ended."""
        with suppress(OSError):  # how Linux says that nobody has the other end
            while os.read(self._ours, 4096):
                pass
        os.close(self._ours)
        return self._process.wait(TIMEOUT_S)


# Without Ray


def test_version() -> None:
    """`--version` prints the version."""
    result = run(None, "--version")
    assert (result.returncode, result.stdout) == (0, f"raylm {__version__}\n")


@pytest.mark.parametrize("verb", [[], ["generate"], ["chat"], ["batch"], ["report"], ["verify"], ["demo"]])
def test_help_tells_the_exit_codes(verb: list[str]) -> None:
    """The help of every verb lists what a script can rely on."""
    assert "130 interrupted" in run(None, *verb, "--help").stdout


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["generate", "x", "--bogus"], "No such option: --bogus"),
        (["generate", "x", "--temperature=-1"], "error: temperature: expected `float` >= 0.0, got -1.0"),
        (["generate", ""], "error: prompt: the prompt is empty"),
        (["generate", "-", "-"], "give - once"),
        (["chat", '--engine-config={"kind": "simulated", "speed": 1}'], "simulated.speed: Extra inputs"),
        (
            ["generate", "x", "--backend=pytorch", engine()],
            "pytorch', but backend_config (--engine-config) is for 'simulated",
        ),
        (["batch", "/nowhere.jsonl"], "/nowhere.jsonl: No such file"),
        (["batch", "-", "--pool=any", "--backend=pytorch"], "--backend: it is for actors that this command starts"),
        (["batch", "-", "--url=http://any", "--replicas=2"], "--replicas: it is for actors that this command starts"),
        (["report", "/nowhere.jsonl"], "there is no /nowhere.jsonl.ledger"),
        (["verify", "/nowhere.jsonl"], "there is no /nowhere.jsonl.ledger"),
        (["demo", "--kill"], "needs --replicas 2 or more"),
    ],
)
def test_wrong_usage(args: list[str], reason: str) -> None:
    """What is wrong with the command line is told before anything is started, with exit code 2."""
    result = run(None, *args)
    assert (result.returncode, result.stdout) == (2, "")
    assert reason in result.stderr
    assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback() -> None:
    """With RAYLM_DEBUG=1 an error keeps its traceback."""
    result = run(None, "generate", "", RAYLM_DEBUG="1")
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("raylm.errors.InvalidRequestError: prompt:")


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    """A batch does not replace an output unasked, and says so before it starts anything."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.touch()
    target.write_text("precious")
    result = run(None, "batch", str(source), "-o", str(target))
    assert result.returncode == 2
    assert "is there already" in result.stderr
    assert target.read_text() == "precious"


def test_compat_tells_of_each_interface() -> None:
    """`compat` has a row for each interface, in words for whether it is there, and names lmdeploy's version."""
    result = run(None, "compat", COLUMNS="400")
    assert result.returncode == 0
    installed = installed_version()
    assert (f"lmdeploy {installed}" if installed else "lmdeploy is not installed") in result.stdout
    for finding in examine():
        word = {True: "yes", False: "no", None: "?"}[finding.present]
        name, used_by = finding.interface.name, finding.interface.used_by
        assert re.search(rf"^{re.escape(name)} +{re.escape(used_by)} +{re.escape(word)} ", result.stdout, re.MULTILINE)


# generate


def test_generate_prints_texts(cluster: str) -> None:
    """Texts are in the order of the prompts, `-` is stdin without its last line end, and stdout has nothing else."""
    result = run(
        cluster, "generate", "a b", "-", "c", "--temperature=0", "--max-new-tokens=4", engine(), stdin="from stdin\n"
    )
    assert result.returncode == 0
    assert result.stdout == "".join(f"{greedy_text(prompt, 4)}\n" for prompt in ("a b", "from stdin", "c"))


def test_generate_prints_json(cluster: str) -> None:
    """With `--json` each prompt has a row with its number, and a failed one an error instead of a text."""
    options = ("--json", "--max-new-tokens=4", "--temperature=0", engine(max_context=10))
    result = run(cluster, "generate", "good", "word " * 20, *options)
    answered, failed = map(json.loads, result.stdout.splitlines())
    assert (answered["id"], answered["text"]) == (1, greedy_text("good", 4))
    assert answered["receipt"]["engine"] == "simulated"
    assert (failed["id"], failed["error"]["type"], "text" in failed) == (2, "ContextLengthError", False)
    assert result.returncode == 1
    assert "prompt 2: ContextLengthError: " in result.stderr


def test_stop_words_and_seed(cluster: str) -> None:
    """`--stop` may be repeated, and the same seed gives the same text."""
    words = greedy_text("a", 4).split()
    result = run(cluster, "generate", "a", f"--stop={words[3]}", f"--stop={words[2]}", "--temperature=0", engine())
    assert result.stdout == f"{words[0]} {words[1]} \n"


def test_a_pool_that_does_not_fit(cluster: str) -> None:
    """More replicas than the cluster holds: one line that says how many fit, and exit code 3."""
    result = run(cluster, "generate", "a", "--replicas=1000", "--backend=openvino")
    assert result.returncode == 3
    assert re.fullmatch(r"error: 1000 replicas of 1 CPU each.* do not fit.*\n", result.stderr)


PLAN = """
models:
  - name: small
    engines: [{kind: lmdeploy, path: small, num_gpus: 0.5, replicas: 2}]
  - name: big
    engines: [{kind: lmdeploy, path: big, backend: pytorch, tp: 8}]
"""


def test_a_plan_for_nodes_that_are_not_there(tmp_path: Path) -> None:
    """`raylm plan --nodes` takes JSON or a file, needs no cluster, and exits with 0 when it fits and 1 when not."""
    config, nodes = tmp_path / "config.yaml", tmp_path / "nodes.yaml"
    config.write_text(PLAN)
    nodes.write_text("[{name: box, count: 2, num_cpus: 8, num_gpus: 4}, {name: spare, num_cpus: 8, num_gpus: 1}]")
    result = run(None, "plan", str(config), f"--nodes={nodes}")
    assert result.stdout.splitlines() == [
        "box-0: 8 CPUs, 4 GPUs: big slot 0 (ranks 0-3 of 8)",
        "box-1: 8 CPUs, 4 GPUs: big slot 0 (ranks 4-7 of 8)",
        "spare: 8 CPUs, 1 GPU: small slots 0-1 (0.5 GPU each)",
        "",
        "it fits: 3 replicas on 3 nodes and 9 of 9 free GPUs",
    ]
    assert (result.returncode, result.stderr) == (0, "")
    result = run(None, "plan", str(config), '--nodes=[{"num_cpus": 8, "num_gpus": 6}]')
    assert result.returncode == 1
    assert "big: 1 replica of 8 GPUs and 1 CPU, over several nodes, does not fit: room for 0" in result.stdout


SCALING = """
models:
  - name: fixed
    engines: [{kind: simulated, num_gpus: 2, replicas: 2}]
  - name: small
    engines: [{kind: simulated, num_gpus: 1, autoscaling: {min_replicas: 0, max_replicas: 4}}]
"""


def test_a_plan_for_what_scales_itself(tmp_path: Path) -> None:
    """What it starts with decides on the exit code; whether the most would fit is told beside it."""
    config = tmp_path / "config.yaml"
    config.write_text(SCALING)
    result = run(None, "plan", str(config), '--nodes=[{"num_cpus": 8, "num_gpus": 8}]')
    assert result.stdout.splitlines() == [
        "node: 8 CPUs, 8 GPUs: fixed slots 0-1 (ranks 0-1 each)",
        "",
        "it fits: 2 replicas on 1 node and 4 of 8 free GPUs",
        "with max_replicas, 4 of small in place of 0, it fits: 6 replicas on 1 node and 8 of 8 free GPUs",
    ]
    assert (result.returncode, result.stderr) == (0, "")
    result = run(None, "plan", str(config), '--nodes=[{"num_cpus": 8, "num_gpus": 6}]')
    assert result.stdout.splitlines()[2:] == [
        "it fits: 2 replicas on 1 node and 4 of 6 free GPUs",
        (
            "with max_replicas, 4 of small in place of 0, it does not fit. small: 4 replicas of 1 GPU each, on one "
            "node each, do not fit: room for 2; missing: 2 GPUs. What would fit: 2 replicas, or 1 more node like node"
        ),
    ]
    assert result.returncode == 0
    result = run(None, "plan", str(config), '--nodes=[{"num_cpus": 8, "num_gpus": 2}]')
    assert "fixed: 2 replicas of 2 GPUs each, on one node each, do not fit: room for 1" in result.stdout
    assert "max_replicas" not in result.stdout
    assert result.returncode == 1


@pytest.mark.parametrize("wrong", ["[{}]", '[{"num_cpus": 1, "gpus": 1}]', "/no/such/file", "[1"])
def test_wrong_nodes_to_plan_for(wrong: str) -> None:
    """A wrong `--nodes` is named, and the exit code is 2."""
    result = run(None, "plan", f"--nodes={wrong}")
    assert result.returncode == 2
    assert "--nodes" in result.stderr


def test_the_real_model(cluster: str) -> None:
    """Out of the box, `raylm generate` continues a text with the built-in model."""
    result = run(cluster, "generate", "The capital of France is", "--temperature=0", "--max-new-tokens=8")
    assert "Paris" in result.stdout
    assert result.returncode == 0


# batch

MIXED = """\
{"prompt": "first", "max_new_tokens": 9}
{"id": "chat", "messages": [{"role": "user", "content": "hello"}]}

not json
{"id": "both", "prompt": "x", "messages": []}
{"prompt": ""}
{"prompt": "x", "max_tokens": 5}
{"id": "\u00fcn\u00ef\u2713", "prompt": "\u4f60\u597d \U0001f680"}
{"id": "long", "prompt": "w w w w w w w w w w w w w w w w w w w w w w"}
"""


@pytest.fixture(scope="module")
def mixed(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A batch of good and bad rows on two replicas, and the folder of its output."""
    folder = tmp_path_factory.mktemp("batch")
    (folder / "in.jsonl").write_text(MIXED)
    result = run(
        cluster,
        "batch",
        str(folder / "in.jsonl"),
        f"--output={folder / 'out.jsonl'}",
        "--replicas=2",
        "--temperature=0",
        "--max-new-tokens=4",
        engine(max_context=20),
    )
    return result, folder


Mixed = tuple[subprocess.CompletedProcess[str], Path]


def test_batch_keeps_the_order(mixed: Mixed) -> None:
    """Every row is there once, in input order, named by its id or its line."""
    _, folder = mixed
    assert [row["id"] for row in rows_of(folder / "out.jsonl")] == [
        1,
        "chat",
        4,
        "both",
        6,
        7,
        "\u00fcn\u00ef\u2713",
        "long",
    ]


def test_batch_answers_good_rows(mixed: Mixed) -> None:
    """Prompts are raw, conversations are conversations, and a row's own parameter wins over the option."""
    _, folder = mixed
    texts = {row["id"]: row["text"] for row in rows_of(folder / "out.jsonl") if "text" in row}
    assert texts == {
        1: greedy_text("first", 9),
        "chat": greedy_text("user: hello\n", 4),
        "\u00fcn\u00ef\u2713": greedy_text("\u4f60\u597d \U0001f680", 4),
    }


def test_batch_reports_bad_rows(mixed: Mixed) -> None:
    """A bad row has an error that names its line, and no text; the exit code says that there are some."""
    result, folder = mixed
    errors = {row["id"]: row["error"] for row in rows_of(folder / "out.jsonl") if "text" not in row}
    assert {row_id: error["message"].partition(":")[0] for row_id, error in errors.items()} == {
        4: "in.jsonl line 4",
        "both": "in.jsonl line 5",
        6: "in.jsonl line 6",
        7: "in.jsonl line 7",
        "long": errors["long"]["message"].partition(":")[0],
    }
    assert errors["long"]["type"] == "ContextLengthError"
    assert result.returncode == 1


def test_batch_sums_up(mixed: Mixed) -> None:
    """The summary is on stderr: rows, failures, tokens, rates, and each slot's share. Stdout has nothing."""
    result, _ = mixed
    assert result.stdout == ""
    assert re.search(r"8 rows, 5 failed, 17 tokens in [\d.]+ s, [\d.]+ rows/s, \d+ tokens/s\n", result.stderr)
    shares = re.findall(r"slot (\d) on \S+: (\d) rows, \d+ tokens \(\d+%\)\n", result.stderr)
    assert sum(int(num_rows) for _, num_rows in shares) == 3


def test_batch_leaves_no_partial_file(mixed: Mixed) -> None:
    """A batch that has ended leaves the output, the ledger that it can go on from, and its report."""
    _, folder = mixed
    assert sorted(path.name for path in folder.iterdir()) == [
        "in.jsonl",
        "out.jsonl",
        "out.jsonl.ledger",
        "out.jsonl.report.html",
        "out.jsonl.report.json",
    ]


def test_batch_tells_what_failed_and_how_long_it_took(mixed: Mixed) -> None:
    """After the counts come the types of failures, the percentiles of latency, and where the report is."""
    result, folder = mixed
    assert "failed: 4 InvalidRequestError, 1 ContextLengthError\n" in result.stderr
    assert re.search(r"latency: p50 [\d.]+ m?s, p90 [\d.]+ m?s, p99 [\d.]+ m?s, max [\d.]+ m?s\n", result.stderr)
    assert f"the report is {folder / 'out.jsonl.report.html'}\n" in result.stderr


def test_report_tells_how_it_went(mixed: Mixed) -> None:
    """The figures are a table on stdout or one JSON object, which is in the file too; no cluster is needed."""
    _, folder = mixed
    told = run(None, "report", str(folder / "out.jsonl"))
    assert told.returncode == 0
    assert re.search(r"rows +8, 3 answered, 5 failed *\n", told.stdout)
    assert re.search(r"ContextLengthError +1, as 'long': ", told.stdout)
    assert "the simulated engine is a clock" in told.stdout
    figures = json.loads(run(None, "report", str(folder / "out.jsonl"), "--json").stdout)
    assert (figures["rows"], figures["total"], figures["failed"], figures["completion_tokens"]) == (8, 8, 5, 17)
    assert figures == json.loads((folder / "out.jsonl.report.json").read_text())


def test_verify_finds_no_drift(mixed: Mixed, cluster: str) -> None:
    """The same model answers the same, and the exit code says so."""
    _, folder = mixed
    told = run(cluster, "verify", str(folder / "out.jsonl"), "--seed=1")
    assert (told.returncode, told.stdout) == (0, "3 of 3 rows have the same text again, 0 drifted\n")


def test_verify_finds_drift(mixed: Mixed, cluster: str, tmp_path: Path) -> None:
    """A text that is another one now is told with the place where the two part, and makes the exit code 1."""
    _, folder = mixed
    shutil.copy(folder / "out.jsonl.ledger", tmp_path / "out.jsonl.ledger")
    with open_ledger(tmp_path / "out.jsonl") as ledger:
        before = ledger.read(1)
        assert before.completion is not None
        text = before.completion.text
        ledger.add(
            structs.replace(before, completion=structs.replace(before.completion, text=f"{text[:6]}other words"))
        )
        ledger.sync()
    told = run(cluster, "verify", str(tmp_path / "out.jsonl"))
    assert told.returncode == 1
    assert told.stdout.splitlines() == [
        "2 of 3 rows have the same text again, 1 drifted",
        f"row 2, 'chat': the texts part after 6 characters, {text[:6]!r}",
        "  then: 'other words'",
        f"  now:  {text[6:]!r}",
    ]
    told = run(cluster, "verify", str(tmp_path / "out.jsonl"), "--json", "--sample=3")
    assert told.returncode == 1
    assert json.loads(told.stdout)["drifted"] == [
        {"id": "chat", "position": 1, "at": 6, "before": text[:6], "then": "other words", "now": text[6:]}
    ]


def test_verify_needs_rows_that_can_be_read_again(cluster: str, tmp_path: Path) -> None:
    """Rows of stdin are gone, which is told before anything is started."""
    row = '{"prompt": "a", "temperature": 0, "max_new_tokens": 4}\n'
    result = run(cluster, "batch", "-", f"--output={tmp_path / 'out'}", engine(), stdin=row)
    assert result.returncode == 0
    told = run(None, "verify", str(tmp_path / "out"))
    assert (told.returncode, told.stdout) == (2, "")
    assert "only rows of a file can be read and asked again" in told.stderr


SAMPLED_ROWS = "".join(
    json.dumps(row) + "\n"
    for row in ({"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]}, {"prompt": "c", "max_new_tokens": 6})
)


@pytest.mark.parametrize("in_file", [True, False])
def test_verify_asks_what_a_program_has_asked(cluster: str, tmp_path: Path, in_file: bool) -> None:
    """A job of `run_batch` is asked again with its engines, template and parameters; rows of no file are given."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(SAMPLED_ROWS)
    with LMDeployPipeline(
        "simulated",
        meta_template=INTERNLM2_META,
        temperature=0,
        max_new_tokens=5,
        top_k=None,
        stop_words="never",
        backend_config=SimulatedConfig(tokens_per_s=500, model_name="mine"),
    ) as pipeline:
        run_batch(pipeline, source if in_file else rows_of(source), target, repetition_penalty=1.1)
    told = run(cluster, "verify", str(target), *(() if in_file else (f"--input={source}",)))
    assert (told.returncode, told.stdout) == (0, "3 of 3 rows have the same text again, 0 drifted\n"), told.stderr
    told = run(None, "verify", str(target), f"--input={tmp_path / 'none'}")
    assert told.returncode == 2
    if not in_file:
        told = run(None, "verify", str(target))
        assert told.returncode == 2
        assert "write them into one, in their order, one JSON object a line, and name it with --input" in told.stderr


def test_verify_says_what_the_ledger_does_not(mixed: Mixed, cluster: str, tmp_path: Path) -> None:
    """Without a note of who was asked, the error names the options that say it, and with them it works."""
    _, folder = mixed
    shutil.copy(folder / "out.jsonl.ledger", tmp_path / "out.jsonl.ledger")
    with open_ledger(tmp_path / "out.jsonl") as ledger:
        noted = {name: value for name, value in ledger.runs[-1].job.items() if name != "target"}
        ledger.begin(noted, [])
    told = run(None, "verify", str(tmp_path / "out.jsonl"))
    assert told.returncode == 2
    assert all(option in told.stderr for option in ("--pool NAME", "--url URL", "--model and --engine-config"))
    told = run(cluster, "verify", str(tmp_path / "out.jsonl"), engine(max_context=20))
    assert (told.returncode, told.stdout) == (0, "3 of 3 rows have the same text again, 0 drifted\n"), told.stderr


def test_verify_needs_the_key_of_servers(tmp_path: Path) -> None:
    """An API key is not in the ledger, which notes that there was one; `verify` says where to put it."""
    (tmp_path / "in").write_text('{"prompt": "a"}\n')
    asked = AsyncLMDeployClient("http://127.0.0.1:1", api_key="secret-key").recipe()
    assert "secret-key" not in json.dumps(asked)
    with open_ledger(tmp_path / "out") as ledger:
        ledger.begin({"source": str(tmp_path / "in"), "reading": {}, "target": asked}, [])
        ledger.add(answered(0))
        ledger.sync()
    told = run(None, "verify", str(tmp_path / "out"), RAYLM_API_KEY="")
    assert told.returncode == 2
    assert "put it into RAYLM_API_KEY" in told.stderr


def test_batch_of_nothing(cluster: str, tmp_path: Path) -> None:
    """An empty file gives an empty output, which is no failure; with `--overwrite` in place of an old one."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.touch()
    target.write_text("old")
    result = run(cluster, "batch", str(source), "-o", str(target), "--overwrite", engine())
    assert (result.returncode, target.read_text()) == (0, "")


def test_batch_in_a_pipe(cluster: str) -> None:
    """Rows from stdin are answered on stdout while stdin is still open."""
    with subprocess.Popen(
        [RAYLM, "batch", "-", "--temperature=0", "--max-new-tokens=4", engine()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(cluster),
        text=True,
        bufsize=1,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for prompt in ("a", "b"):
            process.stdin.write(json.dumps({"prompt": prompt}) + "\n")
            assert json.loads(process.stdout.readline())["text"] == greedy_text(prompt, 4)
        process.stdin.close()
        assert process.wait(TIMEOUT_S) == 0


def test_batch_draws_a_bar(cluster: str, tmp_path: Path) -> None:
    """On a terminal a batch shows how far it is."""
    source = tmp_path / "in"
    source.write_text('{"prompt": "a"}\n' * 3)
    terminal = Terminal(cluster, "batch", str(source), f"--output={tmp_path / 'out'}", "--max-new-tokens=4", engine())
    terminal.wait(r"3/3.*0 failed, .* rows/s, .* tokens/s")
    assert terminal.end() == 0


@contextmanager
def endless_batch(cluster: str | None, folder: Path, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    """A batch whose first row is in the output, and whose second one takes for ever."""
    (folder / "in").write_text('{"prompt": "a", "max_new_tokens": 4}\n{"prompt": "b", "max_new_tokens": 100000000}\n')
    command = [RAYLM, "batch", str(folder / "in"), f"--output={folder / 'out'}", engine(max_context=10**9), *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment(cluster), start_new_session=True) as process:
        partial = folder / "out.partial"
        until(lambda: partial.exists() and partial.stat().st_size > 0)
        yield process


def test_ctrl_c_leaves_nothing_running(tmp_path: Path) -> None:
    """Ctrl-C ends a batch that has a Ray of its own: exit code 130, no process left, and the rows so far kept."""
    with endless_batch(None, tmp_path, "--address=local") as process:
        started = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in name for name in names_of(started))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert psutil.wait_procs(started, timeout=60)[1] == []
    assert [row["id"] for row in rows_of(tmp_path / "out.partial")] == [1]
    assert not (tmp_path / "out").exists()
    assert "it ended early: 1 rows, 0 failed, 4 tokens. The same command goes on from there" in said.decode()
    assert state_of(tmp_path / "out") == ("ended early", "it was interrupted", 1)


def test_sigterm_ends_in_order(cluster: str, tmp_path: Path) -> None:
    """SIGTERM ends a batch as Ctrl-C does."""
    with endless_batch(cluster, tmp_path) as process:
        process.terminate()
        _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130
    assert "it ended early: 1 rows" in said.decode()
    assert f"the report is {tmp_path / 'out.report.html'}\n" in said.decode()
    assert state_of(tmp_path / "out") == ("ended early", "it was interrupted", 1)


def test_a_batch_that_ended_early_is_reported_as_not_finished(cluster: str, tmp_path: Path) -> None:
    """After too many failures there is a report that says that the job is not finished, and why; a rerun's is whole."""
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text('{"prompt": "a"}\n{"prompt": ""}\n{"prompt": "b"}\n')
    args = ("batch", str(source), f"--output={target}", "--max-new-tokens=4", "--temperature=0", engine())
    result = run(cluster, *args, "--max-failures=0")
    assert result.returncode == 3
    assert not target.exists()
    page = tmp_path / "out.report.html"
    assert f"the report is {page}\n" in result.stderr
    state, why, rows = state_of(target)
    assert (state, rows) == ("ended early", 1)
    assert why.startswith("TooManyFailuresError: 1 rows failed, more than the 0 that were allowed")
    assert "<strong>Not finished:</strong> it ended early: TooManyFailuresError: 1 rows failed" in page.read_text()
    told = run(None, "report", str(target))
    assert re.search(r"not finished +it ended early: TooManyFailuresError: 1 rows failed", told.stdout)
    assert run(cluster, *args).returncode == 1
    assert state_of(target) == ("finished", "", 3)
    assert "Not finished" not in page.read_text()


def test_a_batch_that_was_killed_is_not_finished(cluster: str, tmp_path: Path) -> None:
    """A report of a job whose process works, and of one whose process was killed, say so."""
    with endless_batch(cluster, tmp_path) as process:
        figures = json.loads(run(None, "report", str(tmp_path / "out"), "--json").stdout)
        assert (figures["state"], figures["why"]) == ("at work", "")
        process.kill()
        process.communicate(timeout=TIMEOUT_S)
    told = run(None, "report", str(tmp_path / "out"))
    assert re.search(r"not finished +it ended early: its process is gone and has not said why", told.stdout)


# chat


def test_chat_in_a_script(cluster: str) -> None:
    """Without a terminal a line is a turn, answers are all of stdout, and the conversation is kept until `/new`."""
    result = run(
        cluster,
        "chat",
        "--system=be brief",
        "--temperature=0",
        "--max-new-tokens=4",
        engine(),
        stdin="hello\n\nand?\n/new\nhello\n/exit\nnever\n",
    )
    begin = "system: be brief\nuser: hello\n"
    first = greedy_text(begin, 4)
    second = greedy_text(f"{begin}assistant: {first}\nuser: and?\n", 4)
    assert (result.returncode, result.stdout) == (0, f"{first}\n{second}\n{first}\n")


def test_chat_that_outgrows_the_context(cluster: str) -> None:
    """A turn that does not fit is told on stderr, is no text, and makes the exit code 1."""
    result = run(cluster, "chat", engine(max_context=10), stdin=f"{'word ' * 20}\n")
    assert (result.returncode, result.stdout) == (1, "")
    assert "outgrown" in result.stderr


def test_chat_on_a_terminal(cluster: str) -> None:
    """Ctrl-C stops the answer and the chat goes on; Ctrl-D ends it."""
    terminal = Terminal(cluster, "chat", "--temperature=0", "--max-new-tokens=2000", engine(tokens_per_s=20))
    terminal.wait("> ")
    terminal.type("hello\n")
    terminal.wait(greedy_text("user: hello\n", 3))
    terminal.type("\x03")
    terminal.wait("stopped")
    terminal.wait("> ")
    terminal.type("hello\n")
    terminal.wait(greedy_text("user: hello\n", 3))  # the stopped turn is not part of the conversation
    terminal.type("\x03")
    terminal.wait("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


# demo


def test_demo_survives_a_kill(cluster: str) -> None:
    """The demo kills one of two actors in mid-batch, and every question and every turn is answered."""
    # Most questions wait in the pool when the first is answered, so that the killed actor has some whenever that is.
    result = run(cluster, "demo", "--replicas=2", "--kill", engine(tokens_per_s=50, capacity=4))
    assert result.returncode == 0
    assert re.search(r"kill -9 \d+: the actor of slot \d, with \d+ questions in it", result.stdout)
    assert "24 of 24 questions answered" in result.stdout
    assert "moved:died" in result.stdout
    assert result.stdout.count("session pinned to slot") == 9
