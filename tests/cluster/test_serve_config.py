"""`serve.yaml`, and the same inside `rayservice.yaml`."""

import copy
from typing import Any

import pytest
import yaml

from raylm.config import ServeConfig

from .manifests import documents, find, ray_cluster


def _serve_yaml() -> dict[str, Any]:
    (config,) = documents("serve.yaml")
    return config


def _in_rayservice() -> dict[str, Any]:
    config = yaml.safe_load(find("rayservice.yaml", "RayService")["spec"]["serveConfigV2"])
    assert isinstance(config, dict)
    return config


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")  # Ray's own
@pytest.mark.parametrize("config", [_serve_yaml(), _in_rayservice()], ids=["serve.yaml", "rayservice.yaml"])
def test_ray_serve_takes_the_config(config: dict[str, Any]) -> None:
    """It is valid by the schema of `serve deploy`."""
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(config)


@pytest.mark.parametrize("config", [_serve_yaml(), _in_rayservice()], ids=["serve.yaml", "rayservice.yaml"])
def test_raylm_takes_the_arguments(config: dict[str, Any]) -> None:
    """The arguments are a configuration of raylm."""
    (application,) = config["applications"]
    ServeConfig.parse(application["args"])


def test_rayservice_serves_what_serve_yaml_serves() -> None:
    """But for how many there are of it, which depends on the pods."""
    expected = copy.deepcopy(_serve_yaml())
    arguments = expected["applications"][0]["args"]
    arguments["models"][0]["engines"][0]["replicas"] = 2
    arguments["gateway"]["replicas"] = 3
    expected["applications"][0]["deployments"] = [{"name": "gateway", "max_replicas_per_node": 1}]
    assert _in_rayservice() == expected


def test_each_pod_of_the_rayservice_has_a_gateway() -> None:
    """A pod without one would never be ready."""
    groups = ray_cluster("rayservice.yaml")["workerGroupSpecs"]
    assert all(group["replicas"] == group["minReplicas"] == group["maxReplicas"] for group in groups)
    arguments = _in_rayservice()["applications"][0]["args"]
    assert arguments["gateway"]["replicas"] == 1 + sum(group["replicas"] for group in groups)
