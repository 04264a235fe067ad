"""The leaderboard: its columns follow the tasks of the sweep, and its intervals are those of the first one. Progress:
what is done, what it took, and how long the rest will take."""

import json
from pathlib import Path
from typing import Any

import pytest

from model.evaluation.metrics import Record, label_metrics
from sweep.analysis import predictions
from sweep.analysis.leaderboard import leaderboard
from sweep.analysis.predictions import INTERVALS, interval_of, read_predictions, trial_interval
from sweep.analysis.results import Progress, progress, trial_json
from sweep.config.paths import trial_folder
from sweep.config.schema import Config, parse
from sweep.search.study import State, StudyStore, TrialRecord
from tests.conftest import LABELS
from tests.sweep import searched
from tests.sweep.common import CODE, REPLY, ask


def settings(tasks: dict[str, float]) -> Config:
    search = {"pruning": None, "space": {"model.lora.rank": [4]}}
    return parse({"name": "a", "tasks": tasks, "search": search}, "a")


def board(
    folder: Path, config: Config, metrics: dict[str, float], said: dict[str, Any], whole: bool = False
) -> list[tuple[str, str]]:
    """Header and only row of a sweep with one complete trial."""
    ask(study := StudyStore.open(folder, config), 1)
    study.report(0, 1, metrics)
    study.complete(0)
    trial_folder(folder, 0).mkdir(parents=True)
    (trial_folder(folder, 0) / "predictions.json").write_text(json.dumps(said))
    board = leaderboard(config, folder, study.trials())
    table = board.table if whole else board.compact()
    return list(zip(table.header, table.rows[0], strict=True))


def test_replies_are_ranked_by_loss_beside_their_own_metrics(tmp_path: Path) -> None:
    metrics = {"loss": 2.5, "perplexity": 12.18, "bleu": 3.0, "rouge_l": 0.25, "eos_rate": 1.0}
    said = {"labels": {"response": []}, "records": [REPLY | {"id": "c/2"}]}
    assert board(tmp_path, settings({"classify": 0, "response": 1}), metrics, said)[1:] == [
        ("state", "COMPLETE"),
        ("loss", "2.500"),
        ("bleu", "3.000"),
        ("rouge_l", "0.250"),
        ("perplexity", "12.180"),
        ("rank", "4"),
    ]


def test_intervals_of_subsets_are_of_the_first_task(tmp_path: Path) -> None:
    right = CODE | {"subset": "clear", "prediction": "change"}
    records = [right | {"id": f"c/{place}", "conversation": f"c{place}"} for place in range(40)]
    wrong = [CODE | {"task": "forecast", "id": record["id"], "subset": "clear"} for record in records]
    metrics = {"macro_f1": 1.0, "accuracy": 1.0, "accuracy_clear": 1.0, "forecast/accuracy": 0.0}
    said = {"labels": {"classify": LABELS, "forecast": LABELS}, "records": records + wrong}
    found = dict(board(tmp_path, settings({"forecast": 1}), metrics, said))
    assert found["clear"] == "1.00 [0.91,1.00]"
    assert "forecast/accuracy" not in found


def test_the_objective_has_an_interval_and_the_whole_board_says_what_a_trial_cost(tmp_path: Path) -> None:
    records = [
        CODE | {"id": f"c/{place}", "conversation": f"c{place}", "prediction": "change" if place % 3 else "neutral"}
        for place in range(30)
    ]
    value = 0.8 / len(LABELS)  # of three labels, one occurs; two thirds of its items are found
    metrics = {"macro_f1": value, "accuracy": 2 / 3, "weighted_f1": 0.8, "macro_f1_client": 0.8, "accuracy_client": 0.7}
    metrics |= {"steps": 12, "seconds": 7200.0}
    said = {"labels": {"classify": LABELS}, "records": records}
    found = dict(board(tmp_path, settings({"classify": 1}), metrics, said, whole=True))
    low, high = found["macro_f1"].removeprefix("0.267 [").removesuffix("]").split(",")
    assert float(low) < value < float(high)
    told = {"accuracy": "0.667", "macro_f1_client": "0.800", "epochs": "1", "steps": "12", "time": "2.0 h"}
    assert found.items() >= (told | {"cost": "2 CPU-hours", "why": "trained to the end"}).items()


def trial(
    number: int, state: State, epochs: int, seconds: float, value: float | None = None, **more: Any
) -> TrialRecord:
    metrics = {"seconds": seconds} if epochs else {}
    curve = dict.fromkeys(range(1, epochs + 1), value or 0.0)
    return TrialRecord(number, state, more.pop("params", {}), value, metrics, 0, curve, "so", **more)


def of_four(trials: int = 4, **resources: float) -> Config:
    tree = {"name": "a", "train": {"epochs": 4}, "search": {"trials": trials}, "resources": resources}
    return parse(tree, "a")


def test_nothing_is_foretold_before_an_epoch_is_known() -> None:
    found = progress(of_four(), [trial(0, "RUNNING", 0, 0)])
    assert (found.seconds_left, found.hours, found.done, found.running) == (None, 0, 0, 1)
    assert found.line() == "0/4 trials done; 1 running"
    assert progress(of_four(), []).line() == "0/4 trials done"


@pytest.mark.parametrize(
    ("entries", "trials", "slots", "seconds"),
    [
        # 10 s an epoch, by the median: 3 + 2 epochs are left of those that run.
        ([trial(0, "RUNNING", 1, 10), trial(1, "RUNNING", 2, 20)], 2, 1, 50),
        ([trial(0, "RUNNING", 1, 10), trial(1, "RUNNING", 2, 20)], 2, None, 30),  # two slots: the longer one
        ([trial(0, "COMPLETE", 4, 40, 0.5), trial(1, "PRUNED", 2, 20, 0.1)], 4, 1, 60),  # two more of 3 epochs each
        ([trial(0, "COMPLETE", 4, 40, 0.5), trial(1, "COMPLETE", 4, 4000), trial(2, "RUNNING", 3, 30)], 3, 1, 10),
        ([trial(0, "RUNNING", 1, 10, params={"train.epochs": 9})], 1, 1, 80),
        ([trial(0, "COMPLETE", 4, 40, 0.5), trial(1, "FAIL", 0, 0)], 3, 1, 40),  # a failure says nothing of length
    ],
)
def test_time_left(entries: list[TrialRecord], trials: int, slots: int | None, seconds: float) -> None:
    assert progress(of_four(trials), entries, slots).seconds_left == pytest.approx(seconds)


def test_nothing_is_left_of_a_sweep_that_is_over() -> None:
    entries = [trial(0, "COMPLETE", 4, 40, 0.5), trial(1, "FAIL", 1, 9)]
    found = progress(of_four(2), entries)
    assert (found.seconds_left, found.done, found.failed) == (None, 2, 1)


def test_the_best_is_complete_and_by_the_direction() -> None:
    entries = [trial(0, "COMPLETE", 4, 40, 0.5), trial(1, "COMPLETE", 4, 40, 0.7), trial(2, "RUNNING", 1, 10, 0.9)]
    best = progress(of_four(), entries).best
    assert best is not None
    assert best.number == 1
    down = of_four().with_values({"search.metric": "loss"})
    best = progress(down, entries).best
    assert best is not None
    assert best.number == 0


def test_hours_are_of_what_a_trial_occupies() -> None:
    entries = [trial(0, "COMPLETE", 4, 1800, 0.5), trial(1, "FAIL", 1, 1800), trial(2, "FAIL", 0, 0)]
    found = progress(of_four(workers=2, cpus_per_worker=3), entries)
    assert (found.hours, found.format_hours()) == (6.0, "6 CPU-hours")
    found = progress(of_four(workers=2, cpus_per_worker=3, gpus_per_worker=0.25), entries)
    assert (found.hours, found.format_hours()) == (0.5, "0.5 GPU-hours")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3, "about 10 s left"),
        (62, "about 60 s left"),
        (720, "about 12 min left"),
        (5500, "about 1.5 h left"),
    ],
)
def test_a_line_for_people(seconds: float, text: str) -> None:
    best = trial(5, "COMPLETE", 4, 40, 0.873)
    found = Progress(40, 8, 3, 1, 4, best, seconds, 1.25, "GPU")
    counts = "12/40 trials done; 8 complete, 4 running, 3 pruned, 1 failed"
    assert found.line() == f"{counts}; best 0.873 (#5); {text}; 1.25 GPU-hours"


def test_hours_stand_below_the_leaderboard(tmp_path: Path) -> None:
    board = leaderboard(of_four(workers=2), tmp_path, [trial(0, "COMPLETE", 4, 1800, 0.5)])
    assert board.note.endswith("; 1 CPU-hours used")


def test_a_trial_for_scripts() -> None:
    found = trial_json(trial(3, "FAIL", 2, 20, reason="non-finite"), "abc", 2)
    told = {"number": 3, "state": "FAIL", "epochs": 2, "attempts": 2, "reason": "non-finite", "why": "so"}
    assert found.items() >= (told | {"mlflow_run_id": "abc"}).items()


def test_the_interval_of_a_role_is_of_its_own_labels() -> None:
    """A role's F1 leaves out what others may carry; over all labels it would be another number."""
    records = [
        Record(f"c{place}/0", "classify", f"c{place}", "client", None, "change", said, (0.0,), 1.0, 2)
        for place, said in enumerate(("change", "neutral") * 8)
    ]
    labels, roles = [*LABELS, "question"], {"client": LABELS, "therapist": ("question",)}
    found = interval_of({"classify": (labels, records)}, "macro_f1_client", roles)
    assert found is not None
    assert found.value == pytest.approx(label_metrics(records, LABELS, {})["macro_f1"])


def test_an_interval_is_kept_until_the_predictions_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched.played(searched.settings(trials=1), tmp_path / "s")
    [entry] = StudyStore.read(tmp_path / "s", searched.settings()).trials()
    folder = trial_folder(tmp_path / "s", 0)
    first = trial_interval(tmp_path / "s", entry, "macro_f1")
    assert first == interval_of(read_predictions(folder), "macro_f1", {})
    assert trial_interval(tmp_path / "s", entry, "ece") is None
    with monkeypatch.context() as patch:
        patch.setattr(predictions, "_computed_interval", lambda *_: pytest.fail("it was computed before"))
        assert trial_interval(tmp_path / "s", entry, "macro_f1") == first
        assert trial_interval(tmp_path / "s", entry, "ece") is None
    searched.write(folder, searched.said(entry.params, seed=7))
    second = trial_interval(tmp_path / "s", entry, "macro_f1")
    assert second == interval_of(read_predictions(folder), "macro_f1", {}) != first
    kept = (folder / INTERVALS).read_text()
    for damaged in ("[]", kept[:-9], kept.replace("{", "["), kept.replace('"macro_f1":{', '"macro_f1":{"no":1,')[:-1]):
        (folder / INTERVALS).write_text(damaged)
        assert trial_interval(tmp_path / "s", entry, "macro_f1") == second
