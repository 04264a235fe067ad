"""The examples of a trial, and predictions over a whole split: identical however the split is batched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from data.augment import Draw, longest
from data.config import DataConfig
from data.errors import ConfigError, UserError
from data.examples import Example, clip_samples, read_example
from data.features import Features
from data.plan import Cost, micro_batches, plan, share
from data.shards import Shards
from data.stream import SOURCES, Reading, Source, feature_source, taught_source
from data.tasks import Item, has_sound, items
from data.taught import TaughtFiles, parts
from model.config import LossConfig
from model.losses import answer_losses
from model.metrics import Record
from model.score import decide, generate, label_scores
from model.speech_llm import SpeechLLM
from model.teacher import lessons
from model.workers import world

LOGITS = 2**28  # numbers computed at once in an evaluation: 1 GiB in fp32
Select = Callable[[Shards, str, str], list[Item]]
TOGETHER = 64  # items of an evaluation that are cut into batches together, of similar tokens and frames


@dataclass
class SplitData:
    """The items of a split, and by item what planning needs to know."""

    items: list[Item] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)  # tokens of the answer
    answers: list[str] = field(default_factory=list)


@dataclass
class TrialData:
    """The examples of a trial, by split, and where batches of them come from."""

    shards: Shards
    source: Source
    splits: dict[str, SplitData]
    dropped_turns: int  # turns of history that no prompt had room for, over all splits
    short_clips: int  # clips that were filled up to one window of the adapter
    readings: list[Reading] = field(default_factory=list)  # that have not ended

    @classmethod
    def open(
        cls,
        shards: Shards,
        model: SpeechLLM,
        config: DataConfig,
        splits: Sequence[str],
        reader: str = "local",
        *,
        teacher: bool = False,
        features: Path | None = None,
        taught: Path | None = None,
        select: Select = items,
    ) -> "TrialData":
        """Choose the examples of `splits` and plan by what this model computes for each.

        Args:
            teacher: whether the losses of the training split need the base LLM's reading, too. It reads one example
                at a time, or did so before, so it is no matter of the plan; but it must fit.
            features: where those of the frozen encoder or layers lie, if they are to be read in place of the sound.
            taught: where lies what that teacher said, if it is to be read.
            select: chooses the items of a task in a split.

        Raises:
            UserError: a split has nothing for a task, an example does not fit, or the model needs sound and the corpus
                has none.
        """
        if model.config.hears and not has_sound(shards):
            raise UserError(
                f"{shards.folder}: model.modality {model.config.modality!r} needs sound and this corpus is text only; "
                "use model.modality=text, or prepare the corpus with --audio"
            )
        _check_roles(shards, model)
        if features is None:
            source = SOURCES[reader](shards, config, model.config.hears)
        else:
            source = feature_source(shards, config, Features(features, shards, config))
        found = cls(shards, source, {}, 0, 0)
        for split in splits:
            own = found.splits[split] = SplitData()
            for item in (item for task in model.tasks for item in select(shards, task, split)):
                example = read_example(shards, item, config, sound=False)
                samples = clip_samples(shards, item, config)
                measure = model.measure(example, samples)
                if split == "train" and (slowest := longest(samples, config.augment)) > samples:
                    model.measure(example, slowest)  # it must fit, too
                own.items.append(item)
                own.costs.append(measure.cost)
                own.predicted.append(measure.predicted)
                own.answers.append(example.answer)
                found.dropped_turns += measure.dropped_turns
                found.short_clips += measure.short_clip
        if teacher and "train" in splits:
            read = lessons(model.prompter, model.reach, shards, config, list(model.tasks))
            if taught is not None:
                found.source = taught_source(source, TaughtFiles(taught, parts(shards, read)))
        return found

    def read(self, split: str, batches: Sequence[Sequence[int]], draw: Draw | None = None) -> Reading:
        """Examples by batch, read ahead as soon as what was asked for before has been read.

        Args:
            split: by name.
            batches: positions in the split's items.
            draw: in training, of the epoch, for augmentation; None: clips are heard as they are.
        """
        chosen = self.splits[split].items
        own = [[chosen[position] for position in batch] for batch in batches]
        reading = Reading(lambda: self.source(own, draw), after=self.readings[-1] if self.readings else None)
        self.readings = [*(known for known in self.readings if not known.ended), reading]
        return reading

    def close(self) -> None:
        """Stop reading ahead."""
        for reading in self.readings:
            reading.close()


def _check_roles(shards: Shards, model: SpeechLLM) -> None:
    """Raises ConfigError for a renamed role that nobody in the corpus has."""
    speakers = set(shards.columns["speaker"])
    unknown = sorted(model.config.prompt.roles.keys() - speakers)
    if unknown:
        raise ConfigError(
            f"model.prompt.roles.{unknown[0]}: the corpus has no such role; its roles are {', '.join(sorted(speakers))}"
        )


class Asked(NamedTuple):
    """A pass over items that has been asked for: it is read ahead while something else is computed."""

    batches: list[list[int]]  # positions in the split's items
    reading: Reading


def ask(model: SpeechLLM, data: TrialData, split: str, token_budget: int, batch_size: int | None = None) -> Asked:
    """Start to read this worker's part of a split for `evaluate`, with the same arguments."""
    rank, workers = world()
    own = data.splits[split]
    batches: list[list[int]] = []
    for task in model.tasks:
        positions = share([place for place, item in enumerate(own.items) if item[0] == task], rank, workers)
        if batch_size is None:
            costs = [own.costs[position] for position in positions]
            for together in plan(costs, batch_size=TOGETHER, seed=0, epoch=0):
                for part in micro_batches([costs[place] for place in together], token_budget, model.spared):
                    batches += _within_memory(model, task, own, [positions[together[place]] for place in part])
        else:
            batches += [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]
    return Asked(batches, data.read(split, batches))


@torch.no_grad()
def evaluate(
    model: SpeechLLM,
    data: TrialData,
    split: str,
    token_budget: int,
    batch_size: int | None = None,
    asked: Asked | None = None,
    between: Callable[[], Any] = lambda: None,
) -> list[Record]:
    """Predict a whole split, over all workers.

    Args:
        model: that predicts.
        data: with the split.
        split: by name.
        token_budget: limit on what is computed together.
        batch_size: items computed together; by default as many as fit in `token_budget`.
        asked: what `ask` returned, where it was called early.
        between: called before each batch; it may raise to end the evaluation.

    Returns:
        One record per item, in order.
    """
    batches, reading = asked or ask(model, data, split, token_budget, batch_size)
    model.eval()
    found: list[tuple[int, Record]] = []
    for batch, examples in zip(batches, reading, strict=True):
        between()
        found += zip(batch, predict(model, examples), strict=True)
    if (workers := world()[1]) > 1:
        everybody: list[Any] = [None] * workers
        dist.all_gather_object(everybody, found)
        found = [item for part in everybody for item in part]
    return [record for _, record in sorted(found, key=lambda item: item[0])]


def _within_memory(model: SpeechLLM, task: str, own: SplitData, batch: list[int]) -> list[list[int]]:
    """Cut a batch so that its logits, of which every label or token of an answer needs some, stay within LOGITS."""
    rows = len(model.tries[task].nodes) + 1
    rows = max([rows, *(own.predicted[position] for position in batch)])
    size = max(1, LOGITS // (rows * model.llm.get_input_embeddings().num_embeddings))
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def predict(model: SpeechLLM, examples: Sequence[Example]) -> list[Record]:
    """The records of examples of one task."""
    return (_label_records if model.tasks[examples[0].task].labels else _text_records)(model, examples)


def _label_records(model: SpeechLLM, examples: Sequence[Example]) -> list[Record]:
    task = examples[0].task
    labels = model.tasks[task].labels
    scores_BK = label_scores(model, examples)
    decided_BK = decide(model, task, scores_BK)
    losses = [
        -float(row[labels.index(example.answer)])
        if example.answer in labels
        # A set of labels that training does not hold: nobody can choose it, but its words have a probability.
        else float(answer_losses(model, [example], LossConfig()).next_token_B)
        for row, example in zip(scores_BK, examples, strict=True)
    ]
    return [
        _record(
            model,
            example,
            prediction=labels[int(decided_K.argmax())],
            scores=tuple(decided_K.tolist()),
            loss=loss,
        )
        for example, decided_K, loss in zip(examples, decided_BK, losses, strict=True)
    ]


def _text_records(model: SpeechLLM, examples: Sequence[Example]) -> list[Record]:
    losses = answer_losses(model, examples, LossConfig()).next_token_B.tolist()
    return [
        _record(model, example, prediction=reply.text, scores=(), loss=loss, ended=reply.ended)
        for example, reply, loss in zip(examples, generate(model, examples), losses, strict=True)
    ]


def _record(model: SpeechLLM, example: Example, **said: Any) -> Record:
    return Record(
        id=example.id,
        task=example.task,
        conversation=example.conversation,
        speaker=example.speaker,
        subset=example.subset,
        label=example.answer,
        tokens=model.answer(example).predicted,
        **said,
    )
