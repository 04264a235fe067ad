"""Features of frozen encoders: computed once for each clip, with the same result wherever they are computed.

Each clip is encoded separately and its features are rounded to float16, whether or not they are cached: a trial gets
the same bits with and without the cache, and whatever other clips are in its batch. The same holds for the lower layers
of an encoder whose upper layers train.

Legend: F frames, D width of the encoder, T windows of the adapter (or frames, if the adapter does not average).
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from data.config import DataConfig
from data.corpus.audio import waveform
from data.loading import feature_files
from data.loading.cached_arrays import Arrays, CacheJob, CacheKey, Layout
from data.loading.examples import load_clip
from data.shards.dataset import Shards
from model.checkpoints.audio_llms import audio_family
from model.checkpoints.fingerprint import derived_digest, identify, model_digest
from model.config import ModelConfig
from model.encoders.base import OUTPUT, SpeechEncoder
from model.encoders.loading import load_encoder
from model.runtime.numerics import trial_numerics

VERSION = 2  # raise it when the same encoder would give other features, or the rows are split into files differently
LARGEST = float(torch.finfo(torch.float16).max)


class FeatureSpec(NamedTuple):
    """Which features of a clip are computed: what the adapter hears, or what the first layer that trains reads."""

    layers: int = 0  # the number of frozen layers below those that train; 0: the adapter hears the features
    pool: tuple[int, int] | None = None  # window and stride of an average over frames
    state: int = OUTPUT  # the hidden state that is heard, see `SpeechEncoder`


@dataclass(frozen=True)
class FeatureKey(CacheKey):
    """Everything that features depend on, apart from the audio."""

    path_field: ClassVar[str] = "encoder"
    later_fields: ClassVar[dict[str, object]] = {"context": "window", "state": OUTPUT}
    encoder: str  # Hugging Face id or folder
    digest: str  # of its weights and settings
    dtype: str
    precision: str
    device: str  # cpu or cuda: their results differ in the last digits
    layers: int  # see `FeatureSpec`
    pool: tuple[int, int] | None  # see `FeatureSpec`
    sound: str  # `DataConfig.sound`; shuffled clips have the features of the rows they come from
    snr_db: float | None
    version: int = VERSION
    context: Literal["window", "clip"] = "window"  # see `EncoderConfig`
    state: int = OUTPUT  # see `FeatureSpec`

    @property
    def spec(self) -> FeatureSpec:
        """Return which features of a clip are kept."""
        return FeatureSpec(self.layers, self.pool, self.state)

    @property
    def pass_key(self) -> str:
        """Return a hash that is equal for features that the same forward pass computes."""
        return replace(self, layers=0, pool=None, state=OUTPUT).key


def feature_key(model: ModelConfig, data: DataConfig, device: str, spec: FeatureSpec) -> FeatureKey:
    """Return the cache key of features of a frozen encoder, or of its frozen layers.

    Args:
        model: the configuration of the model.
        data: which audio it hears.
        device: "cpu" or "cuda".
        spec: one of `SpeechLLM.feature_specs`.
    """
    return FeatureKey(
        encoder=model.encoder_path,
        digest=encoder_digest(model.encoder_path),
        dtype=model.encoder.dtype,
        precision=model.precision,
        device=device,
        layers=spec.layers,
        pool=spec.pool,
        sound="recorded" if data.sound == "shuffled" else data.sound,
        snr_db=data.snr_db if data.sound == "noisy" else None,
        context=model.encoder.context,
        state=spec.state,
    )


def feature_specs(model: ModelConfig, states: Sequence[int], frozen_layers: int) -> list[FeatureSpec]:
    """Return what of a clip is computed once: what a frozen encoder yields, or its frozen layers.

    Args:
        model: the configuration of the model.
        states: the hidden states that the adapter hears, see `SpeechEncoder.states`.
        frozen_layers: the number of layers below all that train; 0: nothing in the encoder trains.
    """
    if frozen_layers:
        heard = [state for state in states if OUTPUT != state < frozen_layers]
        return [FeatureSpec(frozen_layers), *(FeatureSpec(state=state) for state in heard)]
    adapter, pools = model.adapter, model.adapter.kind == "pool" and model.encoder.path is not None
    pool = (adapter.window, adapter.stride) if pools else None
    return [FeatureSpec(pool=pool, state=state) for state in states]


def encoder_digest(path: str) -> str:
    """Return a hash that is equal for encoders that compute the same frames. Reads all weights, once.

    Raises:
        ConfigError: see `load_encoder`.
    """

    def compute() -> str:
        encoder = inspect.unwrap(load_encoder)(path, "cpu")  # bypass the cache: the encoder may be large
        return model_digest(encoder.state_dict(), encoder.model.config.to_dict() | encoder.extractor.to_dict())

    own = audio_family(path) is not None
    identity = identify("model.llm.path", path, "audio-llm") if own else identify("model.encoder.path", path, "encoder")
    name = f"encoder, transformers {transformers.__version__}"  # which adds settings to those of the files
    return derived_digest(name, identity, compute)


@torch.no_grad()
def clip_features(encoder: SpeechEncoder, pcm: np.ndarray, specs: Sequence[FeatureSpec]) -> list[Tensor]:
    """Return the features of a clip, float16 [T, D] for each spec, from one forward pass.

    Args:
        encoder: frozen, in eval mode.
        pcm: int16 samples at 16 kHz; a clip shorter than one window is padded with zero frames to one window.
        specs: which features to compute.
    """
    wave = waveform(pcm)
    states = encoder.layer_inputs(wave, {layers or state for layers, _, state in specs})
    features = []
    for layers, pool, state in specs:
        frames_FD = states[layers or state].float()
        if not layers:
            frames_FD = frames_FD[: encoder.num_frames(len(wave))]
        if pool is not None:
            window, stride = pool
            padded_FD = F.pad(frames_FD, (0, 0, 0, max(0, window - len(frames_FD))))
            with torch.autocast(frames_FD.device.type, enabled=False):
                frames_FD = F.avg_pool1d(padded_FD.T[None], window, stride)[0].T
        features.append(frames_FD.clamp(-LARGEST, LARGEST).half())
    return features


@dataclass(frozen=True)
class FeatureJob(CacheJob[int, FeatureKey]):
    """Computes the features of the clips of one file; all keys must have the same `pass_key`."""

    layout: ClassVar[Layout] = feature_files.LAYOUT
    shards: Shards
    config: DataConfig

    def compute(self, rows: Sequence[int]) -> list[list[Arrays]]:
        """Return for each key the features of some rows."""
        keys = list(self.keys.values())
        encoder = load_encoder(keys[0].encoder, keys[0].device, keys[0].dtype)
        encoder.set_context(keys[0].context)  # the next one that takes the encoder from memory sets its own
        config = self.config.model_copy(update={"sound": keys[0].sound})
        by_key: list[list[Arrays]] = [[] for _ in keys]
        with trial_numerics(self.threads, keys[0].device, keys[0].precision):
            for row in rows:
                clip = load_clip(self.shards, row, config)
                for features, computed in zip(
                    by_key, clip_features(encoder, clip, [k.spec for k in keys]), strict=True
                ):
                    features.append([computed.cpu().numpy()])
        return by_key
