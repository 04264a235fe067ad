"""The first kind of the feature cache: features of frozen encoders, or of their frozen lower layers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data.corpus.schema import SAMPLE_RATE
from data.loading.cached_arrays import CacheFile
from data.loading.examples import clip_samples
from data.loading.feature_files import BYTES_PER_VALUE, files_with, heard_rows, missing_runs
from data.loading.tasks import items
from model.encoders.base import OUTPUT, SpeechEncoder
from model.encoders.frozen_features import FeatureJob, FeatureKey, feature_key
from model.speech_llm.speech_llm import SpeechLLM
from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config
from sweep.config.space import FOLD
from sweep.execution.trial import open_shards
from sweep.preflight.cache_kinds.base import CacheKind, CacheRequest, model_name
from sweep.preflight.checks import skeleton

FRAME_RATE = 50  # frames of an encoder for a second of audio
MAX_SHARED_BYTES = 2**30  # limit of what one job holds for several keys at once; above it, each key has a job
FeatureRequest = CacheRequest[int, FeatureKey]
_skeletons: dict[str, SpeechLLM] = {}  # models without weights, by their settings


class EncoderFeatures(CacheKind[int, FeatureKey]):
    """Features of frozen encoders; a row is a row of the corpus index, and sizes are audio samples."""

    name = "features"
    axes = (
        "model.llm.path",
        "model.encoder.path",
        "model.encoder.dtype",
        "model.encoder.context",
        "model.encoder.layers",
        "model.encoder.lora.rank",
        "model.encoder.lora.layers",
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

    def keys(self, config: ResolvedConfig) -> list[FeatureKey]:
        """Return the keys of the features that a trial may read in place of audio.

        None if its encoder trains from the first layer on, or if the audio or the frozen layers vary at random.
        """
        augment = config.data.augment
        if config.storage.features == "live" or not config.model.uses_audio or augment.speeds or augment.noise_db:
            return []
        model = _skeleton(config)
        if model.has_own_encoder or not (model.encoder_is_frozen or model.frozen_layers):
            return []
        device = config.resources.device
        return [feature_key(config.model, config.data, device, spec) for spec in model.feature_specs]

    def files(self, config: ResolvedConfig, folder: Path, sweep: Config | None) -> list[CacheFile[int]]:
        """Return the files with the clips that the trial hears, or that other trials of its sweep may hear."""
        rows = set[int]()
        for fold in [config.data.fold] if sweep is None else _folds(sweep):
            shards = open_shards(config.model_copy(update={"data": config.data.model_copy(update={"fold": fold})}))
            rows |= heard_rows(shards, tuple(_tasks(sweep or config)), config.data.sound)
        return files_with(folder, open_shards(config), config.data, rows)

    def identity(self, request: FeatureRequest) -> Path:
        """Return the folder: shuffled clips have the features of the recorded ones, but may be others."""
        return request.folder

    def merged(self, first: FeatureRequest, second: FeatureRequest) -> FeatureRequest:
        """Return a request for the rows of both."""
        return _with_rows(first, {*_rows(first), *_rows(second)})

    def aligned(self, requests: Sequence[FeatureRequest]) -> list[FeatureRequest]:
        """Return the requests as the cache is now; rows that the same requests lack share files."""
        requests = [_with_rows(request, _rows(request)) for request in requests]
        config, lacking = requests[0].config, dict[int, list[int]]()
        for number, request in enumerate(requests):
            for row in (row for file in request.missing for row in file.rows):
                lacking.setdefault(row, []).append(number)
        files = [[file for file in request.files if not request.lacks(file)] for request in requests]
        for numbers in sorted(set(map(tuple, lacking.values()))):
            rows = {row for row, by in lacking.items() if tuple(by) == numbers}
            new = missing_runs(open_shards(config), config.data, rows)
            for number in numbers:
                files[number] += new
        return [replace(request, files=own) for request, own in zip(requests, files, strict=True)]

    def pass_key(self, request: FeatureRequest) -> str:
        """Return a string without layers and pooling: one forward pass of the encoder computes all of them."""
        return request.key.pass_key

    def jobs(self, requests: Sequence[FeatureRequest], files: Sequence[CacheFile[int]]) -> list[FeatureJob]:
        """Return a job for each file, or one for each file and key if the features of all keys are too large."""
        jobs, config = [], requests[0].config
        for file in files:
            lacking = [request for request in requests if request.lacks(file)]
            together = sum(self.bytes(request, [file]) for request in lacking) <= MAX_SHARED_BYTES
            for group in [lacking] if together else [[request] for request in lacking]:
                keys = {request.folder: request.key for request in group}
                jobs.append(FeatureJob(file, keys, config.resources.threads, open_shards(config), config.data))
        return jobs

    def work(self, request: FeatureRequest, size: int) -> float:
        """Return frames times the parameters of the layers that are computed."""
        encoder, layers = _encoder(request.config), request.key.layers or request.key.state
        unused = (*encoder.transformer.layers[layers:], encoder.final_norm) if layers != OUTPUT else ()
        above = {id(parameter) for module in unused for parameter in module.parameters()}
        used = sum(parameter.numel() for parameter in encoder.parameters() if id(parameter) not in above)
        return size / SAMPLE_RATE * FRAME_RATE * used

    def epoch_size(self, request: FeatureRequest) -> int:
        """Return the samples of the clips of all items for training and validation."""
        config = request.config
        shards, tasks = open_shards(config), config.tasks.active()
        read = [item for task in tasks for split in ("train", "val") for item in items(shards, task, split)]
        return sum(clip_samples(shards, item, config.data) for item in read)

    def bytes(self, request: FeatureRequest, files: Sequence[CacheFile[int]]) -> int:
        """Return the bytes of the features in some files."""
        model, encoder = _skeleton(request.config), _encoder(request.config)
        assert model.adapter is not None
        count = encoder.num_computed_frames if request.key.layers else encoder.num_frames
        frames = [count(size) for file in files for size in file.sizes]
        lengths = frames if request.key.pool is None else map(model.adapter.num_embeddings, frames)
        return sum(lengths) * encoder.state_width * BYTES_PER_VALUE

    def topic(self, key: FeatureKey) -> FeatureKey:
        """Return the key without the hidden state."""
        return replace(key, state=OUTPUT)

    def describe(self, keys: Sequence[FeatureKey], config: ResolvedConfig) -> str:
        """Return the encoder, its layers, the pooling and the audio."""
        key, count = keys[0], _encoder(config).n_layers
        heard = sorted(count if key.state == OUTPUT else key.state for key in keys)
        layers = f" up to layer {key.layers} of {count}" if key.layers else ""
        if heard != [count]:
            layers = f", layer{'s' if len(heard) > 1 else ''} {', '.join(map(str, heard))} of {count}"
        pooling = "" if key.pool is None else ", pooled by {} / {}".format(*key.pool)
        audio = "" if key.sound == "recorded" else f", {key.sound} audio"
        return f"features of {model_name(key.encoder)}{layers}{pooling}{audio}"

    def format_size(self, size: int) -> str:
        """Return samples as hours."""
        return f"{size / SAMPLE_RATE / 3600:.3g} h of audio"


def _rows(request: FeatureRequest) -> set[int]:
    return {row for file in request.files for row in file.rows}


def _with_rows(request: FeatureRequest, rows: set[int]) -> FeatureRequest:
    """Return the request for some rows, with the files that the cache has now."""
    return replace(request, files=files_with(request.folder, open_shards(request.config), request.config.data, rows))


def _tasks(sweep: Config) -> list[str]:
    """Return the tasks that some trial of a sweep trains."""

    def is_drawn(name: str) -> bool:
        axis = sweep.search.space.get(f"tasks.{name}")
        values = [] if axis is None else axis.extremes()
        return any(isinstance(value, int | float) and value > 0 for value in values)

    return [name for name in type(sweep.tasks).model_fields if getattr(sweep.tasks, name) > 0 or is_drawn(name)]


def _folds(sweep: Config) -> list[int]:
    """Return the folds that some trial of a sweep uses."""
    axis = sweep.search.space.get(FOLD)
    if axis is None:
        return [sweep.data.fold]
    ends = [value for value in axis.extremes() if isinstance(value, int)]
    return sorted(set(ends)) if axis.choices is not None else list(range(ends[0], ends[1] + 1))


def _encoder(config: ResolvedConfig) -> SpeechEncoder:
    encoder = _skeleton(config).encoder
    assert encoder is not None
    return encoder


def _skeleton(config: ResolvedConfig) -> SpeechLLM:
    """Return a trial's model without weights, built once for all trials whose encoder and adapter are equal."""
    fields = {"llm"} if config.model.encoder.path is None else set[str]()
    fields |= {"encoder", "trainable", "init_from", "init_partial", "modality", "adapter"}
    name = config.model.model_dump_json(include=fields)
    if name not in _skeletons:
        _skeletons[name] = skeleton(config)
    return _skeletons[name]
