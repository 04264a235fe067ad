"""Worker groups: what one more trial costs in one, and with its own TorchTrainer; memory over many trials.

Tiny trials of a few steps and an evaluation, through the whole of `sweep run`: ledger, Tune, checkpoint, MLflow.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from data.corpus import synthetic
from data.preparation.build import prepare
from sweep.config import files
from sweep.config.paths import trial_folder
from sweep.config.resolve import resolve
from sweep.execution.cluster import local_or_remote_ray
from sweep.execution.job import TrialJob
from sweep.execution.trial import fit_job
from tests.bench.measure import Cost, Row, cpu_times, spent
from tests.tiny_models import random_llm

WARM, TRIALS = 20, 200  # trials in one slot; the first ones fill caches
GROWTH = 5.0  # MB of the driver
ALONE = 3  # trials with a TorchTrainer each
Memory = tuple[float, float]  # MB after WARM trials, and after all


def run(warm: int = WARM, trials: int = TRIALS) -> list[Row]:
    """The goals of slots."""
    with tempfile.TemporaryDirectory() as name:
        config = write(Path(name))
        more, memory = in_a_slot(config, Path(name) / "sweep", warm, trials)
        alone = with_trainers(config, Path(name) / "alone")
    rows = []
    for name, seconds, others in (
        ("one more trial, CPU", more.cpu, [cost.cpu for cost in alone]),
        ("one more trial, wall", more.wall, [cost.wall for cost in alone]),
    ):
        note = f"{seconds:.2f} against {sum(others) / ALONE:.1f} s"
        ratios = [seconds / other for other in others]
        rows.append(Row(name, "a TorchTrainer for it", ratios, 0.02, most=True, note=note))
        rows.append(Row(name, "seconds", [seconds], 0.5, most=True))
    for whose, (before, after) in memory.items():
        note = f"{before:.0f} MB, then {after:.0f} after {trials} trials"
        rows.append(Row(f"memory, {whose}", f"after {warm} trials", [after / before], 1.05, most=True, note=note))
    before, after = memory["driver"]
    grown = f"MB, from {warm} to {trials} trials"
    rows.append(Row("memory of the driver, growth", grown, [after - before], GROWTH, most=True))
    return rows


def write(folder: Path) -> Path:
    """The configuration of a sweep whose trials take next to no time to train."""
    shards = prepare(synthetic.corpus(sessions=9, turns=8, seed=3), folder / "shards")
    random_llm(folder / "llm")
    settings = {
        "name": "slots",
        "data": {"shards": str(shards.folder), "history": 1},
        "model": {"modality": "text", "llm": {"path": str(folder / "llm")}, "lora": {"dropout": 0.0}},
        "train": {"epochs": 1},
        "resources": {"slots": 1},
        "search": {"space": {"model.lora.rank": [2, 8], "train.learning_rate": {"low": 1e-3, "high": 1e-2}}},
    }
    (folder / "slots.json").write_text(json.dumps(settings))
    return folder / "slots.json"


def in_a_slot(config: Path, folder: Path, warm: int, trials: int) -> tuple[Cost, dict[str, Memory]]:
    """A sweep; what each trial after the first `warm` takes of all processes, and the memory of two of them."""
    command = [sys.executable, "-m", "sweep", "run", str(config), "--out", str(folder), "--trials", str(trials + 1)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        readings = []
        for number in (warm, trials):
            while not any(trial_folder(folder, number).glob("attempt-*")):  # the one before has ended
                assert process.poll() is None, "the sweep has failed"
                time.sleep(0.05)
            readings.append((time.monotonic(), cpu_times(), memory(process.pid)))
        process.wait()
    (started, before, first), (ended, after, last) = readings
    count = trials - warm
    taken = Cost(spent(before, after) / count, (ended - started) / count)
    return taken, {whose: (first[whose], last[whose]) for whose in first}


def memory(driver: int) -> dict[str, float]:
    """MB that are a process's own, of a sweep's driver and of what it has below that grows with the trials, if any."""
    processes = {"driver": psutil.Process(driver)}
    for process in processes["driver"].children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = process.cmdline()[0]
            names = [name for name in ("TrialWorker", "WorkerGroup", "Mailbox") if title.startswith(f"ray::{name}")]
            processes |= dict.fromkeys(names, process)
    return {name: process.memory_full_info().uss / 1e6 for name, process in processes.items()}


def with_trainers(config: Path, folder: Path) -> list[Cost]:
    """Run the same trials, each with its own TorchTrainer; return the cost of its processes."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    taken = []
    with local_or_remote_ray():
        for number in range(ALONE + 1):
            (trial := trial_folder(folder, number)).mkdir(parents=True)
            settings = resolve(files.load(str(config), ["search.space={}"]))
            files.write(settings, trial / "config.yaml")
            job = TrialJob(str(trial), settings.model_dump_json(), "local", (), None)
            trainer = TorchTrainer(
                train,
                train_loop_config={"job": job},
                scaling_config=ScalingConfig(num_workers=1),
                run_config=RunConfig(name=f"trial-{number}", storage_path=str(folder)),
            )
            taken.append(watched(trainer.fit))
    return taken[1:]  # the first one also starts what all share


def train(config: dict[str, Any]) -> None:
    """A trial as Ray Train runs it."""
    import ray.train

    fit_job(config["job"], lambda epoch, metrics: ray.train.report(metrics), lambda: False)


def watched(work: Any) -> Cost:
    """What something takes, with processes that start and end meanwhile; without this one, which looks at them."""
    before, last, ended = cpu_times(), {}, threading.Event()

    def look() -> None:
        while not ended.wait(0.2):
            for process, seconds in cpu_times().items():
                last[process] = max(seconds, last.get(process, 0.0))

    thread, started = threading.Thread(target=look), time.monotonic()
    thread.start()
    work()
    wall = time.monotonic() - started
    ended.set()
    thread.join()
    last.pop(os.getpid(), None)
    return Cost(spent(before, last), wall)
