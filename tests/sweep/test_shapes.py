"""Shapes: which settings make one, which are tried, and which of them stand for a trial."""

from pathlib import Path
from typing import Any

import pytest

from data.shards.dataset import Shards
from sweep.config.files import load
from sweep.config.space import SearchConfig
from sweep.preflight.trial_profiles import MAX_PROFILES, is_relevant, matching_profiles, trial_profiles
from sweep.search import candidates
from tests.sweep.tiny import config

SPACE: dict[str, Any] = {
    "model.modality": ["speech", "text"],
    "model.lora.rank": [2, 8, 16],
    "train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "model.trainable": {"choices": ["new", "encoder+new"], "when": {"model.modality": ["speech"]}},
    "model.cls": ["none", "after"],
}


def test_what_changes_neither_time_nor_memory_makes_no_shape(models: Path, corpus: Shards) -> None:
    found, left_out = trial_profiles(config(models, corpus, SPACE))
    assert {(shape.values["model.modality"], shape.values.get("model.trainable")) for shape in found} == {
        ("speech", "new"),
        ("speech", "encoder+new"),
        ("text", None),
    }
    assert [shape.values["model.lora.rank"] for shape in found] == [16] * 3
    assert (left_out, sum(shape.weight for shape in found)) == (0, 1)
    assert {shape.values["model.modality"]: shape.weight for shape in found} == {"speech": 0.25, "text": 0.5}
    assert all(shape.config.model.lora.rank == 16 and shape.config.search.space == {} for shape in found)
    whole, _ = trial_profiles(config(models, corpus, SPACE), all_values=True)
    assert len(whole) == 9


def test_every_axis_that_a_preset_searches_is_known_to_matter_or_not() -> None:
    for preset in ("demo", "annomi", "llama-3b-hubert-large"):
        assert any(is_relevant(key) for key in load(preset).search.space)
    assert not is_relevant("train.learning_rates.encoder")
    assert is_relevant("train.batch_size")


def test_of_too_many_some_are_drawn_and_the_rest_is_counted(models: Path, corpus: Shards) -> None:
    keys = ("model.adapter.window", "model.adapter.hidden", "data.history", "train.batch_size", "model.lora.rank")
    space = {key: {"low": 4, "high": 64} for key in keys} | {"model.modality": ["text", "speech", "text+speech"]}
    found, left_out = trial_profiles(config(models, corpus, space))
    assert (len(found), left_out) == (MAX_PROFILES, 3 * 2**4 - MAX_PROFILES)
    again, _ = trial_profiles(config(models, corpus, space))
    assert [shape.values for shape in again] == [shape.values for shape in found]
    space |= {f"tasks.{name}": [0.0, 1.0] for name in ("classify", "response", "forecast")}
    space |= {"model.precision": ["float32", "bfloat16"], "model.llm.gradient_checkpointing": [False, True]}
    drawn = trial_profiles(config(models, corpus, space | {"train.losses.hidden": [0.0, 1.0]}))[0]
    assert len(drawn) <= MAX_PROFILES
    assert {shape.values["model.lora.rank"] for shape in drawn} == {64}  # whichever were drawn
    assert candidates.MOST < 3 * 2**9


def test_where_all_trials_are_points_nothing_else_is_tried(models: Path, corpus: Shards) -> None:
    points = [{"model.modality": "text", "model.lora.rank": 2}, {"model.modality": "text", "model.lora.rank": 8}]
    own = config(models, corpus, SPACE, search={"space": SPACE, "points": points, "trials": 2})
    [shape] = trial_profiles(own)[0]
    assert (shape.values, shape.weight) == (points[1], 1)  # the larger rank stands for both
    assert [shape.values for shape in trial_profiles(own, all_values=True)[0]] == points
    more = own.with_values({"search.trials": 3})
    assert len(trial_profiles(more)[0]) == 3


@pytest.mark.parametrize(
    ("values", "places"),
    [
        ({"model.modality": "text", "model.lora.rank": 2}, [0]),
        ({"model.modality": "text", "model.lora.rank": 5}, [0, 1]),
        ({"model.modality": "text", "model.lora.rank": 64}, [1]),
        ({"model.modality": "speech", "model.lora.rank": 2, "model.cls": "after"}, [2]),
        ({"model.lora.rank": 2}, [0, 2]),
        ({"model.modality": "text+speech", "model.lora.rank": 2}, []),
        ({"model.modality": "speech", "model.lora.rank": 2, "tasks.response": 0.3}, [2]),
        ({"model.modality": "speech", "model.lora.rank": 2, "tasks.response": 0.0}, []),
    ],
)
def test_a_trial_is_like_its_own_shape_or_like_both_neighbours(values: dict[str, Any], places: list[int]) -> None:
    known = [
        {"model.modality": "text", "model.lora.rank": 2},
        {"model.modality": "text", "model.lora.rank": 16},
        {"model.modality": "speech", "model.lora.rank": 2, "tasks.response": 1.0},
    ]
    assert matching_profiles(values, known) == places


def test_the_rule_of_pruning_says_how_much_of_its_epochs_a_trial_is_trained() -> None:
    def share(trials: int, epochs: int = 4, **pruning: Any) -> float:
        return SearchConfig.model_validate({"pruning": pruning}).expected_share(epochs, trials)

    assert share(10) == pytest.approx((3 + (3 + 7 * 0.55) / 10) / 4)  # one rung, after epoch 3; three go on by rule
    assert share(3) == share(10, audit=1.0) == share(10, epochs=1) == 1
    assert share(100, epochs=8, first_epoch=2, audit=0, after_trials=1) == pytest.approx((2 + 0.5 * 2 + 0.25 * 4) / 8)
    assert SearchConfig.model_validate({"pruning": None}).expected_share(4, 10) == 1
    axis = SearchConfig.model_validate({"space": {"train.epochs": [2, 6]}})
    assert (axis.mean_epochs(5), SearchConfig().mean_epochs(5)) == (4, 5)
