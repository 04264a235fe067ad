"""The adapter: encoder frames become fewer vectors, which are projected to the width of the LLM.

Average pooling with a linear layer is the adapter of arXiv 2406.05968; stacked frames with a linear layer or an MLP are
the one of SLAM-ASR (arXiv 2402.08846). Learned queries are in `queries.py`. Merging joins neighbouring frames that are
similar, as A-ToMe does between the layers of an encoder (arXiv 2306.16009).

Legend: B clips, F frames, D width of the encoder, T embeddings, E width of the LLM, W frames in a window, C windows of
all clips.
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
from model.encoders.masked_layers import pad_rows, valid_mask
from model.runtime.device import on_device
from model.speech_llm.queries import Queries


class Adapter(nn.Module):
    """Map the frames of clips to embeddings of the LLM.

    Only frames of the clip count, so its embeddings do not depend on the rest of the batch. Windows that a setting
    gives lie inside the clip; a clip shorter than one is padded with zero frames to exactly one.

    Args:
        width_in: of the frames, or of one of the hidden states whose weighted sum they are.
        width_out: of the embeddings.
        config: of the adapter.
        weighted: how many hidden states of the encoder are side by side in the frames, to be summed with learned
            weights (SUPERB, arXiv 2105.01051); 0: the frames are read as they are.
        frame_rate: frames of the encoder for a second of audio.

    Raises:
        ConfigError: there would be more embeddings than frames.
    """

    def __init__(
        self, width_in: int, width_out: int, config: AdapterConfig, weighted: int = 0, frame_rate: float = 50.0
    ) -> None:
        super().__init__()
        self.config = config
        self.window = config.window if config.has_windows else 0  # a shorter clip is padded to it
        # The weights are the softmax of these, so they start equal.
        self.layer_weights = nn.Parameter(torch.zeros(weighted)) if weighted else None
        self.frame_rate = frame_rate
        if config.has_rate and config.rate > frame_rate:
            raise ConfigError(
                f"model.adapter.rate: {config.rate:g} embeddings a second are more than the {frame_rate:g} frames a "
                "second of the encoder; lower it"
            )
        self.conv = nn.Conv1d(width_in, width_in, config.window, config.stride) if config.kind == "conv" else None
        self.queries: Queries | None = None
        width, hidden = width_in * config.window if config.kind == "stack" else width_in, config.hidden
        if config.kind == "queries":
            width, hidden = hidden or width_in, 0
            self.queries = Queries(width_in, width, config.queries or 1, config.query_layers)
        self.linear: nn.Module = nn.Linear(width, hidden or width_out)
        self.out = nn.Linear(hidden, width_out) if hidden else None

    def num_embeddings(self, n_frames: int) -> int:
        """Return the number of embeddings of a clip of `n_frames` frames; 0 if `AdapterConfig.rate` leaves none."""
        if self.config.has_rate:
            return int(n_frames * self.config.rate / self.frame_rate + 1e-9)
        if self.config.kind == "queries":
            return self.config.queries or 0
        return max(0, n_frames - self.config.window) // self.config.stride + 1

    def forward(self, frames_BFD: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Return the embeddings of each clip, [T_i, E], from frames_BFD that are zero beyond its length."""
        frames_BFD = self._sum_layers(frames_BFD)
        if not self.config.has_windows:
            return self._embed([row_FD[:length] for row_FD, length in zip(frames_BFD, lengths, strict=True)])
        missing = self.config.window - frames_BFD.shape[1]
        if missing > 0:
            frames_BFD = F.pad(frames_BFD, (0, 0, 0, missing))
        embeddings_BTE = self._project(self._reduce(frames_BFD))
        counts = map(self.num_embeddings, lengths)
        return [row_TE[:count] for row_TE, count in zip(embeddings_BTE, counts, strict=True)]

    def project(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the embeddings of each clip, [T_i, E], from cached features of a frozen encoder, [T_i, D].

        The features are pooled already if the adapter pools, see `model/encoders/frozen_features.py`.
        """
        lengths = [len(clip_TD) for clip_TD in features]
        if not self.config.has_windows:
            return self._embed([self._sum_layers(clip_FD) for clip_FD in features])
        if self.config.kind != "pool":
            return self.forward(nn.utils.rnn.pad_sequence(list(features), batch_first=True), lengths)
        return list(self._project(self._sum_layers(torch.cat(list(features)))).split(lengths))

    def _embed(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """Return the embeddings of clips, [T_i, E] each, from their frames_FD by queries or by merging."""
        counts = [self.num_embeddings(len(clip_FD)) for clip_FD in clips]
        if self.queries is None:
            reduced = [merge_frames(clip_FD, count) for clip_FD, count in zip(clips, counts, strict=True)]
        elif self.config.queries is not None:
            lengths_B = on_device(list(map(len, clips)), clips[0].device)
            frames_BFD = pad_rows(clips)
            reduced = list(self.queries(frames_BFD, valid_mask(lengths_B, frames_BFD.shape[1])))
        else:
            frames_CWD, valid_CW = cut_into_windows(clips, counts)
            reduced = list(self.queries(frames_CWD, valid_CW)[:, 0].split(counts))
        return list(self._project(torch.cat(reduced)).split(counts))

    def _sum_layers(self, frames: Tensor) -> Tensor:
        """Return the weighted sum of the hidden states that are side by side, if there are weights."""
        if self.layer_weights is None:
            return frames
        weights = self.layer_weights.softmax(0)
        states = frames.chunk(len(weights), dim=-1)
        total = weights[0] * states[0]
        for weight, state in zip(weights[1:], states[1:], strict=True):
            total = total + weight * state
        return total

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


def merge_frames(frames_FD: Tensor, count: int) -> Tensor:
    """Return the means of `count` runs of neighbouring frames, [T, D]; there is at least one.

    A run ends where two neighbours are least similar (cosine), at the earlier place if several are equally so. That is
    what merging the most similar neighbours comes to. The choice is a step function of the frames, so it is made for
    each clip alone.
    """
    with torch.no_grad(), torch.autocast(frames_FD.device.type, enabled=False):
        units_FD = F.normalize(frames_FD.float(), dim=-1)
        similarity = (units_FD[1:] * units_FD[:-1]).sum(-1)
        ends = similarity.argsort(stable=True)[: count - 1].sort().values + 1
        borders = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(frames_FD))])
    # Unchecked: a check of the lengths would wait for the device.
    return torch.segment_reduce(frames_FD, "mean", lengths=borders.diff(), axis=0, unsafe=True)


def cut_into_windows(clips: Sequence[Tensor], counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Cut clips into windows whose lengths differ by at most a frame.

    Args:
        clips: frames_FD of each.
        counts: number of windows of each, from 1 to its number of frames.

    Returns:
        frames_CWD and the mask_CW of the frames that are inside a window.
    """
    device, starts, ends, offset = clips[0].device, [], [], 0
    for clip_FD, count in zip(clips, counts, strict=True):
        borders = offset + torch.arange(count + 1, device=device) * len(clip_FD) // count
        starts.append(borders[:-1])
        ends.append(borders[1:])
        offset += len(clip_FD)
    starts_C, ends_C = torch.cat(starts), torch.cat(ends)
    longest = max(-(-len(clip_FD) // count) for clip_FD, count in zip(clips, counts, strict=True))
    index_CW = starts_C[:, None] + torch.arange(longest, device=device)
    return torch.cat(list(clips))[index_CW.clamp(max=offset - 1)], index_CW < ends_C[:, None]


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
