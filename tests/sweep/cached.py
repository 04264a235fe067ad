"""Sweeps whose frozen models compute features and teacher logits, and what they request from the cache."""

from pathlib import Path
from typing import Any, NamedTuple

from data.corpus.config import CorpusConfig
from data.preparation.build import prepare
from data.shards.dataset import Shards
from sweep.config.resolve import ResolvedConfig
from sweep.preflight.cache_kinds.base import AnyRequest
from sweep.preflight.feature_cache import cache_requests
from tests.data.common import corpus
from tests.sweep.common import FROZEN
from tests.sweep.tiny import config

TEXT = {"modality": "text", "trainable": "lora"}
UPPER = f"{FROZEN}+encoder.*.layers.1.*"  # trains only the upper layer of the encoder


class Sweeps(NamedTuple):
    """Makes configurations of sweeps over one corpus."""

    models: Path
    shards: Shards

    def features(self, space: dict[str, Any] | None = None, **changed: Any) -> ResolvedConfig:
        """Return a configuration that requests encoder features."""
        return config(self.models, self.shards, space, **changed)

    def logits(self, space: dict[str, Any] | None = None, **losses: float) -> ResolvedConfig:
        """Return a configuration of a distillation between texts, which requests teacher logits."""
        train = {"losses": {"distillation": 0.5} | losses}
        return config(self.models, self.shards, space, model=TEXT, train=train)


def small_corpus(folder: Path, **settings: Any) -> Shards:
    """Prepare a corpus of six sessions of four turns."""
    sessions = corpus(["T:question! C:change! T:other C:neutral!"] * 6)
    return prepare(sessions, folder, CorpusConfig.model_validate(settings))


def requests(config: ResolvedConfig, cache: Path) -> list[AnyRequest]:
    return [request for request, _ in cache_requests(config, cache)]
