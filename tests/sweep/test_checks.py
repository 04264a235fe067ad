"""What `run` and `train` check before they write anything: every structure a search may ask for is built."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.corpus.config import CorpusConfig
from data.errors import ConfigError, DataError, UserError
from data.preparation.build import prepare
from data.shards.dataset import Shards
from sweep.config.loader import flat
from sweep.config.resolve import MAKERS, ResolvedConfig
from sweep.config.schema import parse
from sweep.preflight.checks import resolve_inputs, skeleton
from sweep.search.space_checks import refusals
from tests.data.common import corpus as by_hand
from tests.model.families import make
from tests.sweep.common import FROZEN, refused

WRONG = [
    ("model.trainable", "adaptr+lora", "model.trainable: 'adaptr' matches no parameter that can train"),
    ("model.trainable", "encoder.*.7.*+adapter+lora", "model.trainable: 'encoder.*.7.*' matches no parameter that can"),
    ("model.trainable", "lora", "model.trainable: adapter is frozen and was never loaded, so adapter."),
    ("model.lora.targets", ["v_prj"], "model.lora.targets: v_prj match no linear layer"),
    ("model.llm.path", "/nowhere", "model.llm.path: /nowhere: no such folder; check the path"),
    ("model.encoder.path", "/nowhere", "model.encoder.path: /nowhere: no such folder; check the path"),
    ("model.adapter.init_from", "/nowhere.pt", "model.adapter.init_from: /nowhere.pt: no such file"),
    ("model.init_from", "/nowhere", "model.init_from: /nowhere: no such checkpoint"),
    ("model.prompt.format", "chat", "model.prompt.format: the tokenizer of "),
    ("train.token_budget", 3, "train.token_budget: 3 is smaller than the longest example, "),
    ("tasks.therapist_behaviour", 1, "{shards}: the train split has no items for the task therapist_behaviour"),
]
Check = Callable[..., ResolvedConfig]


@pytest.fixture
def check(here: Path) -> Check:
    """Return a function that checks the settings of good.yaml, with some changed and others searched."""
    good = json.loads((here / "good.yaml").read_text())

    def resolved(changed: dict[str, Any], **search: Any) -> ResolvedConfig:
        config = parse(good, "good").with_values(changed)
        return resolve_inputs(parse(config.model_dump() | {"search": search | {"metric": "loss"}}, "good"))

    return resolved


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_what_cannot_be_built_is_refused(key: str, value: Any, message: str, check: Check, corpus: Shards) -> None:
    """As a setting, and as one value of an axis."""
    message = message.format(shards=corpus.folder)
    with pytest.raises(UserError) as error:
        check({key: value})
    assert str(error.value).startswith(message)
    assert len(str(error.value).splitlines()) == 1
    if not isinstance(value, list):
        right = flat(check({}))[key]
        with pytest.raises(UserError) as error:
            check({}, space={"train.warmup": {"low": 0.0, "high": 0.5}, key: [right, value]})
        assert str(error.value).startswith(message)


def test_family_that_cannot_work_is_refused(check: Check, tmp_path: Path) -> None:
    """ALiBi takes no mask for a trie of labels: without the check, a trial would train for an epoch first."""
    check({"model.llm.path": str(make("falcon", tmp_path / "rotary")), "model.lora.targets": "all-linear"})
    alibi = make("falcon-alibi", tmp_path / "alibi")
    with pytest.raises(ConfigError, match=r"model\.llm\.path: .* is a falcon model, which cannot score labels that"):
        check({"model.llm.path": str(alibi), "model.lora.targets": "all-linear"})


@pytest.mark.parametrize("verb", ["train", "run"])
def test_refused_commands_leave_nothing(verb: str, here: Path) -> None:
    message = refused(here, verb, "good.yaml", "--set", "model.trainable=adaptr+lora", "--out", "new")
    assert message.startswith("model.trainable: 'adaptr' matches no parameter that can train")
    assert len(message.splitlines()) == 1


def test_axis_is_built_only_under_its_condition(check: Check) -> None:
    """A text model has no encoder: what an axis says of it is looked at where the axis is drawn, and nowhere else."""
    axis = {"choices": [FROZEN, "encoder.*.layers.0.*+adapter+lora"], "when": {"model.modality": ["speech"]}}
    check({}, space={"model.modality": ["text", "speech"], "model.trainable": axis})
    check({"model.modality": "text", "model.encoder.path": "/nowhere"}, space={"model.trainable": axis})
    wrong = {"choices": [FROZEN, "encoder.*.layers.7.*+adapter+lora"], "when": {"model.modality": ["speech"]}}
    with pytest.raises(ConfigError, match=r"layers\.7"):
        check({}, space={"model.modality": ["text", "speech"], "model.trainable": wrong})


def test_point_is_built_as_it_is(check: Check) -> None:
    """Each value of these axes goes with the first of the others; together they do not."""
    space = {"model.modality": ["text", "speech"], "model.trainable": [FROZEN, "lora"]}
    check({}, space=space)
    with pytest.raises(ConfigError, match="adapter is frozen and was never loaded"):
        check({}, space=space, points=[{"model.modality": "speech", "model.trainable": "lora"}])


def test_built_in_names_on_an_axis_are_made(
    check: Check, here: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        MAKERS, "tiny-llama", lambda folder: shutil.copytree(models / "llm", folder, dirs_exist_ok=True)
    )
    check({}, space={"model.llm.path": [str(models / "llm"), "builtin:tiny-llama"]})
    [made] = (tmp_path / "cache").glob("[!.]*")  # beside a hidden lock
    assert made.name.startswith("tiny-llama-")
    shutil.rmtree(made)
    monkeypatch.setitem(MAKERS, "tiny-llama", lambda folder: (folder / "no such folder/file").touch())
    with pytest.raises(OSError, match="builtin:tiny-llama cannot be made"):
        check({}, space={"model.llm.path": [str(models / "llm"), "builtin:tiny-llama"]})
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_train_and_val_splits_need_every_task(check: Check, tmp_path: Path) -> None:
    dialogues = ["C:change! T:question! C:neutral!"] * 6
    for missing in ("val", "test"):
        made = by_hand(dialogues)
        for conversation, split in zip(made.conversations, [*["train"] * 4, "val", "test"], strict=True):
            conversation.split, conversation.quality = split, None if split == missing else "high"
        prepare(made, tmp_path / missing)
    check({"tasks.quality": 1.0, "data.shards": str(tmp_path / "test")})  # only `evaluate` reads it
    with pytest.raises(DataError, match="the val split has no items for the task quality"):
        check({"tasks.quality": 1.0, "data.shards": str(tmp_path / "val")})


def test_every_fold_needs_every_task(check: Check, tmp_path: Path) -> None:
    made = by_hand(["C:change! T:question! C:neutral!"] * 6)
    listed = ["conversation,split", *(f"s{session},{session % 3}" for session in range(6))]
    (tmp_path / "folds.csv").write_text("\n".join(listed))
    for session in (1, 4):
        made.conversations[session].quality = None
    config = CorpusConfig.model_validate({"split": {"folds": 3, "file": str(tmp_path / "folds.csv")}})
    shards = prepare(made, tmp_path / "folds", config)
    wanted: dict[str, Any] = {"tasks.quality": 1.0, "data.shards": str(shards.folder), "data.fold": 1}
    check(wanted)  # fold 1 is for test, 2 for validation
    with pytest.raises(DataError, match="the val split has no items for the task quality"):
        check(wanted, space={"data.fold": [1, 0, 2]}, points=[{"data.fold": fold} for fold in (1, 0, 2)])


def test_searched_modality_needs_audio(check: Check, tmp_path: Path) -> None:
    prepare(by_hand(["C:change T:question C:neutral"] * 6), tmp_path / "silent")
    silent = {"data.shards": str(tmp_path / "silent"), "model.modality": "text"}
    check(silent)
    with pytest.raises(UserError, match=r"model\.modality text / speech needs audio"):
        check(silent, space={"model.modality": ["text", "speech"]})


def test_skeleton_has_every_parameter_and_no_weight(check: Check) -> None:
    model = skeleton(check({"model.trainable": "encoder+adapter+lora+tokens", "model.cls": "after"}))
    assert all(parameter.is_meta for parameter in model.parameters())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"cls", "adapter.linear.weight"} <= trained
    assert any(name.startswith("encoder.") for name in trained)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"tasks": {"classify": 0, "response": 1}}, "train.labels: votes is for tasks that predict codes"),
        ({"train": {"losses": {"next_token": 0, "distillation": 1}}}, "train.labels: votes has no effect with train."),
    ],
)
def test_votes_without_a_loss_on_codes_are_refused(changed: dict[str, Any], problem: str) -> None:
    """As a setting, and as a value of an axis that no trial could use."""
    tree = {"name": "a", **changed}
    with pytest.raises(ConfigError) as error:
        parse({**tree, "train": {**changed.get("train", {}), "labels": "votes"}}, "a")
    assert problem in str(error.value)
    config = parse({**tree, "search": {"space": {"train.labels": ["majority", "votes"]}}}, "a")
    [refusal] = refusals(config)
    assert refusal.startswith(f"search.space.train.labels: no trial can use 'votes': {problem}")


def test_votes_that_a_corpus_lacks_are_refused(check: Check, corpus: Shards) -> None:
    message = f"{corpus.folder}: train.labels=votes needs turns that several annotators coded, and none of the "
    for changed, space in ({"train.labels": "votes"}, {}), ({}, {"train.labels": ["majority", "votes"]}):
        with pytest.raises(UserError) as error:
            check(changed, space=space)
        assert str(error.value).startswith(message)
        assert len(str(error.value).splitlines()) == 1
