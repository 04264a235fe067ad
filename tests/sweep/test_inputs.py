"""What `run` and `train` look at before they write anything: every structure a search may ask for is built."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.corpus.config import CorpusConfig
from data.errors import ConfigError, DataError, UserError
from data.preparation.build import prepare
from data.shards.dataset import Shards
from sweep.config.loader import flat
from sweep.config.resolve import MAKERS, _make
from sweep.config.schema import parse
from sweep.preflight.checks import resolve_inputs, skeleton
from sweep.search.candidates import structures
from tests.data.common import corpus as by_hand
from tests.sweep.common import FROZEN, TUNED, refused

WRONG = [
    ("model.trainable", "adaptr+lora", "model.trainable: 'adaptr' matches no parameter that can train"),
    ("model.trainable", "encoder.*.7.*+adapter+lora", "model.trainable: 'encoder.*.7.*' matches no parameter that can"),
    ("model.trainable", "lora", "model.trainable: adapter is frozen and was never loaded, so adapter."),
    ("model.trainable", "adapter", "model.trainable: lora is frozen and was never loaded, so llm."),
    ("model.lora.targets", ["v_prj"], "model.lora.targets: v_prj match no linear layer"),
    ("model.llm.path", "/nowhere", "model.llm.path: cannot load a tokenizer from /nowhere"),
    ("model.encoder.path", "/nowhere", "model.encoder.path: cannot load an encoder from /nowhere"),
    ("model.adapter.init_from", "/nowhere.pt", "model.adapter.init_from: /nowhere.pt: no such file"),
    ("model.init_from", "/nowhere", "model.init_from: /nowhere: no such checkpoint"),
    ("model.prompt.format", "chat", "model.prompt.format: the tokenizer of "),
    ("tasks.therapist_behaviour", 1, "{shards}: the train split has no items for the task therapist_behaviour"),
]


@pytest.fixture
def ask(here: Path) -> Any:
    """Resolves the settings of good.yaml, with some changed and others searched."""
    good = json.loads((here / "good.yaml").read_text())

    def resolve(changed: dict[str, Any], **search: Any) -> Any:
        config = parse(good, "good").with_values(changed)
        return resolve_inputs(parse(config.model_dump() | {"search": search | {"metric": "loss"}}, "good"))

    return resolve


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
@pytest.mark.parametrize("verb", ["train", "run"])
def test_what_cannot_be_built_is_one_error_and_leaves_nothing(
    verb: str, key: str, value: Any, message: str, here: Path, corpus: Shards
) -> None:
    found = refused(here, verb, "good.yaml", "--set", f"{key}={json.dumps(value)}", "--out", "new")
    assert found.startswith(message.format(shards=corpus.folder))
    assert len(found.splitlines()) == 1


@pytest.mark.parametrize(("key", "value", "message"), [wrong for wrong in WRONG if not isinstance(wrong[1], list)])
def test_one_wrong_value_of_an_axis_is_enough(key: str, value: Any, message: str, here: Path, corpus: Shards) -> None:
    good = json.loads((here / "good.yaml").read_text())
    right = flat(parse(good, "good"))[key]
    space = {"model.cls": ["none", "after"], "train.warmup": {"low": 0.0, "high": 0.5}, key: [right, value]}
    (here / "axes.yaml").write_text(json.dumps(good | {"search": {"space": space}}))
    assert refused(here, "run", "axes.yaml", "--out", "new").startswith(message.format(shards=corpus.folder))


def test_an_axis_is_built_under_its_condition_only(ask: Any) -> None:
    """A text model has no encoder: what an axis says of it is looked at where the axis is drawn, and nowhere else."""
    axis = {"choices": [FROZEN, "encoder.*.layers.0.*+adapter+lora"], "when": {"model.modality": ["speech"]}}
    ask({}, space={"model.modality": ["text", "speech"], "model.trainable": axis})
    ask({"model.modality": "text", "model.encoder.path": "/nowhere"}, space={"model.trainable": axis})
    wrong = {"choices": [FROZEN, "encoder.*.layers.7.*+adapter+lora"], "when": {"model.modality": ["speech"]}}
    with pytest.raises(ConfigError, match=r"layers\.7"):
        ask({}, space={"model.modality": ["text", "speech"], "model.trainable": wrong})


def test_the_structures_of_a_search_are_those_that_it_draws() -> None:
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
    found = list(structures(parse({"name": "a", "search": {"space": space, "points": points}}, "a")))
    assert all(structure in found for structure in ({"model.modality": "text"}, speech, low, high))
    assert len(found) == 4


def test_a_point_is_built_as_it_is(ask: Any) -> None:
    """Each value of these axes goes with the first of the others; together they do not."""
    space = {"model.modality": ["text", "speech"], "model.trainable": [FROZEN, "lora"]}
    ask({}, space=space)
    with pytest.raises(ConfigError, match="adapter is frozen and was never loaded"):
        ask({}, space=space, points=[{"model.modality": "speech", "model.trainable": "lora"}])


def test_built_in_names_on_an_axis_are_made(
    ask: Any, here: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(
        MAKERS, "tiny-llama", lambda folder: shutil.copytree(models / "llm", folder, dirs_exist_ok=True)
    )
    monkeypatch.setattr("sweep.config.resolve._make_all", lambda names: [_make(name) for name in names])
    ask({}, space={"model.llm.path": [str(models / "llm"), "builtin:tiny-llama"]})
    [made] = (tmp_path / "cache").iterdir()
    assert made.name.startswith("tiny-llama-")


def test_every_split_that_is_trained_or_chosen_by_needs_every_task(ask: Any, tmp_path: Path) -> None:
    dialogues = ["C:change! T:question! C:neutral!"] * 6
    for missing in ("val", "test"):
        made = by_hand(dialogues)
        for conversation, split in zip(made.conversations, [*["train"] * 4, "val", "test"], strict=True):
            conversation.split, conversation.quality = split, None if split == missing else "high"
        prepare(made, tmp_path / missing)
    ask({"tasks.quality": 1.0, "data.shards": str(tmp_path / "test")})  # only `evaluate` reads it
    with pytest.raises(DataError, match="the val split has no items for the task quality"):
        ask({"tasks.quality": 1.0, "data.shards": str(tmp_path / "val")})


def test_every_fold_needs_every_task(ask: Any, tmp_path: Path) -> None:
    made = by_hand(["C:change! T:question! C:neutral!"] * 6)
    listed = ["conversation,split", *(f"s{session},{session % 3}" for session in range(6))]
    (tmp_path / "folds.csv").write_text("\n".join(listed))
    for session in (1, 4):
        made.conversations[session].quality = None
    config = CorpusConfig.model_validate({"split": {"folds": 3, "file": str(tmp_path / "folds.csv")}})
    shards = prepare(made, tmp_path / "folds", config)
    wanted: dict[str, Any] = {"tasks.quality": 1.0, "data.shards": str(shards.folder), "data.fold": 1}
    ask(wanted)  # fold 1 is for test, 2 for validation
    with pytest.raises(DataError, match="the val split has no items for the task quality"):
        ask(wanted, space={"data.fold": [1, 0, 2]}, points=[{"data.fold": fold} for fold in (1, 0, 2)])


def test_a_searched_modality_needs_sound(ask: Any, tmp_path: Path) -> None:
    prepare(by_hand(["C:change T:question C:neutral"] * 6), tmp_path / "silent")
    silent = {"data.shards": str(tmp_path / "silent"), "model.modality": "text"}
    ask(silent)
    with pytest.raises(UserError, match=r"model\.modality text / speech needs sound"):
        ask(silent, space={"model.modality": ["text", "speech"]})


def test_a_skeleton_has_every_parameter_and_no_weight(ask: Any) -> None:
    model = skeleton(ask({"model.trainable": "encoder+adapter+lora+tokens", "model.cls": "after"}))
    assert all(parameter.is_meta for parameter in model.parameters())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"cls", "adapter.linear.weight"} <= trained
    assert any(name.startswith("encoder.") for name in trained)
