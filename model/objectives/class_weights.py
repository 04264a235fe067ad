"""Class imbalance: what the labels of a task count in the loss, or how often they are drawn, as numbers."""

from collections.abc import Mapping, Sequence
from typing import Literal

from data.errors import ConfigError
from data.loading.tasks import AnswerSet, Item
from model.config import ByLabel, TrainConfig

SETTINGS: tuple[Literal["class_weights", "sampling"], ...] = ("class_weights", "sampling")


def with_numbers(config: TrainConfig, answers: Mapping[str, AnswerSet]) -> TrainConfig:
    """The settings with numbers in the place of `balanced`; trained with them, a model is the same to the bit.

    Args:
        config: of the training.
        answers: by task, what occurs in training.

    Raises:
        ConfigError: numbers are given for a task or a label that there is not.
    """
    found: dict[str, ByLabel] = {}
    for name in SETTINGS:
        setting = getattr(config, name)
        if setting == "balanced":
            found[name] = {task: _balanced(known) for task, known in answers.items() if known.labels}
        elif isinstance(setting, dict):
            _check(f"train.{name}", setting, answers)
    return config.model_copy(update=found)


def by_item(setting: str | ByLabel, items: Sequence[Item], answers: Sequence[str]) -> list[float] | None:
    """The number of every item, 1 where its label has none; None if there are no numbers at all.

    Args:
        setting: of `with_numbers`.
        items: of any tasks.
        answers: theirs.
    """
    if isinstance(setting, str):
        return None
    return [setting.get(task, {}).get(answer, 1.0) for (task, _), answer in zip(items, answers, strict=True)]


def _balanced(known: AnswerSet) -> dict[str, float]:
    """n / (K n_k) of every label that occurs: 1 on average over the items, and as much for each label in all."""
    counts = {label: count for label, count in zip(known.labels, known.counts, strict=True) if count}
    return {label: sum(counts.values()) / (len(counts) * count) for label, count in counts.items()}


def _check(key: str, numbers: ByLabel, answers: Mapping[str, AnswerSet]) -> None:
    labels = {task: known.labels for task, known in answers.items() if known.labels}
    for task, own in numbers.items():
        if task not in labels:
            raise ConfigError(f"{key}.{task}: no task with labels is trained under this name; {_choice(labels)}")
        for label in own:
            if label not in labels[task]:
                raise ConfigError(f"{key}.{task}.{label}: the task has no such label; {_choice(labels[task])}")


def _choice(known: Mapping[str, object] | Sequence[str]) -> str:
    return f"choose from {', '.join(known)}" if known else "there is none: leave it out"
