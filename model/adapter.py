"""Encoder frames → LLM embeddings: average pooling, then one linear layer (arXiv 2406.05968 uses the same pooling)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PoolLinear(nn.Module):
    """Average `pool` frames every `stride` frames, then map to the LLM's width.

    Only windows that lie inside a clip count, so its neighbours in the batch cannot change its embeddings. A clip
    shorter than one window is filled with zero frames to exactly one.
    """

    def __init__(self, width_in: int, width_out: int, pool: int, stride: int) -> None:
        super().__init__()
        self.pool, self.stride = pool, stride
        self.linear = nn.Linear(width_in, width_out)

    def embeddings(self, n_frames: Tensor) -> Tensor:
        """How many embeddings clips of `n_frames` frames give."""
        return ((n_frames - self.pool).clamp(min=0) // self.stride) + 1

    def forward(self, frames_BFD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """frames_BFD (zero beyond lengths_B) → embeddings_BTE and their lengths_B."""
        missing = self.pool - frames_BFD.shape[1]
        if missing > 0:
            frames_BFD = F.pad(frames_BFD, (0, 0, 0, missing))
        pooled_BDT = F.avg_pool1d(frames_BFD.transpose(1, 2), self.pool, self.stride)
        return self.linear(pooled_BDT.transpose(1, 2)), self.embeddings(lengths_B)


def clip_list(values_BTE: Tensor, lengths_B: Tensor) -> list[Tensor]:
    """A padded batch as a list of its unpadded rows."""
    return [row[:length] for row, length in zip(torch.unbind(values_BTE), lengths_B.tolist(), strict=True)]
