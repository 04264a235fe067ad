"""Trials of a sweep trained by themselves, in plain processes without Ray: the reference for the sweep's results.

python -m tests.kill.alone SWEEP OUT RANK WORLD: one of these processes; `train` starts one for each worker.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 900


def train(sweep: Path, out: Path, epochs: dict[int, int], workers: int) -> None:
    """Train every trial up to the epoch that it got in the sweep.

    Args:
        sweep: folder of the sweep.
        out: folder for the folders of the trials.
        epochs: of each trial, by number.
        workers: of a trial; trials with one worker are trained two at a time.
    """
    out.mkdir(parents=True)
    (out / "epochs.json").write_text(json.dumps(epochs))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    processes = []
    for rank in range(2):
        words = [sys.executable, "-m", "tests.kill.alone", str(sweep), str(out), str(rank), str(workers)]
        with (out / f"log-{rank}.txt").open("wb") as log:
            processes.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log))
    try:
        codes = [process.wait(TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        raise RuntimeError(f"training alone failed: {(out / 'log-0.txt').read_text()[-2000:]}")


class EndReached(BaseException):
    """The trial reached the epoch at which it ended in the sweep: a signal, not an error."""


def train_one(config: Path, folder: Path, last: int) -> None:
    """Train one trial up to an epoch."""
    from sweep.config.files import load
    from sweep.config.resolve import resolve
    from sweep.execution.trial import run_trial

    def report(epoch: int, metrics: dict[str, Any]) -> None:
        if epoch == last:
            raise EndReached

    try:
        run_trial(resolve(load(str(config))), folder, report, "local", "cpu")
    except EndReached:
        return
    raise RuntimeError(f"{config}: ended before epoch {last}")


def main() -> None:
    """Train one rank of all trials, or half of the trials that have one rank."""
    sweep, out, rank, world = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{out / 'rendezvous'}", rank=rank, world_size=world)
    for index, (number, last) in enumerate(json.loads((out / "epochs.json").read_text()).items()):
        if world > 1 or index % 2 == rank:
            name = f"{int(number):04d}"
            train_one(sweep / "trials" / name / "config.yaml", out / name, last)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
