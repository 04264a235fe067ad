"""Padding and masks of a batch, and layers that ignore the padding.

Legend: B clips, C channels, T steps over time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def pad_rows(rows: Sequence[Tensor]) -> Tensor:
    """Stack tensors of different lengths, with zeros behind the shorter ones."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def valid_mask(lengths_B: Tensor, size: int) -> Tensor:
    """Return the bool mask_BT of the `size` steps that lie within each row's length."""
    return torch.arange(size, device=lengths_B.device) < lengths_B[:, None]


class MaskedGroupNorm(nn.GroupNorm):
    """A group norm over time whose statistics ignore the padding.

    Each group is one channel, as in the first convolution of the wav2vec 2.0 family.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        assert norm.num_groups == norm.num_channels
        super().__init__(norm.num_groups, norm.num_channels, norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        # The encoder sets the lengths before each forward pass. A deep copy of the module gets its own attribute.
        self.lengths_B = torch.empty(0)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the first `lengths_B` steps of each row of input_BCT; the statistics are in float32."""
        count_B11 = self.lengths_B[:, None, None]
        values_BCT = input.float()
        valid_B1T = valid_mask(self.lengths_B, input.shape[-1])[:, None].float()
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
        self.lengths_B = torch.empty(0)  # set before each forward pass, as in MaskedGroupNorm

    def forward(self, input: Tensor) -> Tensor:
        """Convolve the first `lengths_B` steps of each row of input_BCT."""
        valid_BT = valid_mask(self.lengths_B, input.shape[-1])
        return super().forward(input.masked_fill(~valid_BT[:, None], 0.0))
