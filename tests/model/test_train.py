"""Training: steps do not depend on micro-batches or workers; rates, patience, reports, checkpoints."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data.config import AugmentConfig, DataConfig, TaskWeights
from data.loading.tasks import items
from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.checkpoints.checkpoint import CheckpointError, digest, trained_tensors
from model.config import LearningRates, LossConfig, TrainConfig
from model.evaluation.evaluator import evaluate
from model.parts import part_of
from model.training.loss_accumulator import NonFiniteError
from model.training.trainer import Trainer, fit
from tests.model.common import as_two_workers, close
from tests.model.trials import CONFIG, NEW, ONE, TWO, KilledError, Trial, history, kill_after


def test_a_step_does_not_depend_on_micro_batches(models: Path, corpus: Shards, tmp_path: Path) -> None:
    for name, budget in (("one", 1), ("many", 10**6)):
        Trial(tasks=TWO, train=CONFIG.model_copy(update={"token_budget": budget})).run(models, corpus, tmp_path / name)
    one, many = (checkpoint.load(tmp_path / name / "checkpoint.pt")["tensors"] for name in ("one", "many"))
    for name, tensor in one.items():
        assert close(many[name], tensor, 1e-3), name  # AdamW divides by small second moments
    losses = [history(tmp_path / name) for name in ("one", "many")]
    for name in ("train_loss", "train_loss/response"):
        assert losses[0][0][1][name] == pytest.approx(losses[1][0][1][name], rel=1e-5)


SHARED_BY_WORKERS = {
    "one": Trial(),
    "two": Trial(tasks=TWO, train=CONFIG.model_copy(update={"batch_size": 9})),
    "balanced-augmented": Trial(
        train=CONFIG.model_copy(update={"sampling": "balanced"}),
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
    as_two_workers(worker, 2, models, corpus.folder, tmp_path)
    for name, trial in SHARED_BY_WORKERS.items():
        trial.run(models, corpus, tmp_path / "alone" / name)
        folders = [tmp_path / how / name for how in ("alone", "together")]
        for (_, alone), (_, together) in zip(*map(history, folders), strict=True):
            assert alone.keys() == together.keys()
            for key, value in alone.items():
                tight = key.startswith("train_loss") or isinstance(value, int)
                assert together[key] == pytest.approx(value, rel=1e-5 if tight else 1e-4), key
        ids = [
            [row["id"] for row in json.loads((folder / "predictions.json").read_text())["records"]]
            for folder in folders
        ]
        assert ids[0] == ids[1]
    assert "response/bleu" in history(tmp_path / "together" / "two")[0][1]


RATES = TrainConfig(epochs=2, batch_size=5, learning_rate=1e-3, learning_rates=LearningRates(encoder=1e-5, lora=4e-4))


def test_parts_learn_at_their_own_rates(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """Every trained parameter once; a part that is not named at the common rate."""
    trial = Trial("hubert-layer", {"trainable": f"encoder+{NEW}+llm.*.layers.1.mlp.*"}, train=RATES)
    trainer = trial.trainer(models, corpus, tmp_path)
    groups = trainer.optimizer.param_groups
    rates = {id(tensor): group["initial_lr"] for group in groups for tensor in group["params"]}
    expected = {"encoder": 1e-5, "lora": 4e-4, "adapter": 1e-3, "tokens": 1e-3, "llm": 1e-3}
    names = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    assert {part_of(name) for name in names} == expected.keys()
    assert {name: rates[id(tensor)] for name, tensor in names.items()} == {n: expected[part_of(n)] for n in names}
    assert sum(len(group["params"]) for group in groups) == len(rates) == len(names)
    for _ in range(3):
        trainer.schedule.step()
    factors = [group["lr"] / group["initial_lr"] for group in groups]
    assert factors == pytest.approx([factors[0]] * 3)


def test_a_part_that_barely_learns_barely_moves(models: Path, corpus: Shards, tmp_path: Path) -> None:
    rates = CONFIG.model_copy(update={"learning_rates": LearningRates(lora=1e-12)})
    trial = Trial(train=rates)
    start = {name: tensor.clone() for name, tensor in trained_tensors(trial.start(models, corpus)[0]).items()}
    moved = {name: (tensor - start[name]).abs().max() for name, tensor in _trained(trial, models, corpus, tmp_path)}
    assert max(value for name, value in moved.items() if "lora_" in name) < 1e-9
    assert min(value for name, value in moved.items() if name.startswith("adapter.")) > 1e-4


def _trained(trial: Trial, models: Path, corpus: Shards, folder: Path) -> list[tuple[str, Tensor]]:
    return list(trained_tensors(trial.run(models, corpus, folder)).items())


@pytest.mark.parametrize("warmup", [0.0, 0.25])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_rate_follows_its_schedule(
    schedule: str, warmup: float, models: Path, corpus: Shards, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"schedule": schedule, "warmup": warmup, "learning_rate": 0.5})
    trainer = Trial(train=config).trainer(models, corpus, tmp_path)
    steps = 2 * math.ceil(len(items(corpus, "classify", "train")) / 5)
    rising = round(warmup * steps)
    assert rising >= 2 or not warmup
    found, expected = [], []
    for step in range(steps):
        found.append(trainer.schedule.get_last_lr()[0])
        share = (step - rising) / (steps - rising)
        falling = {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2, "constant": 1.0}[schedule]
        expected.append(0.5 * (step / rising if step < rising else falling))
        trainer.optimizer.step()
        trainer.schedule.step()
    assert found == pytest.approx(expected)


def test_a_trial_that_is_pruned_was_the_full_one_up_to_there(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rates follow `train.epochs` and know of no rung; a training of that many epochs would be another one."""
    rates: list[float] = []
    made = Trainer._optimizer_step

    def step(self: Trainer, *args: Any) -> None:
        rates.append(self.schedule.get_last_lr()[0])
        made(self, *args)

    def run(name: str, epochs: int, last: int) -> tuple[list[float], list[tuple[int, dict[str, Any]]]]:
        def prune(epoch: int, metrics: dict[str, Any]) -> None:
            if epoch == last:
                raise KilledError

        rates.clear()
        with pytest.raises(KilledError):
            Trial(train=CONFIG.model_copy(update={"epochs": epochs})).run(models, corpus, tmp_path / name, prune)
        return list(rates), history(tmp_path / name)

    monkeypatch.setattr(Trainer, "_optimizer_step", step)
    (full, told), pruned, short = run("full", 3, 3), run("pruned", 3, 1), run("short", 1, 1)
    assert pruned == (full[: len(full) // 3], told[:1])
    assert len(set(pruned[0])) > 3
    assert len(short[0]) == len(pruned[0])
    assert short[0] != pruned[0]


def test_weights_decay_apart_from_the_gradient(models: Path, corpus: Shards, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"weight_decay": 0.5, "warmup": 0.0, "learning_rate": 0.1})
    trainer = Trial(train=config).trainer(models, corpus, tmp_path)
    before = {name: tensor.clone() for name, tensor in trained_tensors(trainer.model).items()}
    for parameter in trainer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    for name, tensor in trained_tensors(trainer.model).items():
        assert close(tensor, before[name] * (1 - 0.1 * 0.5), 1e-6) or not before[name].any()


@pytest.mark.parametrize(
    ("losses", "patience", "over"),
    [
        ([3.0, 2.0, 1.0], 1, False),
        ([3.0, 2.0, 2.0], 1, True),
        ([3.0, 2.0, 2.5], 2, False),
        ([3.0, 2.0, 2.5, 2.1], 2, True),
        ([3.0, 2.0, 2.5, 1.9], 2, False),
        ([3.0, 2.0, 2.5, 2.1], None, False),
        ([], 1, False),
        ([3.0, 2.0, 1.0, 0.9, 0.8], None, True),
    ],
)
def test_patience_counts_epochs_without_a_lower_loss(
    losses: Sequence[float], patience: int | None, over: bool, models: Path, corpus: Shards, tmp_path: Path
) -> None:
    trainer = Trial(train=TrainConfig(epochs=5, patience=patience)).trainer(models, corpus, tmp_path)
    trainer.state.history = [(place + 1, {"loss": loss}) for place, loss in enumerate(losses)]
    trainer.state.epoch = len(losses)
    assert trainer.is_over() is over
    # With several tasks it is their weighted sum that must fall.
    trainer.state.history = [(place + 1, {"loss": -place, "total_loss": loss}) for place, loss in enumerate(losses)]
    assert trainer.is_over() is over


@pytest.mark.parametrize("tasks", [ONE, TWO], ids=["one", "two"])
def test_patience_ends_a_run_which_resumes_as_ended(
    tasks: TaskWeights, models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate so small that nothing changes."""
    train = TrainConfig(epochs=9, patience=2, batch_size=16, learning_rate=1e-37)
    trial = Trial(train=train, tasks=tasks)
    epochs: list[tuple[int, float]] = []
    trial.run(models, corpus, tmp_path, lambda epoch, metrics: epochs.append((epoch, metrics["loss"])))
    assert [epoch for epoch, _ in epochs] == [1, 2, 3]
    again: list[tuple[int, float]] = []
    kill_after(monkeypatch, 0)
    trial.run(models, corpus, tmp_path, lambda epoch, metrics: again.append((epoch, metrics["loss"])))
    assert again == epochs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(
    value: float, models: Path, corpus: Shards, tmp_path: Path
) -> None:
    model, data = Trial().start(models, corpus)
    with torch.no_grad():
        model.cls[0] = value
    before = digest(trained_tensors(model))
    expected = r"^non-finite loss at step 1, learning rate .*; lower train\.learning_rate$"
    with pytest.raises(NonFiniteError, match=expected):
        fit(model, data, CONFIG, ONE, 7, tmp_path, lambda epoch, metrics: None)
    assert digest(trained_tensors(model)) == before
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_gradient_that_is_not_finite_stops_before_the_update(models: Path, corpus: Shards, tmp_path: Path) -> None:
    model, data = Trial().start(models, corpus)
    steps = 0

    def explode(gradient: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        return gradient * (float("inf") if steps == 3 else 1.0)

    model.cls.register_hook(explode)
    with pytest.raises(NonFiniteError, match=r"^non-finite gradient at step 3, learning rate"):
        fit(model, data, CONFIG.model_copy(update={"token_budget": 10**6}), ONE, 7, tmp_path, lambda *report: None)
    assert all(tensor.isfinite().all() for tensor in trained_tensors(model).values())


def test_an_epoch_reports_every_task(models: Path, corpus: Shards, tmp_path: Path) -> None:
    losses = LossConfig(distillation=0.5)
    trial = Trial(tasks=TWO, train=TrainConfig(epochs=1, batch_size=9, losses=losses))
    reports: list[dict[str, Any]] = []
    trial.run(models, corpus, tmp_path, lambda epoch, metrics: reports.append(metrics))
    (found,) = reports
    assert found["total_loss"] == pytest.approx(1.0 * found["loss"] + 0.5 * found["response/loss"])
    names = {"train_loss", "train_loss/distillation", "train_loss/response", "train_loss/response/distillation"}
    assert {name for name in found if name.startswith("train_loss")} == names
    assert {"accuracy", "macro_f1", "ece", "response/bleu", "response/perplexity", "response/run_on"} <= found.keys()
    assert (found["epoch"], found["short_clips"]) == (1, 0)
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert written["labels"] == {"classify": ["change", "sustain", "neutral"], "response": []}
    tasks = [record["task"] for record in written["records"]]
    expected = {task: len(items(corpus, task, "val")) for task in ("classify", "response")}
    assert {task: tasks.count(task) for task in expected} == expected
    assert found["steps"] == math.ceil(sum(len(items(corpus, task, "train")) for task in expected) / 9)


def test_the_training_loss_is_the_mean_over_the_epochs_tokens(models: Path, corpus: Shards, tmp_path: Path) -> None:
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
    found = [metrics["train_loss"] for _, metrics in history(tmp_path)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found[0] - found[1]) > 1e-2


def test_dropped_turns_are_reported(models: Path, corpus: Shards, tmp_path: Path) -> None:
    trial = Trial(model={"prompt": {"history_tokens": 0}}, train=TrainConfig(epochs=1, batch_size=64))
    trial.run(models, corpus, tmp_path)
    rows = [row for split in ("train", "val") for _, row in items(corpus, "classify", split)]
    dropped = sum(min(2, row - corpus.sessions[row][0]) for row in rows)
    assert history(tmp_path)[0][1]["dropped_turns"] == dropped > 0


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_predictions_do_not_depend_on_the_batch_size(batch_size: int, models: Path, corpus: Shards) -> None:
    model, data = Trial(tasks=TWO).start(models, corpus)
    reference = evaluate(model, data, "val", 10**6)
    records = evaluate(model, data, "val", 10**6, batch_size)
    for name in ("id", "task", "prediction", "label", "tokens", "ended"):
        assert [getattr(record, name) for record in records] == [getattr(record, name) for record in reference]
    assert [record.loss for record in records] == pytest.approx([record.loss for record in reference], rel=1e-5)
    assert [record.id for record in records] == [
        corpus.columns["id"][row] for task in ("classify", "response") for _, row in items(corpus, task, "val")
    ]


def test_checkpoints_hold_what_trains_and_refuse_another_model(models: Path, corpus: Shards, tmp_path: Path) -> None:
    train = TrainConfig(epochs=1, batch_size=8)
    model = Trial(train=train).run(models, corpus, tmp_path)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert state["tensors"].keys() == trained_tensors(model).keys()
    assert state["digest"] == digest(state["tensors"]) == digest(trained_tensors(model))
    other, _ = Trial(model={"lora": {"rank": 2}}).start(models, corpus)
    with pytest.raises(CheckpointError, match="belongs to another configuration"):
        checkpoint.load_tensors(other, state["tensors"])
    for changed in (Trial(train=train, seed=8), Trial(train=train.model_copy(update={"batch_size": 4}))):
        with pytest.raises(CheckpointError, match="other data or with another batch size or seed"):
            changed.run(models, corpus, tmp_path)


def test_damaged_checkpoints_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(path)
    path.write_bytes(b"half a file")
    with pytest.raises(CheckpointError, match="damaged checkpoint") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)
    torch.save({"model": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of a trial"):
        checkpoint.load(path)


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"tensors": Evil()}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "ran").exists()


def test_the_log_is_appended_line_by_line(models: Path, corpus: Shards, tmp_path: Path) -> None:
    Trial(train=TrainConfig(epochs=3, batch_size=4)).run(models, corpus, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    step, epoch = (next(line for line in lines if name in line["values"]) for name in ("train_loss_step", "accuracy"))
    assert step["values"].keys() == {"train_loss_step", "learning_rate"}
    assert epoch["step"] == len(items(corpus, "classify", "train"))
