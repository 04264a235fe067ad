"""Several objectives: the Pareto front, and the sampler, the leaderboard and the report that use it."""

from pathlib import Path
from typing import Any

import pytest

from data.errors import ConfigError
from sweep.analysis.leaderboard import leaderboard
from sweep.analysis.report.figures import draw_figures
from sweep.config.schema import Config, parse
from sweep.search.sampling.history import history
from sweep.search.sampling.objectives import front_line, objective_values, pareto_front
from sweep.search.study import StudyStore
from tests.sweep.common import SPACE, settings

BOTH = ["macro_f1", "seconds"]
RESULTS = [(0.9, 100.0), (0.8, 50.0), (0.7, 60.0), (0.8, 40.0), (0.2, 10.0), (0.9, 100.0)]
FRONT = [0, 5, 3, 4]  # of equal trials both


def several(**search: Any) -> Config:
    return settings(metrics=BOTH, points=[], **search)


def searched(folder: Path, config: Config, count: int = len(RESULTS)) -> StudyStore:
    study = StudyStore.open(folder, config)
    for value, seconds in (RESULTS * 4)[:count]:
        asked = study.ask([], 99)
        assert asked is not None
        study.report(asked.number, 4, {"macro_f1": value, "seconds": seconds, "steps": 5})
        study.complete(asked.number)
    return study


def test_front_has_the_trials_that_none_beats(tmp_path: Path) -> None:
    study = searched(tmp_path, config := several())
    assert [trial.number for trial in pareto_front(config, study.trials())] == FRONT
    assert pareto_front(settings(), study.trials()) == [], "with one objective there is a best trial"
    best = study.best()
    assert best is not None
    assert best.number == 0
    assert [trial.values for trial in history(config, study.runs())] == [list(result) for result in RESULTS]


def test_leaderboard_and_report_show_the_front(tmp_path: Path) -> None:
    study = searched(tmp_path, config := several())
    board = leaderboard(config, tmp_path, study.trials())
    names = [column.name for column in board.table.columns]
    marked = [row[0] for row in board.table.rows if row[names.index("front")] == "*"]
    assert sorted(map(int, marked)) == sorted(FRONT)
    assert {row[names.index("seconds")] for row in board.table.rows} == {"100", "50", "60", "40", "10"}
    line = (
        "Pareto front: #0, #5, #3, #4; no trial is better in one of macro_f1 and seconds without being worse in another"
    )
    assert line == front_line(config, study.trials())
    assert line in board.note
    [figure] = [figure for figure in draw_figures(study, tmp_path, study.trials(), []) if figure.name == "front"]
    assert list(figure.content.data[1].x) == [100.0, 100.0, 40.0, 10.0]


def test_resumed_search_over_two_objectives_draws_alike(tmp_path: Path) -> None:
    for name in ("one", "many"):
        (tmp_path / name).mkdir()
    whole = searched(tmp_path / "one", several(), 12)
    for count in (4, 4, 4):
        many = StudyStore.open(tmp_path / "many", several())
        for _ in range(count):
            asked = many.ask([], 99)
            assert asked is not None
            value, seconds = (RESULTS * 4)[asked.number]
            many.report(asked.number, 4, {"macro_f1": value, "seconds": seconds, "steps": 5})
            many.complete(asked.number)
    assert [trial.params for trial in many.trials()] == [trial.params for trial in whole.trials()]


def test_gpu_seconds_count_all_gpus_of_a_trial() -> None:
    tree = {"name": "a", "search": {"metrics": ["macro_f1", "gpu_seconds"]}}
    config = parse(tree | {"resources": {"gpus_per_worker": 0.5, "workers": 4}}, "a")
    assert objective_values(config, 0.5, {"seconds": 60.0}) == [0.5, 120.0]
    assert config.search.directions == ["maximize", "minimize"]
    assert (config.search.metric, config.search.pruning) == ("macro_f1", None), "pruning is on by default"


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"metrics": BOTH, "pruning": {}}, r"search.pruning: several objectives are not pruned; set it to null"),
        ({"metrics": ["macro_f1"]}, r"search.metrics: name two or more different objectives"),
        ({"metrics": ["seconds", "macro_f1"]}, r"search.metric: 'seconds' is not a metric of the task"),
        ({"metrics": ["macro_f1", "beauty"]}, r"search.metrics: 'beauty' is no objective; choose from macro_f1, "),
        ({"metrics": BOTH, "metric": "loss"}, r"begins with 'macro_f1', and search.metric is 'loss'; leave one out"),
        ({"metrics": ["macro_f1", "gpu_seconds"]}, r"trials use no GPU .* use seconds"),
        ({"metrics": BOTH, "sampler": "gp"}, r"search.sampler: gp knows one objective"),
    ],
)
def test_objectives_that_cannot_be_searched_are_refused(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        parse({"name": "a", "search": {"space": SPACE, **search}}, "a.yaml")
    assert len(str(refusal.value).splitlines()) == 2
