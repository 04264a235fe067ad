"""Layers that ignore the padding of a batch."""

import numpy as np
import torch
from torch import Tensor, nn


class MaskedGroupNorm(nn.GroupNorm):
    """Group norm over time whose statistics ignore padding (one channel a group, as the wav2vec 2.0 family has it)."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        assert norm.num_groups == norm.num_channels
        super().__init__(norm.num_groups, norm.num_channels, norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        self.lengths_B = torch.empty(0)  # set before each forward; an attribute, so that a deep copy has its own

    def forward(self, input: Tensor) -> Tensor:
        """Normalise input_BCT over the first `lengths_B` steps of each row."""
        count_B11 = self.lengths_B[:, None, None]
        values_BCT = input.float()
        valid_B1T = _valid(self.lengths_B, input.shape[-1])[:, None].float()
        mean_BC1 = (values_BCT * valid_B1T).sum(-1, keepdim=True) / count_B11
        centred_BCT = (values_BCT - mean_BC1) * valid_B1T
        variance_BC1 = centred_BCT.square().sum(-1, keepdim=True) / count_B11
        scaled_BCT = (values_BCT - mean_BC1) * torch.rsqrt(variance_BC1 + self.eps)
        return (scaled_BCT * self.weight[:, None] + self.bias[:, None]).to(input.dtype)


class MaskedConv1d(nn.Conv1d):
    """A convolution over time that reads zeros beyond a clip's end, as it does when the clip is alone."""

    def __init__(self, conv: nn.Conv1d) -> None:
        sizes = (conv.kernel_size[0], conv.stride[0], conv.padding[0], conv.dilation[0], conv.groups)
        super().__init__(conv.in_channels, conv.out_channels, *sizes, bias=conv.bias is not None)
        self.weight, self.bias = conv.weight, conv.bias
        self.lengths_B = torch.empty(0)  # as in MaskedGroupNorm

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the first `lengths_B` steps of each row of input_BCT."""
        valid_BT = _valid(self.lengths_B, input.shape[-1])
        return super().forward(input.masked_fill(~valid_BT[:, None], 0.0))


def _cut(values: np.ndarray, size: int) -> list[np.ndarray]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def _padded(rows: list[Tensor]) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _valid(lengths_B: Tensor, size: int) -> Tensor:
    """Which of `size` steps lie within each row's length, [B, size]."""
    return torch.arange(size, device=lengths_B.device) < lengths_B[:, None]
