"""The trials that a search may draw: their enumeration, the structures among them, and the profiles of a dry run."""

from typing import Any

import pytest

from sweep.config.files import load
from sweep.config.schema import Config, parse
from sweep.preflight.trial_profiles import MAX_PROFILES, is_relevant, matching_profiles, trial_profiles
from sweep.search import candidates
from tests.sweep.common import FROZEN, TUNED

SPACE: dict[str, Any] = {
    "model.modality": ["speech", "text"],
    "model.lora.rank": [2, 8, 16],
    "train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "model.trainable": {"choices": ["new", "encoder+new"], "when": {"model.modality": ["speech"]}},
    "model.cls": ["none", "after"],
}
PATHS = {"data": {"shards": "shards"}, "model": {"encoder": {"path": "org/encoder"}, "llm": {"path": "org/llm"}}}


def config(space: dict[str, Any], **search: Any) -> Config:
    return parse({"name": "a", "search": {"space": space, "metric": "loss", **search}} | PATHS, "a")


def test_combinations_follow_conditions() -> None:
    space = SPACE | {
        "model.end_of_audio": {"choices": ["none", "learned"], "when": {"model.cls": ["after"]}},
        "model.adapter.stride": {"choices": [2], "when": {"model.lora.enabled": [False]}},
    }
    keys = ("model.modality", "model.trainable", "model.adapter.stride")
    combined = candidates.candidates(config(space), {key: config(space).search.space[key].choices for key in keys})
    modality, trainable = keys[:2]
    assert combined == [
        ({modality: "speech", trainable: "new"}, 1),
        ({modality: "speech", trainable: "encoder+new"}, 1),
        ({modality: "text"}, 2),  # whichever of the two the axis has
    ]
    end = {"model.end_of_audio": ["none", "learned"]}
    either = candidates.candidates(config(space), end)  # without options for the axis of its condition
    assert [candidate.values for candidate in either] == [{}, *({key: value} for key in end for value in end[key])]
    assert candidates.candidates(config(space), end, most=2) == either[:2]
    assert candidates.candidates(config(space), {"train.learning_rate": []}) == []


def test_structures_are_those_that_the_search_draws() -> None:
    space = {
        "model.modality": ["text", "speech"],
        "model.trainable": {"choices": [FROZEN, TUNED], "when": {"model.modality": ["speech"]}},
        "model.encoder.spec_augment": {"low": 0.1, "high": 0.2, "when": {"model.trainable": [TUNED]}},
        "model.adapter.stride": {"choices": [8], "when": {"model.modality": ["text+speech"]}},
        "train.warmup": [0.0, 0.1],
    }
    points = [{"model.modality": "speech", "model.trainable": FROZEN, "train.warmup": 0.1}]
    speech = {"model.modality": "speech", "model.trainable": FROZEN}
    tuned = speech | {"model.trainable": TUNED}
    low, high = (tuned | {"model.encoder.spec_augment": share} for share in (0.1, 0.2))
    found = list(candidates.structures(config(space, points=points)))
    assert all(structure in found for structure in ({"model.modality": "text"}, speech, low, high))
    assert len(found) == 4
    assert candidates.first_trial(config(space, points=points)).train.warmup == 0.1
    assert candidates.first_trial(config(space)).model.modality == "text"


def test_profiles_merge_trials_of_equal_cost() -> None:
    profiles, left_out = trial_profiles(config(SPACE))
    kinds = [(profile.values["model.modality"], profile.values.get("model.trainable")) for profile in profiles]
    assert kinds == [("speech", "new"), ("speech", "encoder+new"), ("text", None)]
    assert [profile.values["model.lora.rank"] for profile in profiles] == [16] * 3
    assert (left_out, [profile.weight for profile in profiles]) == (0, [0.25, 0.25, 0.5])
    assert all(profile.config.model.lora.rank == 16 and profile.config.search.space == {} for profile in profiles)
    assert len(trial_profiles(config(SPACE), all_values=True)[0]) == 9


def test_profiles_are_sampled_where_there_are_many() -> None:
    keys = ("model.adapter.window", "model.adapter.hidden", "data.history", "train.batch_size", "model.lora.rank")
    space = {key: {"low": 4, "high": 64} for key in keys} | {"model.modality": ["text", "speech", "text+speech"]}
    profiles, left_out = trial_profiles(config(space))
    assert (len(profiles), left_out) == (MAX_PROFILES, 3 * 2**4 - MAX_PROFILES)
    assert trial_profiles(config(space))[0] == profiles
    space |= {f"tasks.{name}": [0.0, 1.0] for name in ("classify", "response", "forecast")}
    space |= {"model.precision": ["float32", "bfloat16"], "model.llm.gradient_checkpointing": [False, True]}
    drawn, _ = trial_profiles(config(space | {"train.losses.hidden": [0.0, 1.0]}))
    assert len(drawn) <= MAX_PROFILES
    assert {profile.values["model.lora.rank"] for profile in drawn} == {64}  # whichever were drawn
    assert candidates.MOST < 3 * 2**9


def test_profiles_are_the_points_where_all_trials_are() -> None:
    points = [{"model.modality": "text", "model.lora.rank": 2}, {"model.modality": "text", "model.lora.rank": 8}]
    listed = config(SPACE, points=points, trials=2)
    [profile] = trial_profiles(listed)[0]
    assert (profile.values, profile.weight) == (points[1], 1)  # the larger rank stands for both
    assert [profile.values for profile in trial_profiles(listed, all_values=True)[0]] == points
    assert len(trial_profiles(listed.with_values({"search.trials": 3}))[0]) == 3


def test_searched_axes_of_presets_affect_the_cost() -> None:
    for preset in ("demo", "annomi", "llama-3b-hubert-large"):
        assert any(is_relevant(key) for key in load(preset).search.space)
    assert not is_relevant("train.learning_rates.encoder")
    assert is_relevant("train.batch_size")


@pytest.mark.parametrize(
    ("values", "indices"),
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
def test_trial_matches_its_profile_or_both_neighbours(values: dict[str, Any], indices: list[int]) -> None:
    known = [
        {"model.modality": "text", "model.lora.rank": 2},
        {"model.modality": "text", "model.lora.rank": 16},
        {"model.modality": "speech", "model.lora.rank": 2, "tasks.response": 1.0},
    ]
    assert matching_profiles(values, known) == indices
