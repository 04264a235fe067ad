"""Which encoder features and teacher logits a sweep requests from the cache: those that a trial may read."""

from pathlib import Path
from typing import Any

import pytest

from sweep.config.resolve import resolve
from sweep.preflight.feature_cache import (
    ENCODER_FEATURES,
    TEACHER_LOGITS,
    describe,
)
from tests.sweep.cached import UPPER, Sweeps, requests, small_corpus
from tests.sweep.common import FROZEN, TUNED
from tests.sweep.tiny import config

ADAPTED = {"model.encoder.lora.rank": 2, "model.encoder.lora.layers": 1}


@pytest.mark.parametrize(
    ("kind", "values", "requested"),
    [
        (ENCODER_FEATURES, {}, True),
        (ENCODER_FEATURES, {"data.sound": "zeroed"}, True),
        (ENCODER_FEATURES, {"model.modality": "text"}, False),
        (ENCODER_FEATURES, {"model.trainable": TUNED}, False),
        (ENCODER_FEATURES, {"storage.features": "live"}, False),
        (ENCODER_FEATURES, {"model.trainable": UPPER}, True),
        (ENCODER_FEATURES, {"model.trainable": f"{FROZEN}+encoder.*.layers.*"}, False),
        (ENCODER_FEATURES, {"model.trainable": UPPER, "model.encoder.dropout": 0.1}, False),
        (ENCODER_FEATURES, {"model.trainable": UPPER, "model.encoder.spec_augment": 0.1}, False),
        (ENCODER_FEATURES, {"model.trainable": "new", "model.encoder.lora.rank": 2}, False),
        (ENCODER_FEATURES, {"model.trainable": "new", **ADAPTED}, True),
        (ENCODER_FEATURES, {"data.augment.speeds": [0.9, 1.1]}, False),
        (ENCODER_FEATURES, {"model.trainable": UPPER, "data.augment.noise_db": [0, 20]}, False),
        (TEACHER_LOGITS, {}, True),
        (TEACHER_LOGITS, {"train.losses.distillation": 0.0}, False),
        (TEACHER_LOGITS, {"train.losses.hidden": 0.1}, False),
        (TEACHER_LOGITS, {"train.losses.distillation": 0.0, "train.losses.hidden": 0.1}, False),
        (TEACHER_LOGITS, {"storage.features": "live"}, False),
    ],
)
def test_only_constant_outputs_are_requested(
    kind: Any, values: dict[str, Any], requested: bool, sweeps: Sweeps, tmp_path: Path
) -> None:
    base = sweeps.features() if kind is ENCODER_FEATURES else sweeps.logits()
    assert bool(kind.requests(resolve(base.with_values(values)), tmp_path)) == requested


def test_features_of_all_trials_are_requested(sweeps: Sweeps, tmp_path: Path) -> None:
    space = {
        "model.modality": ["speech", "text"],
        "model.trainable": [FROZEN, TUNED],
        "model.adapter.window": {"low": 4, "high": 8, "step": 2},
        "model.adapter.stride": [2, 4],
        "model.lora.rank": [2, 4, 8],
        "data.sound": ["recorded", "shuffled", "zeroed"],
    }
    found = requests(sweeps.features(space), tmp_path)
    assert {(request.key.sound, request.key.pool) for request in found} == {
        (sound, (window, stride)) for sound in ("recorded", "zeroed") for window in (4, 6, 8) for stride in (2, 4)
    }
    assert len({request.folder for request in found}) == len(found)
    assert requests(sweeps.features({"model.trainable": [TUNED]}, model={"trainable": TUNED}), tmp_path) == []
    continuous = {"data.snr_db": {"low": 0.0, "high": 9.0}}
    assert requests(sweeps.features(continuous), tmp_path) == []  # such trials encode by themselves


def test_conditional_axis_leaves_others_their_features(sweeps: Sweeps, tmp_path: Path) -> None:
    space = {
        "model.trainable": [FROZEN, UPPER, TUNED],
        "model.encoder.spec_augment": {"low": 0.1, "high": 0.2, "when": {"model.trainable": [TUNED]}},
        "model.encoder.dropout": {"low": 0.0, "high": 0.2},
        "data.sound": ["recorded", "noisy"],
        "data.snr_db": {"low": 0.0, "high": 9.0, "when": {"data.sound": ["noisy"]}},
    }
    found = requests(sweeps.features(space), tmp_path)
    keys = {(request.key.layers, request.key.pool, request.key.sound) for request in found}
    assert keys == {(0, (8, 4), "recorded"), (1, None, "recorded")}
    [upper] = [request for request in found if request.key.layers]
    assert "features of whisper up to layer 1 of 2: " in "".join(describe([upper]))


@pytest.mark.parametrize(
    ("space", "count"),
    [
        ({}, 1),
        ({"model.lora.rank": [2, 4], "train.learning_rate": {"low": 1e-4, "high": 1e-2}}, 1),
        ({"train.losses.distillation": {"low": 0.0, "high": 1.0}}, 1),
        ({"train.losses.distillation": [0.0, 0.1, 0.5]}, 1),
        ({"train.losses.next_token": {"low": 0.0, "high": 1.0}}, 1),
        ({"train.losses.hidden": [0.0, 0.5], "train.losses.temperature": [1.0, 2.0]}, 2),
        ({"model.precision": ["float32", "bfloat16"], "data.history": [0, 1, 2]}, 6),
        ({"data.last_text": ["given", "omitted"], "tasks.response": {"low": 0.0, "high": 1.0}}, 4),
        ({"model.prompt.separator": ["\n", " "], "model.llm.max_text_tokens": [20, 512]}, 4),
        ({"train.losses.temperature": {"low": 1.0, "high": 2.0}}, 0),  # such trials run the teacher
        ({"model.prompt.format": ["plain", "chat"]}, 1),  # the tokenizer has no template
        ({"model.llm.max_text_tokens": [1, 512]}, 1),  # an input that does not fit is an error of its trial
    ],
)
def test_logits_of_all_trials_are_requested(space: dict[str, Any], count: int, sweeps: Sweeps, tmp_path: Path) -> None:
    assert len(requests(sweeps.logits(space), tmp_path)) == count


def test_points_alone_request_what_they_read(sweeps: Sweeps, tmp_path: Path) -> None:
    stride, modality = "model.adapter.stride", "model.modality"
    space = {stride: [2, 4, 8], modality: ["speech", "text"]}
    points = [{stride: 2, modality: "text"}, {stride: 4, modality: "speech"}, {modality: "text"}]
    for trials, pools in ((3, [4]), (4, [2, 4, 8])):
        found = requests(sweeps.features(space, search={"points": points, "trials": trials}), tmp_path)
        assert [request.key.pool[1] for request in found] == pools


def test_folds_and_shuffled_clips_share_one_request(models: Path, tmp_path: Path) -> None:
    shards = small_corpus(tmp_path / "shards", split={"folds": 3})
    space = {"data.fold": [0, 1, 2], "data.sound": ["recorded", "shuffled"]}
    [request] = requests(config(models, shards, space), tmp_path)
    assert {row for file in request.files for row in file.rows} == {
        row for row, samples in enumerate(shards.columns["n_samples"]) if samples > 0
    }
    [alone] = requests(config(models, shards), tmp_path)
    assert 0 < sum(len(file.rows) for file in alone.files) < sum(len(file.rows) for file in request.files)
