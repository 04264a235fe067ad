"""System metrics are sampled at intervals, under MLflow's names, and never end a trial; devices differ in padding."""

from pathlib import Path

import pytest
import torch
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor

from data.loading.batching import PAD_TOLERANCE, Cost, micro_batches
from data.loading.tasks import items
from data.shards.dataset import Shards
from model.runtime import system_metrics
from model.runtime.device import pad_tolerance
from model.runtime.system_metrics import INTERVAL, PREFIX, SystemMetrics
from model.training import trainer as training
from model.training.metrics_log import MetricsLog
from tests.model.trials import Trial

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(system_metrics, "time", clock := Clock())
    return clock


def test_node_metrics_have_the_names_of_mlflow(clock: Clock) -> None:
    metrics, monitor = SystemMetrics(CPU), CPUMonitor()
    monitor.collect_metrics()
    clock.now += INTERVAL
    sampled = metrics.sample()
    assert sampled.keys() == {f"{PREFIX}{name}" for name in monitor.metrics}
    assert 0 <= sampled["system/cpu_utilization_percentage"] <= 100
    assert 0 < sampled["system/system_memory_usage_percentage"] <= 100
    assert sampled["system/system_memory_usage_megabytes"] > 1


def test_metrics_are_sampled_at_intervals_and_at_least_once(clock: Clock) -> None:
    metrics = SystemMetrics(CPU)
    assert metrics.sample() == {}, "the first interval is too short to measure"
    assert [bool(metrics.sample(at_least_once=True)) for _ in range(2)] == [True, False]
    clock.now += INTERVAL - 0.1
    assert metrics.sample(at_least_once=True) == {}
    clock.now += 0.2
    assert [bool(metrics.sample()) for _ in range(2)] == [True, False]


def test_values_that_a_gpu_does_not_report_are_left_out(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = SystemMetrics(GPU).sample(at_least_once=True)
    assert torch.cuda.is_available() or not any("gpu" in name for name in sampled)

    def refuse(index: int) -> int:
        raise RuntimeError("not supported")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_memory_used", lambda index: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("", (), {"total_memory": 12 * 10**9}))
    monkeypatch.setattr(torch.cuda, "utilization", lambda index: refuse(index) if index else 80)
    monkeypatch.setattr(torch.cuda, "power_draw", refuse)
    sampled = SystemMetrics(GPU).sample(at_least_once=True)
    expected = {
        f"system/gpu_{index}_memory_usage_{name}": value
        for index in (0, 1)
        for name, value in (("megabytes", 3000.0), ("percentage", 25.0))
    }
    assert {name: value for name, value in sampled.items() if "gpu" in name} == expected | {
        "system/gpu_0_utilization_percentage": 80.0
    }


def test_metrics_log_has_system_metrics_in_lines_of_their_own(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    monkeypatch.setattr(system_metrics, "INTERVAL", 0.0)
    Trial().run(models, corpus, tmp_path)
    lines = MetricsLog(tmp_path).lines()
    assert [line.step for line in lines] == sorted(line.step for line in lines)
    system = [line for line in lines if any(name.startswith(PREFIX) for name in line.values)]
    assert all(name.startswith(PREFIX) for line in system for name in line.values)
    steps = [line for line in lines if "train_loss_step" in line.values]
    assert all(line.values.keys() == {"train_loss_step", "learning_rate"} for line in steps)
    assert {line.step for line in system} == {line.step for line in steps}
    assert [line.step for line in lines if line.epoch == 1] == [len(items(corpus, "classify", "train"))]


def test_gpu_computes_a_ragged_step_in_few_parts() -> None:
    costs = [Cost(100 + 25 * index) for index in range(16)]
    parts = {kind: len(micro_batches(costs, 16_384, pad_tolerance(torch.device(kind)))) for kind in ("cpu", "cuda")}
    assert pad_tolerance(CPU) == PAD_TOLERANCE
    assert parts["cuda"] == 2
    assert parts["cpu"] > 6
