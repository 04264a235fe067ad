"""The search space: what an axis draws and when, and the rule by which losers end early."""

from collections.abc import Sequence
from math import exp, inf, nan
from random import Random
from typing import Any

import pytest

from data.errors import ConfigError
from sweep.config.loader import flat
from sweep.config.schema import parse
from sweep.config.space import Axis, PruningConfig, SearchConfig
from sweep.search.pruning import better, is_audited, prune
from tests.sweep.common import FROZEN, TUNED

SPEECH = {"model.modality": ["speech", "text+speech"]}
RULE = PruningConfig(first_epoch=2, keep=0.5, after_trials=4)


class Hand:
    """A sampler that draws what it is told, else the first or lowest value, and notes what it was asked for."""

    def __init__(self, **told: Any) -> None:
        self.told = {name.replace("__", "."): value for name, value in told.items()}
        self.asked: dict[str, tuple[Any, ...]] = {}

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        self.asked[name] = tuple(choices)
        return self.told.get(name, choices[0])

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        self.asked[name] = (int, low, high, step, log)
        return self.told.get(name, low)

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        self.asked[name] = (float, low, high, step, log)
        return self.told.get(name, low)


def search(**space: Any) -> SearchConfig:
    return SearchConfig.model_validate({"space": {key.replace("__", "."): axis for key, axis in space.items()}})


def draw(space: SearchConfig, base: dict[str, Any] | None = None, **told: Any) -> dict[str, Any]:
    return space.suggest(Hand(**told), base if base is not None else flat(parse({"name": "a"}, "test")))


def test_axes_draw_by_kind() -> None:
    hand = Hand()
    axes = search(
        a=["x", 2, None],
        b={"low": 1, "high": 9, "step": 4},
        c={"low": 2, "high": 64, "log": True},
        d={"low": 1e-4, "high": 1e-2, "log": True},
        e={"low": 0, "high": 0.5, "step": 0.1},
    )
    assert axes.suggest(hand, {}) == {"a": "x", "b": 1, "c": 2, "d": 1e-4, "e": 0.0}
    assert hand.asked == {
        "a": ("x", 2, None),
        "b": (int, 1, 9, 4, False),
        "c": (int, 2, 64, 1, True),
        "d": (float, 1e-4, 1e-2, None, True),
        "e": (float, 0.0, 0.5, 0.1, False),
    }


def test_the_ends_of_an_axis_belong_to_it() -> None:
    whole, part = Axis(low=1, high=4), Axis(choices=[1, "x", None])
    assert [value for value in (0, 1, True, 2.5, 4, 4.1, nan, "2", None) if whole.contains(value)] == [1, 4]
    assert Axis(low=1.0, high=4).contains(2.5)
    assert [value for value in (1, "x", None, 2, "None") if part.contains(value)] == [1, "x", None]
    assert (whole.extremes(), part.extremes()) == ([1, 4], [1, "x", None])


def test_a_conditional_axis_follows_the_axis_it_names() -> None:
    space = search(model__modality=["text", "speech"], model__end_of_audio={"choices": ["none"], "when": SPEECH})
    assert draw(space, model__modality="text") == {"model.modality": "text"}
    assert draw(space, model__modality="speech") == {"model.modality": "speech", "model.end_of_audio": "none"}


def test_a_condition_may_name_a_setting_that_is_no_axis() -> None:
    space = search(model__end_of_audio={"choices": ["none"], "when": SPEECH})
    for modality, drawn in {"speech": {"model.end_of_audio": "none"}, "text": {}}.items():
        assert draw(space, flat(parse({"name": "a", "model": {"modality": modality}}, "test"))) == drawn


def test_all_conditions_must_hold() -> None:
    conditions = SPEECH | {"model.trainable": [TUNED]}
    space = search(
        model__modality=["text", "speech"],
        model__trainable={"choices": [FROZEN, TUNED], "when": SPEECH},
        train__warmup={"low": 0.1, "high": 0.5, "when": conditions},
    )
    assert "train.warmup" in draw(space, model__modality="speech", model__trainable=TUNED)
    assert "train.warmup" not in draw(space, model__modality="speech", model__trainable=FROZEN)
    # The axis of what trains is not drawn for text, so its setting is the configuration's, without the encoder.
    assert draw(space, model__modality="text", model__trainable=TUNED) == {"model.modality": "text"}


def test_a_condition_on_a_later_axis_is_obeyed_or_refused() -> None:
    space = {
        "model.end_of_audio": {"choices": ["none"], "when": SPEECH},
        "model.modality": ["text", "speech"],
    }
    try:
        config = parse({"name": "a", "search": {"space": space}}, "test")
    except ConfigError:
        return
    assert "model.end_of_audio" not in draw(config.search, model__modality="text")


def test_a_number_beats_nan_and_nan_beats_nothing() -> None:
    for direction in ("maximize", "minimize"):
        assert better(0.0, nan, direction)
        assert better(-inf, nan, direction)
        assert better(inf, nan, direction)
        assert not better(nan, 0.0, direction)
        assert not better(nan, nan, direction)
        assert not better(0.5, 0.5, direction)
    assert better(2, 1, "maximize")
    assert not better(2, 1, "minimize")
    assert better(1, 2, "minimize")


def test_losses_and_errors_shall_be_small() -> None:
    small = ("loss", "total_loss", "forecast/loss", "perplexity", "response/perplexity", "ece", "quality/ece")
    large = ("macro_f1", "accuracy", "weighted_f1", "forecast/macro_f1", "bleu", "response/rouge_l")
    for metric in small + large:
        assert SearchConfig(metric=metric).direction == ("minimize" if metric in small else "maximize"), metric


def test_pruning_keeps_the_better_share() -> None:
    values = [0.4, 0.1, 0.3, 0.2]
    assert [value for value in values if not prune(value, values, "maximize", RULE)] == [0.4, 0.3]
    assert [value for value in values if not prune(value, values, "minimize", RULE)] == [0.1, 0.2]
    quarter = PruningConfig(keep=0.25)
    assert [value for value in values if not prune(value, values, "maximize", quarter)] == [0.4]
    nearly_none = PruningConfig(keep=0.01)
    assert [value for value in values if not prune(value, values, "maximize", nearly_none)] == [0.4]


def test_an_odd_number_of_trials_keeps_the_smaller_half() -> None:
    values = [0.5, 0.4, 0.3, 0.2, 0.1]
    assert [value for value in values if not prune(value, values, "maximize", RULE)] == [0.5, 0.4]


def test_too_few_peers_prune_nobody() -> None:
    assert not prune(0.1, [0.1, 0.9, 0.9], "maximize", RULE)
    assert prune(0.1, [0.1, 0.9, 0.9, 0.9], "maximize", RULE)
    assert not prune(nan, [nan, 0.9, 0.9], "maximize", RULE)


def test_ties_go_on() -> None:
    assert not prune(0.5, [0.5] * 6, "maximize", RULE)
    values = [0.5, 0.5, 0.5, 0.1]
    assert [value for value in values if not prune(value, values, "maximize", RULE)] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_nan_is_the_worst_value_and_displaces_nobody(direction: str) -> None:
    assert prune(nan, [nan, 0.1, 0.2, 0.3], direction, RULE)
    values = [nan, nan, 0.1, 0.2]
    assert not any(prune(value, values, direction, RULE) for value in (0.1, 0.2))
    assert prune(nan, values, direction, RULE)
    assert not prune(nan, [nan] * 4, direction, RULE)


def rungs(epochs: int, first: int | None = None, **space: Any) -> list[int]:
    tree = {"pruning": {"first_epoch": first}, "space": {key.replace("__", "."): axis for key, axis in space.items()}}
    return SearchConfig.model_validate(tree).rungs(epochs)


def test_rungs_double_and_the_last_epoch_is_none() -> None:
    assert [rungs(34, first) for first in (1, 2, 3)] == [[1, 2, 4, 8, 16, 32], [2, 4, 8, 16, 32], [3, 6, 12, 24]]
    assert (rungs(32, 2)[-1], rungs(2, 2), rungs(2, 5)) == (16, [], [])
    assert SearchConfig(pruning=None).rungs(8) == []


def test_the_first_rung_comes_after_three_fifths_of_the_epochs_if_nothing_is_said() -> None:
    assert [rungs(epochs) for epochs in (1, 2, 3, 4, 5, 8, 20)] == [[], [], [2], [3], [3], [5], [12]]


def test_rungs_are_the_same_for_all_trials_where_epochs_are_searched() -> None:
    assert rungs(5, train__epochs=[2, 12, 4]) == [8]
    assert rungs(5, train__epochs={"low": 2, "high": 12}) == [8]
    assert rungs(40, train__epochs=[2, 12]) == [8], "no trial has the setting's own number"
    some = {"choices": [2, 12], "when": SPEECH}
    assert rungs(40, train__epochs=some) == [24], "the others have"
    assert rungs(5, 2, train__epochs=[2, 12]) == [2, 4, 8]


def crossing(rng: Random, epochs: int, trials: int = 12) -> list[list[float]]:
    """Learning curves: what ends higher rises more slowly, as a rule."""
    curves = []
    for _ in range(trials):
        end, mixed = rng.gauss(0, 1), rng.gauss(0, 1)
        tau = epochs / 6 * exp((0.8 * end + 0.6 * mixed) / 2)
        best = 0.7 + 0.1 * end
        curves.append([best * (1 - exp(-epoch / tau)) + rng.gauss(0, 0.01) for epoch in range(1, epochs + 1)])
    return curves


def winner_lives(curves: Sequence[Sequence[float]], rungs: Sequence[int], slots: int = 2) -> bool:
    """Whether the best of the last values is among the trials that are left, where some run at the same time."""
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


@pytest.mark.parametrize("epochs", [5, 8, 12, 20])
def test_the_first_rung_is_late_enough_where_curves_cross(epochs: int) -> None:
    """In 100 sweeps: a first rung at epoch 1 loses more than every second winner, the default's hardly any."""

    def kept(rungs: Sequence[int]) -> float:
        return sum(winner_lives(crossing(Random(seed), epochs), rungs) for seed in range(100)) / 100

    assert kept(rungs(epochs, 1)) < 0.5
    assert kept(rungs(epochs)) > 0.93


def chosen(trials: int, seed: int, share: float) -> list[int]:
    return [number for number in range(trials) if is_audited(number, seed, share)]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.15, 0.25, 0.3, 0.5, 0.9, 1.0])
def test_the_audit_takes_the_share_of_any_number_of_trials(share: float) -> None:
    for seed in (0, 1, 77, 2**32 - 1):
        numbers = chosen(64, seed, share)
        for trials in range(1, 65):
            assert abs(sum(number < trials for number in numbers) - share * trials) < 1


def test_one_of_ten_is_audited_and_the_seed_says_which() -> None:
    found = [chosen(10, seed, 0.1) for seed in range(50)]
    assert all(len(numbers) == 1 for numbers in found)
    assert {numbers[0] for numbers in found} == {4, 5, 6, 7, 8, 9}, "before them there are no peers"
    assert chosen(30, 7, 0.1) == [number + step for number in chosen(10, 7, 0.1) for step in (0, 10, 20)]
    assert len(chosen(6, 0, 0.1)) == 1
