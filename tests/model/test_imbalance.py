"""Class imbalance and augmentation in training: weights and draws follow the settings, whatever computes them."""

import math
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from data.config import AugmentConfig, DataConfig
from data.errors import ConfigError, DataError
from data.loading.augment import AugmentSeed, augment_clip
from data.loading.batching import Cost, plan, plan_hash, share
from data.loading.examples import Example
from data.loading.tasks import TASKS, AnswerSet, audio_row
from data.shards.dataset import Shards
from model.config import TrainConfig
from model.evaluation.split_data import TrialData
from model.objectives.class_weights import resolve_balanced, weights_by_item
from model.training.trainer import fit
from tests.model.trials import CONFIG, TWO, Trial, equal, same_end

ANSWERS = {
    "classify": AnswerSet(("change", "sustain", "neutral", "change|sustain"), (90, 30, 0, 6)),
    "response": AnswerSet(),
    "quality": AnswerSet(("high", "low"), (9, 1)),
}
LABELLED = [
    ((task, row), label)
    for task, answers in ANSWERS.items()
    for label, count in zip(answers.labels or ("hm",), answers.counts or (40,), strict=True)
    for row in range(count)
]
ITEMS, LABELS = [item for item, _ in LABELLED], [label for _, label in LABELLED]
COSTS = [Cost(20 + 7 * index % 90, 30 * (index % 13)) for index in range(len(ITEMS))]
BALANCED = resolve_balanced(TrainConfig(sampling="balanced"), ANSWERS).sampling
AUGMENTED = DataConfig(history=2, augment=AugmentConfig(speeds=(0.9, 1.1), noise_db=(0.0, 10.0)))
every_setting = pytest.mark.parametrize("setting", ["class_weights", "sampling"])


def epoch(number: int, seed: int = 5, batch_size: int = 16) -> list[list[int]]:
    weights = weights_by_item(BALANCED, ITEMS, LABELS)
    return plan(COSTS, batch_size=batch_size, seed=seed, epoch=number, weights=weights)


@every_setting
def test_balanced_weights_equal_scikit_learn(setting: Any) -> None:
    numbers = getattr(resolve_balanced(TrainConfig.model_validate({setting: "balanced"}), ANSWERS), setting)
    assert set(numbers) == {"classify", "quality"}
    for task, by_label in numbers.items():
        truth = [label for (name, _), label in LABELLED if name == task]
        weights = compute_class_weight("balanced", classes=np.array(list(by_label)), y=truth)
        assert set(by_label) == set(truth)
        assert list(by_label.values()) == pytest.approx(list(weights))
        assert np.mean([by_label[label] for label in truth]) == pytest.approx(1)


def test_every_item_has_a_weight_or_none_has() -> None:
    given = TrainConfig(class_weights={"classify": {"sustain": 3.0, "neutral": 2.0}})
    assert resolve_balanced(given, ANSWERS) == given
    weights = weights_by_item(given.class_weights, ITEMS, LABELS)
    assert weights == [3.0 if item[0] == "classify" and label == "sustain" else 1.0 for item, label in LABELLED]
    plain = resolve_balanced(TrainConfig(), ANSWERS)
    assert weights_by_item(plain.class_weights, ITEMS, LABELS) is weights_by_item(plain.sampling, ITEMS, LABELS) is None


@every_setting
@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ({"clasify": {"change": 2}}, r"\.clasify: no trained task with labels .*; choose from classify, quality$"),
        ({"response": {"hm": 2}}, r"\.response: no trained task with labels .*; choose from classify, quality$"),
        ({"quality": {"low": 2, "lo": 2}}, r"\.quality\.lo: the task has no such label; choose from high, low$"),
    ],
)
def test_weights_of_unknown_names_are_refused(setting: str, numbers: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.{setting}{problem}"):
        resolve_balanced(TrainConfig.model_validate({setting: numbers}), ANSWERS)


@pytest.mark.parametrize("weights", ["balanced", {"classify": {"change": 2}}])
def test_class_weights_with_sampling_are_refused(weights: Any) -> None:
    config = TrainConfig.model_validate({"class_weights": weights, "sampling": "balanced"})
    [problem] = config.problems()
    assert problem.startswith("train.sampling: balanced already weights labels, and train.class_weights (")
    assert problem.endswith("set one of them to none or equal")
    assert TrainConfig(class_weights="balanced").problems() == TrainConfig(sampling="balanced").problems() == []


def test_labels_are_drawn_equally_often_in_each_task() -> None:
    """Tasks keep their shares, and an epoch has as many items in as many steps as without weights."""
    epochs = 400
    drawn = Counter(position for number in range(epochs) for step in epoch(number) for position in step)
    counts: Counter[tuple[str, str]] = Counter()
    for position, count in drawn.items():
        counts[ITEMS[position][0], LABELS[position]] += count
    expected = {("classify", label): 126 / 3 for label in ("change", "sustain", "change|sustain")}
    expected |= {("quality", label): 5 for label in ("high", "low")} | {("response", "hm"): 40}
    assert counts.keys() == expected.keys()
    for name, count in expected.items():
        assert counts[name] / epochs == pytest.approx(count, rel=0.04), name
    texts = [count for position, count in drawn.items() if ITEMS[position][0] == "response"]
    assert len(texts) == 40
    assert min(texts) > 0.75 * epochs
    for size in (1, 7, 16, 1000):
        steps = epoch(0, batch_size=size)
        assert [len(steps), sum(map(len, steps))] == [math.ceil(len(ITEMS) / size), len(ITEMS)]


def test_draws_follow_from_seed_and_epoch() -> None:
    """They are shared among any number of workers, and a checkpoint of other draws has another plan."""
    assert epoch(3) == epoch(3)
    assert epoch(3) != epoch(4)
    assert epoch(3) != epoch(3, seed=6)
    for step in epoch(3):
        assert sorted(step) == sorted(position for rank in range(3) for position in share(step, rank, 3))
    hashes = {plan_hash(COSTS, "a", 16, 0, weights) for weights in (None, [1.0] * len(COSTS), [2.0] * len(COSTS))}
    assert len(hashes) == 3


def test_copies_of_an_item_are_in_different_steps() -> None:
    """Sorting by cost alone would put them next to each other."""
    costs = [Cost(20 + index % 500) for index in range(2000)]
    steps = plan(costs, batch_size=16, seed=0, epoch=0, weights=[10.0] * 40 + [1.0] * 1960)
    drawn = Counter(position for step in steps for position in step)
    assert sum(drawn[position] for position in range(40)) / 40 > 6
    assert sum(len(step) - len(set(step)) for step in steps) < 0.01 * 2000
    computed = sum(max(costs[position].tokens for position in step) * len(step) for step in steps)
    assert computed < 1.25 * sum(costs[position].tokens for step in steps for position in step)  # 1.9 if unsorted


def recorded(data: TrialData) -> list[tuple[AugmentSeed | None, Example]]:
    """Return a list that grows with every example that is read, and the seed of its augmentation."""
    read: list[tuple[AugmentSeed | None, Example]] = []
    source = data.source

    def reading(batches: Any, seed: AugmentSeed | None) -> Generator[list[Example], None, None]:
        for batch in source(batches, seed):
            read.extend((seed, example) for example in batch)
            yield batch

    data.source = reading
    return read


def test_only_training_reads_augmented_clips(models: Path, corpus: Shards, tmp_path: Path) -> None:
    trial = Trial(tasks=TWO, data=AUGMENTED)
    model, data = trial.start(models, corpus)
    read = recorded(data)
    fit(model, data, trial.train, TWO, trial.seed, tmp_path, lambda epoch, metrics: None)
    items = [item for split in data.splits.values() for item in split.items]
    rows = {(task, corpus.columns["id"][row]): audio_row(corpus, TASKS[task], row) for task, row in items}
    counts: Counter[tuple[str, AugmentSeed | None]] = Counter()
    for seed, example in read:
        row = rows[example.task, example.id]
        assert row is not None
        clip, name, split = corpus.pcm(row), corpus.columns["id"][row], corpus.columns["split"][row]
        assert clip is not None
        expected = clip if seed is None else augment_clip(clip, AUGMENTED.augment, seed, name)
        assert np.array_equal(example.pcm, expected)
        counts[split, seed] += 1
    train, val = (len(data.splits[split].items) for split in ("train", "val"))
    assert counts == {("val", None): 2 * val, ("train", AugmentSeed(7, 0)): train, ("train", AugmentSeed(7, 1)): train}


def test_augmentation_changes_training_and_not_the_plan(models: Path, corpus: Shards, tmp_path: Path) -> None:
    trainers = [Trial(data=data).trainer(models, corpus, tmp_path) for data in (DataConfig(history=2), AUGMENTED)]
    assert trainers[0].plan_hash == trainers[1].plan_hash
    for trainer in trainers:
        trainer.train_epoch()
    assert len({trainer.progress.sums["classify/next_token"][0] for trainer in trainers}) == 2


def test_slowed_clip_beyond_the_llm_is_refused_before_training(models: Path, corpus: Shards) -> None:
    model, data = Trial().start(models, corpus)
    model.max_positions = max(cost.tokens for cost in data.splits["train"].costs) + 2
    slow = DataConfig(history=2, augment=AugmentConfig(speeds=(0.5, 1.0)))
    TrialData.open(corpus, model, DataConfig(history=2), ("train", "val"))
    TrialData.open(corpus, model, slow, ("val",))
    with pytest.raises(DataError, match=rf"reads {model.max_positions} at once"):
        TrialData.open(corpus, model, slow, ("train", "val"))


def test_numbers_train_the_model_of_balanced(models: Path, corpus: Shards, tmp_path: Path) -> None:
    short = CONFIG.model_copy(update={"epochs": 1})
    plain = Trial(tasks=TWO, train=short).run(models, corpus, tmp_path / "plain")
    for setting in ("class_weights", "sampling"):
        trial = Trial(tasks=TWO, train=short.model_copy(update={setting: "balanced"}))
        model = trial.run(models, corpus, tmp_path / setting)
        numbers = TrainConfig.model_validate_json(resolve_balanced(trial.train, model.tasks).model_dump_json())
        assert isinstance(getattr(numbers, setting), dict)
        Trial(tasks=TWO, train=numbers).run(models, corpus, tmp_path / f"{setting}-numbers")
        assert same_end(tmp_path / setting, tmp_path / f"{setting}-numbers")
        assert not equal(dict(model.named_parameters()), dict(plain.named_parameters()))
