"""The leaderboard and where it is shown, progress, intervals, and the JSON of a trial."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data.formats import format_value
from model.evaluation.metrics import Record, label_metrics
from sweep.analysis import predictions
from sweep.analysis.leaderboard import leaderboard
from sweep.analysis.predictions import INTERVALS, interval_of, read_predictions, trial_interval
from sweep.analysis.results import Progress, progress, trial_json
from sweep.analysis.view import to_markdown, to_terminal
from sweep.cli.console import console
from sweep.config.paths import trial_folder
from sweep.config.schema import Config, parse
from sweep.search.study import State, StudyStore, TrialRecord
from tests.conftest import LABELS
from tests.sweep import searched
from tests.sweep.common import CODE, REPLY, ask, sweep

Row = dict[str, str]


def record(index: int, **changed: Any) -> dict[str, Any]:
    return CODE | {"id": f"c/{index}", "conversation": f"c{index}", "prediction": "change"} | changed


def only_row(
    folder: Path, tasks: dict[str, float], metrics: dict[str, float], content: dict[str, Any]
) -> tuple[Row, Row]:
    """Return the row of a sweep with one complete trial: all of it, and what a terminal shows."""
    search = {"pruning": None, "space": {"model.lora.rank": [4]}}
    config = parse({"name": "a", "tasks": tasks, "search": search}, "a")
    ask(study := StudyStore.open(folder, config), 1)
    study.report(0, 1, metrics)
    study.complete(0)
    trial_folder(folder, 0).mkdir(parents=True)
    (trial_folder(folder, 0) / "predictions.json").write_text(json.dumps(content))
    table = leaderboard(config, folder, study.trials()).table
    compact = leaderboard(config, folder, study.trials()).compact()
    return dict(zip(table.header, table.rows[0], strict=True)), dict(zip(compact.header, compact.rows[0], strict=True))


def test_leaderboard_ranks_replies_by_loss(tmp_path: Path) -> None:
    metrics = {"loss": 2.5, "perplexity": 12.18, "bleu": 3.0, "rouge_l": 0.25, "eos_rate": 1.0}
    content = {"labels": {"response": []}, "records": [REPLY | {"id": "c/2"}]}
    full, compact = only_row(tmp_path, {"classify": 0, "response": 1}, metrics, content)
    values = {"loss": "2.500", "bleu": "3.000", "rouge_l": "0.250", "perplexity": "12.180", "rank": "4"}
    assert list(compact.items()) == [("#", "0"), ("state", "COMPLETE"), *values.items()]
    assert full["eos_rate"] == "1.000"


def test_subset_intervals_are_of_the_first_task(tmp_path: Path) -> None:
    right = [record(index, subset="clear") for index in range(40)]
    wrong = [CODE | {"task": "forecast", "id": item["id"], "subset": "clear"} for item in right]
    metrics = {"macro_f1": 1.0, "accuracy": 1.0, "accuracy_clear": 1.0, "forecast/accuracy": 0.0}
    content = {"labels": {"classify": LABELS, "forecast": LABELS}, "records": right + wrong}
    full, _ = only_row(tmp_path, {"forecast": 1}, metrics, content)
    assert full["clear"] == "1.00 [0.91,1.00]"
    assert "forecast/accuracy" not in full


def test_leaderboard_has_intervals_roles_and_costs(tmp_path: Path) -> None:
    records = [record(index, prediction="change" if index % 3 else "neutral") for index in range(30)]
    value = 0.8 / len(LABELS)  # of three labels, one occurs; two thirds of its items are found
    metrics = {"macro_f1": value, "accuracy": 2 / 3, "weighted_f1": 0.8, "macro_f1_client": 0.8, "accuracy_client": 0.7}
    content = {"labels": {"classify": LABELS}, "records": records}
    full, _ = only_row(tmp_path, {"classify": 1}, metrics | {"steps": 12, "seconds": 7200.0}, content)
    low, high = full["macro_f1"].removeprefix("0.267 [").removesuffix("]").split(",")
    assert float(low) < value < float(high)
    cells = {"accuracy": "0.667", "macro_f1_client": "0.800", "epochs": "1", "steps": "12", "time": "2.0 h"}
    assert full.items() >= (cells | {"cost": "2 CPU-hours", "why": "trained to the end"}).items()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep whose leaderboard is wider than 80 columns, in a folder whose name is no ASCII."""
    paths = ["encoders/of-a-very-long-name/→", "encoders/of-another-long-name"]
    space = searched.SPACE | {"model.encoder.path": paths}
    searched.played(searched.settings(space=space), folder := tmp_path_factory.mktemp("wide") / "sweep")
    return folder


@pytest.mark.parametrize("width", [80, 132])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_status_fits_the_terminal(encoding: str, width: int, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Number, state and objective are always shown, and a line says what is not."""
    stream = io.TextIOWrapper(buffer := io.BytesIO(), encoding=encoding, write_through=True)
    monkeypatch.setattr(console, "width", width)
    monkeypatch.setitem(vars(console), "_file", stream)  # None by default: sys.stdout, whichever it is
    assert sweep("status", wide).code == 0
    lines = buffer.getvalue().decode(encoding).splitlines()
    rule = next(index for index, line in enumerate(lines) if set(line) in ({"─"}, {"-"}))
    rows = lines[rule + 1 : rule + 7]
    assert all(len(line) <= width for line in [*lines[rule - 3 : rule + 1], *rows])
    best = StudyStore.of(wide).best()
    assert best is not None
    assert rows[0].split()[:3] == [str(best.number), "COMPLETE", f"{best.value:.3f}"]
    assert sorted(row.split()[0] for row in rows) == list("012345")
    missing = [line for line in lines if line.startswith("not shown: ")]
    assert len(missing) == (width == 80)
    assert all("encoder.path" in line and "sweep report" in line for line in missing)
    assert width == 80 or ("→" in "".join(rows)) == (encoding == "utf-8")


def test_all_views_show_the_same_cells(wide: Path) -> None:
    table = leaderboard((study := StudyStore.of(wide)).config, wide, study.trials()).compact()
    screen = Console(file=io.StringIO(), width=200)
    screen.print(to_terminal(table, screen)[0])
    assert isinstance(screen.file, io.StringIO)
    terminal, markdown = screen.file.getvalue(), to_markdown(table)
    for row, line in zip(table.rows, markdown[2:], strict=True):
        assert line == f"| {' | '.join(row)} |"
        assert all(cell in terminal for cell in row)


def trial(
    number: int, state: State, epochs: int, seconds: float, value: float | None = None, **more: Any
) -> TrialRecord:
    metrics = {"seconds": seconds} if epochs else {}
    curve = dict.fromkeys(range(1, epochs + 1), value or 0.0)
    return TrialRecord(number, state, more.pop("params", {}), value, metrics, 0, curve, "so", **more)


def of_four(trials: int = 4, **resources: float) -> Config:
    search = {"trials": trials, "space": {"seed": {"low": 0, "high": 99}}}
    return parse({"name": "a", "train": {"epochs": 4}, "search": search, "resources": resources}, "a")


@pytest.mark.parametrize(
    ("entries", "trials", "slots", "seconds"),
    [
        # 10 s an epoch, by the median: 3 + 2 epochs are left of those that run.
        ([trial(0, "RUNNING", 1, 10), trial(1, "RUNNING", 2, 20)], 2, 1, 50),
        ([trial(0, "RUNNING", 1, 10), trial(1, "RUNNING", 2, 20)], 2, None, 30),  # two at a time: the longer one
        ([trial(0, "COMPLETE", 4, 40, 0.5), trial(1, "PRUNED", 2, 20, 0.1)], 4, 1, 60),  # two more of 3 epochs each
        ([trial(0, "COMPLETE", 4, 40, 0.5), trial(1, "COMPLETE", 4, 4000), trial(2, "RUNNING", 3, 30)], 3, 1, 10),
        ([trial(0, "RUNNING", 1, 10, params={"train.epochs": 9})], 1, 1, 80),
        ([trial(0, "COMPLETE", 4, 40, 0.5), trial(1, "FAIL", 0, 0)], 3, 1, 40),  # a failure says nothing of length
        ([trial(0, "RUNNING", 0, 0)], 4, 1, None),  # before the first epoch
        ([trial(0, "COMPLETE", 4, 40, 0.5), trial(1, "FAIL", 1, 9)], 2, 1, None),  # nothing is left
    ],
)
def test_time_left(entries: list[TrialRecord], trials: int, slots: int | None, seconds: float | None) -> None:
    assert progress(of_four(trials), entries, slots).seconds_left == pytest.approx(seconds)


def test_progress_counts_states_and_knows_the_best() -> None:
    trials = [trial(0, "COMPLETE", 4, 40, 0.5), trial(1, "COMPLETE", 4, 40, 0.7), trial(2, "RUNNING", 1, 10, 0.9)]
    for metric, best in (("macro_f1", 1), ("loss", 0)):
        now = progress(of_four().with_values({"search.metric": metric}), trials)
        assert now.best is not None
        assert (now.best.number, now.done, now.running) == (best, 2, 1)
    assert progress(of_four(), [trial(0, "RUNNING", 0, 0)]).line() == "0/4 trials done; 1 running"
    assert progress(of_four(), []).line() == "0/4 trials done"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3, "about 10 s left"),
        (62, "about 60 s left"),
        (720, "about 12 min left"),
        (5500, "about 1.5 h left"),
    ],
)
def test_progress_line(seconds: float, text: str) -> None:
    best = trial(5, "COMPLETE", 4, 40, 0.873)
    now = Progress(40, 8, 3, 1, 4, best, seconds, 1.25, "GPU")
    counts = "12/40 trials done; 8 complete, 4 running, 3 pruned, 1 failed"
    assert now.line() == f"{counts}; best 0.873 (#5); {text}; 1.25 GPU-hours"


@pytest.mark.parametrize(("gpus", "text"), [(0, "6 CPU-hours"), (0.25, "0.5 GPU-hours")])
def test_hours_are_of_what_trials_occupy(gpus: float, text: str, tmp_path: Path) -> None:
    trials = [trial(0, "COMPLETE", 4, 1800, 0.5), trial(1, "FAIL", 1, 1800), trial(2, "FAIL", 0, 0)]
    config = of_four(workers=2, cpus_per_worker=3, gpus_per_worker=gpus)
    assert progress(config, trials).format_hours() == text
    assert leaderboard(config, tmp_path, trials).note.endswith(f"; {text} used")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["q_proj", "v_proj"], "q_proj, v_proj"),
        ([], "none"),
        ("all-linear", "all-linear"),
        (True, "yes"),
        (0.003, "3.00e-03"),
    ],
)
def test_value_of_a_setting(value: object, text: str) -> None:
    assert format_value(value) == text


def test_trial_json() -> None:
    content = trial_json(trial(3, "FAIL", 2, 20, value=float("nan"), reason="non-finite"), "abc", 2)
    expected = {"number": 3, "state": "FAIL", "epochs": 2, "attempts": 2, "reason": "non-finite", "why": "so"}
    assert content.items() >= (expected | {"mlflow_run_id": "abc", "value": None}).items()


def test_interval_of_a_role_uses_its_labels() -> None:
    """A role's F1 leaves out what others may carry; over all labels it would be another number."""
    records = [
        Record(f"c{index}/0", "classify", f"c{index}", "client", None, "change", prediction, (0.0,), 1.0, 2)
        for index, prediction in enumerate(("change", "neutral") * 8)
    ]
    labels, roles = [*LABELS, "question"], {"client": LABELS, "therapist": ("question",)}
    interval = interval_of({"classify": (labels, records)}, "macro_f1_client", roles)
    assert interval is not None
    assert interval.value == pytest.approx(label_metrics(records, LABELS, {})["macro_f1"])


def test_intervals_are_cached_until_predictions_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched.played(searched.settings(trials=1), sweep_folder := tmp_path / "s")
    [record] = StudyStore.read(sweep_folder, searched.settings()).trials()
    folder = trial_folder(sweep_folder, 0)
    first = trial_interval(sweep_folder, record, "macro_f1")
    assert first == interval_of(read_predictions(folder), "macro_f1", {})
    assert trial_interval(sweep_folder, record, "ece") is None
    with monkeypatch.context() as patch:
        patch.setattr(predictions, "_computed_interval", lambda *_: pytest.fail("it was computed before"))
        assert trial_interval(sweep_folder, record, "macro_f1") == first
        assert trial_interval(sweep_folder, record, "ece") is None
    searched.write(folder, searched.said(record.params, seed=7))
    second = trial_interval(sweep_folder, record, "macro_f1")
    assert second == interval_of(read_predictions(folder), "macro_f1", {}) != first
    content = (folder / INTERVALS).read_text()
    for damaged in (
        "[]",
        content[:-9],
        content.replace("{", "["),
        content.replace('"macro_f1":{', '"macro_f1":{"no":1,'),
    ):
        (folder / INTERVALS).write_text(damaged)
        assert trial_interval(sweep_folder, record, "macro_f1") == second
