"""The Kubernetes files: valid, and careful with streams, nodes and rights."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from raylm.config import SessionConfig

from .manifests import (
    CLUSTER,
    KUBERNETES_FILES,
    RAY_FILES,
    container,
    documents,
    find,
    head,
    pods,
    ports,
    ray_cluster,
    readme_variables,
)

_KUBERNETES = "1.37"
_DEFINITIONS = "_definitions.json"

_PODS = dict(pods())
_RAY_PODS = {name: pod for name, pod in _PODS.items() if name.startswith(RAY_FILES)}
_SERVING_PODS = {name: pod for name, pod in _RAY_PODS.items() if not name.startswith("rayjob.yaml")}
_OBJECTS = {
    f"{name}: {document['kind']} {document['metadata']['name']}": document
    for name in KUBERNETES_FILES
    for document in documents(name)
}
_RAY_OBJECTS = {name: found for name, found in _OBJECTS.items() if found["apiVersion"] == "ray.io/v1"}
_PLAIN_OBJECTS = {name: found for name, found in _OBJECTS.items() if name not in _RAY_OBJECTS}


def _of_all(found: dict[str, dict[str, Any]], name: str = "pod") -> pytest.MarkDecorator:
    return pytest.mark.parametrize(name, found.values(), ids=found.keys())


@pytest.fixture(scope="module")
def kuberay() -> Draft202012Validator:
    """Checks an object against the schema of its kind, with Kubernetes' own schema for pods."""
    own = json.loads((Path(__file__).parent / "schemas" / "kuberay.json").read_text())
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{_KUBERNETES}.0-local-strict"
    definitions = json.loads((folder / _DEFINITIONS).read_text())
    kinds = [
        {"if": {"properties": {"kind": {"const": kind}}}, "then": {"$ref": f"kuberay.json#/$defs/{kind}"}}
        for kind in ("RayCluster", "RayJob", "RayService")
    ]
    registry: Registry[Any] = Registry().with_resources(
        (name, Resource.from_contents(schema, default_specification=DRAFT202012))
        for name, schema in (("kuberay.json", own), (_DEFINITIONS, definitions))
    )
    return Draft202012Validator({"allOf": kinds}, registry=registry)


@_of_all(_RAY_OBJECTS, "found")
def test_kuberay_takes_it(kuberay: Draft202012Validator, found: dict[str, Any]) -> None:
    """The object is valid by KubeRay's schema, with Kubernetes' own for its pods."""
    kuberay.validate(found)


def test_a_misspelt_field_of_kuberay_is_found(kuberay: Draft202012Validator) -> None:
    """The schema knows KubeRay's fields."""
    wrong = copy.deepcopy(find("rayservice.yaml", "RayService"))
    wrong["spec"]["rayClusterConfig"]["autoscaling"] = True
    with pytest.raises(ValidationError, match="autoscaling"):
        kuberay.validate(wrong)


def test_a_misspelt_field_of_a_pod_in_it_is_found(kuberay: Draft202012Validator) -> None:
    """The schema goes down into the pods."""
    wrong = copy.deepcopy(find("rayservice.yaml", "RayService"))
    container(head(wrong["spec"]["rayClusterConfig"]))["enviroment"] = []
    with pytest.raises(ValidationError, match="enviroment"):
        kuberay.validate(wrong)


@_of_all(_PLAIN_OBJECTS, "found")
def test_kubernetes_takes_it(found: dict[str, Any]) -> None:
    """The object is valid by Kubernetes' schema, without a field that it does not know."""
    kubernetes_validate.validate(found, _KUBERNETES, strict=True)


@_of_all(_PODS)
def test_nothing_runs_as_root_or_may_become_it(pod: dict[str, Any]) -> None:
    """Every pod has a plain user without capabilities."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] >= 1
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    rights = container(pod)["securityContext"]
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}


@_of_all(_PODS)
def test_what_a_pod_needs_is_reserved(pod: dict[str, Any]) -> None:
    """Every pod asks for CPU and memory, and gets no more memory than it asks for."""
    resources = container(pod)["resources"]
    assert {"cpu", "memory"} <= set(resources["requests"])
    assert resources["limits"]["memory"] == resources["requests"]["memory"]


@_of_all(_RAY_PODS)
def test_ray_counts_the_cpus_that_it_gets(pod: dict[str, Any]) -> None:
    """KubeRay tells Ray the limit."""
    resources = container(pod)["resources"]
    assert resources["limits"] == resources["requests"]


@_of_all(_PODS)
def test_a_busy_pod_is_not_killed(pod: dict[str, Any]) -> None:
    """It takes two minutes of silence at least."""
    probe = container(pod)["livenessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 120


@_of_all(_RAY_PODS)
def test_what_tells_that_ray_lives_asks_for_no_token(pod: dict[str, Any]) -> None:
    """The probe's path and port are Ray's own, and are open to the kubelet."""
    from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
    from ray.dashboard.http_server_agent import PUBLIC_EXACT_PATHS

    asked = container(pod)["livenessProbe"]["httpGet"]
    assert asked["path"] in PUBLIC_EXACT_PATHS
    assert asked["port"] == DEFAULT_DASHBOARD_AGENT_LISTEN_PORT


@_of_all(_SERVING_PODS)
def test_streams_have_time_to_end(pod: dict[str, Any]) -> None:
    """The pod waits before Ray is ended, and Kubernetes waits longer."""
    (word, seconds) = container(pod)["lifecycle"]["preStop"]["exec"]["command"]
    assert word == "sleep"
    assert pod["terminationGracePeriodSeconds"] > int(seconds) >= 60


def test_an_update_leaves_the_old_cluster_time_for_its_streams() -> None:
    """The old cluster stays for longer than one of its pods takes to end."""
    spec = find("rayservice.yaml", "RayService")["spec"]
    assert spec["rayClusterDeletionDelaySeconds"] >= head(spec["rayClusterConfig"])["terminationGracePeriodSeconds"]


@_of_all(_SERVING_PODS)
def test_ray_starts_in_the_environment_of_the_readme(pod: dict[str, Any]) -> None:
    """The token's two variables are KubeRay's to set."""
    expected = readme_variables()
    assert expected.pop("RAY_AUTH_MODE") == "token"
    expected["RAY_SERVE_HAPROXY_BINARY_PATH"] = "/usr/local/bin/raylm-haproxy"
    plain = [variable for variable in container(pod)["env"] if "valueFrom" not in variable]
    assert {variable["name"]: variable["value"] for variable in plain} == expected


@pytest.mark.parametrize("name", RAY_FILES)
def test_ray_asks_for_the_token_of_a_secret(name: str) -> None:
    """Every cluster has token authentication."""
    assert ray_cluster(name)["authOptions"] == {"mode": "token", "secretName": "raylm-token"}


@pytest.mark.parametrize("name", ["rayservice.yaml", "raycluster.yaml"])
def test_the_head_keeps_its_state_in_the_redis_of_redis_yaml(name: str) -> None:
    """Address and password are those of redis.yaml."""
    options = ray_cluster(name)["gcsFaultToleranceOptions"]
    service = find("redis.yaml", "Service")
    (port,) = service["spec"]["ports"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{port['port']}"
    (variable,) = container(_PODS["redis.yaml"])["env"]
    assert options["redisPassword"]["valueFrom"] == variable["valueFrom"]


@_of_all(_SERVING_PODS)
def test_gateways_may_keep_sessions_in_the_redis_of_redis_yaml(pod: dict[str, Any]) -> None:
    """What the README writes for sessions names the Service, and a variable of each pod with the Secret's password."""
    (line,) = re.findall(r"^sessions: .*$", (CLUSTER / "README.md").read_text(), re.MULTILINE)
    (settings,) = yaml.safe_load(line).values()
    sessions = SessionConfig(**settings)
    service = find("redis.yaml", "Service")
    (port,) = service["spec"]["ports"]
    assert sessions.url == f"redis://{service['metadata']['name']}:{port['port']}/1"
    (password,) = (variable for variable in container(pod)["env"] if variable["name"] == sessions.password_env)
    (variable,) = container(_PODS["redis.yaml"])["env"]
    assert password["valueFrom"] == variable["valueFrom"]


def test_no_password_is_in_a_file() -> None:
    """Secrets are made by hand."""
    assert not [name for name, found in _OBJECTS.items() if found["kind"] == "Secret"]


def test_clients_reach_haproxy_alone() -> None:
    """The one port of Ray's pods that is open to all is the endpoint's."""
    policy = find("network-policy.yaml", "NetworkPolicy", "raylm-ray")["spec"]
    open_to_all = [rule["ports"] for rule in policy["ingress"] if "from" not in rule]
    assert open_to_all == [[{"port": ports(_PODS["rayservice.yaml: head"])["serve"]}]]


@pytest.mark.parametrize("policy", documents("network-policy.yaml"), ids=lambda policy: str(policy["metadata"]["name"]))
def test_a_policy_opens_ports_that_are_listened_on(policy: dict[str, Any]) -> None:
    """Every port of a policy is one of its pods'."""
    listening = {
        "raylm-ray": set(ports(_PODS["rayservice.yaml: head"]).values()),
        "raylm-redis": set(ports(_PODS["redis.yaml"]).values()),
        "raylm-triton": set(ports(_PODS["triton.yaml"]).values()),
    }[policy["metadata"]["name"]]
    opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
    assert opened <= listening


@pytest.mark.parametrize("name", ["redis.yaml", "triton.yaml"])
def test_a_service_and_a_policy_select_the_pods(name: str) -> None:
    """The labels of the pods are those that Service and policy look for."""
    labels = next(
        found["spec"]["template"]["metadata"]["labels"]
        for found in documents(name)
        if found["kind"] in ("StatefulSet", "Deployment")
    )
    assert find(name, "Service")["spec"]["selector"] == labels
    selected = [policy["spec"]["podSelector"].get("matchLabels") for policy in documents("network-policy.yaml")]
    assert labels in selected


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml", "triton.yaml"])
def test_volumes_are_claimed_in_the_same_file(name: str) -> None:
    """A pod's volume comes with it, and none comes without use."""
    claims = {found["metadata"]["name"] for found in documents(name) if found["kind"] == "PersistentVolumeClaim"}
    used = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod_name, pod in _PODS.items()
        if pod_name.startswith(name)
        for volume in pod.get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    assert used == claims


def test_the_job_is_a_command_of_raylm() -> None:
    """The command line takes the job's words, and its files are on the volume."""
    from typer.main import get_command

    from raylm.cli import app

    program, verb, *arguments = find("rayjob.yaml", "RayJob")["spec"]["entrypoint"].split()
    command = get_command(app).commands[verb]  # type: ignore[attr-defined]
    options = command.make_context(verb, list(arguments)).params
    assert program == "raylm"
    (mount,) = container(_PODS["rayjob.yaml: head"])["volumeMounts"]
    assert Path(options["source"]).is_relative_to(mount["mountPath"])
    assert Path(options["output"]).is_relative_to(mount["mountPath"])
