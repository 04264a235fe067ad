"""Trials that start from earlier trials: what is loaded, what is kept, what is refused."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.errors import ConfigError
from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.checkpoints.checkpoint import CheckpointError, trained_tensors
from model.config import TrainConfig
from model.encoders.loading import load_encoder
from model.evaluation.evaluator import evaluate
from model.training.trainer import fit
from tests.model.common import close
from tests.model.trials import NEW, ONE, Trial

SHORT = TrainConfig(epochs=1, batch_size=8, learning_rate=3e-3, checkpoint_steps=1)
FIRST = Trial(model={"trainable": "adapter+tokens", "lora": {"enabled": False}}, train=SHORT)
SECOND = partial(Trial, train=SHORT, seed=8)


@pytest.fixture(scope="module")
def first(models: Path, corpus: Shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trial that trained only the adapter and the learned vectors."""
    folder = tmp_path_factory.mktemp("first")
    FIRST.run(models, corpus, folder)
    return folder


@pytest.fixture
def own_first(first: Path, tmp_path: Path) -> Path:
    """A copy of it that may be changed."""
    return Path(shutil.copytree(first, tmp_path / "first"))


def second(source: Path, **changed: Any) -> Trial:
    """A trial that starts from another one and trains only LoRA."""
    return SECOND(model={"trainable": "lora", "init_from": str(source)} | changed)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = checkpoint.load(folder / "checkpoint.pt")["tensors"]
    return tensors


def corpus_of(shards: Shards) -> str:
    return f"trained on corpus {shards.fingerprint}"


def link(folder: Path) -> dict[str, str]:
    path = folder / "checkpoint.pt"
    return {"path": str(path), "digest": checkpoint.load(path)["digest"]}


def test_second_stage_starts_from_the_first(first: Path, models: Path, corpus: Shards, tmp_path: Path) -> None:
    """It trains on top of it, and its checkpoint evaluates to the predictions that it wrote."""
    before = tensors_of(first)
    assert before.keys() == {"adapter.linear.weight", "adapter.linear.bias", "end_of_audio", "cls"}
    trial = second(first)
    model, data = trial.start(models, corpus)
    assert model.parents == second(first / "checkpoint.pt").start(models, corpus)[0].parents == [link(first)]
    assert model.sources["adapter"] == f"{first}: 4 of 4 tensors matched; left out: none; {corpus_of(corpus)}"
    fit(model, data, trial.train, ONE, trial.seed, tmp_path, lambda epoch, metrics: None)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[key], tensor) for key, tensor in before.items())
    assert not any(parameters[key].requires_grad for key in before)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["parents"] == [link(first)]
    assert all("lora_" in key for key in state["tensors"])
    assert any(tensor.any() for key, tensor in state["tensors"].items() if "lora_B" in key)
    model, data = SECOND(model=second(first).model, seed=99).start(models, corpus)  # all else random is loaded
    checkpoint.restore(model, state)
    written = json.loads((tmp_path / "predictions.json").read_text())["records"]
    records = [record.as_dict() | {"scores": list(record.scores)} for record in evaluate(model, data, "val", 16_384)]
    assert records == written


def test_third_stage_has_the_lineage_of_both_before_it(
    first: Path, models: Path, corpus: Shards, tmp_path: Path
) -> None:
    second(first).run(models, corpus, tmp_path / "second")
    third = SECOND(model={"trainable": NEW, "init_from": str(tmp_path / "second")})
    model, _ = third.start(models, corpus)
    parameters = dict(model.named_parameters())
    expected = tensors_of(first) | tensors_of(tmp_path / "second")
    assert all(torch.equal(parameters[name], tensor) for name, tensor in expected.items())
    assert trained_tensors(model).keys() == expected.keys()
    third.run(models, corpus, tmp_path / "third")
    parents = checkpoint.load(tmp_path / "third" / "checkpoint.pt")["parents"]
    assert parents == [link(first), link(tmp_path / "second")]
    fourth, _ = second(tmp_path / "third").start(models, corpus)
    assert len(fourth.parents) == 3
    assert torch.equal(fourth.adapter.linear.weight, tensors_of(tmp_path / "third")["adapter.linear.weight"])


def test_parent_that_has_changed_is_refused(own_first: Path, models: Path, corpus: Shards, tmp_path: Path) -> None:
    """By its child, and by trials that start from its child."""
    child = second(own_first)
    child.run(models, corpus, tmp_path / "second")
    grandchild = second(tmp_path / "second")
    grandchild.start(models, corpus)
    (own_first / "checkpoint.pt").unlink()
    Trial(model=FIRST.model, train=SHORT, seed=1).run(models, corpus, own_first)
    expected = rf"{own_first}/checkpoint\.pt: has changed since .* put the former checkpoint back$"
    with pytest.raises(CheckpointError, match=expected):
        grandchild.start(models, corpus)
    with pytest.raises(CheckpointError, match=expected):
        child.run(models, corpus, tmp_path / "second")
    (own_first / "checkpoint.pt").unlink()
    with pytest.raises(CheckpointError, match=rf"{own_first}/checkpoint\.pt: no such checkpoint"):
        grandchild.start(models, corpus)


def test_resume_with_other_parents_is_refused(first: Path, models: Path, corpus: Shards, tmp_path: Path) -> None:
    SECOND(model={"init_from": str(first)}).run(models, corpus, tmp_path)
    with pytest.raises(CheckpointError, match=r"configuration: it started from 1 earlier trials, and model\.init"):
        SECOND().run(models, corpus, tmp_path)


def test_tensors_without_a_match_are_refused_unless_allowed(first: Path, models: Path, corpus: Shards) -> None:
    report = f"{first}: 3 of 4 tensors matched; left out: cls"
    with pytest.raises(CheckpointError) as error:
        second(first, cls="none").start(models, corpus)
    assert str(error.value) == (
        f"model.init_from: {report}; use the settings of that trial, or allow it with model.init_partial=true"
    )
    model, _ = second(first, cls="none", init_partial=True).start(models, corpus)
    assert model.sources["adapter"] == f"{report}; {corpus_of(corpus)}"
    assert torch.equal(model.adapter.linear.weight, tensors_of(first)["adapter.linear.weight"])


TEXT = {"modality": "text", "cls": "none", "end_of_audio": "none"}
SHAPES = r"adapter\.linear\.weight is \[32, 32\] in .* and \[32, 64\] here; use the settings of that trial$"


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (TEXT, r"0 of 4 tensors matched; .*; use the settings of that trial$"),
        (TEXT | {"init_partial": True}, r"0 of 4 tensors matched; .*; use the settings of that trial$"),
        ({"adapter": {"kind": "stack", "window": 2, "stride": 2}, "init_partial": True}, SHAPES),
        ({"adapter": {"window": 4, "stride": 4}}, r"model\.init_from: .* has adapter with .*, and this model with .*;"),
        ({"trainable": "adapter+tokens"}, r"lora is frozen and was never loaded"),
    ],
    ids=["nothing", "nothing-partial", "shape", "meaning", "never-trained"],
)
def test_trial_that_does_not_fit_is_refused(
    changed: dict[str, Any], match: str, first: Path, models: Path, corpus: Shards
) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=match) as error:
        second(first, **changed).start(models, corpus)
    assert "\n" not in str(error.value)


def test_missing_trial_is_one_line(models: Path, corpus: Shards, tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(
            CheckpointError, match=r"^model\.init_from: .*: no such checkpoint; train it first, or name another trial$"
        ) as error:
            second(source).start(models, corpus)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["whisper", "hubert-group"])
def test_encoder_of_an_earlier_stage_leaves_the_shared_one(
    kind: str, models: Path, corpus: Shards, tmp_path: Path
) -> None:
    base = load_encoder(str(models / kind), "cpu", "float32")
    before = {name: tensor.clone() for name, tensor in base.named_parameters()}
    versions = [tensor._version for tensor in base.parameters()]
    stage = {"trainable": "encoder+adapter+tokens", "lora": {"enabled": False}}
    Trial(kind, stage, train=SHORT).run(models, corpus, tmp_path / "first")
    trial = SECOND(kind, {"trainable": "lora", "init_from": str(tmp_path / "first")})
    model, data = trial.start(models, corpus)
    trained = {name: tensor for name, tensor in tensors_of(tmp_path / "first").items() if name.startswith("encoder.")}
    parameters = dict(model.named_parameters())
    assert all(
        torch.equal(parameters[name], tensor) and not parameters[name].requires_grad for name, tensor in trained.items()
    )
    assert any(not torch.equal(tensor, before[name.removeprefix("encoder.")]) for name, tensor in trained.items())
    (examples,) = data.read("val", [[0, 1]])
    plain, _ = SECOND(kind, {"trainable": NEW}).start(models, corpus)
    plain.adapter.load_state_dict(model.adapter.state_dict())
    with torch.no_grad():
        assert not close(torch.cat(model.eval().clips(examples)), torch.cat(plain.eval().clips(examples)), 1e-3)
    frozen = {name: tensor.clone() for name, tensor in parameters.items() if name.startswith("encoder.")}
    fit(model, data, SHORT, ONE, 8, tmp_path / "second", lambda epoch, metrics: None)
    assert all(torch.equal(parameters[name], tensor) for name, tensor in frozen.items())
    assert [tensor._version for tensor in base.parameters()] == versions
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.named_parameters())


def test_lora_adapts_an_llm_that_an_earlier_stage_trained(models: Path, corpus: Shards, tmp_path: Path) -> None:
    whole = Trial(model={"trainable": "llm+adapter+tokens", "lora": {"enabled": False}}, train=SHORT)
    whole.run(models, corpus, tmp_path)
    parameters = dict(second(tmp_path).start(models, corpus)[0].named_parameters())
    name = "layers.0.self_attn.q_proj"
    trained = tensors_of(tmp_path)[f"llm.model.{name}.weight"]
    assert torch.equal(parameters[f"llm.base_model.model.model.{name}.base_layer.weight"], trained)
    assert torch.equal(
        parameters["llm.base_model.model.model.embed_tokens.weight"],
        tensors_of(tmp_path)["llm.model.embed_tokens.weight"],
    )


def test_changed_file_of_a_frozen_adapter_is_refused(first: Path, models: Path, corpus: Shards, tmp_path: Path) -> None:
    file = tmp_path / "adapter.pt"
    weights = {name: value for name, value in tensors_of(first).items() if name.startswith("adapter.")}
    torch.save(weights, file)
    trial = Trial(model={"trainable": "lora+tokens", "adapter": {"init_from": str(file)}}, train=SHORT)
    trial.run(models, corpus, tmp_path / "trial")
    trial.run(models, corpus, tmp_path / "trial")
    torch.save({name: value + 1 for name, value in weights.items()}, file)
    with pytest.raises(CheckpointError, match=r"model\.adapter\.init_from: its file has changed"):
        trial.run(models, corpus, tmp_path / "trial")
