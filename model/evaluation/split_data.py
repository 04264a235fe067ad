"""The examples of a trial, by split."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.config import DataConfig
from data.errors import ConfigError, UserError
from data.loading.augment import AugmentSeed, longest_samples
from data.loading.batching import Cost
from data.loading.examples import clip_samples, read_example
from data.loading.feature_files import FeatureReader
from data.loading.prefetch import Prefetcher
from data.loading.ray_source import ray_source
from data.loading.sources import Source, feature_source, local_source, teacher_source
from data.loading.tasks import Item, has_audio, items
from data.loading.teacher_files import TeacherReader, teacher_files
from data.shards.dataset import Shards
from model.objectives.teacher import teacher_inputs
from model.speech_llm.speech_llm import SpeechLLM

Select = Callable[[Shards, str, str], list[Item]]


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
    readings: list[Prefetcher] = field(default_factory=list)  # that have not ended

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
        teacher_logits: Path | None = None,
        select: Select = items,
    ) -> "TrialData":
        """Choose the examples of `splits` and plan by what this model computes for each.

        Args:
            teacher: whether the losses of the training split need the base LLM's reading, too. It reads one example
                at a time, or did so before, so it is no matter of the plan; but it must fit.
            features: the cache folder of the frozen encoder's or layers' features, to be read in place of the audio.
            teacher_logits: the cache folder of that teacher's logits, to be read in place of running it.
            select: chooses the items of a task in a split.

        Raises:
            UserError: a split has nothing for a task, an example does not fit, or the model needs sound and the corpus
                has none.
        """
        if model.config.uses_audio and not has_audio(shards):
            raise UserError(
                f"{shards.folder}: model.modality {model.config.modality!r} needs sound and this corpus is text only; "
                "use model.modality=text, or prepare the corpus with --audio"
            )
        _check_roles(shards, model)
        if features is None:
            source = (local_source if reader == "local" else ray_source)(shards, config, model.config.uses_audio)
        else:
            source = feature_source(shards, config, FeatureReader(features, shards, config))
        found = cls(shards, source, {}, 0, 0)
        for split in splits:
            own = found.splits[split] = SplitData()
            for item in (item for task in model.tasks for item in select(shards, task, split)):
                example = read_example(shards, item, config, with_audio=False)
                samples = clip_samples(shards, item, config)
                measure = model.measure(example, samples)
                if split == "train" and (slowest := longest_samples(samples, config.augment)) > samples:
                    model.measure(example, slowest)  # it must fit, too
                own.items.append(item)
                own.costs.append(measure.cost)
                own.predicted.append(measure.predicted)
                own.answers.append(example.answer)
                found.dropped_turns += measure.dropped_turns
                found.short_clips += measure.short_clip
        if teacher and "train" in splits:
            inputs = teacher_inputs(model.prompt_builder, model.max_positions, shards, config, list(model.tasks))
            if teacher_logits is not None:
                found.source = teacher_source(source, TeacherReader(teacher_logits, teacher_files(shards, inputs)))
        return found

    def read(self, split: str, batches: Sequence[Sequence[int]], draw: AugmentSeed | None = None) -> Prefetcher:
        """Examples by batch, read ahead as soon as what was asked for before has been read.

        Args:
            split: by name.
            batches: positions in the split's items.
            draw: in training, of the epoch, for augmentation; None: clips are heard as they are.
        """
        chosen = self.splits[split].items
        own = [[chosen[position] for position in batch] for batch in batches]
        reading = Prefetcher(lambda: self.source(own, draw), after=self.readings[-1] if self.readings else None)
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
