"""What stands in several files is the same in all of them."""

import re
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from raylm._version import __version__
from raylm.config import EngineGroup

from .manifests import CLUSTER, RAY_FILES, ROOT, container, documents, find, pods, ports, ray_cluster, workers

_PODS = dict(pods())


def _pinned(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("name", RAY_FILES)
def test_the_ray_version_is_the_pinned_one(name: str) -> None:
    """KubeRay files name the version of Ray that is pinned and tested."""
    assert ray_cluster(name)["rayVersion"] == _pinned("constraints.txt")["ray"] == metadata.version("ray")


def test_the_ray_version_is_what_raylm_depends_on() -> None:
    """The pinned version of Ray is of the series that raylm depends on."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (wanted,) = (text for text in dependencies if text.startswith("ray["))
    assert wanted == f"ray[serve]=={_pinned('constraints.txt')['ray'].rpartition('.')[0]}.*"


@pytest.mark.parametrize("name", [name for name in _PODS if name.startswith(RAY_FILES)])
def test_ray_nodes_run_the_image_for_what_they_have(name: str) -> None:
    """A pod with GPUs runs the CUDA image, and another one the CPU image, of raylm's version."""
    found = container(_PODS[name])
    image = "raylm-cuda" if "nvidia.com/gpu" in found["resources"]["limits"] else "raylm"
    assert found["image"] == f"{image}:{__version__}"


@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.cuda", "README.md"])
def test_images_are_built_under_the_names_that_are_run(file: str) -> None:
    """The commands that build the images give them the names that the pods ask for."""
    built = set(re.findall(r"docker build -f cluster/(\S+) -t (\S+) \.", (CLUSTER / file).read_text()))
    expected = {("Dockerfile", f"raylm:{__version__}"), ("Dockerfile.cuda", f"raylm-cuda:{__version__}")}
    assert built == (expected if file == "README.md" else {pair for pair in expected if pair[0] == file})


def test_no_file_names_a_registry() -> None:
    """An image's first part is a host where it has a dot, a port or is localhost."""
    images = [container(pod)["image"] for pod in _PODS.values()]
    images += re.findall(
        r"^FROM (\S+)", "".join(path.read_text() for path in CLUSTER.glob("Dockerfile*")), re.MULTILINE
    )
    for image in images:
        first, slash, _ = image.partition("/")
        assert not (slash and re.search(r"[.:]|^localhost$", first)), image


def test_a_gpu_node_has_as_many_gpus_everywhere() -> None:
    """Kubernetes and Slurm ask for nodes of the same size."""
    found = container(workers(ray_cluster("raycluster.yaml"))["gpu"])["resources"]["limits"]["nvidia.com/gpu"]
    slurm = re.search(r"^#SBATCH --gpus-per-node=(\d+)$", (CLUSTER / "slurm.sbatch").read_text(), re.MULTILINE)
    assert slurm is not None
    assert found == int(slurm[1])


def test_clients_find_the_same_port_everywhere() -> None:
    """Serve, the pods and Prometheus agree on the port of the endpoint."""
    (serve,) = documents("serve.yaml")
    port = serve["http_options"]["port"]
    serving = [pod for name, pod in _PODS.items() if name.startswith(("rayservice.yaml", "raycluster.yaml"))]
    assert {ports(pod)["serve"] for pod in serving} == {port}
    inner = yaml.safe_load(find("rayservice.yaml", "RayService")["spec"]["serveConfigV2"])
    assert inner["http_options"] == serve["http_options"]
    targets = documents("prometheus.yaml")[0]["scrape_configs"][0]["static_configs"][0]["targets"]
    service = f"{find('rayservice.yaml', 'RayService')['metadata']['name']}-serve-svc"  # KubeRay's name for it
    assert targets == [f"{service}.default.svc:{port}"]


def test_ray_listens_on_one_port_everywhere() -> None:
    """Kubernetes, the launcher and Slurm have Ray's head on one port."""
    heads = [pod for name, pod in _PODS.items() if name.startswith(RAY_FILES) and name.endswith(": head")]
    (port,) = {ports(pod)["gcs-server"] for pod in heads}
    (launcher,) = documents("ray-up.yaml")
    assert f"--port={port} " in launcher["head_start_ray_commands"][-1]
    assert launcher["worker_start_ray_commands"][-1].endswith(f"--address=$RAY_HEAD_IP:{port}")
    assert f"RAYLM_RAY_PORT:-{port}}}" in (CLUSTER / "slurm.sbatch").read_text()


def test_the_readme_connects_to_the_triton_of_triton_yaml() -> None:
    """The engine in the README has the address of the Service, and raylm takes it."""
    (block,) = re.findall(r"```yaml\n(engines: .*?)```", (CLUSTER / "README.md").read_text(), re.DOTALL)
    (engine,) = yaml.safe_load(block)["engines"]
    EngineGroup.model_validate(engine)
    service = find("triton.yaml", "Service")
    listening = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert engine["address"] == f"{service['metadata']['name']}:{listening['grpc']}"
    assert listening == ports(_PODS["triton.yaml"])


def test_batches_of_the_pool_are_on_the_volume_that_the_readme_names() -> None:
    """The folder for batches is the one where the head has its volume."""
    (mount,) = container(_PODS["raycluster.yaml: head"])["volumeMounts"]
    assert f"`batches.folder` is\n`{mount['mountPath']}`" in (CLUSTER / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(path.name for path in CLUSTER.iterdir() if path.name != "README.md"))
def test_the_readme_says_when_to_use_it(name: str) -> None:
    """No file is left without a word in the README."""
    assert name in (CLUSTER / "README.md").read_text()


def _instructions(name: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions; a backslash at the end of a line continues it."""
    text = (CLUSTER / name).read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


_DOCKERFILES = ("Dockerfile", "Dockerfile.cuda")


@pytest.mark.parametrize("name", _DOCKERFILES)
def test_a_dockerfile_is_made_of_dockers_instructions(name: str) -> None:
    """There is no Docker here to build it."""
    words = [word for word, _ in _instructions(name)]
    assert words[0] == "FROM"
    assert set(words) <= {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "CMD"}
    assert words[-1] == "CMD"


@pytest.mark.parametrize("name", _DOCKERFILES)
def test_what_an_image_copies_is_there(name: str) -> None:
    """Every source of a COPY is in the repository."""
    sources = [path for word, rest in _instructions(name) if word == "COPY" for path in rest.split()[:-1]]
    assert sources
    assert [path for path in sources if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", _DOCKERFILES)
def test_an_image_installs_extras_that_there_are_with_pinned_versions(name: str) -> None:
    """The extras are in pyproject.toml, and the constraints that pip is given are copied."""
    (install,) = (rest for word, rest in _instructions(name) if word == "RUN" and rest.startswith("pip install"))
    extras = re.search(r"'\.\[([a-z,]+)\]'$", install)
    assert extras is not None
    known: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras[1].split(",")) <= set(known)
    copied = {path for word, rest in _instructions(name) if word == "COPY" for path in rest.split()[:-1]}
    assert {path for path in copied if path.startswith("constraints")} == set(re.findall(r"-c (\S+)", install))


def test_nodes_of_both_images_have_the_same_python_and_ray() -> None:
    """Ray asks for that; what crosses between nodes is pickled."""
    (cpu,), (cuda,) = ([rest for word, rest in _instructions(name) if word == "FROM"] for name in _DOCKERFILES)
    assert cpu == cuda
    shared = set(_pinned("constraints.txt")) & set(_pinned("constraints-lmdeploy.txt"))
    assert shared == set()  # so that both install raylm's own dependencies from the first one


@pytest.mark.parametrize("name", _DOCKERFILES)
def test_an_image_runs_as_the_user_of_the_pods(name: str) -> None:
    """The user of the pods is made in the image, and is its own."""
    instructions = _instructions(name)
    (user,) = (rest for word, rest in instructions if word == "USER")
    ray_pods = [pod for pod_name, pod in _PODS.items() if pod_name.startswith(RAY_FILES)]
    assert {pod["securityContext"]["runAsUser"] for pod in ray_pods} == {int(user)}
    assert any(word == "RUN" and f"--uid {user} " in rest for word, rest in instructions)


def test_both_images_have_what_the_pods_start() -> None:
    """KubeRay starts a login shell, whose PATH has /usr/local/bin, where pip puts programs outside of environments."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    binary = {
        variable["value"]
        for name, pod in _PODS.items()
        if name.startswith(("rayservice.yaml", "raycluster.yaml"))
        for variable in container(pod)["env"]
        if variable["name"] == "RAY_SERVE_HAPROXY_BINARY_PATH"
    }
    assert {Path(path).parent for path in binary} == {Path("/usr/local/bin")}
    assert {Path(path).name for path in binary} <= set(scripts)
