"""The plan: what is measured and saved, which trials are excluded, and how the estimate compares with reality."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
from ray.tune.search import Searcher

from data.errors import UserError
from data.shards.dataset import Shards
from model.runtime import memory
from model.training.dry_run import TrialCost
from sweep.config.resolve import ResolvedConfig
from sweep.execution.tasks import EndedTask, TaskQueue
from sweep.execution.tune import StudySearcher
from sweep.preflight import dry_run as dry_run_module
from sweep.preflight import plan as plan_module
from sweep.preflight.dry_run import DryRun, DryRunResult, dry_runs_on_workers
from sweep.preflight.plan import Plan, make_plan
from sweep.preflight.plan_file import FILE, Estimate, PlanFile, plan_lines, save_actual_time, save_estimate
from sweep.preflight.preparation import Preparation
from sweep.search.study import StudyStore
from tests.forked import Forked
from tests.sweep.common import FROZEN, Asked, ask, play, report, sweep
from tests.sweep.tiny import config

NODES = [{"CPU": 2.0}]
RANK, MODALITY, RATE = "model.lora.rank", "model.modality", "train.learning_rate"
SPACE = {RANK: [2, 4, 8], MODALITY: ["speech", "text"], RATE: {"low": 1e-3, "high": 1e-2, "log": True}}


def searched(models: Path, corpus: Shards, **search: Any) -> ResolvedConfig:
    tree = {"space": SPACE, "trials": 8, "pruning": None, "startup_trials": 3} | search
    return config(models, corpus, search=tree, train={"epochs": 2}, storage={"features": "live"})


def plan_of(config: ResolvedConfig, folder: Path, lines: list[str] | None = None) -> Plan:
    return make_plan(config, folder / "cache", folder, NODES, 2, ([] if lines is None else lines).append)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Dry runs that end at once: no rank above 4 fits, and speech takes twice as long as text."""
    runs: list[tuple[int, str]] = []

    def instant(run: DryRun) -> DryRunResult:
        rank, modality = run.config.model.lora.rank, run.config.model.modality
        runs.append((rank, modality))
        if rank > 4:
            return DryRunResult(too_large=f"too large by {rank - 4}")
        seconds = 2.0 if modality == "speech" else 1.0
        cost = TrialCost(train=seconds, val=0.5 * seconds, least=10, full=20, budget=16_384)
        return DryRunResult(cost=cost, startup=0.25, capacity=10**9)

    monkeypatch.setattr(dry_run_module, "dry_run", instant)
    return runs


def test_dry_runs_are_done_once_for_a_sweep(
    models: Path, corpus: Shards, tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill loses only the dry run in progress, other code measures again, and smaller values are measured if the
    largest one does not fit."""
    instant, one = dry_run_module.dry_run, searched(models, corpus)

    def killed(run: DryRun) -> DryRunResult:
        if len(measured) == 1:
            raise KeyboardInterrupt
        return instant(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dry_run_module, "dry_run", killed)
        plan_of(one, tmp_path)
    lines: list[str] = []
    plan = plan_of(one, tmp_path, lines)
    assert lines[0].startswith("plan: measured 5 trial profiles in ")
    assert lines[1] == "plan: 1 trial profile measured before"
    assert sorted(measured) == [(rank, modality) for rank in (2, 4, 8) for modality in ("speech", "text")]
    assert plan.epoch_seconds({MODALITY: "speech"}) == 2 * plan.epoch_seconds({MODALITY: "text"}) == 3.0
    assert [plan.fits({RANK: rank, MODALITY: "text"}) for rank in (2, 4, 8, 16)] == [True, True, False, False]
    assert plan.fits({RANK: 6, MODALITY: "text"}), "between one that fits and one that does not"
    assert plan.fits({RANK: 8, MODALITY: "other"}), "not measured"
    line = "plan: excluded, does not fit into memory: model.lora.rank 8, model.modality text: too large by 4"
    assert line in lines
    assert line in plan_lines(one, tmp_path, [])
    again = plan_of(resolved(one, {"search.trials": 30, "seed": 4}), tmp_path)
    assert [known.result for known in again.results] == [known.result for known in plan.results]
    assert len(measured) == 6
    monkeypatch.setattr(plan_module, "code_version", lambda: "other")
    plan_of(one, tmp_path)
    assert len(measured) == 12


def test_dry_runs_decide_what_a_trial_leaves_open(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it asks for one, also after a resume, which measures nothing."""

    def instant(run: DryRun) -> DryRunResult:
        budget = 65_536 if run.config.model.modality == "text" else 16_384
        return DryRunResult(cost=TrialCost(train=1.0, val=0.5, least=10, full=20, budget=budget), capacity=10**9)

    lines, space = list[str](), searched(models, corpus)
    preparation = Preparation(Mock(), space, tmp_path / "cache", NODES, 2, 8, lines.append, Mock())
    with monkeypatch.context() as patch:
        patch.setattr(dry_run_module, "dry_run", instant)
        plan_of(space, tmp_path, lines)
    assert lines[1] == "plan: model.lora.rank 8, model.modality text: train.token_budget auto is 65536"
    values = {RANK: 4, MODALITY: "text", RATE: 0.005}
    trial = space.for_trial(values)
    assert preparation.decide(trial, values) == trial
    preparation.plan = plan_of(space, tmp_path)
    decided = preparation.decide(trial, values).train
    assert (decided.token_budget, decided.compile) == (65_536, "off")
    fixed = trial.with_values({"train.token_budget": 99, "train.compile": "on"})
    assert preparation.decide(fixed, values) == fixed
    on_gpu = {"resources.gpus_per_worker": 1, "train.epochs": 600}
    assert preparation.decide(trial.with_values(on_gpu), values).train.compile == "on", "1.5 s for each epoch"
    assert preparation.decide(trial.with_values(on_gpu | {"train.epochs": 599}), values).train.compile == "off"


def test_dry_runs_share_a_part_of_the_sweep(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They begin with ten seconds; once an epoch is known to take 100 s, five percent of the sweep are more."""
    given: list[float] = []

    def slow(run: DryRun) -> DryRunResult:
        given.append(run.seconds)
        return DryRunResult(cost=TrialCost(train=90.0, val=10.0, least=10, full=20, budget=16_384), capacity=10**9)

    monkeypatch.setattr(dry_run_module, "dry_run", slow)
    plan = plan_of(searched(models, corpus), tmp_path)
    first, *others = given
    assert first == pytest.approx(plan_module.LEAST_SECONDS / len(given), abs=0.5)
    sweep = plan.estimate([], [], 2).seconds
    assert others
    assert others[-1] == pytest.approx(0.05 * sweep, abs=2)
    assert others[-1] > 2 * plan_module.LEAST_SECONDS


def test_dry_runs_end_with_their_time(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading the models counts; the profile that trains most comes first, and the plan says what it does not know."""
    runs: list[DryRun] = []
    cost = TrialCost(train=3.0, val=1.0, least=10, full=20, budget=16_384, extrapolated=True)

    def slow(run: DryRun) -> DryRunResult:
        runs.append(run)
        return DryRunResult(cost=cost, capacity=10**9, seconds=11.0)

    monkeypatch.setattr(dry_run_module, "dry_run", slow)
    one, lines = searched(models, corpus, trials=1), list[str]()
    plan = plan_of(one, tmp_path, lines)
    assert [run.config.model.modality for run in runs] == ["speech"]
    assert lines == [
        "plan: measured 1 trial profile in 11.0 s",
        "plan: 1 trial profile measured in part: the time of an epoch is extrapolated",
        "plan: 1 more trial profile not measured: none is excluded, and the mean time is assumed",
    ]
    assert plan.fits({RANK: 8, MODALITY: "text"})
    plan_of(one, tmp_path, lines)
    assert len(runs) == 2, "another run of the sweep has time again"
    assert "plan: 1 trial profile measured before" in lines


def resolved(config: ResolvedConfig, changed: dict[str, Any]) -> ResolvedConfig:
    return ResolvedConfig.model_validate(dict(config.with_values(changed)))


def test_profile_that_exceeds_worker_memory_is_excluded(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two trials at a time may use a half of the node's memory."""
    cost = TrialCost(train=1.0, val=0.5, least=600 * 10**6, full=700 * 10**6, budget=16_384)
    monkeypatch.setattr(dry_run_module, "dry_run", lambda _: DryRunResult(cost=cost, capacity=10**9))
    with pytest.raises(UserError, match=r"^no trial of the search space fits into memory \(needs 600 MB with one"):
        plan_of(searched(models, corpus, space={RANK: [2, 4], RATE: SPACE[RATE]}), tmp_path)
    lines = PlanFile.read(tmp_path).excluded
    assert len(lines) == 2  # also with the smaller rank
    assert all("with one example at a time, and has 500 MB" in line for line in lines)


@pytest.mark.usefixtures("measured")
def test_excluded_values_take_no_trial(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """Neither random draws nor TPE propose them, and a sweep that resumes before every trial draws the same."""
    points = [{RANK: 8, MODALITY: "text"}, {RANK: 2, MODALITY: "text"}]
    one = searched(models, corpus, points=points)
    plan = plan_of(one, tmp_path)

    def opened(name: str) -> StudyStore:
        (folder := tmp_path / name).mkdir(exist_ok=True)
        study = StudyStore.open(folder, one)
        study.fits = plan.fits
        return study

    def run(study: StudyStore, target: int) -> list[Asked]:
        return list(play(study, target))

    whole = run(study := opened("whole"), 12)
    assert [asked for target in range(1, 13) for asked in run(opened("resumed"), target)] == whole
    assert [number for number, _ in whole] == list(range(12))
    assert {values[RANK] for _, values in whole} == {2, 4}
    assert whole[0][1] | points[1] == whole[0][1]
    assert {trial.state for trial in study.trials()} == {"COMPLETE"}
    assert study.points_left() == points[:1]
    study.fits = lambda values: True  # on a larger machine
    [(_, values)] = run(study, 13)
    assert values | points[0] == values
    assert study.points_left() == []
    # A rule that excludes nothing changes no draw.
    plain, ruled = (StudyStore.open(Path(opened(name).folder), one) for name in ("plain", "ruled"))
    ruled.fits = lambda values: values[RANK] < 99
    assert run(plain, 8) == run(ruled, 8)


def test_search_without_fitting_values_stops(models: Path, corpus: Shards, tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, searched(models, corpus))
    study.fits = lambda values: False
    queue = TaskQueue()
    queue.waits = lambda values: False
    searcher = StudySearcher(study, lambda *_: {}, lambda: None, lambda: None, lambda: None, queue)
    assert searcher.suggest("0") == Searcher.FINISHED
    assert searcher.fault is not None
    assert searcher.fault[0].startswith("search.space: none of 100 draws fits into memory")
    assert study.trials() == []


@pytest.mark.usefixtures("measured")
def test_estimate_counts_remaining_work(models: Path, corpus: Shards, tmp_path: Path) -> None:
    text, speech = {RANK: 2, MODALITY: "text"}, {RANK: 2, MODALITY: "speech"}
    one = searched(models, corpus, trials=4, points=[text, speech, speech])
    plan, study = plan_of(one, tmp_path), StudyStore.open(tmp_path, one)
    whole = plan.estimate(study.trials(), study.points_left(), slots=1)
    mean = 2 * (3.0 + 1.5) / 2  # two epochs, of speech or text
    assert whole.work == pytest.approx(3 + 6 + 6 + mean)
    assert whole.seconds == pytest.approx(plan_module.WORKER_STARTUP + whole.work + 4 * 0.25)
    two = plan.estimate(study.trials(), study.points_left(), slots=2)
    assert two.seconds == pytest.approx(plan_module.WORKER_STARTUP + max(3 + 6 + 0.5, 6 + mean + 0.5))
    ask(study, 2)
    report(study, 1, 0.5)
    left = plan.estimate(study.trials(), study.points_left(), slots=1)
    assert left.work == pytest.approx(3 + 3 + 6 + mean)


@pytest.mark.usefixtures("measured")
def test_first_estimate_is_compared_with_reality(models: Path, corpus: Shards, tmp_path: Path) -> None:
    one = searched(models, corpus, trials=2)
    plan, study = plan_of(one, tmp_path), StudyStore.open(tmp_path, one)
    first = plan.estimate([], [], 2)
    save_estimate(tmp_path, first)

    def lines(config: ResolvedConfig = one) -> list[str]:
        return [line for line in plan_lines(config, tmp_path, study.trials()) if "excluded" not in line]

    for number, _ in ask(study, 2):
        assert lines() == []
        study.report(number, 1, {"macro_f1": 0.5, "steps": 1, "seconds": first.work})
        study.complete(number)
        save_estimate(tmp_path, plan.estimate(study.trials(), [], 2))  # of a later attempt: it is not saved
    assert PlanFile.read(tmp_path).estimate == first
    assert lines() == ["plan: 0.0025 CPU-hours estimated, 0.005 CPU-hours used (2.00 times that), by several attempts"]
    save_actual_time(tmp_path, plan.estimate(study.trials(), [], 2), 7.0)  # of an attempt that ran a part
    assert "several attempts" in lines()[0]
    save_actual_time(tmp_path, first, 2 * first.seconds)
    assert lines()[0].startswith("plan: 25 s estimated, 50 s taken (2.00 times that); ")
    save_estimate(tmp_path, Estimate(trials=3, used=9.0, work=1.0, seconds=2.0))
    assert lines(resolved(one, {"search.trials": 3})) == []
    names = {"trials": 3, "before": 9.0, "work": 1.0, "seconds": 2.0, "took": None}
    assert json.loads((tmp_path / FILE).read_text())["forecast"] == names


def test_plan_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    cost = {"train": 1.5, "val": 0.25, "least": 10, "full": 20, "budget": 64}
    step = {"measured": cost, "build": 0.5, "capacity": 10**9}
    saved = {"trials": 3, "before": 0, "work": 8.5, "seconds": 6.5, "took": 8.25}
    old = {"steps": {"a": step, "b": {"full": "too large"}}, "excluded": [], "forecast": saved}
    (tmp_path / FILE).write_text(json.dumps(old))
    plan = PlanFile.read(tmp_path)
    results = {key: DryRunResult.model_validate(content) for key, content in plan.steps.items()}
    assert results["a"].cost == TrialCost(train=1.5, val=0.25, least=10, full=20, budget=64)
    assert [results["b"].too_large, results["b"].cost] == ["too large", None]
    dumped = {key: result.model_dump(by_alias=True, exclude_defaults=True) for key, result in results.items()}
    assert dumped == old["steps"]
    assert plan.estimate == Estimate(trials=3, used=0, work=8.5, seconds=6.5, took=8.25)
    plan.write(tmp_path)
    assert json.loads((tmp_path / FILE).read_text()) == old


def test_preview_shows_cache_and_plan_and_writes_nothing(models: Path, corpus: Shards, tmp_path: Path) -> None:
    path = tmp_path / "test.yaml"
    space = {"model.trainable": [FROZEN, f"{FROZEN}+encoder.*.layers.1.*"]}
    path.write_text(config(models, corpus, space).model_dump_json())
    outcome = sweep("run", path, "--dry-run", "--out", tmp_path / "runs" / "test")
    assert outcome.code == 0
    lines = outcome.out.replace("\n", " ")
    assert "features of whisper, pooled by 8 / 4: " in lines
    assert "features of whisper up to layer 1 of 2: " in lines
    assert lines.count(" files to compute") == lines.count("shared by all trials; ") == 2
    assert "plan: measured 2 trial profiles in " in lines
    assert "CPU-hours; less with the feature cache" in lines
    assert sorted(tmp_path.iterdir()) == [path]


class Workers:
    """A queue whose dry runs are done in this process; those of a large rank kill their workers."""

    def run(self, tasks: Sequence[Callable[[], list[Any]]], at_once: int) -> Iterator[EndedTask]:
        for place, task in enumerate(tasks):
            calls = task()
            rank = calls[0].args[0].config.model.lora.rank if calls else 0
            yield EndedTask(place, None if rank > 4 else [call() for call in calls])


@pytest.mark.usefixtures("measured")
def test_profile_that_kills_its_worker_is_excluded(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "SMALL_MODEL", 0)
    one, queue = searched(models, corpus, space={RANK: [2, 8], RATE: SPACE[RATE]}), cast(TaskQueue, Workers())
    plan = make_plan(one, tmp_path / "cache", tmp_path, NODES, 2, [].append, dry_runs_on_workers(queue))
    assert {known.profile.values[RANK]: (known.fits, known.too_large) for known in plan.results} == {
        2: (True, ""),
        8: (False, "its dry run killed the process, also when run alone"),
    }


def test_profiles_wait_for_their_part_of_the_cache(
    models: Path, corpus: Shards, tmp_path: Path, measured: list[tuple[int, str]]
) -> None:
    """Then they may not fit, which is known only when all are measured."""
    lines: list[str] = []

    def plan(waiting: bool) -> Plan:
        one, waits = searched(models, corpus), lambda trial: waiting and trial.model.modality == "speech"
        return make_plan(one, tmp_path / "cache", tmp_path, NODES, 2, lines.append, waits=waits)

    first = plan(waiting=True)
    assert {modality for _, modality in measured} == {"text"}
    assert lines[-1] == "plan: 3 trial profiles wait for the feature cache"
    assert first.fits({RANK: 8, MODALITY: "speech"})
    assert not plan(waiting=False).fits({RANK: 8, MODALITY: "speech"})
    assert len(measured) == len(set(measured)) == 6


def test_divided_trial_that_cannot_fit_is_excluded(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers divide the LLM, which no dry run can do: its memory is estimated, and its time is unknown."""
    estimate = dry_run_module.estimate_memory  # see tests/model/test_memory_estimate.py
    monkeypatch.setattr(dry_run_module, "estimate_memory", lambda *given: Forked(lambda: estimate(*given)).result())
    resources = {"shard": True, "workers": 2}
    one = config(models, corpus, resources=resources, model={"modality": "text"}, storage={"features": "live"})
    lines: list[str] = []
    [result] = plan_of(one, tmp_path, lines).results
    assert memory.WORKER < result.result.estimate < memory.WORKER + 10**8
    assert result.fits
    assert any("could not be measured (resources.shard divides the LLM among workers" in line for line in lines)
    monkeypatch.setattr(memory, "capacity", lambda device: 10**9)
    (tmp_path / "small").mkdir()
    with pytest.raises(UserError, match=r"no trial of the search space fits into memory \(needs .* with one example"):
        plan_of(one, tmp_path / "small")
