"""An encoder in two steps, frozen layers and the rest, is the same encoder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from model.encoders.base import SpeechEncoder
from tests.conftest import ENCODERS
from tests.model.common import close
from tests.model.encoders import BELOW, CLIPS, encode, fresh, noise, same, without_dropout


def on_top(encoder: SpeechEncoder, hidden: Sequence[Tensor], clips: Sequence[np.ndarray], start: int) -> list[Tensor]:
    """The frames of each clip from what layer `start` reads, of their lengths and zero beyond."""
    frames_BFD, lengths_B = encoder.forward_from_layer(hidden, [len(clip) for clip in clips], start)
    lengths = [encoder.num_frames(len(clip)) for clip in clips]
    assert lengths_B.tolist() == lengths
    assert frames_BFD.shape == (len(clips), max(lengths), encoder.width)
    assert not any(row[length:].any() for row, length in zip(frames_BFD, lengths, strict=True))
    return [row[:length] for row, length in zip(frames_BFD, lengths, strict=True)]


@pytest.mark.parametrize("kind", [*ENCODERS, "hubert-batch-norm", "conformer-no-positions", "w2v-bert-rotary"])
@torch.no_grad()
def test_an_encoder_in_two_steps_yields_the_same_frames(kind: str, folders: dict[str, Path]) -> None:
    """Clips by themselves up to a layer, and in any batch from there: what the whole yields for a clip alone."""
    encoder, clips = fresh(folders[kind]), [*CLIPS[:3], noise(BELOW, 1)]
    assert len(encoder.transformer.layers) == 2
    whole = [encode(encoder, [clip])[0] for clip in clips]
    for start in (1, 2):
        hidden = [encoder.layer_inputs(clip, [start])[start] for clip in clips]
        assert [row.shape for row in hidden] == [
            (encoder.num_computed_frames(len(clip)), encoder.width) for clip in clips
        ]
        for order in ([0], [3, 2, 1, 0]):
            frames = on_top(encoder, [hidden[place] for place in order], [clips[place] for place in order], start)
            assert same(frames, [whole[place] for place in order])
        assert torch.equal(encoder.layer_inputs(clips[1], [start])[start], hidden[1])  # whatever was computed before
    assert same(encode(encoder, clips), whole)
    every = encoder.layer_inputs(clips[0], [1, 0, 2])  # in one pass
    assert torch.equal(every[0], whole[0])
    assert all(torch.equal(every[start], encoder.layer_inputs(clips[0], [start])[start]) for start in (1, 2))


@pytest.mark.parametrize("kind", ["hubert-group", "wavlm-layer", "conformer-relative", "w2v-bert", "whisper"])
def test_upper_layers_train_independently_of_the_batch(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = without_dropout(folders[kind], tmp_path / kind)
    hidden = [encoder.layer_inputs(clip, [1])[1] for clip in CLIPS[:3]]
    direction_D = torch.randn(encoder.width, generator=torch.Generator().manual_seed(0))

    def gradient(*batches: Sequence[int]) -> Tensor:
        encoder.zero_grad()
        for batch in batches:
            frames = on_top(encoder, [hidden[place] for place in batch], [CLIPS[place] for place in batch], 1)
            torch.stack([(row @ direction_D).sum() for row in frames]).sum().backward()
        gradients = [parameter.grad for parameter in encoder.transformer.layers[1].parameters()]
        return torch.cat([part.flatten() for part in gradients if part is not None])

    alone = gradient([0], [1], [2])
    assert len(alone) == sum(parameter.numel() for parameter in encoder.transformer.layers[1].parameters())
    assert alone.abs().max() > 0
    assert close(gradient([2, 0], [1]), alone)
    assert close(gradient([1, 0, 2]), alone)
