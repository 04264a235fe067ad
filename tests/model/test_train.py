"""Training: steps do not depend on the number of workers; learning rates, patience, reports, checkpoints."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.config import AugmentConfig, DataConfig
from data.loading.tasks import items
from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.checkpoints.checkpoint import CheckpointError, trained_tensors
from model.checkpoints.fingerprint import digest
from model.config import LearningRates, LossConfig, TrainConfig
from model.evaluation.evaluator import evaluate
from model.parts import part_of
from model.training.loss_accumulator import NonFiniteError
from model.training.optimizer import make_schedule
from model.training.progress import Progress
from model.training.trainer import Trainer, fit
from tests.model.common import as_two_workers, close
from tests.model.trials import CONFIG, NEW, ONE, TWO, KilledError, Trial, history, kill_after

SHARED_BY_WORKERS = {
    "two-tasks": Trial(tasks=TWO, train=CONFIG.model_copy(update={"batch_size": 9})),
    "balanced-augmented": Trial(
        train=CONFIG.model_copy(update={"sampling": "balanced", "epochs": 1}),
        data=DataConfig(history=2, augment=AugmentConfig(speeds=(0.9, 1.1), noise_db=(5.0, 20.0))),
    ),
}


def worker(rank: int, world: int, models: Path, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=world)
    for name, trial in SHARED_BY_WORKERS.items():
        trial.run(models, Shards(folder), out / "together" / name)
    dist.destroy_process_group()


def test_two_workers_train_what_one_trains(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """Also where a step leaves a worker without an item, or without one of a task."""
    for name, trial in SHARED_BY_WORKERS.items():
        trial.run(models, corpus, tmp_path / "alone" / name)
    as_two_workers(worker, 2, models, corpus.folder, tmp_path)  # forked, with what the trials above imported
    for name in SHARED_BY_WORKERS:
        folders = [tmp_path / how / name for how in ("alone", "together")]
        for (_, alone), (_, together) in zip(*map(history, folders), strict=True):
            assert alone.keys() == together.keys()
            for key, value in alone.items():
                is_tight = key.startswith("train_loss") or isinstance(value, int)
                assert together[key] == pytest.approx(value, rel=1e-5 if is_tight else 1e-4), key
        alone, together = (json.loads((folder / "predictions.json").read_text())["records"] for folder in folders)
        assert [row["id"] for row in alone] == [row["id"] for row in together]
    assert "response/bleu" in history(tmp_path / "together" / "two-tasks")[0][1]


def test_parts_have_their_own_learning_rates(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """Every trained parameter is in one group; a part that is not named has the common rate, and weights decay."""
    rates = LearningRates(encoder=1e-5, lora=4e-4)
    train = TrainConfig(batch_size=5, learning_rate=1e-3, learning_rates=rates, weight_decay=0.5, warmup=0.0)
    trainer = Trial("hubert-layer", {"trainable": f"encoder+{NEW}+llm.*.layers.1.mlp.*"}, train=train).trainer(
        models, corpus, tmp_path
    )
    groups = trainer.optimizer.param_groups
    by_id = {id(tensor): group["initial_lr"] for group in groups for tensor in group["params"]}
    expected = {"encoder": 1e-5, "lora": 4e-4, "adapter": 1e-3, "tokens": 1e-3, "llm": 1e-3}
    named = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    assert {part_of(name) for name in named} == expected.keys()
    assert {name: by_id[id(tensor)] for name, tensor in named.items()} == {n: expected[part_of(n)] for n in named}
    assert sum(len(group["params"]) for group in groups) == len(by_id) == len(named)

    before = {name: tensor.detach().clone() for name, tensor in named.items()}
    for tensor in named.values():
        tensor.grad = torch.zeros_like(tensor)
    trainer.optimizer.step()
    for name, tensor in named.items():
        assert close(tensor, before[name] * (1 - expected[part_of(name)] * 0.5), 1e-6) or not before[name].any()

    for _ in range(3):
        trainer.schedule.step()
    factors = [group["lr"] / group["initial_lr"] for group in groups]
    assert factors == pytest.approx([factors[0]] * 3)


@pytest.mark.parametrize("warmup", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_learning_rate_follows_its_schedule(kind: str, warmup: float) -> None:
    optimizer, steps = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5), 12
    schedule = make_schedule(optimizer, CONFIG.model_copy(update={"schedule": kind, "warmup": warmup}), steps)
    rising = round(warmup * steps)
    for step in range(steps):
        share = (step - rising) / (steps - rising)
        falling = {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2, "constant": 1.0}[kind]
        expected = 0.5 * (step / rising if step < rising else falling)
        assert schedule.get_last_lr() == [pytest.approx(expected)]
        optimizer.step()
        schedule.step()


def test_pruned_trial_equals_the_full_one_up_to_its_end(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its learning rates follow `train.epochs`, and not the epoch at which it is pruned."""
    rates: list[float] = []
    original = Trainer.optimizer_step

    def step(self: Trainer, *args: Any) -> None:
        rates.append(self.schedule.get_last_lr()[0])
        original(self, *args)

    def run(name: str, epochs: int, last: int) -> tuple[list[float], list[tuple[int, dict[str, Any]]]]:
        def prune(epoch: int, metrics: dict[str, Any]) -> None:
            if epoch == last:
                raise KilledError

        rates.clear()
        with pytest.raises(KilledError):
            Trial(train=CONFIG.model_copy(update={"epochs": epochs})).run(models, corpus, tmp_path / name, prune)
        return list(rates), history(tmp_path / name)

    monkeypatch.setattr(Trainer, "optimizer_step", step)
    (full, reported), pruned, short = run("full", 2, 2), run("pruned", 2, 1), run("short", 1, 1)
    assert pruned == (full[: len(full) // 2], reported[:1])
    assert len(set(pruned[0])) > 3
    assert len(short[0]) == len(pruned[0])
    assert short[0] != pruned[0]


@pytest.mark.parametrize(
    ("losses", "patience", "over"),
    [
        ([3.0, 2.0, 1.0], 1, False),
        ([3.0, 2.0, 2.0], 1, True),
        ([3.0, 2.0, 2.5], 2, False),
        ([3.0, 2.0, 2.5, 2.1], 2, True),
        ([3.0, 2.0, 2.5, 1.9], 2, False),
        ([3.0, math.nan, 2.0, 2.1], 2, False),
        ([3.0, 2.0, 2.5, 2.1], None, False),
        ([], 1, False),
        ([3.0, 2.0, 1.0, 0.9, 0.8], None, True),
    ],
)
def test_patience_counts_epochs_without_a_lower_loss(losses: Sequence[float], patience: int | None, over: bool) -> None:
    """With several tasks, their weighted sum counts."""
    config = TrainConfig(epochs=5, patience=patience)
    for name, first in (("loss", {}), ("total_loss", {"loss": 0.0})):
        reported = [(index + 1, first | {name: loss}) for index, loss in enumerate(losses)]
        trainer = SimpleNamespace(config=config, progress=Progress(epoch=len(losses), history=reported))
        assert Trainer.is_over(trainer) is over


def test_run_that_patience_ends_resumes_as_ended(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate so small that nothing changes."""
    train = TrainConfig(epochs=9, patience=2, batch_size=16, learning_rate=1e-37)
    trial = Trial(train=train, tasks=TWO)
    reports: list[list[tuple[int, float]]] = [[], []]
    trial.run(models, corpus, tmp_path, lambda epoch, metrics: reports[0].append((epoch, metrics["loss"])))
    kill_after(monkeypatch, 0)
    trial.run(models, corpus, tmp_path, lambda epoch, metrics: reports[1].append((epoch, metrics["loss"])))
    assert [epoch for epoch, _ in reports[0]] == [1, 2, 3]
    assert reports[0] == reports[1]


def test_non_finite_loss_stops_before_the_update(models: Path, corpus: Shards, tmp_path: Path) -> None:
    model, data = Trial().start(models, corpus)
    with torch.no_grad():
        model.cls[0] = math.nan
    before = digest(trained_tensors(model))
    expected = r"^non-finite loss at step 1, learning rate .*; lower train\.learning_rate$"
    with pytest.raises(NonFiniteError, match=expected):
        fit(model, data, CONFIG, ONE, 7, tmp_path, lambda epoch, metrics: None)
    assert digest(trained_tensors(model)) == before
    assert not (tmp_path / "checkpoint.pt").exists()


def test_epoch_reports_every_task(models: Path, corpus: Shards, tmp_path: Path) -> None:
    train = TrainConfig(epochs=1, batch_size=9, losses=LossConfig(distillation=0.5))
    trial = Trial(model={"prompt": {"history_tokens": 0}}, tasks=TWO, train=train)
    reports: list[dict[str, Any]] = []
    trial.run(models, corpus, tmp_path, lambda epoch, metrics: reports.append(metrics))
    (reported,) = reports
    assert reported["total_loss"] == pytest.approx(1.0 * reported["loss"] + 0.5 * reported["response/loss"])
    names = {"train_loss", "train_loss/distillation", "train_loss/response", "train_loss/response/distillation"}
    assert {name for name in reported if name.startswith("train_loss")} == names
    assert {"accuracy", "macro_f1", "ece", "response/bleu", "response/perplexity", "response/run_on"} <= reported.keys()
    assert (reported["epoch"], reported["short_clips"]) == (1, 0)
    rows = {
        split: [item for task in trial.tasks.active() for item in items(corpus, task, split)]
        for split in ("train", "val")
    }
    assert reported["steps"] == math.ceil(len(rows["train"]) / 9)
    _, data = trial.start(models, corpus)
    assert reported["dropped_turns"] == data.dropped_turns > 0
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert written["labels"] == {"classify": ["change", "sustain", "neutral"], "response": []}
    expected = [(task, corpus.columns["id"][row]) for task, row in rows["val"]]
    assert [(record["task"], record["id"]) for record in written["records"]] == expected


def test_turns_without_room_in_the_prompt_are_counted(models: Path, corpus: Shards) -> None:
    _, data = Trial(model={"prompt": {"history_tokens": 0}}).start(models, corpus)
    rows = [row for split in ("train", "val") for _, row in items(corpus, "classify", split)]
    assert data.dropped_turns == sum(min(2, row - corpus.sessions[row][0]) for row in rows) > 0


def test_training_loss_is_the_mean_over_the_tokens_of_an_epoch(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """At a rate so small that the model is the same all through an epoch."""
    trial = Trial(train=TrainConfig(epochs=2, batch_size=5, learning_rate=1e-37))
    model, data = trial.start(models, corpus)
    expected = []

    def compare(epoch: int, metrics: dict[str, Any]) -> None:
        records = evaluate(model, data, "train", 10**6)
        expected.append(sum(record.loss for record in records) / sum(record.tokens for record in records))
        with torch.no_grad():
            model.cls.mul_(30)

    fit(model, data, trial.train, ONE, 7, tmp_path, compare)
    reported = [metrics["train_loss"] for _, metrics in history(tmp_path)]
    assert reported == pytest.approx(expected, rel=1e-5)
    assert abs(reported[0] - reported[1]) > 1e-2


def test_checkpoint_has_what_trains_and_refuses_another_trial(models: Path, corpus: Shards, tmp_path: Path) -> None:
    train = TrainConfig(epochs=1, batch_size=8)
    model = Trial(train=train).run(models, corpus, tmp_path)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["tensors"].keys() == trained_tensors(model).keys()
    assert state["digest"] == digest(state["tensors"]) == digest(trained_tensors(model))
    different, _ = Trial(model={"lora": {"rank": 2}}).start(models, corpus)
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        checkpoint.load_tensors(different, state["tensors"])
    for changed in (Trial(train=train, seed=8), Trial(train=train.model_copy(update={"batch_size": 4}))):
        with pytest.raises(CheckpointError, match="other data or with another batch size or seed"):
            changed.run(models, corpus, tmp_path)
