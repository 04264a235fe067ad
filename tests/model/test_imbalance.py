"""Class imbalance and augmentation in training: weights and draws are what they say, and the same wherever it runs."""

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
ITEMS = [
    ((task, row), label)
    for task, known in ANSWERS.items()
    for label, count in zip(known.labels or ("hm",), known.counts or (40,), strict=True)
    for row in range(count)
]
WHAT, SAID = [item for item, _ in ITEMS], [label for _, label in ITEMS]
COSTS = [Cost(20 + 7 * place % 90, 30 * (place % 13)) for place in range(len(ITEMS))]
BALANCED = resolve_balanced(TrainConfig(sampling="balanced"), ANSWERS).sampling
AUGMENTED = DataConfig(history=2, augment=AugmentConfig(speeds=(0.9, 1.1), noise_db=(0.0, 10.0)))


def epoch(number: int, seed: int = 5, batch_size: int = 16) -> list[list[int]]:
    return plan(COSTS, batch_size=batch_size, seed=seed, epoch=number, weights=weights_by_item(BALANCED, WHAT, SAID))


@pytest.mark.parametrize("setting", ["class_weights", "sampling"])
def test_balanced_is_what_scikit_learn_has_under_the_name(setting: Any) -> None:
    numbers = getattr(resolve_balanced(TrainConfig.model_validate({setting: "balanced"}), ANSWERS), setting)
    assert set(numbers) == {"classify", "quality"}
    for task, own in numbers.items():
        truth = [label for (name, _), label in ITEMS if name == task]
        weights = compute_class_weight("balanced", classes=np.array(list(own)), y=truth)
        assert set(own) == set(truth)
        assert list(own.values()) == pytest.approx(list(weights))
        assert np.mean([own[label] for label in truth]) == pytest.approx(1)


def test_every_item_has_a_number_or_none_has() -> None:
    given = TrainConfig(class_weights={"classify": {"sustain": 3.0, "neutral": 2.0}})
    assert resolve_balanced(given, ANSWERS) == given
    found = weights_by_item(given.class_weights, WHAT, SAID)
    assert found == [3.0 if item[0] == "classify" and label == "sustain" else 1.0 for item, label in ITEMS]
    plain = resolve_balanced(TrainConfig(), ANSWERS)
    assert weights_by_item(plain.class_weights, WHAT, SAID) is weights_by_item(plain.sampling, WHAT, SAID) is None


@pytest.mark.parametrize("setting", ["class_weights", "sampling"])
@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ({"clasify": {"change": 2}}, r"\.clasify: no trained task with labels .*; choose from classify, quality$"),
        ({"response": {"hm": 2}}, r"\.response: no trained task with labels .*; choose from classify, quality$"),
        ({"quality": {"low": 2, "lo": 2}}, r"\.quality\.lo: the task has no such label; choose from high, low$"),
    ],
)
def test_numbers_for_what_there_is_not_are_refused(setting: str, numbers: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"^train\.{setting}{problem}"):
        resolve_balanced(TrainConfig.model_validate({setting: numbers}), ANSWERS)


@pytest.mark.parametrize("weights", ["balanced", {"classify": {"change": 2}}])
def test_both_at_once_are_refused(weights: Any) -> None:
    config = TrainConfig.model_validate({"class_weights": weights, "sampling": "balanced"})
    [problem] = config.problems()
    assert problem.startswith("train.sampling: balanced already weights labels, and train.class_weights (")
    assert problem.endswith("set one of them to none or equal")
    assert TrainConfig(class_weights="balanced").problems() == TrainConfig(sampling="balanced").problems() == []


def test_labels_are_drawn_equally_often_and_tasks_keep_their_shares() -> None:
    epochs = 400
    drawn = [position for number in range(epochs) for step in epoch(number) for position in step]
    found = Counter((WHAT[position][0], SAID[position]) for position in drawn)
    expected = {("classify", label): 126 / 3 for label in ("change", "sustain", "change|sustain")}
    expected |= {("quality", label): 5 for label in ("high", "low")} | {("response", "hm"): 40}
    assert found.keys() == expected.keys()
    for name, count in expected.items():
        assert found[name] / epochs == pytest.approx(count, rel=0.04), name
    texts = Counter(position for position in drawn if WHAT[position][0] == "response")
    assert len(texts) == 40
    assert min(texts.values()) > 0.75 * epochs


def test_an_epoch_has_as_many_items_as_there_are_in_as_many_steps() -> None:
    for size in (1, 7, 16, 1000):
        steps = epoch(0, batch_size=size)
        assert [len(steps), sum(map(len, steps))] == [math.ceil(len(ITEMS) / size), len(ITEMS)]


def test_what_is_drawn_is_a_function_of_seed_and_epoch_and_dealt_to_any_number_of_workers() -> None:
    assert epoch(3) == epoch(3)
    assert epoch(3) != epoch(4)
    assert epoch(3) != epoch(3, seed=6)
    for step in epoch(3):
        assert sorted(step) == sorted(position for rank in range(3) for position in share(step, rank, 3))


def test_copies_of_an_item_go_to_different_steps() -> None:
    """Sorted by cost they would lie side by side."""
    costs = [Cost(20 + place % 500) for place in range(2000)]
    steps = plan(costs, batch_size=16, seed=0, epoch=0, weights=[10.0] * 40 + [1.0] * 1960)
    drawn = Counter(position for step in steps for position in step)
    assert sum(drawn[position] for position in range(40)) / 40 > 6
    assert sum(len(step) - len(set(step)) for step in steps) < 0.01 * 2000
    computed = sum(max(costs[position].tokens for position in step) * len(step) for step in steps)
    assert computed < 1.25 * sum(costs[position].tokens for step in steps for position in step)  # else it is 1.9


def test_a_checkpoint_of_other_draws_is_of_another_plan() -> None:
    names = {plan_hash(COSTS, "a", 16, 0, weights) for weights in (None, [1.0] * len(COSTS), [2.0] * len(COSTS))}
    assert len(names) == 3


def listen(data: TrialData) -> list[tuple[AugmentSeed | None, Example]]:
    """Every example that will be read, and the draw that it is read with."""
    read: list[tuple[AugmentSeed | None, Example]] = []
    source = data.source

    def listening(batches: Any, draw: AugmentSeed | None) -> Generator[list[Example], None, None]:
        for batch in source(batches, draw):
            read.extend((draw, example) for example in batch)
            yield batch

    data.source = listening
    return read


def test_training_hears_augmented_clips_and_validation_the_recorded_ones(
    models: Path, corpus: Shards, tmp_path: Path
) -> None:
    trial = Trial(tasks=TWO, data=AUGMENTED)
    model, data = trial.start(models, corpus)
    read = listen(data)
    fit(model, data, trial.train, TWO, trial.seed, tmp_path, lambda epoch, metrics: None)
    every = [item for own in data.splits.values() for item in own.items]
    rows = {(task, corpus.columns["id"][row]): audio_row(corpus, TASKS[task], row) for task, row in every}
    draws: Counter[tuple[str, AugmentSeed | None]] = Counter()
    for draw, example in read:
        row = rows[example.task, example.id]
        assert row is not None
        clip, name, split = corpus.pcm(row), corpus.columns["id"][row], corpus.columns["split"][row]
        assert clip is not None
        expected = clip if draw is None else augment_clip(clip, AUGMENTED.augment, draw, name)
        assert np.array_equal(example.pcm, expected)
        draws[split, draw] += 1
    train, val = (len(data.splits[split].items) for split in ("train", "val"))
    assert draws == {("val", None): 2 * val, ("train", AugmentSeed(7, 0)): train, ("train", AugmentSeed(7, 1)): train}


def test_augmentation_changes_training_and_not_the_plan(models: Path, corpus: Shards, tmp_path: Path) -> None:
    plain, changed = (Trial(data=data) for data in (DataConfig(history=2), AUGMENTED))
    one, other = (trial.trainer(models, corpus, tmp_path) for trial in (plain, changed))
    assert one.plan_hash == other.plan_hash
    losses = []
    for trainer in (one, other):
        trainer.train_epoch()
        losses.append(trainer.progress.sums["classify/next_token"][0])
    assert losses[0] != losses[1]


def test_a_slowed_clip_that_the_llm_could_not_read_is_told_before_training(models: Path, corpus: Shards) -> None:
    model, data = Trial().start(models, corpus)
    train = data.splits["train"]
    prompts = [cost.tokens for cost in train.costs]
    model.max_positions = max(prompts) + 2
    slow = DataConfig(history=2, augment=AugmentConfig(speeds=(0.5, 1.0)))
    TrialData.open(corpus, model, DataConfig(history=2), ("train", "val"))
    TrialData.open(corpus, model, slow, ("val",))
    with pytest.raises(DataError, match=rf"reads {model.max_positions} at once"):
        TrialData.open(corpus, model, slow, ("train", "val"))


@pytest.mark.parametrize("setting", ["class_weights", "sampling"])
def test_the_numbers_train_what_balanced_trains(setting: str, models: Path, corpus: Shards, tmp_path: Path) -> None:
    trial = Trial(tasks=TWO, train=CONFIG.model_copy(update={setting: "balanced"}))
    model = trial.run(models, corpus, tmp_path / "balanced")
    written = resolve_balanced(trial.train, model.tasks).model_dump_json()
    numbers = TrainConfig.model_validate_json(written)
    assert isinstance(getattr(numbers, setting), dict)
    Trial(tasks=TWO, train=numbers).run(models, corpus, tmp_path / "numbers")
    assert same_end(tmp_path / "balanced", tmp_path / "numbers")
    plain = Trial(tasks=TWO).run(models, corpus, tmp_path / "plain")
    assert not equal(dict(model.named_parameters()), dict(plain.named_parameters()))
