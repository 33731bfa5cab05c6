"""The Slurm script, with real Ray nodes: a stub of srun starts them at addresses of this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from raylm.ports import free_port

from .manifests import CLUSTER

pytestmark = pytest.mark.timeout(600)

_NODES = ("127.0.0.2", "127.0.0.3")

_END_TIMEOUT_S = 60.0
_JOB_TIMEOUT_S = 400.0
"""The script itself waits for its nodes for 300 s."""

_SRUN = f"""#!/bin/bash
# Becomes the command of the step's one node. Ray on nodes that share a machine needs more options.
set -u
nodes=({" ".join(_NODES)})
while [[ $1 == --* ]]; do
    case $1 in
    --nodelist=*) nodes=("${{1#*=}}") ;;
    --exclude=*) mapfile -t nodes < <(printf '%s\\n' "${{nodes[@]}}" | grep -vxF "${{1#*=}}") ;;
    --nodes=*) count=${{1#*=}} ;;
    esac
    shift
done
[[ $count == 1 && ${{#nodes[@]}} == 1 ]] || exit 9
head=()
[[ " $* " != *" --head "* ]] || head=(--include-dashboard=false)
exec "$@" --node-ip-address="${{nodes[0]}}" --num-cpus=2 --object-store-memory=100000000 --temp-dir="$STUB_TEMP" \\
    --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 "${{head[@]}}"
"""

_JOB = f"""#!/bin/bash
set -eu
{sys.executable} - > nodes.json <<'END'
import json, os, ray
ray.init(log_to_driver=False)
nodes = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]]
print(json.dumps({{"nodes": nodes, "mode": os.environ["RAY_AUTH_MODE"], "cpus": ray.cluster_resources()["CPU"]}}))
END
raylm batch prompts.jsonl -o answers.jsonl --replicas 4 --engine-config '{{"kind": "simulated", "tokens_per_s": 1000}}'
"""

_WAITING_JOB = """#!/bin/bash
trap 'touch ended-in-order; exit 0' TERM
touch runs
while :; do sleep 0.1; done
"""


@dataclass
class Submitted:
    """A job as Slurm runs it."""

    process: subprocess.Popen[str]
    folder: Path
    mark: str
    temp: Path

    def left(self) -> list[str]:
        """Return the processes of it that do not end with it. Those that are being killed have some time."""
        deadline = time.monotonic() + _END_TIMEOUT_S
        while (left := self._processes()) and time.monotonic() < deadline:
            psutil.wait_procs(left, timeout=1)
        return [str(process) for process in left]

    def end(self) -> None:
        """End what is left of it."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()
        shutil.rmtree(self.temp, ignore_errors=True)

    def _processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _has(process, self.mark)]


def _has(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get("RAYLM_TEST_JOB") == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _submit(folder: Path, *command: str, num_nodes: int = len(_NODES)) -> Submitted:
    programs = folder / "bin"
    programs.mkdir()
    srun = programs / "srun"
    srun.write_text(_SRUN)
    srun.chmod(0o755)
    mark = uuid.uuid4().hex
    temp = Path("/tmp") / f"raylm-{mark[:8]}"  # noqa: S108 - sockets' paths may have 107 characters
    environment = {
        **os.environ,
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAYLM_TEST_JOB": mark,
        "RAYLM_RAY_PORT": str(free_port()),
        "STUB_TEMP": str(temp),
        "SLURMD_NODENAME": _NODES[0],
        "SLURM_JOB_NUM_NODES": str(num_nodes),
    }
    process = subprocess.Popen(
        ["bash", str(CLUSTER / "slurm.sbatch"), *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Submitted(process, folder, mark, temp)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Submitted]:
    """A job that has ended by itself."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "job.sh").write_text(_JOB)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"row {row}"}) + "\n" for row in range(8)))
    job = _submit(folder, "bash", "job.sh")
    try:
        output, _ = job.process.communicate(timeout=_JOB_TIMEOUT_S)
        print(output)
        yield job
    finally:
        job.end()


def test_the_job_ends_as_its_command_does(done: Submitted) -> None:
    """Slurm sees the command's exit code."""
    assert done.process.returncode == 0


def test_the_command_runs_on_a_cluster_of_all_nodes(done: Submitted) -> None:
    """When the command starts, all nodes have joined."""
    seen = json.loads((done.folder / "nodes.json").read_text())
    assert sorted(seen["nodes"]) == list(_NODES)
    assert seen["cpus"] == 2 * len(_NODES)


def test_ray_is_told_to_ask_for_a_token(done: Submitted) -> None:
    """The command has the same environment as the nodes."""
    assert json.loads((done.folder / "nodes.json").read_text())["mode"] == "token"


def test_a_batch_has_actors_on_all_nodes(done: Submitted) -> None:
    """Four replicas of one CPU each do not fit on one of the nodes."""
    answers = [json.loads(line) for line in (done.folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 8
    assert all("error" not in answer for answer in answers)


def test_nothing_is_left_of_a_job(done: Submitted) -> None:
    """No process of it outlives the script."""
    assert done.left() == []


def test_a_job_whose_time_is_up_ends_its_command_and_then_its_nodes(tmp_path: Path) -> None:
    """SIGTERM lets the command end in order, and leaves nothing."""
    (tmp_path / "job.sh").write_text(_WAITING_JOB)
    job = _submit(tmp_path, "bash", "job.sh")
    try:
        while not (tmp_path / "runs").exists():
            assert job.process.poll() is None, job.process.communicate()[0]
            with suppress(subprocess.TimeoutExpired):
                job.process.wait(0.2)
        job.process.send_signal(signal.SIGTERM)
        job.process.communicate(timeout=_JOB_TIMEOUT_S)
        assert job.process.returncode == 128 + signal.SIGTERM
        assert (tmp_path / "ended-in-order").exists()
        assert job.left() == []
    finally:
        job.end()


def test_a_job_ends_when_a_node_does_not_start(tmp_path: Path) -> None:
    """The stub refuses the second step, for which it has too few nodes; the command is not run."""
    job = _submit(tmp_path, "touch", "ran", num_nodes=len(_NODES) + 1)
    try:
        output, _ = job.process.communicate(timeout=_JOB_TIMEOUT_S)
        assert job.process.returncode == 1
        assert "not all of 3 Ray nodes came up" in output
        assert not (tmp_path / "ran").exists()
        assert job.left() == []
    finally:
        job.end()


def test_a_job_without_a_command_says_how(tmp_path: Path) -> None:
    """The script says how it is used."""
    job = _submit(tmp_path)
    output, _ = job.process.communicate(timeout=_JOB_TIMEOUT_S)
    assert job.process.returncode == 2
    assert output.startswith("usage: sbatch")
