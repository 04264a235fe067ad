"""The plan: what is tried and kept, what is not drawn, and how the forecast compares with the truth."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from data.errors import UserError
from data.shards.dataset import Shards
from model.runtime import memory
from sweep.config.schema import Config
from sweep.execution.tune import StudySearcher
from sweep.preflight import dry_run as planner
from sweep.preflight import eta as forecast
from sweep.preflight.dry_run import Plan, dry_steps
from sweep.preflight.eta import Forecast
from sweep.search.study import StudyStore
from tests.sweep.common import Asked, ask, play, report, sweep
from tests.sweep.passes import config

NODES = [{"CPU": 2.0}]
RANK, MODALITY, RATE = "model.lora.rank", "model.modality", "train.learning_rate"
SPACE = {RANK: [2, 4, 8], MODALITY: ["speech", "text"], RATE: {"low": 1e-3, "high": 1e-2, "log": True}}
Said = dict[str, Any]


def own(models: Path, corpus: Shards, **search: Any) -> Config:
    tree = {"space": SPACE, "trials": 8, "pruning": None, "startup_trials": 3} | search
    return config(models, corpus, search=tree, train={"epochs": 2}, storage={"features": "live"})


def make(own: Config, folder: Path, said: list[str] | None = None) -> Plan:
    folder.mkdir(exist_ok=True)
    return planner.make(own, folder / "cache", folder, NODES, 2, [].append if said is None else said.append)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Dry steps that are over in a moment: nothing above rank 4 fits, and speech takes twice as long as text."""
    found: list[tuple[int, str]] = []

    def steps(config: Config, folders: Mapping[str, str | None]) -> Said:
        rank, modality = config.model.lora.rank, config.model.modality
        found.append((rank, modality))
        if rank > 4:
            return {"full": f"too large by {rank - 4}"}
        seconds = 2.0 if modality == "speech" else 1.0
        measured = {"train": seconds, "val": 0.5 * seconds, "least": 10, "full": 20, "budget": 16_384}
        return {"measured": measured, "build": 0.25, "capacity": 10**9}

    monkeypatch.setattr(planner, "dry_steps", steps)
    return found


def test_real_dry_steps_are_made_once_a_sweep(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    sweep_ = own(models, corpus)
    plan = make(sweep_, tmp_path, said)
    assert [(known.fits, known.trouble, known.have > 10**9) for known in plan.tried] == [(True, "", True)] * 2
    assert said[0].startswith("plan: dry steps of 2 shapes of trials in ")
    assert plan.epoch({MODALITY: "speech"}) > plan.epoch({MODALITY: "text"}) > 0  # its encoder is computed, too
    monkeypatch.setattr(planner, "dry_steps", lambda *_: pytest.fail("made again"))
    again = make(sweep_.with_values({"search.trials": 30, "seed": 4}), tmp_path)
    assert [known.measured for known in again.tried] == [known.measured for known in plan.tried]
    monkeypatch.setattr(planner, "code_version", lambda: "other")
    with pytest.raises(pytest.fail.Exception, match="made again"):
        make(sweep_, tmp_path)


def test_a_worker_that_has_less_memory_than_one_example_takes_excludes_its_shape(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a node's memory each of two trials has a half."""
    monkeypatch.setattr(memory, "capacity", lambda device: 2 * 500 * 10**6)
    space = {RANK: [2, 4], RATE: SPACE[RATE]}
    with pytest.raises(UserError, match=r"^nothing that the search may draw fits into memory \(needs \d+ MB with one"):
        make(own(models, corpus, space=space), tmp_path)
    lines = forecast.read(tmp_path)["excluded"]
    assert len(lines) == 2  # with the smaller rank
    assert all("with one example at a time, and has 500 MB" in line for line in lines)


def test_after_a_kill_only_what_is_missing_is_tried(
    models: Path, corpus: Shards, tmp_path: Path, tried: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: Callable[..., Said] = planner.dry_steps

    def killed(config: Config, folders: Mapping[str, str | None]) -> Said:
        if len(tried) == 1:
            raise KeyboardInterrupt
        return steps(config, folders)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(planner, "dry_steps", killed)
        make(own(models, corpus), tmp_path)
    make(own(models, corpus), tmp_path)
    assert sorted(tried) == [(rank, modality) for rank in (2, 4, 8) for modality in ("speech", "text")]


def test_where_the_largest_number_does_not_fit_those_below_are_tried(
    models: Path, corpus: Shards, tmp_path: Path, tried: list[Any]
) -> None:
    said: list[str] = []
    plan = make(own(models, corpus), tmp_path, said)
    assert [plan.fits({RANK: rank, MODALITY: "text"}) for rank in (2, 4, 8)] == [True, True, False]
    assert plan.fits({RANK: 6, MODALITY: "text"}), "between one that fits and one that does not"
    assert not plan.fits({RANK: 16, MODALITY: "text"})
    assert plan.fits({RANK: 8, MODALITY: "other"}), "nothing is known of it"
    shown = "plan: cannot fit, so not started: model.lora.rank 8, model.modality text: too large by 4"
    assert shown in said
    assert shown in forecast.lines(own(models, corpus), tmp_path, [])


def run(study: StudyStore, target: int) -> list[Asked]:
    return list(play(study, target))


def test_what_cannot_fit_takes_no_trials_place(models: Path, corpus: Shards, tmp_path: Path, tried: list[Any]) -> None:
    """Neither at random nor by TPE; a sweep that is resumed before every trial draws the same."""
    points = [{RANK: 8, MODALITY: "text"}, {RANK: 2, MODALITY: "text"}]
    sweep_ = own(models, corpus, points=points)
    plan = make(sweep_, tmp_path)
    one, many = tmp_path / "one", tmp_path / "many"
    for folder in (one, many):
        folder.mkdir()

    def opened(folder: Path) -> StudyStore:
        study = StudyStore.open(folder, sweep_)
        study.fits = plan.fits
        return study

    whole = run(study := opened(one), 12)
    resumed = [asked for target in range(1, 13) for asked in run(opened(many), target)]
    assert resumed == whole
    assert [number for number, _ in whole] == list(range(12))
    assert {values[RANK] for _, values in whole} == {2, 4}
    assert whole[0][1] | points[1] == whole[0][1]
    assert {entry.state for entry in study.trials()} == {"COMPLETE"}
    assert study.points_left() == points[:1]
    study.fits = lambda values: True  # on a larger machine
    [(_, values)] = run(study, 13)
    assert values | points[0] == values
    assert study.points_left() == []


def test_without_exclusions_the_same_trials_are_drawn(models: Path, corpus: Shards, tmp_path: Path) -> None:
    sweep_ = own(models, corpus)
    found = []
    for name in ("all", "some"):
        (tmp_path / name).mkdir()
        study = StudyStore.open(tmp_path / name, sweep_)
        if name == "some":
            study.fits = lambda values: values[RANK] < 99
        found.append(run(study, 8))
    assert found[0] == found[1]


def test_a_search_of_which_nothing_fits_stops_and_fails_no_trial(models: Path, corpus: Shards, tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, own(models, corpus))
    study.fits = lambda values: False
    searcher = StudySearcher(study, lambda *_: {}, lambda: None, lambda: None, lambda: None)
    assert searcher.suggest("0") == Searcher.FINISHED
    assert searcher.fault is not None
    assert searcher.fault[0].startswith("search.space: of 100 draws none fits into memory")
    assert study.trials() == []


def test_the_forecast_counts_what_is_left(models: Path, corpus: Shards, tmp_path: Path, tried: list[Any]) -> None:
    text, speech = {RANK: 2, MODALITY: "text"}, {RANK: 2, MODALITY: "speech"}
    sweep_ = own(models, corpus, trials=4, points=[text, speech, speech])
    plan, study = make(sweep_, tmp_path), StudyStore.open(tmp_path, sweep_)
    whole = plan.forecast(study.trials(), study.points_left(), slots=1)
    mean = 2 * (3.0 + 1.5) / 2  # two epochs, of speech or text
    assert whole.work == pytest.approx(3 + 6 + 6 + mean)
    assert whole.seconds == pytest.approx(planner.START + whole.work + 4 * 0.25)
    two = plan.forecast(study.trials(), study.points_left(), slots=2)
    assert two.seconds == pytest.approx(planner.START + max(3 + 6 + 0.5, 6 + mean + 0.5))
    ask(study, 2)
    report(study, 1, 0.5)
    left = plan.forecast(study.trials(), study.points_left(), slots=1)
    assert left.work == pytest.approx(3 + 3 + 6 + mean)


def test_the_end_is_compared_with_what_was_said_first(
    models: Path, corpus: Shards, tmp_path: Path, tried: list[Any]
) -> None:
    sweep_ = own(models, corpus, trials=2)
    plan, study = make(sweep_, tmp_path), StudyStore.open(tmp_path, sweep_)
    said = plan.forecast([], [], 2)
    forecast.remember(tmp_path, said)

    def lines() -> list[str]:
        return [line for line in forecast.lines(sweep_, tmp_path, study.trials()) if "cannot fit" not in line]

    for number, _ in ask(study, 2):
        assert lines() == []
        study.report(number, 1, {"macro_f1": 0.5, "steps": 1, "seconds": said.work})
        study.complete(number)
        forecast.remember(tmp_path, plan.forecast(study.trials(), [], 2))  # another attempt: the first word stays
    assert forecast.forecast(tmp_path) == said
    assert lines() == ["plan: 0.0025 CPU-hours estimated, 0.005 CPU-hours used (2.00 times that), by several attempts"]
    forecast.ended(tmp_path, plan.forecast(study.trials(), [], 2), 7.0)  # by one that did a part
    assert "several attempts" in lines()[0]
    forecast.ended(tmp_path, said, 2 * said.seconds)
    assert lines()[0].startswith("plan: 25 s estimated, 50 s taken (2.00 times that); ")
    more = sweep_.with_values({"search.trials": 3})
    forecast.remember(tmp_path, Forecast(trials=3, before=9.0, work=1.0, seconds=2.0))
    assert [line for line in forecast.lines(more, tmp_path, study.trials()) if "estimated" in line] == []
    assert json.loads((tmp_path / forecast.FILE).read_text())["forecast"]["before"] == 9.0


def test_a_dry_run_says_the_plan_and_writes_nothing(models: Path, corpus: Shards, tmp_path: Path) -> None:
    path = tmp_path / "test.yaml"
    path.write_text(json.dumps(own(models, corpus).model_dump(mode="json")))
    outcome = sweep("run", path, "--dry-run", "--out", tmp_path / "runs" / "test")
    assert outcome.code == 0
    assert "plan: dry steps of 2 shapes of trials in " in outcome.out
    assert "CPU-hours" in outcome.out
    assert sorted(tmp_path.iterdir()) == [path]


def mortal(config: Config, folders: Mapping[str, str | None]) -> Said:
    """Dry steps that the system ends where the rank is large; the real ones otherwise."""
    if config.model.lora.rank > 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return {**dry_steps(config, folders), "pid": os.getpid(), "rest": memory._at_rest()}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_on_a_cluster_a_shape_that_takes_its_process_along_is_excluded(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sweep.execution.cluster import local_or_remote_ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(planner, "SMALL", 0)
    monkeypatch.setattr(planner, "dry_steps", mortal)
    with local_or_remote_ray():
        plan = make(own(models, corpus, space={RANK: [2, 8], RATE: SPACE[RATE]}), tmp_path)
    assert {known.shape.values[RANK]: (known.fits, known.full) for known in plan.tried} == {
        2: (True, ""),
        8: (False, "its dry steps ended their process, also alone"),
    }
    [said] = [said for said in forecast.read(tmp_path)["steps"].values() if "measured" in said]
    assert said["pid"] != os.getpid()
    assert 0.5 < said["rest"] / memory.WORKER < 2, "what a worker's process takes before it has a model"
