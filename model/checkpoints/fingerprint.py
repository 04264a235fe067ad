"""What passes of frozen models share: what names them, and how a process computes them."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.checkpoints import checkpoint

NO_MATTER = {"_name_or_path", "transformers_version", "architectures", "dtype"}  # of a model's settings


class Keyed:
    """A dataclass of all that some numbers depend on, besides what is read."""

    place: ClassVar[str]  # the field that says where the model lies, which is no part of the key

    @property
    def key(self) -> str:
        """Names the numbers."""
        content = {name: value for name, value in asdict(self).items() if name != self.place}  # type: ignore[call-overload]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def model_digest(tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Equal for models that compute the same."""
    said = json.dumps({name: settings[name] for name in settings.keys() - NO_MATTER}, sort_keys=True, default=str)
    return hashlib.sha256(f"{checkpoint.digest(tensors)} {said}".encode()).hexdigest()[:16]


@contextlib.contextmanager
def computing(threads: int, device: str, precision: str) -> Iterator[None]:
    """Compute as a trial does, so that the bits are the same."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
        yield
