"""`train.keep: best`: the weights, predictions and figures of the best epoch are the result, also after kills."""

import json
from collections.abc import Callable
from math import inf, nan
from pathlib import Path

import pytest

from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.checkpoints.checkpoint import CheckpointState, trained_tensors
from model.checkpoints.fingerprint import digest
from model.checkpoints.warm_start import load_parent
from model.evaluation.metrics import Record, summarise
from model.speech_llm.adapter import read_tensors
from model.training.progress import LOWEST_LOSS, Metrics, Objective, best_epoch
from model.training.run_folder import RunFolder
from model.training.trainer import fit
from tests.model.trials import CONFIG, KilledError, Trial, kill_after, same_end

UNSTABLE = {"epochs": 3, "learning_rate": 1.0, "schedule": "constant", "warmup": 0.0, "keep": "best"}
TRIAL = Trial(train=CONFIG.model_copy(update=UNSTABLE))
HIGHEST_LOSS = Objective("loss", maximize=True)  # best after the first epoch of a model that learns


def train(
    models: Path, corpus: Shards, folder: Path, objective: Objective = LOWEST_LOSS, trial: Trial = TRIAL
) -> dict[int, tuple[str, float]]:
    """Train a trial, and return the digest of the weights and the loss after each epoch."""
    model, data = trial.start(models, corpus)
    ends: dict[int, tuple[str, float]] = {}

    def report(epoch: int, metrics: Metrics) -> None:
        ends[epoch] = digest(trained_tensors(model)), metrics["loss"]

    fit(model, data, trial.train, trial.tasks, trial.seed, folder, report, objective=objective)
    return ends


def end_before_checkpoint(self: RunFolder, state: CheckpointState) -> None:
    raise KilledError


@pytest.mark.parametrize(("objective", "choose"), [(LOWEST_LOSS, min), (HIGHEST_LOSS, max)])
def test_result_is_that_of_the_best_epoch(
    objective: Objective, choose: Callable[..., int], models: Path, corpus: Shards, tmp_path: Path
) -> None:
    """Everything that reads a result reads the same epoch: evaluation, a later stage, an adapter, the predictions."""
    ends = train(models, corpus, tmp_path, objective)
    best = choose(ends, key=lambda epoch: ends[epoch][1])
    assert best < max(ends), "a later epoch is worse, so the last one would be the wrong one"
    path = tmp_path / checkpoint.FILE
    state = checkpoint.load_result(path)
    assert (checkpoint.result_epoch(state), state["digest"]) == (best, ends[best][0])
    assert (
        digest(state["tensors"])
        == digest(load_parent(str(path)).tensors)
        == digest(read_tensors(path))
        == ends[best][0]
    )
    assert checkpoint.load(path)["digest"] == ends[max(ends)][0], "a resumed training continues from the last step"
    content = json.loads((tmp_path / "predictions.json").read_text())
    records = [Record(**record) for record in content["records"]]
    assert summarise(records, content["labels"], corpus.manifest.roles)["loss"] == ends[best][1]


def test_last_epoch_is_kept_unless_told_otherwise(models: Path, corpus: Shards, tmp_path: Path) -> None:
    last = Trial(train=CONFIG.model_copy(update=UNSTABLE | {"keep": "last"}))
    ends = train(models, corpus, tmp_path, trial=last)
    state = checkpoint.load_result(tmp_path / checkpoint.FILE)
    assert (checkpoint.result_epoch(state), state["digest"], state["kept"]) == (3, ends[3][0], None)
    del state["kept"]  # as earlier versions wrote it
    assert checkpoint.result_epoch(state) == 3


def test_killed_trial_keeps_the_same_epoch(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed within the epochs before and after the best one, and after predictions without a checkpoint."""
    train(models, corpus, tmp_path / "whole", HIGHEST_LOSS)
    for steps in (2, 3, 3):
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            kill_after(patch, steps)
            train(models, corpus, tmp_path / "killed", HIGHEST_LOSS)
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(RunFolder, "save", end_before_checkpoint)  # its predictions may be there without a checkpoint
        train(models, corpus, tmp_path / "killed", HIGHEST_LOSS)
    train(models, corpus, tmp_path / "killed", HIGHEST_LOSS)
    assert same_end(tmp_path / "whole", tmp_path / "killed")
    whole, killed = ((tmp_path / name / "predictions.json").read_bytes() for name in ("whole", "killed"))
    assert whole == killed


@pytest.mark.parametrize(
    ("losses", "best"), [([2, 1, 3], 2), ([1, 1, 1], 1), ([nan, 2, inf], 2), ([nan, inf], 2), ([3], 1)]
)
def test_best_epoch_is_the_first_finite_best(losses: list[float], best: int) -> None:
    curve = dict(enumerate(losses, start=1))
    assert best_epoch(curve, maximize=False) == best
    assert best_epoch({epoch: -loss for epoch, loss in curve.items()}, maximize=True) == best
