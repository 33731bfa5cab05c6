"""The files of `cluster/`, read."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"

RAY_FILES = ("rayservice.yaml", "raycluster.yaml", "rayjob.yaml")
KUBERNETES_FILES = (*RAY_FILES, "redis.yaml", "triton.yaml", "network-policy.yaml")


def documents(name: str) -> list[dict[str, Any]]:
    """Return what a YAML file of `cluster/` says."""
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def find(name: str, kind: str, called: str | None = None) -> dict[str, Any]:
    """Return the one object of a kind in a file."""
    (found,) = (
        document
        for document in documents(name)
        if document["kind"] == kind and called in (None, document["metadata"]["name"])
    )
    return found


def ray_cluster(name: str) -> dict[str, Any]:
    """Return the cluster that a KubeRay file describes."""
    (found,) = (document for document in documents(name) if document["apiVersion"] == "ray.io/v1")
    spec = found["spec"]
    cluster: dict[str, Any] = {
        "RayCluster": lambda: spec,
        "RayJob": lambda: spec["rayClusterSpec"],
        "RayService": lambda: spec["rayClusterConfig"],
    }[found["kind"]]()
    return cluster


def head(cluster: dict[str, Any]) -> dict[str, Any]:
    """Return the pod of the head."""
    pod: dict[str, Any] = cluster["headGroupSpec"]["template"]["spec"]
    return pod


def workers(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the pod of each group of workers."""
    return {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every pod of all Kubernetes files, with its name."""
    for name in RAY_FILES:
        cluster = ray_cluster(name)
        yield f"{name}: head", head(cluster)
        for group, pod in workers(cluster).items():
            yield f"{name}: {group}", pod
    yield "redis.yaml", find("redis.yaml", "StatefulSet")["spec"]["template"]["spec"]
    yield "triton.yaml", find("triton.yaml", "Deployment")["spec"]["template"]["spec"]


def container(pod: dict[str, Any]) -> dict[str, Any]:
    """Return a pod's one container."""
    (found,) = pod["containers"]
    assert isinstance(found, dict)
    return found


def ports(pod: dict[str, Any]) -> dict[str, int]:
    """Return a container's ports by their names."""
    return {port["name"]: port["containerPort"] for port in container(pod)["ports"]}


def readme_variables() -> dict[str, str | None]:
    """Return what Ray's environment needs, from the table in the README."""
    rows = re.findall(r"^\| `([A-Z_]+)(?:=([^`]*))?` \|", (CLUSTER / "README.md").read_text(), re.MULTILINE)
    return {name: value or None for name, value in rows}
