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

OWN = [name for name in presets() if name not in ("research-log-stage-2", "llama-3b-hubert-large")]
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def small(models: Path, corpus: Shards, *more: str) -> list[str]:
    """Any preset on untrained models and a handful of dialogues."""
    return [
        f"data.shards={corpus.folder}",
        f"model.llm.path={models / 'llm'}",
        f"model.encoder.path={models / 'whisper'}",
        "train.epochs=1",
        *more,
    ]


def train(config: Config, point: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one trial of a sweep; its last metrics."""
    reported: list[dict[str, Any]] = []
    resolved = resolve_inputs(config.for_trial(point))
    run_trial(resolved, folder, lambda epoch, metrics: reported.append(metrics), "local", "cpu")
    return reported[-1]


@pytest.mark.parametrize("name", OWN)
def test_every_point_of_a_preset_trains(name: str, models: Path, corpus: Shards, tmp_path: Path) -> None:
    config = load(name, small(models, corpus))
    if not config.search.points:
        config = config.with_values({"search.points": [{}]})
    for number, point in enumerate(config.search.points):
        metrics = train(config, point, tmp_path / str(number))
        assert 0 <= metrics["macro_f1"] <= 1


def test_the_second_stage_starts_from_the_first(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """As docs/model.md has it: the adapter of trial 2, then LoRA beside it, frozen or not."""
    first = load("research-log", small(models, corpus))
    point = first.search.points[2]
    assert point["model.lora.enabled"] is False
    assert first.storage.keep is None  # or its checkpoint would be gone unless it was one of the best
    train(first, point, tmp_path / "trials" / "0002")
    second = load("research-log-stage-2", small(models, corpus, f"model.init_from={tmp_path / 'trials' / '0002'}"))
    for number, point in enumerate(second.search.points):
        train(second, point, tmp_path / str(number))


def test_the_real_preset_runs_on_folders_of_its_kinds(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """In bf16 with checkpointing and a chat template: all that its ids would load, but small."""
    shutil.copytree(models / "llm", tmp_path / "llm")
    settings = json.loads((tmp_path / "llm" / "tokenizer_config.json").read_text())
    (tmp_path / "llm" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    paths = [f"model.llm.path={tmp_path / 'llm'}", f"model.encoder.path={models / 'hubert-layer'}"]
    config = load("llama-3b-hubert-large", [*small(models, corpus), *paths])
    assert config.model.llm.dtype == config.model.precision == "bfloat16"
    for number, point in enumerate(config.search.points):
        train(config, point, tmp_path / str(number))
    train(config, config.search.points[0] | {"model.trainable": "encoder+adapter+lora+tokens"}, tmp_path / "encoder")


def test_a_second_stage_without_its_first_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = sweep("run", "research-log-stage-2")
    assert outcome.code == 2
    assert "runs/research-log/trials/0002" in outcome.err
    assert list(tmp_path.iterdir()) == []
