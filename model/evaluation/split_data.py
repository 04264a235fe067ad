"""The data of a trial: the items of each split, what they cost to compute, and readers of their examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.config import DataConfig
from data.errors import ConfigError, UserError
from data.loading.augment import AugmentSeed, possible_samples
from data.loading.batching import Cost
from data.loading.examples import clip_samples, read_example
from data.loading.feature_files import FeatureReader, heard_rows
from data.loading.prefetch import Prefetcher
from data.loading.ray_source import ray_source
from data.loading.sources import Source, feature_source, local_source, teacher_source
from data.loading.tasks import Item, check_votes, has_audio, items, vote_targets
from data.loading.teacher_files import TeacherReader, teacher_files
from data.shards.dataset import Shards
from model.objectives.teacher import teacher_inputs
from model.speech_llm.speech_llm import SpeechLLM

Select = Callable[[Shards, str, str], list[Item]]  # (shards, task, split) → the items to use


@dataclass
class SplitData:
    """The items of a split and, in the same order, what planning needs to know of each."""

    items: list[Item] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)  # tokens of the answer
    answers: list[str] = field(default_factory=list)
    targets: list[dict[str, float] | None] = field(default_factory=list)  # shares of annotators; None: the answer


@dataclass
class TrialData:
    """The splits of a trial, and the source that their batches are read from."""

    shards: Shards
    source: Source
    splits: dict[str, SplitData]
    dropped_turns: int  # turns of history that did not fit into the prompts, over all splits
    short_clips: int  # clips that were padded to one window of the adapter
    readers: list[Prefetcher] = field(default_factory=list)  # that have not ended

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
        features: Sequence[Path] = (),
        teacher_logits: Path | None = None,
        votes: bool = False,
        select: Select = items,
    ) -> "TrialData":
        """Select the items of `splits`, and measure what this model computes for each.

        Args:
            shards: of the corpus.
            model: that is trained or evaluated.
            config: of the data.
            splits: by name.
            reader: of the examples, "local" or "ray".
            teacher: whether the losses of the training split need a teacher, which must be able to read the prompts.
                It reads one example at a time, or has done so before, so it does not affect the batch plan.
            features: folders with the features of the frozen encoder or layers, to read in place of the audio.
            teacher_logits: folder with the teacher's logits, to read in place of running the teacher.
            votes: whether the training split is trained on the votes of its annotators.
            select: returns the items of a task in a split.

        Raises:
            UserError: a split has no item of a task, an example does not fit, the model needs audio and the corpus
                has none, or votes are asked for and no turn has several annotators.
        """
        if model.config.uses_audio and not has_audio(shards):
            raise UserError(
                f"{shards.folder}: model.modality {model.config.modality!r} needs audio and this corpus is text only; "
                "use model.modality=text, or prepare the corpus with --audio"
            )
        speakers = set(shards.columns["speaker"])
        unknown = sorted(model.config.prompt.roles.keys() - speakers)
        if unknown:
            raise ConfigError(
                f"model.prompt.roles.{unknown[0]}: the corpus has no such role; its roles are "
                f"{', '.join(sorted(speakers))}"
            )
        if not features:
            source = (local_source if reader == "local" else ray_source)(shards, config, model.config.uses_audio)
        else:
            heard = heard_rows(shards, tuple(model.tasks), config.sound)
            source = feature_source(shards, config, [FeatureReader(f, shards, config, heard) for f in features])
        data = cls(shards, source, {}, 0, 0)
        if votes:
            check_votes(shards, list(model.tasks))
        for split in splits:
            selected = data.splits[split] = SplitData()
            for task, answers in model.tasks.items():
                of_task = select(shards, task, split)
                soft = votes and split == "train"
                selected.items += of_task
                selected.targets += vote_targets(shards, of_task, answers.labels) if soft else [None] * len(of_task)
        data._measure(model, config)
        if teacher and "train" in splits:
            inputs = teacher_inputs(model.prompt_builder, model.max_positions, shards, config, list(model.tasks))
            if teacher_logits is not None:
                data.source = teacher_source(source, TeacherReader(teacher_logits, teacher_files(shards, inputs)))
        return data

    def _measure(self, model: SpeechLLM, config: DataConfig) -> None:
        """Measure all items; raise MisfitError where an example does not fit, also after augmentation."""
        possible = {
            (split, item): possible_samples(samples, config.augment) if split == "train" else (samples, samples)
            for split, selected in self.splits.items()
            for item in selected.items
            if model.config.uses_audio and (samples := clip_samples(self.shards, item, config))
        }
        if possible:  # the shortest clip comes first: the adapter's rate may leave none of its frames
            (_, item), (shortest, _) = min(possible.items(), key=lambda pair: pair[1])
            model.measure(read_example(self.shards, item, config, with_audio=False), shortest)
        for split, selected in self.splits.items():
            for item, target in zip(selected.items, selected.targets, strict=True):
                example = read_example(self.shards, item, config, with_audio=False)
                samples = clip_samples(self.shards, item, config)
                measure = model.measure(example, samples, target or ())
                if (slowest := max(possible.get((split, item), (0,)))) > samples:
                    model.measure(example, slowest)
                selected.costs.append(measure.cost)
                selected.predicted.append(measure.predicted)
                selected.answers.append(example.answer)
                self.dropped_turns += measure.dropped_turns
                self.short_clips += measure.short_clip

    def read(self, split: str, batches: Sequence[Sequence[int]], draw: AugmentSeed | None = None) -> Prefetcher:
        """Return a reader of the examples of batches, which reads ahead once the readers before it are done.

        Args:
            split: by name.
            batches: positions in the split's items.
            draw: the random draw of the epoch for augmentation; None: clips are used as they are.
        """
        selected = self.splits[split].items
        requested = [[selected[position] for position in batch] for batch in batches]
        reader = Prefetcher(lambda: self.source(requested, draw), after=self.readers[-1] if self.readers else None)
        self.readers = [*(other for other in self.readers if not other.ended), reader]
        return reader

    def close(self) -> None:
        """Stop reading ahead."""
        for reader in self.readers:
            reader.close()
