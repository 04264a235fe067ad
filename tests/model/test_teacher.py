"""The teacher of a distillation: read or computed, alone or beside others, a trial gets the same bits."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.config import DataConfig
from data.loading.array_files import missing
from data.loading.examples import Example
from data.loading.feature_files import parts as feature_parts
from data.loading.tasks import answer_sets
from data.loading.teacher_files import TeacherFiles, parts
from data.shards.dataset import Shards
from model.config import LossConfig
from model.encoders.frozen_features import Job as FeatureJob
from model.encoders.frozen_features import recipe as feature_recipe
from model.evaluation.split_data import TrialData
from model.objectives.losses import answer_losses
from model.objectives.teacher import Job, lesson, lessons, likeliest, llm_digest, read, recipe
from model.speech_llm.language_model import load_llm
from model.speech_llm.speech_llm import SpeechLLM
from model.training.random_state import seed_everything
from model.training.trainer import fit
from tests.model.common import build, settings
from tests.model.losses import mixed
from tests.model.trials import CONFIG, TWO, Trial, same_end

SHORT = CONFIG.model_copy(update={"epochs": 1, "losses": LossConfig(distillation=0.5, temperature=2.0)})
TEXT = {"modality": "text", "trainable": "lora+tokens"}


def computed(trial: Trial, models: Path, shards: Shards, root: Path) -> Path:
    """The folder with what the teacher of a trial says."""
    made = recipe(trial.config(models), trial.train.losses.temperature, "cpu")
    folder = root / made.key
    model = SpeechLLM(trial.config(models), answer_sets(shards, trial.tasks.active()), "meta")
    own = lessons(model.prompt_builder, model.max_positions, shards, trial.data, list(model.tasks))
    for part in missing(folder, parts(shards, own)):
        told = Job(part, [own[item] for item in part.rows], made, folder, 1)().to_pylist()
        assert told[0]["size"] == part.size
        assert told[0]["bytes"] > 0
    return folder


def train(
    trial: Trial, models: Path, shards: Shards, folder: Path, taught: Path | None, features: Path | None = None
) -> None:
    seed_everything(trial.seed)
    answers = answer_sets(shards, trial.tasks.active())
    model = SpeechLLM(trial.config(models), answers, encodes=features is None)
    data = TrialData.open(shards, model, trial.data, ("train", "val"), teacher=True, features=features, taught=taught)
    fit(model, data, trial.train, trial.tasks, trial.seed, folder, lambda epoch, metrics: None)


@pytest.mark.parametrize(
    "trial",
    [
        Trial(model=TEXT, train=SHORT),
        Trial(tasks=TWO, train=SHORT, model={"cls": "after"}),
        Trial(model={"modality": "speech", "lora": {"dropout": 0.2}}, train=SHORT),
        Trial(model=TEXT | {"precision": "bfloat16", "llm": {"dtype": "bfloat16"}}, train=SHORT),
        Trial(model=TEXT, train=SHORT.model_copy(update={"token_budget": 60}), data=DataConfig(last_text="omitted")),
    ],
    ids=["text", "two tasks, both", "speech", "mixed precision", "small budget"],
)
def test_a_trial_ends_with_the_same_bits_with_and_without_files(
    trial: Trial, models: Path, corpus: Shards, tmp_path: Path
) -> None:
    llm = {"path": str(models / "llm")} | trial.model.get("llm", {})
    trial = replace(trial, model=trial.model | {"llm": llm})
    found = computed(trial, models, corpus, tmp_path / "teacher")
    train(trial, models, corpus, tmp_path / "live", None)
    train(trial, models, corpus, tmp_path / "read", found)
    assert same_end(tmp_path / "live", tmp_path / "read")


def test_words_and_features_are_read_together(models: Path, corpus: Shards, tmp_path: Path) -> None:
    trial = Trial(train=SHORT)
    found = computed(trial, models, corpus, tmp_path / "teacher")
    made = feature_recipe(trial.config(models), trial.data, "cpu")
    for part in feature_parts(corpus, trial.data):
        FeatureJob(corpus, part, trial.data, {tmp_path / "features": made}, 1)()
    train(trial, models, corpus, tmp_path / "live", None)
    train(trial, models, corpus, tmp_path / "read", found, tmp_path / "features")
    assert same_end(tmp_path / "live", tmp_path / "read")


def test_the_files_are_what_is_read(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests above would compare a trial with itself."""
    trial = Trial(model=TEXT, train=SHORT)
    found = computed(trial, models, corpus, tmp_path / "teacher")
    with monkeypatch.context() as patch:
        patch.setattr("model.objectives.teacher.read", None)  # nobody calls it
        train(trial, models, corpus, tmp_path / "read", found)
    losses = SHORT.losses.model_copy(update={"temperature": 0.5})
    other = computed(replace(trial, train=SHORT.model_copy(update={"losses": losses})), models, corpus, tmp_path)
    assert other.name != found.name
    for path, wrong in zip(sorted(found.glob("*.arrow")), sorted(other.glob("*.arrow")), strict=True):
        assert path.name == wrong.name  # the same is read
        shutil.copy(wrong, path)
    train(trial, models, corpus, tmp_path / "wrong", found)
    assert not same_end(tmp_path / "read", tmp_path / "wrong")


@torch.no_grad()
def test_what_is_said_of_an_example_depends_on_no_other(models: Path, examples: list[Example]) -> None:
    """To the bit, with files or without; the losses then differ by what the student's batch does to them."""
    model, config = build(models), LossConfig(distillation=1.0)
    llm = load_llm(str(models / "llm"), "float32", "cpu")
    asked = mixed(examples)
    said = [likeliest(read(llm, lesson(model.prompt_builder, example))[0], 1.0) for example in asked]
    brought = [
        replace(example, taught=(ids.numpy(), log_probs.numpy()))
        for example, (ids, log_probs) in zip(asked, said, strict=True)
    ]
    for chosen in (slice(0, 1), slice(2, 5), slice(None, None, -1), slice(None)):
        live, files = (answer_losses(model, part[chosen], config).distillation_B for part in (asked, brought))
        assert torch.equal(live, files)
    # A part of a batch may have files only, and hidden states are no part of them.
    half = [*asked[:3], *brought[3:]]
    assert torch.equal(answer_losses(model, half, config).distillation_B, live)
    both = LossConfig(distillation=1.0, hidden=1.0)
    one, other = (answer_losses(model, part, both) for part in (asked, brought))
    assert torch.equal(one.weighted_sum(both), other.weighted_sum(both))


def test_a_lesson_is_read_and_predicted_where_the_model_predicts(models: Path, examples: list[Example]) -> None:
    model = build(models, cls="after", modality="text+speech")
    for example in mixed(examples):
        own, answer = lesson(model.prompt_builder, example), model.answer(example)
        targets = [target for target in answer.targets if target >= 0]
        assert own.predicted == len(targets) == answer.predicted
        assert own.ids[len(own.ids) - own.predicted + 1 :].tolist() == targets[:-1]
        assert (own.ids >= 0).all()


def test_a_key_names_all_that_a_teacher_says_depends_on_and_nothing_else(models: Path) -> None:
    def key(temperature: float = 1.0, device: str = "cpu", **changed: Any) -> str:
        return recipe(settings(models, **changed), temperature, device).key

    same = [key(), key(lora={"rank": 16}), key(modality="speech"), key(cls="none"), key(prompt={"history_tokens": 9})]
    assert len(set(same)) == 1
    llm = {"path": str(models / "llm")}
    others = [key(2.0), key(device="cuda"), key(precision="bfloat16"), key(llm=llm | {"dtype": "bfloat16"})]
    assert len({*same, *others}) == 5


def test_an_llm_is_known_by_its_weights_and_settings_wherever_it_lies(models: Path, tmp_path: Path) -> None:
    source = models / "llm"
    for name in ("copy", "weights", "settings"):
        shutil.copytree(source, tmp_path / name)
    assert llm_digest(str(tmp_path / "copy"), "float32") == llm_digest(str(source), "float32")
    tensors = load_file(tmp_path / "weights" / "model.safetensors")
    name = min(tensors)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, tmp_path / "weights" / "model.safetensors", {"format": "pt"})
    path = tmp_path / "settings" / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert len({llm_digest(str(tmp_path / name), "float32") for name in ("copy", "weights", "settings")}) == 3


def test_a_token_takes_half_a_kilobyte(models: Path, corpus: Shards, tmp_path: Path) -> None:
    trial = Trial(model=TEXT, train=SHORT)
    folder = computed(trial, models, corpus, tmp_path)
    model = SpeechLLM(trial.config(models), answer_sets(corpus, trial.tasks.active()), "meta")
    own = lessons(model.prompt_builder, model.max_positions, corpus, trial.data, list(model.tasks))
    files = TeacherFiles(folder, parts(corpus, own))
    for item, one in own.items():
        ids, log_probs = files.read(item) or (np.empty(0), np.empty(0))
        assert (ids.shape, log_probs.shape) == ((one.predicted, 64), (one.predicted, 65))
        assert ids.nbytes + log_probs.nbytes == 516 * one.predicted
