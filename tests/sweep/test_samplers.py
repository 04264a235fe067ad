"""Every sampler keeps the promises of a search: conditions, no repeats, the same draws after a kill."""

from pathlib import Path
from typing import Any

import pytest

from data.errors import ConfigError, UserError
from sweep.config.loader import flat
from sweep.config.schema import Config
from sweep.config.search_checks import check_search
from sweep.config.space import Value
from sweep.search.sampling.samplers import choose
from sweep.search.space_checks import check_requests, notes
from sweep.search.stopping import total_trials
from sweep.search.study import StudyStore
from tests.sweep.common import POINTS, SPACE, play, settings, whole_and_resumed

RANK, RATE, MODALITY = "model.lora.rank", "train.learning_rate", "model.modality"
RANGES: dict[str, Any] = SPACE | {"train.warmup": {"low": 0.0, "high": 0.3}}
FINITE: dict[str, Any] = SPACE | {RATE: {"low": 0.001, "high": 0.003, "step": 0.001}}
SIZE = 3 * 3 * (2 + 1)
SAMPLERS = ["tpe", "gp", "cmaes", "qmc", "random", "grid"]
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def searching(sampler: str, **search: Any) -> Config:
    return settings(sampler=sampler, **{"space": FINITE if sampler == "grid" else RANGES, **search})


@every_sampler
def test_killed_search_draws_the_same_trials(sampler: str, tmp_path: Path) -> None:
    whole, resumed = whole_and_resumed(tmp_path, config := searching(sampler))
    assert resumed == whole
    assert POINTS[0].items() <= whole[0][1].items()
    for _, values in whole:
        keys = {key for key in config.search.space if config.search.is_varied(key, values, flat(config))}
        assert values.keys() == keys
        assert all(config.search.space[key].contains(value) for key, value in values.items())
    assert len({repr(values) for _, values in whole}) == len(whole)


@every_sampler
def test_finite_space_is_exhausted_without_repeats(sampler: str, tmp_path: Path) -> None:
    config = searching(sampler, space={RANK: {"low": 2, "high": 3}, RATE: FINITE[RATE]}, points=[], trials=12)
    asked = list(play(StudyStore.open(tmp_path, config), 12))
    assert len(asked) == len({repr(values) for _, values in asked}) == total_trials(config, []) == 6


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
def test_sampler_learns_and_avoids_infeasible_values(sampler: str, tmp_path: Path) -> None:
    """The objective rises with the warm-up; trials with a rank above 8 run out of memory."""
    config = searching(sampler, points=[], startup_trials=5)
    study, warmups, ranks = StudyStore.open(tmp_path, config), list[float](), list[Value]()
    while (trial := study.ask([], 40 if sampler == "cmaes" else 16)) is not None:
        number, values = trial
        ranks.append(values[RANK])
        if values[RANK] == 16:
            study.fail(number, "out of memory at step 3", reason="out of memory")
        else:
            warmups.append(float(str(values["train.warmup"])))
            study.report(number, 4, {"macro_f1": warmups[-1], "steps": 1})
            study.complete(number)
    assert sum(warmups[-6:]) / 6 > 0.18
    assert sampler == "cmaes" or ranks[-8:].count(16) <= 2, "cmaes draws choices at random"


def test_running_trials_are_drawn_apart(tmp_path: Path) -> None:
    study = StudyStore.open(tmp_path, searching("gp", points=[]))
    list(play(study, 5))
    running = [study.ask([5, 6], 99), study.ask([5, 6], 99)]
    assert len({repr(trial and trial.params) for trial in running}) == 2


def test_auto_says_which_sampler_and_why() -> None:
    assert str(choose(searching("random"))) == "random (set by search.sampler)"
    assert choose(searching("auto", space=FINITE, trials=SIZE - 1)).name != "grid"
    few = searching("auto", space=FINITE, trials=SIZE)
    assert str(choose(few)) == f"grid (auto: search.trials is {SIZE}, so all {SIZE} combinations run)"


@pytest.mark.parametrize(
    ("sampler", "space", "message"),
    [
        ("grid", RANGES, r"grid needs finite axes, and search.space.train.learning_rate has infinitely many values"),
        (
            "cmaes",
            {RANK: [2, 4], RATE: SPACE[RATE]},
            r"cmaes needs two axes that are ranges .* has 1; choose gp or tpe",
        ),
    ],
)
def test_sampler_that_cannot_draw_is_refused(sampler: str, space: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_search(searching(sampler, space=space, points=[]), "test")


def test_missing_package_is_refused_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweep.search.sampling.samplers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"cmaes needs a package .* pip install 'speech-llm-sweep\[cmaes\]'"):
        check_requests(searching("cmaes"), tmp_path)


def test_notes_name_what_a_sampler_leaves_out() -> None:
    [grid] = [note for note in notes(searching("grid", points=[])) if "grid" in note]
    assert grid.startswith(f"search.trials: 9, and the grid has {SIZE} combinations")
    [cmaes] = [note for note in notes(searching("cmaes")) if "cmaes" in note]
    assert "draws model.modality, model.lora.rank and model.trainable at random" in cmaes
