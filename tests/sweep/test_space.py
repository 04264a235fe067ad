"""The search space: what an axis draws and when, and the rule that prunes trials."""

from collections.abc import Sequence
from math import exp, inf, nan
from random import Random
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from data.errors import ConfigError
from sweep.config.schema import parse
from sweep.config.search import PruningConfig, SearchConfig
from sweep.config.space import Axis
from sweep.search import candidates
from sweep.search.pruning import better, is_audited, prune
from tests.sweep.common import FROZEN, TUNED

SPEECH = {"model.modality": ["speech", "text+speech"]}
RULE = PruningConfig(first_epoch=2, keep=0.5, after_trials=4)


def search(pruning: dict[str, Any] | None = None, **space: Any) -> SearchConfig:
    axes = {key.replace("__", "."): axis for key, axis in space.items()}
    return SearchConfig.model_validate({"space": axes, "pruning": pruning})


def draw(space: SearchConfig, modality: str = "speech", **wanted: Any) -> dict[str, Any]:
    config = parse({"name": "a", "model": {"modality": modality}}, "test").model_copy(update={"search": space})
    return candidates.draw(config, {key.replace("__", "."): value for key, value in wanted.items()})


def test_axes_draw_by_kind() -> None:
    axes = search(
        a=["x", 2, None],
        b={"low": 1, "high": 9, "step": 4},
        c={"low": 2, "high": 64, "log": True},
        d={"low": 1e-4, "high": 1e-2, "log": True},
        e={"low": 0, "high": 0.5, "step": 0.1},
    )
    values = axes.suggest(trial := optuna.create_study().ask(), {})
    assert list(values) == list("abcde")
    assert all(axes.space[key].contains(value) for key, value in values.items())
    assert trial.distributions == {key: axis.distribution() for key, axis in axes.space.items()}
    assert trial.distributions == {
        "a": CategoricalDistribution(("x", 2, None)),
        "b": IntDistribution(1, 9, step=4),
        "c": IntDistribution(2, 64, log=True),
        "d": FloatDistribution(1e-4, 1e-2, log=True),
        "e": FloatDistribution(0.0, 0.5, step=0.1),
    }


def test_axis_contains_its_ends() -> None:
    whole, part = Axis(low=1, high=4), Axis(choices=[1, "x", None])
    assert [value for value in (0, 1, True, 2.5, 4, 4.1, nan, "2", None) if whole.contains(value)] == [1, 4]
    assert Axis(low=1.0, high=4).contains(2.5)
    assert [value for value in (1, "x", None, 2, "None") if part.contains(value)] == [1, "x", None]
    assert (whole.extremes(), part.extremes()) == ([1, 4], [1, "x", None])
    assert (whole.by_sign(), Axis(low=0.0, high=1.0).by_sign()) == ([4], [0.0, 1.0])


def test_axis_follows_its_conditions() -> None:
    """On another axis, on a setting that is no axis, and on several of them."""
    end = {"choices": ["none"], "when": SPEECH}
    space = search(model__modality=["text", "speech"], model__end_of_audio=end)
    assert draw(space, model__modality="text") == {"model.modality": "text"}
    assert draw(space, model__modality="speech") == {"model.modality": "speech", "model.end_of_audio": "none"}
    alone = search(model__end_of_audio=end)
    assert (draw(alone, "speech"), draw(alone, "text")) == ({"model.end_of_audio": "none"}, {})
    space = search(
        train__warmup={"low": 0.1, "high": 0.5, "when": SPEECH | {"model.trainable": [TUNED]}},
        model__trainable={"choices": [FROZEN, TUNED], "when": SPEECH},
        model__modality=["text", "speech"],
    )
    assert "train.warmup" in draw(space, model__modality="speech", model__trainable=TUNED)
    assert "train.warmup" not in draw(space, model__modality="speech", model__trainable=FROZEN)
    assert draw(space, model__modality="text", model__trainable=TUNED) == {"model.modality": "text"}


def test_conditions_in_a_cycle_are_refused() -> None:
    space = {
        "model.cls": {"choices": ["none"], "when": SPEECH},
        "model.modality": {"choices": ["text"], "when": {"model.cls": ["none"]}},
    }
    with pytest.raises(ConfigError, match="form a cycle; remove one"):
        parse({"name": "a", "search": {"space": space}}, "test")


def test_finite_values_beat_nan_and_nan_beats_nothing() -> None:
    for direction in ("maximize", "minimize"):
        assert all(better(value, nan, direction) for value in (0.0, -inf, inf))
        assert not any(better(*pair, direction) for pair in ((nan, 0.0), (nan, nan), (0.5, 0.5)))
    assert (better(2, 1, "maximize"), better(2, 1, "minimize"), better(1, 2, "minimize")) == (True, False, True)


def test_losses_and_errors_are_minimized() -> None:
    small = ("loss", "total_loss", "forecast/loss", "perplexity", "response/perplexity", "ece", "quality/ece")
    large = ("macro_f1", "accuracy", "weighted_f1", "forecast/macro_f1", "bleu", "response/rouge_l")
    for metric in small + large:
        assert SearchConfig(metric=metric).direction == ("minimize" if metric in small else "maximize"), metric


@pytest.mark.parametrize(
    ("values", "direction", "rule", "kept"),
    [
        ([0.4, 0.1, 0.3, 0.2], "maximize", RULE, [0.4, 0.3]),
        ([0.4, 0.1, 0.3, 0.2], "minimize", RULE, [0.1, 0.2]),
        ([0.4, 0.1, 0.3, 0.2], "maximize", PruningConfig(keep=0.25), [0.4]),
        ([0.4, 0.1, 0.3, 0.2], "maximize", PruningConfig(keep=0.01), [0.4]),
        ([0.5, 0.4, 0.3, 0.2, 0.1], "maximize", RULE, [0.5, 0.4]),  # the smaller half
        ([0.5] * 6, "maximize", RULE, [0.5] * 6),  # ties are kept
        ([0.5, 0.5, 0.5, 0.1], "maximize", RULE, [0.5, 0.5, 0.5]),
        ([0.1, 0.9, 0.9], "maximize", RULE, [0.1, 0.9, 0.9]),  # too few
        ([nan, nan, 0.1, 0.2], "maximize", RULE, [0.1, 0.2]),
        ([nan, nan, 0.1, 0.2], "minimize", RULE, [0.1, 0.2]),
        ([nan] * 4, "maximize", RULE, [nan] * 4),
    ],
)
def test_pruning_keeps_the_better_share(
    values: list[float], direction: str, rule: PruningConfig, kept: list[float]
) -> None:
    assert repr([value for value in values if not prune(value, values, direction, rule)]) == repr(kept)


def rungs(epochs: int, first: int | None = None, **space: Any) -> list[int]:
    return search({"first_epoch": first}, **space).rungs(epochs)


def test_rungs_double_and_end_before_the_last_epoch() -> None:
    assert [rungs(34, first) for first in (1, 2, 3)] == [[1, 2, 4, 8, 16, 32], [2, 4, 8, 16, 32], [3, 6, 12, 24]]
    assert (rungs(32, 2)[-1], rungs(2, 2), rungs(2, 5), search().rungs(8)) == (16, [], [], [])
    assert [rungs(epochs) for epochs in (1, 2, 3, 4, 5, 8, 20)] == [[], [], [2], [3], [3], [5], [12]]


def test_rungs_follow_the_largest_number_of_epochs() -> None:
    assert rungs(5, train__epochs=[2, 12, 4]) == rungs(5, train__epochs={"low": 2, "high": 12}) == [8]
    assert rungs(40, train__epochs=[2, 12]) == [8], "no trial has the setting's number of epochs"
    assert rungs(40, train__epochs={"choices": [2, 12], "when": SPEECH}) == [24], "text trials have it"
    assert rungs(5, 2, train__epochs=[2, 12]) == [2, 4, 8]


def test_expected_share_follows_the_pruning_rule() -> None:
    def share(trials: int, epochs: int = 4, **pruning: Any) -> float:
        return search(pruning).expected_share(epochs, trials)

    assert share(10) == pytest.approx((3 + (3 + 7 * 0.55) / 10) / 4)  # one rung, after epoch 3; three pass it anyway
    assert share(3) == share(10, audit=1.0) == share(10, epochs=1) == search().expected_share(4, 10) == 1
    assert share(100, epochs=8, first_epoch=2, audit=0, after_trials=1) == pytest.approx((2 + 0.5 * 2 + 0.25 * 4) / 8)
    assert (search(train__epochs=[2, 6]).mean_epochs(5), search().mean_epochs(5)) == (4, 5)


def crossing(rng: Random, epochs: int, trials: int = 12) -> list[list[float]]:
    """Return learning curves: what ends higher rises more slowly, as a rule."""
    curves = []
    for _ in range(trials):
        end, mixed = rng.gauss(0, 1), rng.gauss(0, 1)
        tau = epochs / 6 * exp((0.8 * end + 0.6 * mixed) / 2)
        best = 0.7 + 0.1 * end
        curves.append([best * (1 - exp(-epoch / tau)) + rng.gauss(0, 0.01) for epoch in range(1, epochs + 1)])
    return curves


def winner_completes(curves: Sequence[Sequence[float]], rungs: Sequence[int], slots: int = 2) -> bool:
    """Return whether the trial with the best last value is complete, where two trials run at a time."""
    rule, last = PruningConfig(), len(curves[0])
    seen: dict[int, list[float]] = {epoch: [] for epoch in rungs}
    running, waiting, complete = list[list[int]](), list(range(len(curves))), []
    while running or waiting:
        while waiting and len(running) < slots:
            running.append([waiting.pop(0), 0])
        for trial in list(running):
            trial[1] += 1
            number, epoch = trial
            value = curves[number][epoch - 1]
            seen.get(epoch, []).append(value)
            if epoch == last:
                complete.append(number)
            if epoch == last or (epoch in rungs and prune(value, seen[epoch], "maximize", rule)):
                running.remove(trial)
    return max(range(len(curves)), key=lambda number: curves[number][-1]) in complete


@pytest.mark.parametrize("epochs", [5, 12])
def test_default_first_rung_keeps_slow_winners(epochs: int) -> None:
    """In 100 sweeps: a first rung at epoch 1 loses more than every second winner, the default's hardly any."""

    def kept(rungs: Sequence[int]) -> float:
        return sum(winner_completes(crossing(Random(seed), epochs), rungs) for seed in range(100)) / 100

    assert kept(rungs(epochs, 1)) < 0.5
    assert kept(rungs(epochs)) > 0.93


def audited(trials: int, seed: int, share: float) -> list[int]:
    return [number for number in range(trials) if is_audited(number, seed, share)]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.15, 0.25, 0.3, 0.5, 0.9, 1.0])
def test_audit_takes_its_share_of_any_number_of_trials(share: float) -> None:
    for seed in (0, 1, 77, 2**32 - 1):
        numbers = audited(64, seed, share)
        for trials in range(1, 65):
            assert abs(sum(number < trials for number in numbers) - share * trials) < 1


def test_seed_decides_which_trials_are_audited() -> None:
    first = [audited(10, seed, 0.1) for seed in range(50)]
    assert all(len(numbers) == 1 for numbers in first)
    assert {numbers[0] for numbers in first} == {4, 5, 6, 7, 8, 9}, "before them there are no peers"
    assert audited(30, 7, 0.1) == [number + step for number in first[7] for step in (0, 10, 20)]
    assert len(audited(6, 0, 0.1)) == 1


def test_steps_end_at_the_end_of_a_range() -> None:
    """In floating point, three steps of 0.1 are more than 0.3, which Optuna refuses."""
    for low, high, step in ((0.0, 0.3, 0.1), (0.1, 0.75, 0.1)):
        axis = Axis(low=low, high=high, step=step)
        assert all(axis.distribution()._contains(value) for value in axis.values() or ())


def test_steps_of_an_axis_hold_for_points() -> None:
    search = {"space": {"train.warmup": {"low": 0.0, "high": 0.5, "step": 0.1}}, "points": [{"train.warmup": 0.3}]}
    axis = parse({"name": "a", "search": search}, "a").search.space["train.warmup"]
    assert [axis.contains(value) for value in (0.0, 0.1, 0.3, 0.5, 0.35, 0.6)] == [True] * 4 + [False] * 2
