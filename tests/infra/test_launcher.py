"""Configurations of Ray's cluster launcher: valid by Ray's own schema, spot workers, nothing open without the token."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sweep.cli.submit import STOP_SECONDS

ROOT = Path(__file__).resolve().parents[2]
Config = dict[str, Any]


@pytest.fixture(params=("aws", "gcp"))
def config(request: pytest.FixtureRequest) -> Config:
    loaded: Config = yaml.safe_load((ROOT / f"infra/ray-cluster.{request.param}.yaml").read_text())
    return loaded


def check(config: Config) -> Config:
    """What `ray up` does before it asks the cloud for anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared: Config = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_accepts_it_and_adds_no_commands(config: Config) -> None:
    prepared, everywhere = check(config), config["setup_commands"]
    assert prepared["head_setup_commands"] == everywhere + config["head_setup_commands"]
    assert prepared["worker_setup_commands"] == everywhere
    for name in ("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        assert prepared[name] == config[name]


DAMAGES: list[Callable[[Config], object]] = [
    lambda config: config.update(idle_timeout_minute=5),
    lambda config: config["available_node_types"]["gpu-spot"].update(max_worker=8),
    lambda config: config["docker"].update(run_option=[]),
    lambda config: config.update(max_workers="eight"),
    lambda config: config.update(head_node_type="heads"),
]


def test_ray_refuses_broken_copies(config: Config) -> None:
    from jsonschema import ValidationError

    for damage in DAMAGES:
        damage(broken := copy.deepcopy(config))
        with pytest.raises((ValidationError, ValueError)):
            check(broken)


def test_workers_alone_are_of_the_spot_market(config: Config) -> None:
    types = config["available_node_types"]
    assert re.search(r"spot", str(types["gpu-spot"]["node_config"]), re.IGNORECASE)
    assert not re.search(r"spot", str(types["head"]["node_config"]), re.IGNORECASE)
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["gpu-spot"]["min_workers"] == 0


def test_ray_requires_the_token_and_waits_for_checkpoints(config: Config) -> None:
    starts = [config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    assert all(re.search(r"RAY_AUTH_MODE=token [^;]*ray start", start) for start in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert f"RAY_JOB_STOP_WAIT_TIME_S={STOP_SECONDS} " in starts[0]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
