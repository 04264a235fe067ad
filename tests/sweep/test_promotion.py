"""With `kind: promote`, trials pause at rungs and continue when they are among the best there; any kill is survived."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from sweep.analysis.predictions import objective_error
from sweep.config.schema import Config
from sweep.durability.retention import prune_checkpoints
from sweep.execution.job import Standby
from sweep.execution.tasks import TaskQueue
from sweep.execution.tune import StudySearcher
from sweep.search.pruning import as_history
from sweep.search.sampling.draw import draw
from sweep.search.study import StudyStore
from tests.conftest import LABELS
from tests.sweep.common import CODE, ask, report, settings
from tests.sweep.stores import kill_at_writes
from tests.sweep.tracked import append, runs, track

RATE = "train.learning_rate"
VALUES = [0.3, 0.9, 0.1, 0.5, 0.7, 0.2, 0.6, 0.8]  # of each trial, at every epoch


def promote(**changed: Any) -> Config:
    """Rungs are at epochs 1 and 2 of 4; half of the trials continue, and two are finished. There is one branch."""
    rule = {"kind": "promote", "keep": 0.5, "after_trials": 2, "finish": 2, "rungs": None, "compare": "objective"}
    return settings(pruning=rule | changed, startup_trials=99, points=[], space={RATE: {"low": 1e-4, "high": 1e-2}})


def states(study: StudyStore) -> list[tuple[str, int]]:
    """Return the state of each trial, and the epochs that it has trained for."""
    return [(trial.state, len(trial.curve)) for trial in study.trials()]


def train(study: StudyStore, number: int, value: float | None = None) -> None:
    """Train a trial as a worker does: from its checkpoint, whose epochs are reported again, until it must end."""
    for epoch in range(1, 5):
        metrics = {"macro_f1": VALUES[number] if value is None else value, "steps": 10 * epoch}
        if study.report(number, epoch, metrics):
            return
    study.complete(number)


def finish(folder: Path, target: int = 8) -> list[int]:
    """Run what is left of a sweep with one worker, and return the numbers of the trials in the order of their runs."""
    study, order = StudyStore.open(folder, promote()), list[int]()
    while (asked := study.ask([], target)) is not None:
        order.append(asked.number)
        train(study, asked.number)
    return order


def test_trial_pauses_and_continues_when_it_is_among_the_best(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, promote())
    ask(study, 3)
    assert report(study, 0, 0.3) == [True], "it has no peer yet"
    assert report(study, 1, 0.9) == [False], "the better half of two"
    assert states(study) == [("PAUSED", 1), ("RUNNING", 1), ("RUNNING", 0)]
    assert study.trials()[0].why == "paused at epoch 1: ranked 2nd of 2 by macro_f1"
    assert report(study, 2, 0.1) == [True]
    asked = study.ask([1], 9)
    assert asked is not None
    assert asked.number == 3, "one of three continues, and does already"
    assert report(study, 3, 0.2) == [True]
    again = StudyStore.open(tmp_path, promote())
    assert again.ask([1], 9) == (0, again.trials()[0].params), "half of four"
    assert (states(again)[0], again.running()) == (("RUNNING", 1), [0, 1])
    assert report(again, 0, 0.3, 0.4) == [False, True], "the first rung is passed, and the second one has no peer"


def test_no_trial_pauses_before_a_rung_predicts_the_end(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, promote(agreement=0.8, after_trials=3))
    ask(study, 5)
    for number, early in enumerate((0.1, 0.2, 0.3)):
        assert report(study, number, early, 0.1, 0.1, early) == [False] * 4
        study.complete(number)
    assert report(study, 3, 0.1) == [True], "the order of three trials was the same at epoch 1 and at the end"
    again = StudyStore.open(tmp_path, promote(agreement=0.8, after_trials=3))
    assert report(again, 4, 0.4, 0.0) == [False, False], "at epoch 2 all of them were equal"


def test_difference_within_noise_pauses_no_trial(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, promote(noise=1.0))
    study.error = lambda number, metric: [0.05, 0.05, 0.04, 0.0][number]
    ask(study, 4)
    report(study, 0, 0.6)
    assert [report(study, number, value) for number, value in ((1, 0.5), (2, 0.57), (3, 0.56))] == [
        [True],
        [False],
        [True],
    ]
    again = StudyStore.open(tmp_path, promote(noise=1.0))
    assert again.trials()[2].errors == {1: 0.04}, "it is stored, since predictions are written again"
    assert [again.report(2, 1, {"macro_f1": 0.57, "steps": 10}), states(again)[2]] == [False, ("RUNNING", 1)]


def test_trials_of_a_branch_are_compared_by_their_loss(tmp_path: Path) -> None:
    """Text has a lower loss than speech; two of each are needed before one continues, and F1 does not matter."""
    modalities = ["text", "speech", "text", "speech"]
    rule = {"kind": "promote", "keep": 0.5, "after_trials": 2, "audit": 0}
    config = settings(
        pruning=rule,
        space={
            "model.modality": ["text", "speech"],
            "model.trainable": {"choices": ["new", "encoder+new"], "when": {"model.modality": ["speech"]}},
            RATE: {"low": 1e-4, "high": 1e-2, "log": True},
        },
        points=[{"model.modality": modality, RATE: 1e-3 * (1 + n)} for n, modality in enumerate(modalities)],
    )
    assert (config.search.rungs(4), config.search.rungs(20), config.search.compared) == ([1], [3], "loss")
    ask(study := StudyStore.open(tmp_path, config), 4)

    def continues(number: int, loss: float) -> bool:
        return not study.report(number, 1, {"macro_f1": loss, "loss": loss, "steps": 10})

    assert [continues(0, 0.1), continues(1, 0.9), continues(2, 0.2), continues(3, 0.8)] == [False, False, False, True]
    records = StudyStore.read(tmp_path, config).trials()
    assert (records[1].why, records[1].compared) == ("paused at epoch 1: ranked 2nd of 2 by loss", {1: 0.9})
    assert records[2].why == "paused at epoch 1: ranked 2nd of 2 by loss"
    again = study.ask([3], 4)
    assert again is not None
    assert again.number == 0, "the better one of two with text"


def test_sampler_waits_for_trials_that_trained_to_their_end(tmp_path: Path) -> None:
    ask(study := StudyStore.open(tmp_path, promote()), 4)

    def values(startup: int) -> dict[str, Any]:
        config = promote().with_values({"search.startup_trials": startup})
        drawn = draw(config, list(map(as_history, study.runs())))
        assert drawn is not None
        return drawn.params

    for number in (0, 1):
        report(study, number, 0.1)
    study.complete(1)
    assert values(2) == values(99), "one is paused"
    report(study, 2, 0.2, 0.2)
    study.complete(2)
    assert values(2) != values(99)


def test_error_of_the_objective_is_read_from_the_predictions(tmp_path: Path) -> None:
    folder = tmp_path / "trials/0000"
    assert objective_error(tmp_path, 0, "accuracy") == 0, "there are none"
    folder.mkdir(parents=True)
    right = [(session, session != "b" or index == 0) for session in "abcd" for index in range(2)]
    records = [
        CODE | {"id": f"{session}/{index}", "conversation": session, "prediction": "change" if is_right else "neutral"}
        for index, (session, is_right) in enumerate(right)
    ]
    (folder / "predictions.json").write_text(json.dumps({"labels": {"classify": LABELS}, "records": records}))
    # Accuracy without session a, b, c, d: 5/6, 1, 5/6, 5/6.
    assert objective_error(tmp_path, 0, "accuracy") == pytest.approx((3 / 4 * (3 / 24**2 + 1 / 8**2)) ** 0.5)
    assert objective_error(tmp_path, 0, "bleu") == 0, "the task has no such metric"


def test_best_paused_trials_are_finished_and_the_others_pruned(tmp_path: Path) -> None:
    order = finish(tmp_path)
    study = StudyStore.read(tmp_path, promote())
    assert sorted(set(order)) == list(range(8))
    assert len(order) > 8, "some trials ran again"
    complete = [trial.number for trial in study.trials() if trial.state == "COMPLETE"]
    assert complete == [1, 4, 7], "trial 4 was among the best when few had been tried"
    assert {trial.state for trial in study.trials()} == {"COMPLETE", "PRUNED"}
    assert study.trials()[2].why == "pruned at epoch 1: ranked 8th of 8 by macro_f1"


@pytest.mark.parametrize("every", [2, 3, 5])
def test_kills_at_any_write_change_nothing(every: int, tmp_path: Path) -> None:
    """A process dies after every few writes of the study; the same command resumes to the same trials."""
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    finish(folders[0])
    kills = kill_at_writes(every, lambda: finish(folders[1]))
    whole, killed = (StudyStore.read(folder, promote()).trials() for folder in folders)
    assert kills >= 30 // every
    assert killed == whole


def test_worker_waits_while_a_paused_trial_may_continue(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, promote(finish=1).with_values({"search.trials": 2}))
    queue = TaskQueue()
    queue.waits = lambda values: False
    searcher = StudySearcher(study, lambda number, _: number, Mock(), Mock(), Mock(), queue)  # type: ignore[arg-type,return-value]
    assert [searcher.suggest(name) for name in ("a", "b")] == [{"job": 0}, {"job": 1}]
    assert searcher.report("a", {"epoch": 1, "metrics": '{"macro_f1": 0.5, "steps": 3}'})
    searcher.on_trial_complete("a", {})
    assert searcher.suggest("c") == {"job": 0}, "it is the only one to be finished"
    assert searcher.report("b", {"epoch": 1, "metrics": '{"macro_f1": 0.1, "steps": 3}'})
    searcher.on_trial_complete("b", {})
    assert searcher.suggest("d") == {"job": Standby(queue.version)}
    searcher.on_trial_complete("c", {"finished": True})
    assert (searcher.suggest("e"), states(study)) == ("FINISHED", [("COMPLETE", 1), ("PRUNED", 1)])


def test_paused_trial_keeps_its_last_checkpoint(tmp_path: Path) -> None:
    config = promote().with_values({"storage.keep": 1})
    ask(study := StudyStore.open(tmp_path, config), 2)
    report(study, 0, 0.3)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / "trials/0000").mkdir(parents=True, exist_ok=True)
        (tmp_path / "trials/0000" / name).write_text("")
    prune_checkpoints(study, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("trials/0000/checkpoint*")) == ["checkpoint.pt"]


def test_mlflow_shows_a_paused_trial(tmp_path: Path, database: Path) -> None:
    config, seen = promote(), list[tuple[str, str | None]]()
    (folder := tmp_path / "runs/s").mkdir(parents=True)
    shutil.copy(database, folder.parent)
    ask(study := StudyStore.open(folder, config), 2)

    def look() -> None:
        track(folder, config)
        run = runs(folder)[1][0]
        seen.append((run.info.status, run.data.tags.get("sweep.state")))

    append(folder, 0, (16, 1000.0, 0.5))
    append(folder, 1, (16, 1000.0, 0.5))
    report(study, 0, 0.3)
    look()
    assert report(study, 1, 0.1) == [True]
    assert study.ask([], 2) is not None
    look()
    train(study, 0)
    while (asked := study.ask([], 2)) is not None:
        train(study, asked.number)
    look()
    assert seen == [("SCHEDULED", "PAUSED"), ("SCHEDULED", None), ("FINISHED", "COMPLETE")]
