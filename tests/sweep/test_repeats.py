"""Nothing is trained twice: repeated draws, exhausted spaces, points that were done. Axes whose values are lists."""

import json
import shlex
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from optuna.trial import TrialState, create_trial

from sweep.analysis import confirm
from sweep.analysis.leaderboard import leaderboard
from sweep.analysis.report.figures import draw_figures, in_memory_study
from sweep.config.diff import claim_folder, compare
from sweep.config.files import load
from sweep.config.schema import Config
from sweep.search.candidates import combinations
from sweep.search.sampling import draw as sampler
from sweep.search.stopping import total_trials
from sweep.search.study import StudyStore
from sweep.tracking.runs import Runs
from sweep.tracking.summary import params
from tests.sweep import searched
from tests.sweep.common import Asked, play, settings, sweep

CLS, MODALITY, END, RATE = "model.cls", "model.modality", "model.end_of_audio", "train.learning_rate"
FINITE = {MODALITY: ["speech", "text"], END: {"choices": ["none", "learned"], "when": {MODALITY: ["speech"]}}}
SIZE = 3  # text has no end of audio
TARGETS = "model.lora.targets"
LISTS: list[Any] = ["all-linear", ["q_proj"], ["q_proj", "v_proj"]]


def finite(**search: Any) -> Config:
    return settings(**{"space": FINITE, "points": [], "trials": 12, "startup_trials": 2, **search})


def played(folder: Path, config: Config, target: int = 12) -> list[Asked]:
    folder.mkdir(exist_ok=True)
    return list(play(StudyStore.open(folder, config), target))


def test_finite_space_is_run_once(tmp_path: Path) -> None:
    asked = played(tmp_path, config := finite())
    assert [number for number, _ in asked] == [0, 1, 2]
    assert {repr(sorted(values.items())) for _, values in asked} == {
        repr(sorted(values.items())) for values in combinations(config) if values is not None
    }
    study = StudyStore.read(tmp_path, config)
    assert (total_trials(config, study.trials()), total_trials(config, []), study.points_left()) == (SIZE, SIZE, [])


def test_killed_search_neither_doubles_nor_loses(tmp_path: Path) -> None:
    """The driver is killed after each ask, and once more while the trial runs."""
    space = FINITE | {"train.warmup": {"low": 0.0, "high": 0.3, "step": 0.1}}
    whole = played(tmp_path / "whole", config := finite(space=space), target=99)
    assert len(whole) == SIZE * 4
    assert len({repr(values) for _, values in whole}) == len(whole)
    (killed := tmp_path / "killed").mkdir()
    resumed: list[Asked] = []
    for target in range(1, len(whole) + 2):
        cut = StudyStore.open(killed, config).ask([], target)
        resumed += play(StudyStore.open(killed, config), target)
        assert cut is None or resumed[-1] == cut
    assert resumed == whole


def test_running_trials_are_not_drawn_again(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, finite())
    asked = [study.ask(list(range(number)), 12) for number in range(SIZE + 1)]
    assert asked[SIZE] is None
    assert len({repr(trial) for trial in asked}) == SIZE + 1


def test_seed_axis_and_infinite_axes_repeat_as_asked(tmp_path: Path) -> None:
    seeds = played(tmp_path / "seeds", finite(space={CLS: ["none"], "seed": [1, 2, 3]}))
    assert sorted(values["seed"] for _, values in seeds) == [1, 2, 3]
    rates = finite(space={CLS: ["none"], RATE: {"low": 1e-4, "high": 1e-2}})
    assert len(played(tmp_path / "rates", rates)) == total_trials(rates, []) == 12


def test_wider_space_continues_an_exhausted_sweep(tmp_path: Path) -> None:
    played(tmp_path, finite())
    wider = finite(space=FINITE | {CLS: ["none", "after"]})
    asked = played(tmp_path, wider)
    assert len(asked) == SIZE
    assert {values[CLS] for _, values in asked} == {"after"}, "existing trials have the setting, none"


def test_old_sweep_with_repeats_is_read_and_extended(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, config := finite(trials=5))
    text = {MODALITY: "text"}
    distributions = {MODALITY: config.search.space[MODALITY].distribution()}
    for _ in range(4):
        study.study.add_trial(
            create_trial(state=TrialState.COMPLETE, value=0.5, params=text, distributions=distributions)
        )
    assert total_trials(config, study.trials()) == 5
    assert [values[MODALITY] for _, values in play(study, 5)] == ["speech"]
    more = finite(trials=12)
    assert [values[MODALITY] for _, values in play(StudyStore.open(tmp_path, more), 12)] == ["speech"]
    assert total_trials(more, study.trials()) == 4 + 2


def test_point_that_was_trained_is_not_trained_again(tmp_path: Path) -> None:
    played(tmp_path, finite())
    space = FINITE | {CLS: ["none", "after"]}
    points = [{MODALITY: "text", CLS: "none"}, {MODALITY: "text", CLS: "after"}, {MODALITY: "text"}]
    study = StudyStore.open(tmp_path, finite(space=space, points=points))
    assert study.points_left() == points[1:]
    asked = study.ask([], 12)
    assert asked is not None
    assert asked.params == points[1]


def test_point_gets_all_of_its_values(tmp_path: Path) -> None:
    """A point may leave open the axis on which the condition of another one depends."""
    points = [{END: "learned"}, {END: "none"}]
    for seed in range(4):
        config = finite(points=points).model_copy(update={"seed": seed})
        asked = played(tmp_path / str(seed), config, target=2)
        assert [values[END] for _, values in asked] == ["learned", "none"]


def test_what_does_not_fit_comes_last_as_failed_trials(tmp_path: Path) -> None:
    """Otherwise the sweep could neither end nor continue."""
    study = StudyStore.open(tmp_path, config := finite())
    study.fits = lambda values: values[MODALITY] == "text"
    assert [values[MODALITY] for _, values in play(study, 12)] == ["text"]
    states = [(trial.state, trial.reason) for trial in study.trials()]
    assert states == [("COMPLETE", None), ("FAIL", "out of memory"), ("FAIL", "out of memory")]
    assert study.trials()[1].why == "not started: does not fit into memory by the plan"
    assert total_trials(config, study.trials()) == SIZE
    claim_folder(config, tmp_path)
    for shown in (sweep("status", tmp_path), sweep("status", tmp_path, "--json")):
        assert (shown.code, shown.err) == (0, "")
    few = finite(trials=2)
    (tmp_path / "few").mkdir()
    study = StudyStore.open(tmp_path / "few", few)
    study.fits = lambda values: values[MODALITY] == "text"
    list(play(study, 2))
    assert [trial.state for trial in study.trials()] == ["COMPLETE", "FAIL"]


def test_rare_combination_is_found() -> None:
    """The only one of 900 that fits: drawing alone would need about as many tries."""
    left = {"data.history": 17, "train.batch_size": 23}
    config = finite(space={"data.history": {"low": 0, "high": 29}, "train.batch_size": {"low": 1, "high": 30}})
    found = sampler.draw(config, [], lambda values: values == left)
    assert found is not None
    assert (found.state, found.params) == (TrialState.RUNNING, left)


def test_widening_keeps_the_steps_and_not_the_end() -> None:
    """`high` need not be on the steps; what was never drawn need not be kept."""

    def axis(low: int, high: int, step: int = 8) -> Config:
        return finite(space={"data.history": {"low": low, "high": high, "step": step}})

    assert not compare(axis(4, 32), axis(4, 40)).refused
    assert not compare(axis(4, 32), axis(4, 28)).refused, "its largest value is 28"
    assert compare(axis(4, 32), axis(4, 27)).refused
    assert compare(axis(4, 32), axis(5, 40)).refused
    assert axis(4, 32).search.space["data.history"].extremes() == [4, 28]


@pytest.fixture
def lists(tmp_path: Path) -> tuple[Path, Config]:
    """A finished sweep over lists, with a point that has one."""
    point = searched.REFERENCE | {TARGETS: LISTS[2]}
    space = searched.SPACE | {TARGETS: LISTS, "train.class_weights": ["equal", {"classify": {"change": 2.0}}]}
    config = searched.settings(space=space, points=[point, point | {TARGETS: LISTS[1]}], trials=8)
    folder = tmp_path / "lists"
    searched.played(config, folder)
    return folder, config


def test_choices_may_be_lists_and_mappings(lists: tuple[Path, Config]) -> None:
    folder, config = lists
    study = StudyStore.of(folder)
    assert study.config == config
    trials = study.trials()
    assert [trial.params[TARGETS] for trial in trials[:2]] == [LISTS[2], LISTS[1]]
    assert all(trial.params[TARGETS] in LISTS for trial in trials)
    assert study.study.get_trials()[0].params[TARGETS] == json.dumps(LISTS[2])
    assert study.trial_config(trials[0]).model.lora.targets == LISTS[2]
    assert any(isinstance(trial.params["train.class_weights"], dict) for trial in trials)
    assert len(played(folder, config, target=10)) == 2, "resumed"
    wider = config.search.model_dump()["space"] | {TARGETS: [*LISTS, ["v_proj"]]}
    claim_folder(more := searched.settings(space=wider, points=config.search.points, trials=24), folder)
    assert any(values[TARGETS] == ["v_proj"] for _, values in played(folder, more, target=24))
    assert StudyStore.of(folder).trials()[0].params == trials[0].params


def test_results_show_lists(lists: tuple[Path, Config]) -> None:
    folder, config = lists
    study = StudyStore.of(folder)
    trials = study.trials()
    board = leaderboard(config, folder, trials)
    column = [column.name for column in board.table.columns].index("targets")
    assert {row[column] for row in board.table.rows} >= {"q_proj, v_proj", "q_proj"}
    assert params(config, trials[0])[TARGETS] == LISTS[2]
    client = Mock()
    run = Mock(data=Mock(params={"model.lora.rank": "4"}))
    Runs.complete(Mock(client=client, _corpus_of=lambda values: None), run, params(config, trials[0]))
    logged = {param.key: param.value for param in client.log_batch.call_args.kwargs["params"]}
    assert logged[TARGETS] == json.dumps(LISTS[2])
    assert "model.lora.rank" not in logged, "MLflow has it already"
    memory = in_memory_study(study)
    assert json.dumps(LISTS[2]) in {trial.params["targets"] for trial in memory.trials}
    assert {"importance", "slices"} <= {figure.name for figure in draw_figures(study, folder, trials, [])}
    best = study.best()
    assert best is not None
    words = shlex.split(next(line for line in sweep("best", folder).out.splitlines() if line.startswith("reproduce:")))
    sets = [words[index + 1] for index, word in enumerate(words) if word == "--set"]
    assert load(str(folder / "config.yaml"), sets).for_trial({}) == study.trial_config(best)
    for command in (("status",), ("status", "--json"), ("best",), ("best", "--json"), ("best", "--config")):
        shown = sweep(command[0], folder, *command[1:])
        assert (shown.code, shown.err) == (0, "")
    planned = confirm.plan(study, folder, top=2, seeds=2)
    assert len(planned.search.points) == 4
    searched.played(planned, confirm.confirm_folder(folder))
    again = confirm.plan(study, folder, top=2, seeds=2)
    assert again.search.points == planned.search.points
    assert len(StudyStore.of(confirm.confirm_folder(folder)).trials()) == 4
