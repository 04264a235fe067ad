"""The second peer of a whole sweep: `transformers.Trainer.hyperparameter_search` with Optuna, one trial after another.

    python -m tests.bench.peer_transformers CONFIG.yaml FOLDER

Trains the points of a configuration, with the encoder online, and leaves FOLDER/results.json:
[{params, value, seconds}]. The Trainer gets this project's model, and its batches in the order of the plan, so that its
results can be compared; and what makes it faster: the base model is loaded once, checkpoints hold only what trains,
nothing is logged.
"""

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import torch
import transformers
from torch import Tensor, nn

from data.loading.batching import plan
from data.loading.examples import read_example
from data.loading.tasks import items
from model.evaluation.scoring import label_scores
from model.objectives.losses import answer_losses
from sweep.config.files import load
from sweep.config.loader import flat
from sweep.config.schema import Config
from sweep.execution.trial import build, open_shards
from tests.kill.steps import FILE, Step

TASK = "classify"


class Model(nn.Module):
    """A freshly made model as the Trainer wants it: from rows of the corpus to a loss, and to scores in evaluation."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.settings, self.shards = config, open_shards(config)
        self.model, data = build(config, "local", ("train",), config.resources.device)
        self.costs = data.splits["train"].costs

    def forward(self, row: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Mean loss (nats a token) of the answers of rows [B], and in evaluation the scores of all labels, [B, K]."""
        examples = [
            read_example(self.shards, (TASK, place), self.settings.data, with_audio=True) for place in row.tolist()
        ]
        if self.training:
            losses = answer_losses(self.model, examples, self.settings.train.losses)
            return {"loss": losses.next_token_B.sum() / sum(losses.count_B)}
        scores_BK = label_scores(self.model, examples)
        tokens = sum(self.model.answer(example).predicted for example in examples)
        return {"loss": -scores_BK.gather(1, labels[:, None]).sum() / tokens, "logits": scores_BK}

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Of what trains: a checkpoint needs no more."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **options).items() if name in trained}


class FirstStep(transformers.TrainerCallback):
    """Records the first optimizer step for `tests.bench.timeline`."""

    def on_step_end(self, args: transformers.TrainingArguments, state: object, control: object, **_: object) -> None:
        if (folder := os.environ.get("KILL_FOLDER")) and not (path := Path(folder) / FILE).exists():
            path.write_text(json.dumps(Step(time.time(), os.getpid(), 0, 1)._asdict()) + "\n")


class Planned(transformers.Trainer):
    """Trains in the order of the batch plan, which follows from the model of the trial."""

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        settings, costs = self.model.settings, self.model.costs

        class Steps:
            """The steps of the plan, epoch after epoch, as a `batch_sampler`."""

            epochs = itertools.count()

            def __len__(self) -> int:
                return math.ceil(len(costs) / settings.train.batch_size)

            def __iter__(self) -> Iterator[list[int]]:
                size = settings.train.batch_size
                return iter(plan(costs, batch_size=size, seed=settings.seed, epoch=next(self.epochs)))

        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=Steps(), collate_fn=transformers.default_data_collator
        )


def sweep(config: Config, folder: Path) -> list[dict[str, Any]]:
    """The value of every point after its last epoch, and the seconds that it trained."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    train, search = rows(config, "train"), config.search

    def chosen(trial: optuna.Trial) -> dict[str, Any]:
        return search.suggest(trial, flat(config))

    trainer = Planned(
        args=arguments(config, folder, math.ceil(len(train) / config.train.batch_size)),
        model_init=lambda trial: Model(config.with_values(chosen(trial) if trial else {})),
        train_dataset=train,
        eval_dataset=rows(config, "val"),
        callbacks=[FirstStep],
    )
    kept: dict[str, Any] = {"storage": optuna.storages.InMemoryStorage(), "study_name": config.name}
    study = optuna.create_study(direction=search.direction, **kept)
    for point in search.points:
        study.enqueue_trial(point)

    trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": config.with_values(chosen(trial)).train.learning_rate},
        compute_objective=lambda metrics: metrics["eval_loss"],
        n_trials=search.trials,
        direction=search.direction,
        backend="optuna",
        pruner=optuna.pruners.NopPruner(),
        load_if_exists=True,
        **kept,
    )
    return [
        {"params": trial.params, "value": trial.value, "seconds": trial.duration.total_seconds()}
        for trial in study.trials
    ]


def rows(config: Config, split: str) -> list[dict[str, int]]:
    """What the Trainer batches: places in the corpus, and numbers of labels."""
    shards = open_shards(config)
    labels = list(shards.manifest.labels)
    return [{"row": row, "labels": labels.index(shards.columns["label"][row])} for _, row in items(shards, TASK, split)]


def arguments(config: Config, folder: Path, steps: int) -> transformers.TrainingArguments:
    """Return the settings of `train` as the Trainer names them; `steps` are those of an epoch."""
    train = config.train
    return transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=train.epochs,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        warmup_steps=round(train.warmup * train.epochs * steps),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=config.resources.device == "cpu",
        seed=config.seed,
    )


if __name__ == "__main__":
    made = Path(sys.argv[2])
    made.mkdir(parents=True, exist_ok=True)
    (made / "results.json").write_text(json.dumps(sweep(load(sys.argv[1]), made)))
