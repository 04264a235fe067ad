"""The report says how much better a search was than random search would have been."""

from collections.abc import Sequence

import numpy as np
import pytest

from sweep.analysis.report.search_quality import _best_of, search_quality
from sweep.config.schema import Config
from sweep.search.study import TrialRecord
from tests.sweep.common import settings

RATE, RANK = "train.learning_rate", "model.lora.rank"
SPACE = {RATE: {"low": 1e-4, "high": 1e-2, "log": True}, RANK: [2, 4, 8, 16]}


def searched(rates: Sequence[float]) -> tuple[Config, list[TrialRecord]]:
    """Trials whose value falls with the distance of the rate to 1e-3."""
    config, trials = settings(space=SPACE, points=[], trials=len(rates)), []
    for number, rate in enumerate(rates):
        params = {RATE: float(rate), RANK: (2, 4, 8, 16)[number % 4]}
        value = 0.8 - 0.2 * abs(float(np.log10(rate / 1e-3)))
        curve = dict.fromkeys(range(1, 5), value)
        trials.append(TrialRecord(number, "COMPLETE", params, value, {}, 40, curve, ""))
    return config, trials


def test_expected_best_is_that_of_many_draws() -> None:
    values, generator = np.sort(np.random.default_rng(0).normal(size=200)), np.random.default_rng(1)
    drawn = generator.choice(values, (20_000, 5)).max(1).mean()
    assert _best_of(values, 5) == pytest.approx(drawn, abs=0.02)
    assert _best_of(values, 1) == pytest.approx(values.mean())


def test_search_near_the_best_rates_beats_random_search() -> None:
    """The model knows the space from a first half at random, and the second half is near the best rate."""
    rates = [*np.geomspace(1e-4, 1e-2, 10), *np.geomspace(9.9e-4, 1.01e-3, 6)]
    config, trials = searched(rates)
    quality = search_quality(config, trials)
    assert quality is not None
    assert (quality.cost[-1], quality.best[-1]) == (16.0, pytest.approx(0.8, abs=0.01))
    assert quality.random[0] == pytest.approx(0.7, abs=0.06), "one random trial is a typical one"
    assert list(quality.random) == sorted(quality.random)
    assert quality.best[9] - quality.random[9] < 0.05, "the first half was drawn as random search does"
    assert quality.random[-1] < 0.8 + quality.error
    assert quality.describe("macro_f1").startswith("after the cost of 16 full trainings the best macro_f1 is 0.8")


def test_too_few_or_equal_trials_say_nothing() -> None:
    config, trials = searched([1e-4, 1e-3, 1e-2])
    assert search_quality(config, trials) is None
    assert search_quality(*searched([1e-3] * 10)) is None
