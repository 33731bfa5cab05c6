"""A real Triton server with the models in `triton_models/`, as a child process on a free port.

The `tritonserver` binary comes in the wheel nvidia-pytriton (Triton 2.51), which is installed once into a virtual
environment of its own in raylm's cache folder: it needs numpy 1, and nothing else of it is wanted here.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import pytest
from filelock import FileLock

from tests.ports import kept_port

MODELS = Path(__file__).parent / "triton_models"
REPOSITORY = MODELS / "repository"

_REQUIREMENTS = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")  # numpy 2 crashes the python back end on text tensors
_PYTHONS = ("3.10", "3.11", "3.12")
_DESCRIBE = """
import json, sys, sysconfig
site, libdir = sysconfig.get_paths()["purelib"], sysconfig.get_config_var("LIBDIR")
json.dump([site, libdir, "%d.%d" % sys.version_info[:2]], sys.stdout)
"""


def install() -> Path:
    """Return the virtual environment with the server, making it first if need be. Takes 10 s, and 250 MB of disk.

    Skips the test where that is not possible; fails it where CI=true.
    """
    try:
        return _install()
    except (OSError, subprocess.CalledProcessError, RuntimeError) as error:
        said = getattr(error, "output", None) or error
        reason = f"no Triton server here: {said}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


def _install() -> Path:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise RuntimeError("the wheel nvidia-pytriton is for Linux on x86-64")
    cache = os.environ.get("RAYLM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "raylm")
    home = Path(cache).expanduser().absolute() / "tritonserver"
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "lock"):
        if not (home / "ready").exists():
            shutil.rmtree(home / "venv", ignore_errors=True)
            _run(_python(), "-m", "venv", home / "venv")
            for requirement in _REQUIREMENTS:
                _run(home / "venv/bin/python", "-m", "pip", "install", "--quiet", "--no-deps", requirement)
            root, _, version = _describe(home / "venv")
            stubs = root / "python_backend_stubs" / version
            shutil.copy2(stubs / "triton_python_backend_stub", root / "backends/python/")
            (home / "ready").touch()
    return home / "venv"


def _python() -> str:
    """Return a Python that the wheel has a back end for."""
    if "{}.{}".format(*sys.version_info) in _PYTHONS:
        return sys.executable
    for version in _PYTHONS:
        if found := shutil.which(f"python{version}"):
            return found
    raise RuntimeError(f"the wheel nvidia-pytriton needs a Python among {', '.join(_PYTHONS)}")


def _run(*command: str | Path) -> str:
    # stderr is part of what pip says when it fails.
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    return done.stdout


def _describe(venv: Path) -> tuple[Path, str, str]:
    """Return the server's folder, the folder of Python's shared library, and Python's version."""
    site, libdir, version = json.loads(_run(venv / "bin/python", "-c", _DESCRIBE))
    return Path(site, "pytriton/tritonserver"), libdir, version


def make_repository(folder: Path, models: Mapping[str, tuple[str, Mapping[str, str]]]) -> Path:
    """Make a model repository of changed copies.

    Args:
        folder: Where to; made.
        models: By name of the copy, the model it is made of and what to replace in its configuration.

    Returns:
        The folder.
    """
    for name, (source, changes) in models.items():
        shutil.copytree(REPOSITORY / source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        file = folder / name / "config.pbtxt"
        text = file.read_text().replace(f'name: "{source}"\n', f'name: "{name}"\n', 1)
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        file.write_text(text)
    return folder


class TritonServer:
    """One server, from `start` to `stop`; may be started again, on the same port.

    Args:
        repository: Its models.
        models: Load these; None loads all that the repository has.
        options: More for its command line.
        journals: The models write down what they are asked.

    Attributes:
        port: Where it listens, once started. Nobody else is given it in the meantime.
    """

    def __init__(
        self,
        repository: Path = REPOSITORY,
        models: Sequence[str] | None = None,
        options: Sequence[str] = (),
        *,
        journals: bool = True,
    ) -> None:
        venv = install()
        root, libdir, _ = _describe(venv)
        stack = ExitStack()
        self.port = stack.enter_context(kept_port())
        weakref.finalize(self, stack.close)
        self._shm = f"raylm_test_{uuid.uuid4().hex[:12]}_"
        self._folder = Path(tempfile.mkdtemp(prefix="raylm_triton_"))
        self._arguments = [
            str(root / "bin/tritonserver"),
            f"--model-repository={repository}",
            f"--backend-directory={root / 'backends'}",
            "--allow-http=false",
            "--allow-metrics=false",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={self.port}",
            "--disable-auto-complete-config",
            "--exit-timeout-secs=5",
            f"--backend-config=python,shm-region-prefix-name={self._shm}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in models or ["*"]),
            *options,
        ]
        self._environment = {
            "PATH": f"{venv / 'bin'}:/usr/bin:/bin",
            "LD_LIBRARY_PATH": f"{root.parents[1] / 'nvidia_pytriton.libs'}:{libdir}",
            "HOME": str(self._folder),
            "TOY_LIB": str(MODELS / "lib"),
            "TOY_JOURNAL": str(self._folder / "journal") if journals else "",
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where its gRPC endpoint is."""
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def journal(self) -> list[dict[str, object]]:
        """Return what the models wrote down, in order."""
        file = self._folder / "journal"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def start(self) -> TritonServer:
        """Return when the models are loaded and requests are taken. Raises RuntimeError with the server's errors."""
        self.stop()  # what is left of one that was killed
        log = self._folder / "log"
        # setpriv, of util-linux, ends the server if pytest is killed. Python's preexec_fn would run Python code between
        # fork and exec, beside the threads of gRPC.
        guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [*guard, *self._arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 200
        while True:
            said = log.read_text(errors="replace")
            if "Started GRPCInferenceService" in said:  # logged when all models are ready
                return self
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                errors = "\n".join(line for line in said.splitlines() if line[:1] == "E" or "rror:" in line)
                raise RuntimeError(f"tritonserver did not start:\n{errors or said[-3000:]}")
            time.sleep(0.02)

    def stop(self, patience_s: float = 8) -> None:
        """End the server, in order if it does so in time."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
                try:
                    self._process.wait(patience_s)
                except subprocess.TimeoutExpired:
                    self.kill()
            self._process.wait()
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # python back ends outlive a server that was killed
            for region in Path("/dev/shm").glob(f"{self._shm}*"):  # noqa: S108 - a killed back end leaves its region
                region.unlink(missing_ok=True)
            self._process = None

    def kill(self) -> None:
        """End the server at once."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> TritonServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
