"""Presets: every one of them is consistent, and what it names can be trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.shards.dataset import Shards
from sweep.config.files import load, presets
from sweep.config.schema import Config
from sweep.execution.trial import run_trial
from sweep.preflight.checks import resolve_inputs
from tests.sweep.common import sweep

STAGES = ("research-log", "research-log-stage-2")
NAMES = sorted({*presets()} - {STAGES[1]})
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def small(models: Path, corpus: Shards, tmp_path: Path) -> list[str]:
    """Overrides that train any preset on untrained models, with a chat template, and a handful of dialogues."""
    shutil.copytree(models / "llm", tmp_path / "llm")
    settings = json.loads((tmp_path / "llm" / "tokenizer_config.json").read_text())
    (tmp_path / "llm" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    paths = {"data.shards": corpus.folder, "model.llm.path": tmp_path / "llm", "model.encoder.path": models / "whisper"}
    return ["train.epochs=1", *(f"{key}={path}" for key, path in paths.items())]


def train(config: Config, point: dict[str, Any], folder: Path) -> None:
    """Train one trial of a sweep."""
    reported: list[dict[str, Any]] = []
    resolved = resolve_inputs(config.for_trial(point))
    run_trial(resolved, folder, lambda epoch, metrics: reported.append(metrics), "local", "cpu")
    assert 0 <= reported[-1]["macro_f1"] <= 1


def small_config(name: str, small: list[str], models: Path) -> Config:
    real = name == "llama-3b-hubert-large"  # in bf16 with checkpointing: all that its ids would load, but small
    config = load(name, [*small, f"model.encoder.path={models / 'hubert-layer'}"] if real else small)
    assert (config.model.llm.dtype == config.model.precision == "bfloat16") is real
    return config


@pytest.mark.parametrize("name", NAMES)
def test_structures_of_a_preset_are_built(name: str, small: list[str], models: Path) -> None:
    resolve_inputs(small_config(name, small, models))


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_every_point_of_a_preset_trains(name: str, small: list[str], models: Path, tmp_path: Path) -> None:
    config = small_config(name, small, models)
    tuned = {"model.modality": "speech", "model.trainable": "encoder+adapter+lora+tokens"}
    for number, point in enumerate([*config.search.points, tuned]):
        train(config, point, tmp_path / str(number))


def test_second_stage_starts_from_the_first(small: list[str], tmp_path: Path) -> None:
    """As docs/model.md has it: the adapter of trial 2, then LoRA beside it, frozen or not."""
    first = load(STAGES[0], small)
    point = first.search.points[2]
    assert point["model.lora.enabled"] is False
    assert first.storage.keep is None  # or its checkpoint would be gone unless it was one of the best
    train(first, point, folder := tmp_path / "trials" / "0002")
    second = load(STAGES[1], [*small, f"model.init_from={folder}"])
    resolve_inputs(second)
    train(second, second.search.points[0], tmp_path / "0")


def test_second_stage_without_the_first_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = sweep("run", STAGES[1])
    assert outcome.code == 2
    assert "runs/research-log/trials/0002" in outcome.err
    assert list(tmp_path.iterdir()) == []
