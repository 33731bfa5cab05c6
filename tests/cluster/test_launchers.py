"""Ray's launcher and the Slurm script, as far as can be told without starting them."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.util import prepare_config, validate_config

from .manifests import CLUSTER, documents, readme_variables


def _launcher() -> dict[str, Any]:
    (config,) = documents("ray-up.yaml")
    return config


def test_ray_up_takes_its_file() -> None:
    """As `ray up` does it: with Ray's defaults filled in."""
    prepared = prepare_config(_launcher())
    validate_config(prepared)
    assert prepared["max_workers"] == len(_launcher()["provider"]["worker_ips"])


def test_ray_up_refuses_a_misspelt_field() -> None:
    """Ray's schema knows its fields."""
    from jsonschema import ValidationError

    with pytest.raises(ValidationError, match="worker_start_commands"):
        validate_config(prepare_config({**_launcher(), "worker_start_commands": []}))


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_the_launcher_starts_ray_in_the_environment_of_the_readme(commands: str) -> None:
    """Ray starts with all variables that the README asks for."""
    start = _launcher()[commands][-1]
    found = dict(re.findall(r"\b(RAY_[A-Z_]+)=(\S+?);?(?= |$)", start))
    expected = readme_variables()
    expected["RAY_SERVE_HAPROXY_BINARY_PATH"] = "/opt/raylm/bin/raylm-haproxy"
    assert found == expected


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_the_launchers_commands_are_bash(commands: str) -> None:
    """Bash can parse them."""
    for command in _launcher()[commands]:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_the_token_of_this_user_goes_to_the_nodes() -> None:
    """It goes to where Ray looks for it, in the home folder of the user of ssh."""
    user = _launcher()["auth"]["ssh_user"]
    assert _launcher()["file_mounts"] == {f"/home/{user}/.ray/auth_token": "~/.ray/auth_token"}


def test_shellcheck_finds_nothing_in_the_slurm_script() -> None:
    """Shellcheck has nothing to say about it."""
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", CLUSTER / "slurm.sbatch"], capture_output=True, text=True
    )
    assert done.stdout + done.stderr == ""


def test_the_slurm_script_starts_ray_in_the_environment_of_the_readme() -> None:
    """Ray starts with all variables that the README asks for."""
    text = (CLUSTER / "slurm.sbatch").read_text()
    exported = set(re.findall(r"\b(RAY_[A-Z_]+)\b", " ".join(re.findall(r"^export (.*)$", text, re.MULTILINE))))
    expected = readme_variables()
    assert set(expected) | {"RAY_ADDRESS", "RAY_AUTH_TOKEN"} == exported
    assert [f"{name}={value}" in text for name, value in expected.items() if value] == [True] * (len(expected) - 1)
