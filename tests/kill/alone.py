"""Trials of a sweep trained by themselves, in plain processes without Ray: the reference for the sweep's results."""

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sweep.config.files import load
from sweep.config.resolve import resolve
from sweep.execution.trial import run_trial

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
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=train_share, args=(sweep, out, epochs, rank, workers)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(TIMEOUT)
        if any(process.exitcode for process in processes):
            raise RuntimeError("training alone failed, see above")
    finally:
        for process in processes:
            process.kill()


class EndReached(BaseException):
    """The trial reached the epoch at which it ended in the sweep: a signal, not an error."""


def train_one(config: Path, folder: Path, last: int) -> None:
    """Train one trial up to an epoch."""

    def report(epoch: int, metrics: dict[str, Any]) -> None:
        if epoch == last:
            raise EndReached

    try:
        run_trial(resolve(load(str(config))), folder, report, "local", "cpu")
    except EndReached:
        return
    raise RuntimeError(f"{config}: ended before epoch {last}")


def train_share(sweep: Path, out: Path, epochs: dict[int, int], rank: int, world: int) -> None:
    """Train one rank of all trials, or half of the trials that have one rank."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{out / 'rendezvous'}", rank=rank, world_size=world)
    for index, (number, last) in enumerate(epochs.items()):
        if world > 1 or index % 2 == rank:
            train_one(sweep / "trials" / f"{number:04d}" / "config.yaml", out / f"{number:04d}", last)
    if world > 1:
        dist.destroy_process_group()
