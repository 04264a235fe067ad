"""Class imbalance: weights of labels in the loss (`train.class_weights`) or in the draw of items (`train.sampling`)."""

from collections.abc import Mapping, Sequence
from typing import Literal

from data.errors import ConfigError
from data.loading.tasks import AnswerSet, Item
from model.config import ByLabel, TrainConfig
from model.objectives.losses import Share, SoftTarget

SETTINGS: tuple[Literal["class_weights", "sampling"], ...] = ("class_weights", "sampling")


def resolve_balanced(config: TrainConfig, answers: Mapping[str, AnswerSet]) -> TrainConfig:
    """Return the settings with `balanced` replaced by numbers; training with them gives the same model to the bit.

    Balanced weights are n / (K n_k), as in scikit-learn: 1 on average over the items, with the same total for each of
    the K labels that occur. n counts items, and n_k those of a label.

    Args:
        config: of the training.
        answers: what occurs in the training split, by task.

    Raises:
        ConfigError: the configuration has numbers for an unknown task or label.
    """
    resolved: dict[str, ByLabel] = {}
    for name in SETTINGS:
        setting = getattr(config, name)
        if setting == "balanced":
            resolved[name] = {task: _balanced(answer_set) for task, answer_set in answers.items() if answer_set.labels}
        elif isinstance(setting, dict):
            _check_names(f"train.{name}", setting, answers)
    return config.model_copy(update=resolved)


def weights_by_item(setting: str | ByLabel, items: Sequence[Item], answers: Sequence[str]) -> list[float] | None:
    """Return the weight of every item, 1 where its label has none, or None if the setting has no numbers at all.

    Args:
        setting: `class_weights` or `sampling` after `resolve_balanced`.
        items: of any tasks.
        answers: for each item.
    """
    if isinstance(setting, str):
        return None
    return [setting.get(task, {}).get(answer, 1.0) for (task, _), answer in zip(items, answers, strict=True)]


def weigh_targets(
    setting: str | ByLabel, items: Sequence[Item], answers: Sequence[str], targets: Sequence[Mapping[str, float] | None]
) -> tuple[list[float], list[SoftTarget | None]]:
    """Apply class weights to the labels of each item.

    As in torch's cross-entropy with probabilities, each label of a soft target counts with its own weight.

    Args:
        setting: `class_weights` after `resolve_balanced`.
        items: of any tasks.
        answers: for each item.
        targets: the share of each label, or None where the answer has all.

    Returns:
        The weight of every item: the mean over its annotators. And the soft targets, relative to that weight.
    """
    by_task = {} if isinstance(setting, str) else setting
    weights, soft = list[float](), list[SoftTarget | None]()
    for (task, _), answer, target in zip(items, answers, targets, strict=True):
        numbers = by_task.get(task, {})
        if target is None:
            weights.append(numbers.get(answer, 1.0))
            soft.append(None)
            continue
        products = {label: share * numbers.get(label, 1.0) for label, share in target.items()}
        weights.append(total := sum(products.values()))
        soft.append({label: Share(share, products[label] / total) for label, share in target.items()})
    return weights, soft


def _balanced(answers: AnswerSet) -> dict[str, float]:
    counts = {label: count for label, count in zip(answers.labels, answers.counts, strict=True) if count}
    return {label: sum(counts.values()) / (len(counts) * count) for label, count in counts.items()}


def _check_names(key: str, numbers: ByLabel, answers: Mapping[str, AnswerSet]) -> None:
    labels = {task: answer_set.labels for task, answer_set in answers.items() if answer_set.labels}
    for task, by_label in numbers.items():
        if task not in labels:
            raise ConfigError(f"{key}.{task}: no trained task with labels has this name; {_choices(labels)}")
        for label in by_label:
            if label not in labels[task]:
                raise ConfigError(f"{key}.{task}.{label}: the task has no such label; {_choices(labels[task])}")


def _choices(names: Mapping[str, object] | Sequence[str]) -> str:
    return f"choose from {', '.join(names)}" if names else "there is none: remove the setting"
