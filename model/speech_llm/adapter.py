"""Encoder frames → LLM embeddings: a window of frames becomes one vector, which is projected to the LLM's width.

Legend: B clips, F frames, D width of the encoder, T embeddings, E width of the LLM, W frames a window.
"""

from collections.abc import Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import ConfigError, listed
from model.config import AdapterConfig


class Adapter(nn.Module):
    """Only windows that lie inside a clip count, so its neighbours in the batch cannot change its embeddings.

    A clip shorter than one window is filled with zero frames to exactly one. Average pooling with a linear layer is
    the adapter of arXiv 2406.05968, stacked frames with a linear layer or an MLP that of arXiv 2402.08846.
    """

    def __init__(self, width_in: int, width_out: int, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.conv = nn.Conv1d(width_in, width_in, config.window, config.stride) if config.kind == "conv" else None
        width = width_in * config.window if config.kind == "stack" else width_in
        self.linear: nn.Module = nn.Linear(width, config.hidden or width_out)
        self.out = nn.Linear(config.hidden, width_out) if config.hidden else None

    def embeddings(self, n_frames: int) -> int:
        """How many embeddings a clip of `n_frames` frames gives."""
        return max(0, n_frames - self.config.window) // self.config.stride + 1

    def forward(self, frames_BFD: Tensor, lengths_B: Tensor) -> list[Tensor]:
        """frames_BFD, zero beyond lengths_B → the embeddings of each clip, [T_i, E]."""
        missing = self.config.window - frames_BFD.shape[1]
        if missing > 0:
            frames_BFD = F.pad(frames_BFD, (0, 0, 0, missing))
        embeddings_BTE = self._project(self._reduce(frames_BFD))
        return [row[: self.embeddings(length)] for row, length in zip(embeddings_BTE, lengths_B.tolist(), strict=True)]

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The features of clips of a frozen encoder (see `model.features`), [T_i, D] → their embeddings, [T_i, E]."""
        lengths = [len(clip_TD) for clip_TD in features]
        if self.config.kind != "pool":
            padded_BFD = nn.utils.rnn.pad_sequence(list(features), batch_first=True)
            return self.forward(padded_BFD, torch.tensor(lengths, device=padded_BFD.device))
        return list(self._project(torch.cat(list(features))).split(lengths))

    def _project(self, reduced: Tensor) -> Tensor:
        hidden: Tensor = self.linear(reduced)
        return hidden if self.out is None else self.out(F.gelu(hidden))

    def _reduce(self, frames_BFD: Tensor) -> Tensor:
        window, stride = self.config.window, self.config.stride
        frames_BDF = frames_BFD.transpose(1, 2)
        if self.conv is not None:
            return F.gelu(self.conv(frames_BDF)).transpose(1, 2)
        if self.config.kind == "stack":
            return frames_BDF.unfold(2, window, stride).permute(0, 2, 3, 1).flatten(2)  # [B, T, W * D]
        return F.avg_pool1d(frames_BDF, window, stride).transpose(1, 2)


def load_adapter(adapter: Adapter, path: str, partial: bool) -> tuple[set[str], str]:
    """Fill an adapter from a file of tensors; names may carry the prefix "adapter.", as those of a checkpoint.pt do.

    Returns:
        The names that were matched; and what was matched, missing and unexpected, in one line.

    Raises:
        ConfigError: the file cannot be read, a tensor has another shape, or, unless `partial`, one is left out.
    """
    tensors = _read_tensors(Path(path))
    prefixed = {name: value for name, value in tensors.items() if name.startswith("adapter.")}
    if prefixed:
        tensors = {name.removeprefix("adapter."): value for name, value in prefixed.items()}
    own = adapter.state_dict()
    matched = set(own.keys() & tensors.keys())
    for name in sorted(matched):
        if own[name].shape != tensors[name].shape:
            raise ConfigError(
                f"model.adapter.init_from: {name} is {list(tensors[name].shape)} in {path}, and this adapter needs "
                f"{list(own[name].shape)}; use the adapter's own encoder, LLM, kind and window"
            )
    missing, unexpected = own.keys() - matched, tensors.keys() - matched
    said = f"{len(matched)} of {len(own)} tensors matched; missing: {listed(missing)}; unexpected: {listed(unexpected)}"
    if not matched or ((missing or unexpected) and not partial):
        raise ConfigError(
            f"model.adapter.init_from: {path}: {said}; use a file of this adapter"
            + (", or allow it with model.adapter.init_partial=true" if matched else "")
        )
    adapter.load_state_dict({name: tensors[name] for name in matched}, strict=False)
    return matched, f"{path}: {said}"


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors or torch file; nothing in it is run."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"model.adapter.init_from: {path}: no such file") from None
    except Exception as error:
        raise ConfigError(
            f"model.adapter.init_from: {path}: not a file of tensors ({type(error).__name__}); use safetensors, or a "
            "state_dict saved by torch.save"
        ) from None
    content = content.get("tensors", content) if isinstance(content, dict) else {}
    named = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}
