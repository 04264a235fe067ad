"""Of trials that are tied within noise, the cheapest one is recommended."""

import json
from pathlib import Path

import numpy as np
import pytest

from model.evaluation.bootstrap import paired_difference, summed_metric
from model.evaluation.metrics import Record
from sweep.analysis.recommendation import recommend
from sweep.config.diff import claim_folder
from sweep.config.paths import trial_folder
from sweep.search.study import StudyStore
from tests.conftest import LABELS
from tests.sweep import searched
from tests.sweep.common import sweep


def predicted(skill: float, seed: int) -> list[Record]:
    """Predictions of which a share is right, on the same items for each seed."""
    truth, drawn = np.random.default_rng(0).choice(LABELS, 400), np.random.default_rng(seed)
    said = [str(label) if drawn.random() < skill else str(drawn.choice(LABELS)) for label in truth]
    return [
        Record(f"s{i % 20}/{i}", "classify", f"s{i % 20}", "client", None, str(truth[i]), said[i], (), 1.0, 2)
        for i in range(len(said))
    ]


def searched_with(folder: Path, *trials: tuple[float, float]) -> StudyStore:
    """A sweep whose trials have a skill and a cost in seconds each."""
    config, metric = searched.settings(), summed_metric("macro_f1", LABELS, {})
    assert metric is not None
    claim_folder(config, folder)
    study = StudyStore.open(folder, config)
    for skill, seconds in trials:
        asked = study.ask([], 99)
        assert asked is not None
        (path := trial_folder(folder, asked.number)).mkdir(parents=True)
        searched.write(path, records := predicted(skill, asked.number))
        value = float(metric.value(metric.item_sums(records).sum(0)))
        study.report(asked.number, 2, {"macro_f1": value, "seconds": seconds, "steps": 5})
        study.complete(asked.number)
    return study


def test_cheapest_of_the_tied_trials_is_recommended(tmp_path: Path) -> None:
    study = searched_with(tmp_path, (0.82, 100), (0.81, 60), (0.81, 40), (0.4, 1))
    found = recommend(study.config, tmp_path, study.trials())
    assert found is not None
    assert found.trial.number == 2, "the last one is cheaper, and not as good"
    assert "within noise" in found.line
    shown = sweep("best", tmp_path)
    assert found.line in shown.out.replace("\n", "")
    assert json.loads(sweep("best", tmp_path, "--json").out)["recommended"] == 2


@pytest.mark.parametrize("trials", [[(0.8, 100)], [(0.9, 100), (0.5, 10)], [(0.8, 100), (0.8, 99)]])
def test_best_trial_is_recommended_where_none_is_cheaper(trials: list[tuple[float, float]], tmp_path: Path) -> None:
    study = searched_with(tmp_path, *trials)
    assert recommend(study.config, tmp_path, study.trials()) is None


def test_error_of_a_difference_is_that_of_repeated_corpora() -> None:
    """The jackknife agrees with the spread of the difference over many corpora."""
    metric = summed_metric("accuracy", LABELS, {})
    assert metric is not None
    pairs = [(predicted(0.8, 2 * seed), predicted(0.6, 2 * seed + 1)) for seed in range(60)]
    found = [paired_difference(first, second, metric) for first, second in pairs]
    spread = float(np.std([difference for difference, _ in found]))
    assert np.mean([error for _, error in found]) == pytest.approx(spread, rel=0.25)
    with pytest.raises(ValueError, match="different items"):
        paired_difference(pairs[0][0], pairs[0][1][1:], metric)
