"""The adapter: a window of encoder frames becomes one vector, which is projected to the width of the LLM.

Average pooling with a linear layer is the adapter of arXiv 2406.05968; stacked frames with a linear layer or an MLP are
the one of SLAM-ASR (arXiv 2402.08846).

Legend: B clips, F frames, D width of the encoder, T embeddings, E width of the LLM, W frames in a window.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import ConfigError, UnavailableError, listed
from model.checkpoints.checkpoint import CheckpointState, with_result
from model.config import AdapterConfig


class Adapter(nn.Module):
    """Map the frames of clips to embeddings of the LLM.

    Only windows inside a clip count, so the embeddings do not depend on the rest of the batch. A clip shorter than one
    window is padded with zero frames to exactly one.
    """

    def __init__(self, width_in: int, width_out: int, config: AdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.conv = nn.Conv1d(width_in, width_in, config.window, config.stride) if config.kind == "conv" else None
        width = width_in * config.window if config.kind == "stack" else width_in
        self.linear: nn.Module = nn.Linear(width, config.hidden or width_out)
        self.out = nn.Linear(config.hidden, width_out) if config.hidden else None

    def num_embeddings(self, n_frames: int) -> int:
        """Return the number of embeddings of a clip of `n_frames` frames."""
        return max(0, n_frames - self.config.window) // self.config.stride + 1

    def forward(self, frames_BFD: Tensor, lengths_B: Tensor) -> list[Tensor]:
        """Return the embeddings of each clip, [T_i, E], from frames_BFD that are zero beyond lengths_B."""
        missing = self.config.window - frames_BFD.shape[1]
        if missing > 0:
            frames_BFD = F.pad(frames_BFD, (0, 0, 0, missing))
        embeddings_BTE = self._project(self._reduce(frames_BFD))
        lengths = map(self.num_embeddings, lengths_B.tolist())
        return [row_TE[:length] for row_TE, length in zip(embeddings_BTE, lengths, strict=True)]

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the embeddings of each clip, [T_i, E], from cached features of a frozen encoder, [T_i, D].

        The features are pooled already if the adapter pools, see `model/encoders/frozen_features.py`.
        """
        lengths = [len(clip_TD) for clip_TD in features]
        if self.config.kind != "pool":
            padded_BFD = nn.utils.rnn.pad_sequence(list(features), batch_first=True)
            return self.forward(padded_BFD, torch.tensor(lengths, device=padded_BFD.device))
        return list(self._project(torch.cat(list(features))).split(lengths))

    def _reduce(self, frames_BFD: Tensor) -> Tensor:
        """Return one vector for each window, [B, T, D], or [B, T, W * D] if frames are stacked."""
        window, stride = self.config.window, self.config.stride
        frames_BDF = frames_BFD.transpose(1, 2)
        if self.conv is not None:
            return F.gelu(self.conv(frames_BDF)).transpose(1, 2)
        if self.config.kind == "stack":
            return frames_BDF.unfold(2, window, stride).permute(0, 2, 3, 1).flatten(2)
        return F.avg_pool1d(frames_BDF, window, stride).transpose(1, 2)

    def _project(self, reduced: Tensor) -> Tensor:
        hidden: Tensor = self.linear(reduced)
        return hidden if self.out is None else self.out(F.gelu(hidden))


def load_adapter(adapter: Adapter, path: str, partial: bool) -> tuple[set[str], str]:
    """Load the weights of an adapter from a file of tensors.

    Args:
        adapter: receives the weights.
        path: a safetensors file, or a torch file such as a trial's checkpoint.pt. Names may begin with "adapter.".
        partial: whether tensors of the file or of the adapter may be left out.

    Returns:
        The names of the loaded tensors, and a line that reports which tensors match, are missing and are unexpected.

    Raises:
        ConfigError: the file cannot be read, a tensor has another shape, or a tensor is left out without `partial`.
    """
    tensors = read_tensors(Path(path))
    prefixed = {name: value for name, value in tensors.items() if name.startswith("adapter.")}
    if prefixed:
        tensors = {name.removeprefix("adapter."): value for name, value in prefixed.items()}
    expected = adapter.state_dict()
    matched = set(expected.keys() & tensors.keys())
    for name in sorted(matched):
        if expected[name].shape != tensors[name].shape:
            raise ConfigError(
                f"model.adapter.init_from: {name} is {list(tensors[name].shape)} in {path}, and this adapter needs "
                f"{list(expected[name].shape)}; use the encoder, LLM, kind and window that the file was trained with"
            )
    missing, unexpected = expected.keys() - matched, tensors.keys() - matched
    report = (
        f"{len(matched)} of {len(expected)} tensors matched; missing: {listed(missing)}; "
        f"unexpected: {listed(unexpected)}"
    )
    if not matched or ((missing or unexpected) and not partial):
        raise ConfigError(
            f"model.adapter.init_from: {path}: {report}; use a file of this adapter"
            + (", or allow it with model.adapter.init_partial=true" if matched else "")
        )
    adapter.load_state_dict({name: tensors[name] for name in matched}, strict=False)
    return matched, f"{path}: {report}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a safetensors or torch file without running code in it.

    Raises:
        ConfigError: the file is missing or holds something else.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UnavailableError(f"model.adapter.init_from: {path}: no such file") from None
    except Exception as error:
        raise UnavailableError(
            f"model.adapter.init_from: {path}: not a file of tensors ({type(error).__name__}); use safetensors, or a "
            "state_dict saved by torch.save"
        ) from None
    if isinstance(content, dict) and "tensors" in content:  # a trial's checkpoint
        content = with_result(cast(CheckpointState, content))["tensors"]
    named = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}
