"""Frozen passes of encoders: which features a trial reads, and how they are computed; see `sweep.frozen`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.corpus.schema import SAMPLE_RATE
from data.loading.array_files import Part
from data.loading.examples import clip_samples
from data.loading.feature_files import BYTES, missing, parts
from data.loading.tasks import items
from model.encoders.base import SpeechEncoder
from model.encoders.frozen_features import CacheKey, Job, recipe
from model.speech_llm.speech_llm import SpeechLLM
from sweep.config.resolve import ResolvedConfig
from sweep.execution.trial import open_shards
from sweep.preflight.checks import skeleton

# Axes that decide which features a trial reads, if any.
AXES = (
    "model.encoder.path",
    "model.encoder.dtype",
    "model.encoder.dropout",
    "model.encoder.spec_augment",
    "model.adapter.kind",
    "model.adapter.window",
    "model.adapter.stride",
    "model.modality",
    "model.trainable",
    "model.precision",
    "model.init_from",
    "data.sound",
    "data.snr_db",
    "data.augment.speeds",
    "data.augment.noise_db",
)
FRAMES = 50  # of an encoder, in a second of sound
LARGE = 2**30  # bytes that a pass may hold for several needs at once: with more, each has its own
_BUILT: dict[str, SpeechLLM] = {}  # without weights


@dataclass(frozen=True)
class CacheRequest:
    """Features that trials of a sweep read."""

    recipe: CacheKey
    config: ResolvedConfig
    folder: Path

    @property
    def parts(self) -> list[Part[int]]:
        """The files they lie in."""
        return parts(open_shards(self.config), self.config.data)

    @property
    def missing(self) -> list[Part[int]]:
        """Those that have not been computed."""
        return missing(self.folder, open_shards(self.config), self.config.data)

    def describe(self) -> str:
        """Whose they are."""
        encoder, layers = _encoder(self.config), self.recipe.layers
        part = f" up to layer {layers} of {len(encoder.transformer.layers)}" if layers else ""
        kept = "" if self.recipe.pool is None else ", pooled by {} / {}".format(*self.recipe.pool)
        sound = "" if self.recipe.sound == "recorded" else f", {self.recipe.sound}"
        return f"frozen {shown_name(self.recipe.encoder)}{part}{kept}{sound}"

    def shown(self, size: int) -> str:
        """Samples as hours."""
        return f"{size / SAMPLE_RATE / 3600:.3g} h of sound"

    def work(self, size: int) -> float:
        """Frames times parameters."""
        encoder, layers = _encoder(self.config), self.recipe.layers
        above = {
            id(own)
            for module in (*encoder.transformer.layers[layers:], encoder.final_norm)
            for own in module.parameters()
        }
        used = sum(own.numel() for own in encoder.parameters() if not layers or id(own) not in above)
        return size / SAMPLE_RATE * FRAMES * used

    @property
    def epoch(self) -> int:
        """Samples of the clips of all items for training and validation."""
        shards, data = open_shards(self.config), self.config.data
        tasks = self.config.tasks.active()
        known = [item for task in tasks for split in ("train", "val") for item in items(shards, task, split)]
        return sum(clip_samples(shards, item, data) for item in known)

    def bytes(self, parts: Sequence[Part[int]]) -> int:
        """Of the features of parts."""
        model, samples = _structure(self.config), open_shards(self.config).columns["n_samples"]
        assert model.encoder is not None
        assert model.adapter is not None
        count = model.encoder.num_computed_frames if self.recipe.layers else model.encoder.num_frames
        frames = [count(samples[row]) for part in parts for row in part.rows]
        kept = map(model.adapter.num_embeddings, frames) if self.recipe.pool is not None else frames
        return sum(kept) * model.encoder.width * BYTES

    @property
    def reading(self) -> tuple[str, ...]:
        """Layers and pooling are no part of it: an encoder passes all of them on its way."""
        return self.recipe.reading, *(part.name for part in self.parts)

    def jobs(self, parts: Sequence[Part[int]], needs: Sequence["CacheRequest"]) -> list[Job]:
        """The work."""
        shards, config, found = open_shards(self.config), self.config, []
        for part in parts:
            lacking = [need for need in needs if not (need.folder / part.name).exists()]
            together = sum(need.bytes([part]) for need in lacking) <= LARGE
            for own in [lacking] if together else [[need] for need in lacking]:
                recipes = {need.folder: need.recipe for need in own}
                found.append(Job(shards, part, config.data, recipes, config.resources.threads))
        return found


def need_of(config: ResolvedConfig, cache: Path) -> CacheRequest | None:
    """The features that a trial may read in place of the sound; None if all of its encoder trains, or something is
    drawn in what would be computed once."""
    augment = config.data.augment
    if config.storage.features == "live" or not config.model.uses_audio or augment.speeds or augment.noise_db:
        return None
    model = _structure(config)
    if model.has_own_encoder or not (model.encoder_is_frozen or model.frozen_layers):
        return None
    made = recipe(config.model, config.data, config.resources.device, model.frozen_layers)
    return CacheRequest(made, config, cache / "features" / made.key)


def shown_name(path: str) -> str:
    """Of a model: its id, or what its folder is called."""
    return Path(path).name if Path(path).exists() else path


def _encoder(config: ResolvedConfig) -> SpeechEncoder:
    encoder = _structure(config).encoder
    assert encoder is not None
    return encoder


def _structure(config: ResolvedConfig) -> SpeechLLM:
    """The model of a trial, as far as its encoder is concerned: others need not be built anew."""
    keys = {"encoder", "trainable", "init_from", "init_partial", "modality", "adapter"}
    key = config.model.model_dump_json(include=keys)
    if key not in _BUILT:
        _BUILT[key] = skeleton(config)
    return _BUILT[key]
