"""What a trial's machine does: told now and then, under MLflow's names, and never a reason to end."""

from pathlib import Path

import pytest
import torch
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

from data.shards.dataset import Shards
from model.runtime import system_metrics as usage
from model.runtime.system_metrics import EVERY, PREFIX, SystemMetrics
from model.training import metrics_log as curve
from model.training import trainer as train
from tests.model.trials import Trial

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(usage, "time", found := Clock())
    return found


def test_the_node_has_the_names_of_mlflow(clock: Clock) -> None:
    own = SystemMetrics(CPU)
    (monitor := CPUMonitor()).collect_metrics()
    clock.now += EVERY
    found = own.sample()
    assert found.keys() == {f"{PREFIX}{name}" for name in monitor.metrics}
    assert 0 <= found["system/cpu_utilization_percentage"] <= 100
    assert 0 < found["system/system_memory_usage_percentage"] <= 100
    assert found["system/system_memory_usage_megabytes"] > 1


def test_it_is_told_now_and_then_and_once_at_least(clock: Clock) -> None:
    own = SystemMetrics(CPU)
    assert own.sample() == {}, "a moment is too short to measure"
    assert own.sample(once=True)
    assert own.sample(once=True) == {}
    clock.now += EVERY - 0.1
    assert own.sample(once=True) == {}
    clock.now += 0.2
    assert own.sample()
    assert own.sample() == {}


def test_what_a_gpu_does_not_tell_is_left_out(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: int) -> int:
        raise RuntimeError("not supported")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda place: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("", (), {"total_memory": 12 * 10**9}))
    monkeypatch.setattr(torch.cuda, "utilization", lambda place: refuse(place) if place else 80)
    monkeypatch.setattr(torch.cuda, "power_draw", refuse)
    found = SystemMetrics(GPU).sample(once=True)
    assert {name: value for name, value in found.items() if "gpu" in name} == {
        "system/gpu_0_memory_usage_megabytes": 3000.0,
        "system/gpu_0_memory_usage_percentage": 25.0,
        "system/gpu_0_utilization_percentage": 80.0,
        "system/gpu_1_memory_usage_megabytes": 3000.0,
        "system/gpu_1_memory_usage_percentage": 25.0,
    }


def test_a_machine_without_the_gpu_it_names(clock: Clock) -> None:
    found = SystemMetrics(GPU).sample(once=True)
    assert torch.cuda.is_available() or not any("gpu" in name for name in found)


def test_a_trial_tells_it_beside_its_steps(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    monkeypatch.setattr(usage, "EVERY", 0.0)
    Trial().run(models, corpus, tmp_path)
    lines = list(curve.lines((tmp_path / curve.FILE).read_bytes()))
    told = [line for line in lines if any(name.startswith(PREFIX) for name in line["values"])]
    assert all(name.startswith(PREFIX) for line in told for name in line["values"])
    steps = {line["step"] for line in lines if "train_loss_step" in line["values"]}
    assert {line["step"] for line in told} == steps
