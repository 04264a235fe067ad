"""Fingerprints of models: equal for models that compute the same."""

import hashlib
import json
from collections.abc import Mapping

from torch import Tensor

from model.checkpoints import checkpoint

IGNORED = {"_name_or_path", "transformers_version", "architectures", "dtype"}  # settings that change no number


def model_digest(tensors: dict[str, Tensor], settings: Mapping[str, object]) -> str:
    """Return a hash of a model's weights and of those of its settings that change what it computes."""
    content = json.dumps({name: settings[name] for name in settings.keys() - IGNORED}, sort_keys=True, default=str)
    return hashlib.sha256(f"{checkpoint.digest(tensors)} {content}".encode()).hexdigest()[:16]
