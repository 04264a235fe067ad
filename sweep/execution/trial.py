"""One trial: from its configuration to a trained, evaluated model. Runs in a slot's worker, or plainly in a process."""

import functools
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from data.errors import StorageError, UserError
from data.loading.tasks import answer_sets
from data.shards.dataset import Shards
from model.evaluation.split_data import TrialData
from model.objectives.class_weights import resolve_balanced
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from model.training.trainer import Report, TrialInterrupted, fit, never
from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config

AnyConfig = TypeVar("AnyConfig", bound=Config)


def open_shards(config: ResolvedConfig) -> Shards:
    """The corpus, opened once per process."""
    return _opened(config.data.shards, config.data.fold)


@functools.lru_cache(maxsize=16)  # as many folds as a sweep may go through in turn
def _opened(folder: str, fold: int) -> Shards:
    return Shards(folder, fold)


def as_run(config: AnyConfig, shards: Shards) -> AnyConfig:
    """The configuration that says what is trained: with numbers where it asks for balanced classes.

    Raises:
        ConfigError: it has numbers for a task or a label that there is not.
    """
    if (config.train.class_weights, config.train.sampling) == ("equal", "none"):
        return config
    train = resolve_balanced(config.train, answer_sets(shards, config.tasks.active()))
    return config.model_copy(update={"train": train})


def settle(config: Config) -> None:
    """Make this process compute as a trial does."""
    # Convolutions on a GPU round fp32 to TF32 by default, which would break the equality of batch sizes.
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(config.resources.threads)
    seed_everything(config.seed)


def build(
    config: ResolvedConfig,
    reader: str,
    splits: Sequence[str],
    device: str,
    features: Path | None = None,
    teacher_logits: Path | None = None,
) -> tuple[SpeechLLM, TrialData]:
    """The model of a trial as it is before training, and its data.

    Args:
        config: of the trial.
        reader: "ray" or "local".
        splits: those that will be read.
        device: "cpu" or "cuda".
        features, teacher_logits: see `CacheFolders`.
    """
    settle(config)
    shards = open_shards(config)
    answers = answer_sets(shards, config.tasks.active())
    model = SpeechLLM(config.model, answers, device, encodes=features is None)
    return model, TrialData.open(
        shards,
        model,
        config.data,
        splits,
        reader,
        teacher=config.train.has_teacher,
        features=features,
        teacher_logits=teacher_logits,
    )


def available_device() -> str:
    """The device of a process that nobody shares out devices to."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_trial(
    config: ResolvedConfig,
    folder: Path,
    report: Report,
    reader: str,
    device: str,
    interrupted: Callable[[], bool] = never,
    features: Path | None = None,
    teacher_logits: Path | None = None,
) -> None:
    """Train a trial to its end, or on from its checkpoint in `folder`; see `build` and `fit`.

    Raises:
        Interrupted: `interrupted` said so; the checkpoint is written.
    """
    model, data = build(config, reader, ("train", "val"), device, features, teacher_logits)
    fit(model, data, config.train, config.tasks, config.seed, folder, report, interrupted)


def fit_job(job: dict[str, Any], report: Report, interrupted: Callable[[], bool]) -> bool:
    """`run_trial` in a slot's worker; the job is what `SweepRunner` makes of a trial.

    Returns:
        Whether the trial came to its end; otherwise it was interrupted.
    """
    config, folder = ResolvedConfig.model_validate_json(job["config"]), Path(job["folder"])
    if not (folder / "config.yaml").exists():
        raise StorageError(
            f"{folder}: not seen from the node {socket.gethostname()}; --out must lie on storage that all nodes share"
        )
    device = config.resources.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("resources.gpus_per_worker: this worker finds no CUDA device; install a driver, or set it to 0")
    try:
        run_trial(config, folder, report, job["reader"], device, interrupted, *job["cached"])
    except TrialInterrupted:
        return False
    return True
