"""Learned queries that read the frames of a clip by attention, as in the Q-Former of BLIP-2 (arXiv 2301.12597).

A fixed number of queries reads the whole clip, or one query reads each window of it (SALMONN, arXiv 2310.13289).

Legend: G groups (clips or windows), Q queries, W frames of a group, D width of the frames, H width of the queries,
A heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_WIDTH = 64


class Queries(nn.Module):
    """Learned queries, and layers in which they attend to each other and to frames.

    Args:
        width_in: D.
        width: H.
        count: Q.
        layers: number of layers.
    """

    def __init__(self, width_in: int, width: int, count: int, layers: int) -> None:
        super().__init__()
        self.sizes = (width_in, width, count, layers)
        self.start = nn.Parameter(0.02 * torch.randn(count, width))  # the standard deviation of BLIP-2
        self.norm_in = nn.LayerNorm(width_in)
        self.layers = nn.ModuleList(QueryLayer(width_in, width, count) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, frames_GWD: Tensor, valid_GW: Tensor) -> Tensor:
        """Return queries_GQH of groups of frames, each of which has a valid frame."""
        normed_GWD = self.norm_in(frames_GWD)
        queries_GQH = self.start.expand(len(frames_GWD), -1, -1)
        for layer in self.layers:
            queries_GQH = layer(queries_GQH, normed_GWD, valid_GW)
        normed_GQH: Tensor = self.norm_out(queries_GQH)
        return normed_GQH


class QueryLayer(nn.Module):
    """Attention among the queries (if there are several), attention to the frames, and a feed-forward block."""

    def __init__(self, width_in: int, width: int, count: int) -> None:
        super().__init__()
        self.itself = Attention(width, width) if count > 1 else None
        self.frames = Attention(width, width_in)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if count > 1 else 2))
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, queries_GQH: Tensor, frames_GWD: Tensor, valid_GW: Tensor) -> Tensor:
        """Return queries_GQH after this layer."""
        if self.itself is not None:
            normed_GQH = self.norms[2](queries_GQH)
            queries_GQH = queries_GQH + self.itself(normed_GQH, normed_GQH, None)
        queries_GQH = queries_GQH + self.frames(self.norms[0](queries_GQH), frames_GWD, valid_GW)
        updated_GQH: Tensor = queries_GQH + self.feed_forward(self.norms[1](queries_GQH))
        return updated_GQH


class Attention(nn.Module):
    """Attention of queries to other vectors; a head has 64 numbers, or more if they do not divide the width."""

    def __init__(self, width: int, width_in: int) -> None:
        super().__init__()
        self.heads = next(n for n in range(max(1, width // HEAD_WIDTH), 0, -1) if width % n == 0)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = nn.Linear(width_in, width), nn.Linear(width_in, width)

    def forward(self, queries_GQH: Tensor, others_GWD: Tensor, valid_GW: Tensor | None) -> Tensor:
        """Return the attended vectors [G, Q, H]; nothing attends to what is not valid."""
        parts = self.query(queries_GQH), self.key(others_GWD), self.value(others_GWD)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mask_G11W = None if valid_GW is None else valid_GW[:, None, None]
        attended_GAQH = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_G11W)
        result_GQH: Tensor = self.out(attended_GAQH.transpose(1, 2).flatten(2))
        return result_GQH
