"""Training: resumed equals uninterrupted bit for bit; steps do not depend on micro-batches or workers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from data.examples import targets
from data.shards import Shards
from model import checkpoint
from model.checkpoint import CheckpointError, digest, seed_everything, trained_tensors
from model.config import ModelConfig, TrainConfig
from model.encoder import load_encoder
from model.evaluate import TrialData, evaluate
from model.speech_llm import SpeechLLM, load_llm
from model.train import NonFiniteError, Trainer, fit
from tests.model.common import close, settings

CONFIG = TrainConfig(epochs=2, batch_size=5, learning_rate=3e-3, checkpoint_steps=3)


class KilledError(Exception):
    pass


def start(models: Path, shards: Shards, config: ModelConfig | None = None) -> tuple[SpeechLLM, TrialData]:
    seed_everything(7)
    dropout = {"rank": 4, "dropout": 0.2}
    model = SpeechLLM(config or settings(models, "whisper", lora=dropout), shards.manifest.labels)
    return model, TrialData.open(shards, model, 2, "local", ("train", "val"))


def run(
    models: Path, shards: Shards, folder: Path, config: TrainConfig = CONFIG, own: ModelConfig | None = None
) -> SpeechLLM:
    model, data = start(models, shards, own)
    fit(model, data, config, 7, folder, lambda epoch, metrics: None)
    return model


@pytest.mark.parametrize("steps", [2, 4, 7])
def test_a_killed_run_resumes_bit_for_bit(
    steps: int, models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout on, killed within the first epoch before and after a checkpoint, and within the second."""
    whole = run(models, corpus, tmp_path / "whole")
    taken = 0
    original = Trainer._optimizer_step

    def step(self: Trainer, *args: Any) -> None:
        nonlocal taken
        if taken == steps:
            raise KilledError
        taken += 1
        original(self, *args)

    monkeypatch.setattr(Trainer, "_optimizer_step", step)
    with pytest.raises(KilledError):
        run(models, corpus, tmp_path / "killed")
    monkeypatch.setattr(Trainer, "_optimizer_step", original)
    resumed = run(models, corpus, tmp_path / "killed")
    assert digest(trained_tensors(resumed)) == digest(trained_tensors(whole))
    histories = [
        checkpoint.load(tmp_path / name / "checkpoint.pt")["progress"]["history"] for name in ("whole", "killed")
    ]
    for (epoch, one), (again, other) in zip(*histories, strict=True):
        assert epoch == again
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_step_does_not_depend_on_micro_batches(models: Path, corpus: Shards, tmp_path: Path) -> None:
    config = settings(models, "whisper")
    one = run(models, corpus, tmp_path / "one", CONFIG.model_copy(update={"token_budget": 1}), config)
    many = run(models, corpus, tmp_path / "many", CONFIG.model_copy(update={"token_budget": 10**6}), config)
    for name, tensor in trained_tensors(one).items():
        assert close(trained_tensors(many)[name], tensor, 1e-3), name  # AdamW divides by small second moments
    losses = [checkpoint.load(tmp_path / name / "checkpoint.pt")["progress"]["history"] for name in ("one", "many")]
    assert losses[0][0][1]["train_loss"] == pytest.approx(losses[1][0][1]["train_loss"], rel=1e-5)


def worker(rank: int, world: int, models: Path, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=world)
    run(models, Shards(folder), out / "trial", own=settings(models, "whisper"))
    dist.destroy_process_group()


def test_two_workers_train_what_one_trains(models: Path, corpus: Shards, tmp_path: Path) -> None:
    run(models, corpus, tmp_path / "one", own=settings(models, "whisper"))
    multiprocessing.spawn(worker, (2, models, corpus.folder, tmp_path), nprocs=2)
    one, two = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("one", "trial"))
    for (_, alone), (_, together) in zip(one["progress"]["history"], two["progress"]["history"], strict=True):
        assert alone["loss"] == pytest.approx(together["loss"], rel=1e-4)
        assert alone["train_loss"] == pytest.approx(together["train_loss"], rel=1e-5)
        assert alone["accuracy"] == together["accuracy"]
    ids = [
        [row["id"] for row in json.loads((tmp_path / name / "predictions.json").read_text())]
        for name in ("one", "trial")
    ]
    assert ids[0] == ids[1]


def test_frozen_weights_are_shared_and_stay_as_they_were(models: Path, corpus: Shards, tmp_path: Path) -> None:
    llm = load_llm(str(models / "llm"), "float32", "cpu")
    encoder = load_encoder(str(models / "whisper"), "cpu")
    before = [tensor.clone() for base in (llm, encoder) for tensor in base.parameters()]
    versions = [tensor._version for base in (llm, encoder) for tensor in base.parameters()]
    model = run(models, corpus, tmp_path)
    assert [tensor._version for base in (llm, encoder) for tensor in base.parameters()] == versions
    assert all(
        torch.equal(tensor, old)
        for tensor, old in zip((t for base in (llm, encoder) for t in base.parameters()), before, strict=True)
    )
    assert model.llm.get_input_embeddings().weight.data_ptr() == llm.get_input_embeddings().weight.data_ptr()


def test_exactly_what_the_configuration_names_is_trained(models: Path, corpus: Shards) -> None:
    def parts(**changed: Any) -> set[str]:
        model = SpeechLLM(settings(models, "hubert-layer", **changed), corpus.manifest.labels)
        return {name.split(".")[0] for name in trained_tensors(model)}

    assert parts() == {"encoder", "adapter", "llm", "end_of_audio", "cls"}
    assert parts(encoder={"path": str(models / "hubert-layer"), "trainable": False}) == {
        "adapter",
        "llm",
        "end_of_audio",
        "cls",
    }
    assert parts(modality="text", cls="none") == {"llm"}
    assert parts(modality="speech", lora={"enabled": False}, cls="none", end_of_audio="none") == {"encoder", "adapter"}
    model = SpeechLLM(settings(models, "hubert-layer"), corpus.manifest.labels)
    assert not any("feature_extractor" in name for name in trained_tensors(model))


def test_frozen_parts_keep_their_dropout_off(models: Path, corpus: Shards) -> None:
    model, _ = start(models, corpus, settings(models, "whisper", encoder={"path": str(models / "whisper")}))
    model.train()
    assert model.encoder is not None
    assert not any(module.training for module in model.encoder.modules())
    assert model.llm.training


def test_a_loss_that_is_not_finite_stops_before_the_update(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = start(models, corpus)
    before = digest(trained_tensors(model))
    original = SpeechLLM.loss
    monkeypatch.setattr(SpeechLLM, "loss", lambda self, part: (original(self, part)[0] * float("nan"), 1))
    with pytest.raises(
        NonFiniteError, match=r"non-finite loss at step 1, learning rate .*; lower train\.learning_rate"
    ):
        fit(model, data, CONFIG, 7, tmp_path, lambda epoch, metrics: None)
    assert digest(trained_tensors(model)) == before


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_predictions_do_not_depend_on_the_batch_size(batch_size: int, models: Path, corpus: Shards) -> None:
    model, data = start(models, corpus)
    reference, loss = evaluate(model, data, "val", 10**6)
    records, again = evaluate(model, data, "val", 10**6, batch_size)
    assert [record.id for record in records] == [record.id for record in reference]
    assert [record.prediction for record in records] == [record.prediction for record in reference]
    assert again == pytest.approx(loss, rel=1e-6)


def test_checkpoints_hold_what_trains_and_refuse_another_model(models: Path, corpus: Shards, tmp_path: Path) -> None:
    model = run(models, corpus, tmp_path, TrainConfig(epochs=1, batch_size=8))
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["tensors"].keys() == trained_tensors(model).keys()
    other, _ = start(models, corpus, settings(models, "whisper", lora={"rank": 2}))
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        checkpoint.load_tensors(other, state["tensors"])
    with pytest.raises(CheckpointError, match="other data or with another batch size or seed"):
        run(models, corpus, tmp_path, TrainConfig(epochs=1, batch_size=4))


def test_damaged_checkpoints_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="damaged checkpoint") as error:
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert "\n" not in str(error.value)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"tensors": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


def test_the_log_is_appended_line_by_line(models: Path, corpus: Shards, tmp_path: Path) -> None:
    run(models, corpus, tmp_path, TrainConfig(epochs=3, batch_size=4))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    step, epoch = (next(line for line in lines if name in line["values"]) for name in ("train_loss_step", "accuracy"))
    assert step["values"].keys() == {"train_loss_step", "learning_rate"}
    assert epoch["step"] == len(targets(corpus, "train"))
