"""A share of a sweep goes to further seeds of the best configurations, as far as they are tied."""

from pathlib import Path
from typing import Any

import pytest

from data.errors import ConfigError
from sweep.analysis import confirm
from sweep.analysis.leaderboard import leaderboard
from sweep.analysis.recommendation import tie_line
from sweep.config.paths import trial_folder
from sweep.config.schema import Config, parse
from sweep.search.sampling import ties
from sweep.search.stopping import total_trials
from sweep.search.study import StudyStore, best_first
from sweep.tracking.summary import start_tags
from tests.sweep import searched
from tests.sweep.common import settings
from tests.sweep.stores import kill_at_writes

VALUES = [0.3, 0.9, 0.1, 0.88, 0.5, 0.89, 0.2, 0.4, 0.6]  # of each configuration with the seed of the sweep
LUCK = {1: -0.2, 3: 0.01, 5: 0.0}  # what the fresh seeds of a configuration add


def tied(share: float = 0.34, **search: Any) -> Config:
    return settings(**{"points": [], "startup_trials": 99, "tie_share": share} | search)


def finish(folder: Path, config: Config, values: list[float] = VALUES) -> StudyStore:
    """Run what is left of a sweep with one worker."""
    study = StudyStore.open(folder, config)
    study.error = lambda number, metric: 0.02
    while (asked := study.ask([], config.search.trials)) is not None:
        number, first = asked.number, study.trials()[asked.number].repeats
        value = values[number] if first is None else values[first] + LUCK.get(first, 0.0)
        for epoch in range(1, 5):
            study.report(number, epoch, {"macro_f1": value, "steps": 10 * epoch})
        study.complete(number)
    return study


def test_tied_configurations_get_further_seeds(tmp_path: Path) -> None:
    config = tied()
    trials = finish(tmp_path, config).trials()
    assert [trial.repeats for trial in trials] == [None] * 6 + [1, 5, 3]
    assert [trial.params.get("seed") for trial in trials[5:]] == [None, 1000, 1000, 1000]
    assert trials[6].params == trials[1].params | {"seed": 1000}
    assert [trial.number for trial in best_first(config, trials)] == [5, 3, 1, 4, 0, 2], "by the means"
    assert tie_line(config, trials) == (
        "further seeds: trial 5 has macro_f1 0.890 in the mean of 2 seeds, tied with #3 (0.885 in the mean of 2 "
        "seeds); standard deviation between seeds 0.065"
    )
    rows = [row[:5] for row in leaderboard(config, tmp_path, trials).table.rows]
    assert rows[:2] == [
        ["5", "COMPLETE", "0.890", "0", "0.890 (2)"],
        ["7", "COMPLETE", "0.890", "1000", "of #5"],
    ]
    tags = start_tags(config, trials[7], [])
    assert (tags["sweep.seed"], tags["sweep.repeats"]) == ("1000", "5")


@pytest.mark.parametrize("every", [2, 5])
def test_kills_change_no_further_seed(every: int, tmp_path: Path) -> None:
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    whole = finish(folders[0], tied()).trials()
    assert kill_at_writes(every, lambda: finish(folders[1], tied())) > 3
    assert StudyStore.read(folders[1], tied()).trials() == whole


@pytest.mark.parametrize(
    ("search", "repeats"),
    [
        ({"space": {"model.lora.rank": [2, 4, 8, 16]}}, [None] * 4 + [1, 3]),  # all combinations come first
        ({"budget": {"steps": 240}}, [None] * 4 + [1, 3]),  # a trial makes 40
        ({"trials": 3, "points": [{"model.lora.rank": rank} for rank in (2, 8, 16)]}, [None] * 3),
    ],
)
def test_space_budget_and_points_come_first(search: dict[str, Any], repeats: list[int | None], tmp_path: Path) -> None:
    config = tied(**search)
    for _ in range(2):  # rerunning the command starts nothing
        trials = finish(tmp_path, config).trials()
        assert [trial.repeats for trial in trials] == repeats
        assert total_trials(config, trials) == len(trials)


def test_clear_winner_leaves_the_share_to_new_trials(tmp_path: Path) -> None:
    values = [0.3, 0.99, 0.1, 0.5, 0.2, 0.4, 0.0, 0.0, 0.0]
    trials = finish(tmp_path, tied(), values).trials()
    assert [trial.repeats for trial in trials] == [None] * 6 + [1, 3, None]


def test_confirm_uses_further_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = searched.settings(trials=12, tie_share=0.34)
    searched.played(config, folder := tmp_path / "s")
    study = StudyStore.read(folder, config)
    repeats = [trial for trial in study.trials() if trial.repeats is not None]
    first, *_ = best_first(config, study.trials())
    seeds = [trial.params["seed"] for trial in repeats if trial.repeats == first.number]
    assert seeds
    assert len(confirm.plan(study, folder, 1, len(seeds)).search.points) == len(seeds), "no checkpoint was kept"
    for trial in repeats:
        for name in ("checkpoint.pt", "test.json"):
            (trial_folder(folder, trial.number) / name).write_text('{"labels": {}, "records": []}')
    assert confirm.plan(study, folder, 1, len(seeds)).search.points == []
    [planned] = confirm.plan(study, folder, 1, len(seeds) + 1).search.points
    assert planned["seed"] not in seeds
    confirmation = confirm.confirm(study, folder)
    assert {trial.number: trial.seeds for trial in confirmation.ranked}[first.number] == seeds


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            {"tie_share": 0.2, "space": {"seed": [1, 2]}},
            "search.tie_share: 0.2 is for further seeds, and seed is an axis",
        ),
        ({"tie_share": 0.2, "metrics": ["macro_f1", "steps"]}, "search.tie_share: 0.2, and ties are those of one"),
        ({"tie_share": 1}, "search.tie_share: 1: input should be less than 1"),
    ],
)
def test_bad_tie_share_is_refused_in_one_line(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        parse({"name": "a", "search": search}, "a.yaml")
    assert len(str(refusal.value).splitlines()) <= 2


def test_noise_is_that_between_seeds_once_known() -> None:
    trained = [ties.Trained(0, [0.5, 0.7], 2), ties.Trained(1, [0.4], 1)]
    assert ties.noise(trained, []) == pytest.approx(0.2 / 2**0.5)
