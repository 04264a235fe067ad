"""What MLflow's table of runs is made of: best values, parameters, tags, the corpus, and the sweep's note."""

import json
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

from data.shards.dataset import Shards
from model.training.metrics_log import Point
from sweep.search.study import TrialRecord
from sweep.tracking.dataset import Corpus, without_secrets
from sweep.tracking.note import MAX_LENGTH, link, note
from sweep.tracking.summary import end_tags, is_summary, params, start_tags, sweep_metrics, trial_metrics, unvaried
from tests.sweep.common import FROZEN, settings

CONFIG = settings()


def trial(number: int = 0, *curve: float, state: Any = "COMPLETE", **more: Any) -> TrialRecord:
    epochs = dict(enumerate(curve, start=1))
    own = {"params": {}, "metrics": {}, "why": "so"} | more
    return TrialRecord(number, state, value=curve[-1] if curve else None, steps=0, curve=epochs, **own)


def points(**curves: list[float]) -> list[Point]:
    return [Point(name, step, 0, value) for name, values in curves.items() for step, value in enumerate(values)]


def test_each_metric_has_its_best_by_direction() -> None:
    logged = points(accuracy=[0.4, 0.9, 0.7], loss=[2.0, 0.5, 0.6], ece=[0.3, 0.2], accuracy_client=[0.1, 0.2])
    logged += [Point("forecast/loss", 1, 0, 3.0), Point("forecast/loss", 2, 0, 4.0)]
    assert trial_metrics(CONFIG, trial(0, 0.8, 0.95, 0.9), logged) == {
        "best_macro_f1": 0.95,
        "best_accuracy": 0.9,
        "best_accuracy_client": 0.2,
        "best_loss": 0.5,
        "best_ece": 0.2,
        "best_forecast/loss": 3.0,
        "objective": 0.9,
    }


def test_metric_without_direction_has_no_best() -> None:
    names = ("train_loss_step", "train_loss/next", "train_loss", "learning_rate", "seconds", "data_wait", "empty")
    logged = [Point(name, 1, 0, 1.0) for name in (*names, "system/cpu_utilization_percentage", "lossy")]
    assert trial_metrics(CONFIG, trial(), logged) == {}


def test_non_finite_value_is_never_the_best() -> None:
    found = trial_metrics(CONFIG, trial(0, nan, 0.5, inf), points(loss=[nan, 1.0, -inf], ece=[nan]))
    assert found == {"best_macro_f1": 0.5, "best_loss": 1.0}, "and an objective that is not finite is none"


@pytest.mark.parametrize(("state", "has"), [("COMPLETE", True), ("PRUNED", True), ("FAIL", False), ("RUNNING", False)])
def test_failed_trial_has_no_objective(state: str, has: bool) -> None:
    found = trial_metrics(CONFIG, trial(0, 0.9, state=state), [])
    assert found == {"best_macro_f1": 0.9} | ({"objective": 0.9} if has else {})


def test_best_trial_of_a_sweep() -> None:
    trials = [trial(0, 0.5), trial(1, 0.7), trial(2, 0.7), trial(3, 0.9, state="PRUNED")]
    assert sweep_metrics(CONFIG, trials) == {"best_macro_f1": 0.7, "best_trial": 1.0}
    assert sweep_metrics(settings(metric="loss"), trials) == {"best_loss": 0.5, "best_trial": 0.0}
    assert sweep_metrics(CONFIG, trials[3:]) == {}
    assert all(map(is_summary, ("best_macro_f1", "best_trial", "objective")))
    assert not any(map(is_summary, ("macro_f1", "loss", "system/best_of")))


def test_parameters_have_every_axis() -> None:
    drawn = {"model.modality": "text", "model.lora.rank": 8, "train.learning_rate": 1e-3}
    config = settings().with_values({"model.trainable": FROZEN})
    record = trial(params=drawn)
    assert params(config, record) == drawn | {"model.trainable": FROZEN}, "what it ran with"
    assert params(config, record).keys() == config.search.space.keys()
    assert unvaried(config, record) == ["model.trainable"]
    assert start_tags(config, record, ["1+a", "1+b"]) == {
        "sweep.trial": "0",
        "sweep.seed": "0",
        "sweep.code": "1+a, 1+b",
        "sweep.unvaried": "model.trainable",
    }
    assert "sweep.unvaried" not in start_tags(config, trial(params=drawn | {"model.trainable": FROZEN}), ["1+a"])


def test_tags_say_how_a_trial_ended() -> None:
    pruned = trial(0, 0.1, 0.2, state="PRUNED")
    assert end_tags(pruned, 3) == {
        "sweep.state": "PRUNED",
        "sweep.why": "so",
        "sweep.rung": "2",
        "sweep.attempts": "3",
    }
    assert end_tags(trial(0, 0.2, 0.1, epoch=1), 1)["sweep.epoch"] == "1"
    assert end_tags(trial(state="FAIL", reason="out of memory"), None) == {
        "sweep.state": "FAIL",
        "sweep.why": "so",
        "sweep.reason": "out of memory",
        "sweep.rung": "0",
    }


def test_corpus_is_a_dataset(corpus: Shards) -> None:
    known = Corpus.of(corpus)
    assert known.tags() == {
        "data.corpus": corpus.manifest.corpus,
        "data.fingerprint": corpus.fingerprint,
        "data.labels": ",".join(corpus.manifest.labels),
    }
    found = known.input()
    assert (found.dataset.name, found.dataset.digest) == (corpus.manifest.corpus, corpus.fingerprint)
    assert (found.dataset.source_type, json.loads(found.dataset.source)) == ("local", {"uri": str(corpus.folder)})
    profile = json.loads(found.dataset.profile)
    assert profile["labels"] == list(corpus.manifest.labels)
    assert profile["turns"] == corpus.manifest.turns
    assert {"name": "text", "type": "string"} in json.loads(found.dataset.schema)["mlflow_colspec"]
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training")]


def test_folder_with_a_colon_is_local() -> None:
    assert Corpus("a", "f00d", (), "a:b/shards").input().dataset.source_type == "local"


def test_address_has_no_secrets() -> None:
    assert without_secrets("s3://key:secret@bucket/shards?access_key=a&secret_key=b") == "s3://bucket/shards"
    assert without_secrets("datasets/a?b") == "datasets/a?b", "a folder"


def test_the_note_links_every_trial_that_has_a_run(tmp_path: Path) -> None:
    trials = [trial(0, 0.5), trial(1, 0.7), trial(2, state="FAIL", why="it burnt")]
    lines = note(CONFIG, tmp_path, trials, {1: link("5", "abc")}).splitlines()
    assert lines[0].startswith("| # | state | macro_f1 |")
    assert lines[2].startswith("| [1](#/experiments/5/runs/abc) | COMPLETE | 0.700 |")
    assert lines[3].startswith("| 0 | COMPLETE")
    assert "- #2 it burnt" in lines


def test_a_note_that_is_too_long_ends_with_a_whole_row(tmp_path: Path) -> None:
    """The server would cut it anywhere."""
    trials = [trial(number, number / 1000) for number in range(300)]
    trials.append(trial(300, state="FAIL", why="it burnt"))
    text = note(CONFIG, tmp_path, trials, {number: link("1", "f" * 32) for number in range(300)})
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert MAX_LENGTH - 400 < len(text) <= MAX_LENGTH
    assert rows[0].startswith("| [299](")
    assert all(row.endswith(" |") for row in rows)
    assert f"{301 - len(rows) + 1} more lines" in text
