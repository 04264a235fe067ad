"""Every encoder kind gives a clip the same frames whatever else is in the batch: the conformance suite.

The reference is a clip encoded alone, which in turn equals what the stock model of transformers yields for it.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModel

from data.corpus.audio import MIN_SAMPLES
from data.corpus.schema import SAMPLE_RATE
from model.encoders.base import SpeechEncoder
from model.encoders.masked_layers import MaskedConv1d, MaskedGroupNorm
from model.speech_llm.language_model import shared_view
from tests.conftest import ENCODERS
from tests.model.common import close
from tests.model.encoders import (
    BELOW,
    CLIPS,
    LONG,
    VARIANTS,
    encode,
    fresh,
    gradient,
    masks_of,
    noise,
    same,
    without_dropout,
)

PADDED = [kind for kind in ENCODERS if kind != "whisper"]
CONFORMERS = ["conformer-relative", "conformer-rotary", "conformer-group", "conformer-no-positions"]


every_kind = pytest.mark.parametrize("encoder", ENCODERS, indirect=True)


@torch.no_grad()
def invariant(encoder: SpeechEncoder, clips: Sequence[np.ndarray] = CLIPS, every_order: bool = False) -> bool:
    """Whether a clip's frames are the same alone, beside the longest one, and in a batch of all."""
    alone = [encode(encoder, [clip])[0] for clip in clips]
    places = range(len(clips))
    longest = max(places, key=lambda place: len(clips[place]))
    batches: list[Sequence[int]] = [*((place, longest) for place in places), places, places[::-1]]
    if every_order:
        batches += [*itertools.permutations(places), *itertools.combinations(places, 3)]
    return all(
        same(encode(encoder, [clips[place] for place in batch]), [alone[place] for place in batch]) for batch in batches
    )


@pytest.mark.parametrize("kind", [*ENCODERS, *VARIANTS])
def test_frames_do_not_depend_on_the_batch(kind: str, folders: dict[str, Path]) -> None:
    assert invariant(fresh(folders[kind]))


@every_kind
def test_frames_do_not_depend_on_the_order_of_rows(encoder: SpeechEncoder) -> None:
    assert invariant(encoder, [*CLIPS[:3], CLIPS[3][:32_000]], every_order=True)


@every_kind
def test_shortest_clips_do_not_depend_on_the_batch(encoder: SpeechEncoder) -> None:
    clips = [noise(n_samples, n_samples) for n_samples in (MIN_SAMPLES, BELOW, 1, LONG)]
    assert [encoder.num_frames(n_samples) for n_samples in (BELOW, 1)] == [1, 1]
    assert invariant(encoder, clips)


@every_kind
def test_silence_is_finite_and_does_not_depend_on_the_batch(encoder: SpeechEncoder) -> None:
    assert invariant(encoder, [np.zeros(5637, np.float32), noise(LONG, 1), np.zeros(MIN_SAMPLES, np.float32)])


@torch.no_grad()
def stock(folder: Path, clips: Sequence[np.ndarray]) -> list[Tensor]:
    """What transformers yields for each unpadded clip, with the feature extractor of the folder."""
    model, extractor = AutoModel.from_pretrained(folder).eval(), AutoFeatureExtractor.from_pretrained(folder)
    found = []
    for clip in clips:
        inputs = extractor(clip, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        if model.config.model_type == "whisper":
            found.append(model.get_encoder()(**inputs).last_hidden_state[0])
        else:
            frames_FD = model(**inputs).last_hidden_state[0]
            half = model.config.model_type == "wav2vec2-bert" and not inputs["attention_mask"][0, -1]
            found.append(frames_FD[:-1] if half else frames_FD)
    return found


@pytest.mark.parametrize("kind", [*ENCODERS, *VARIANTS])
def test_a_clip_alone_yields_what_the_stock_model_yields(kind: str, folders: dict[str, Path]) -> None:
    encoder = fresh(folders[kind])
    clips = [clip[:SAMPLE_RATE] for clip in CLIPS] if kind == "whisper" else CLIPS  # stock Whisper reads one window
    expected = stock(folders[kind], clips)
    if kind == "whisper":
        expected = [frames[: encoder.num_frames(len(clip))] for frames, clip in zip(expected, clips, strict=True)]
    with torch.no_grad():
        assert same([encode(encoder, [clip])[0] for clip in clips], expected)


@pytest.mark.parametrize("kind", ["hubert-layer", "conformer-rotary", "w2v-bert"])
def test_the_length_formula_is_the_stock_models(kind: str, folders: dict[str, Path]) -> None:
    """At every edge of the first frames, and at odd lengths."""
    encoder = fresh(folders[kind])
    first = range(encoder.min_samples, encoder.min_samples + 4 * 320)
    edges = {n for n in first if encoder.num_frames(n) != encoder.num_frames(n + 1)}
    lengths = sorted({encoder.min_samples, *edges, *(n + 1 for n in edges), 4321, 5637, 16000, 23457, 48111})
    expected = [len(frames) for frames in stock(folders[kind], [noise(n, n) for n in lengths])]
    assert len(edges) >= 3
    assert [encoder.num_frames(n) for n in lengths] == expected
    encode(encoder, [noise(n, n) for n in lengths])


def test_whisper_reads_long_clips_window_by_window(models: Path) -> None:
    encoder = fresh(models / "whisper")
    clip, window = CLIPS[2], SAMPLE_RATE
    parts = [part for start in range(0, len(clip), window) for part in encode(encoder, [clip[start : start + window]])]
    assert close(encode(encoder, [clip])[0], torch.cat(parts))
    for n_samples in (1, 319, 320, 321, window - 1, window, window + 1, 5637):
        assert encoder.num_frames(n_samples) == -(-n_samples // 320)
        encode(encoder, [noise(n_samples, 1)])
    assert [encoder.num_computed_frames(n) for n in (1, window, window + 1)] == [50, 50, 100]


@pytest.mark.parametrize("kind", [*ENCODERS, *VARIANTS])
def test_training_does_not_depend_on_the_batch(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = without_dropout(folders[kind], tmp_path / kind)
    alone = gradient(encoder, [[0], [1], [2], [3]])
    assert len(alone) == sum(parameter.numel() for parameter in encoder.parameters() if parameter.requires_grad)
    assert alone.abs().max() > 0
    assert close(gradient(encoder, [[3, 0], [2, 1]]), alone)
    assert close(gradient(encoder, [[1, 3, 0, 2]]), alone)
    assert invariant(encoder)
    buffers = dict(fresh(folders[kind]).named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in encoder.named_buffers())
    with torch.no_grad():  # nothing is drawn: SpecAugment only hides what it is given, layers are not dropped
        trained = encode(encoder, CLIPS)
        assert same(trained, encode(encoder.eval(), CLIPS))


@pytest.mark.parametrize("encoder", [*ENCODERS, "hubert-without-specaugment"], indirect=True)
@torch.no_grad()
def test_masks_hide_frames_whatever_the_batch(encoder: SpeechEncoder) -> None:
    masks = masks_of(encoder, CLIPS)
    assert all(mask.any() for mask in masks)
    alone = [encode(encoder, [clip], [mask])[0] for clip, mask in zip(CLIPS, masks, strict=True)]
    for order in ([3, 1, 0, 2], [0, 3], [2, 1, 3]):
        batched = encode(encoder, [CLIPS[place] for place in order], [masks[place] for place in order])
        assert same(batched, [alone[place] for place in order])
    plain = encode(encoder, CLIPS)
    assert not any(close(one, other, 1e-3) for one, other in zip(alone, plain, strict=True))
    assert same(encode(encoder, CLIPS, [np.zeros_like(mask) for mask in masks]), plain)


@pytest.mark.parametrize("kind", ["w2v-bert", "wavlm-group"])
def test_what_is_hidden_does_not_matter(kind: str, models: Path) -> None:
    """Frames behind the mask carry nothing of their sound, where no convolution over time follows them."""
    encoder = fresh(models / kind)
    inputs = []
    encoder.model.encoder.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(args[0]), with_kwargs=True
    )
    mask = masks_of(encoder, [CLIPS[2]])[0]
    for seed in (1, 2):
        encode(encoder, [noise(len(CLIPS[2]), seed)], [mask])
    first, second = (hidden[0] for hidden in inputs)
    assert torch.equal(first[mask], second[mask])
    assert not torch.equal(first[~mask], second[~mask])


def test_whisper_masks_hide_two_mel_steps_a_frame(models: Path) -> None:
    encoder = fresh(models / "whisper")
    seen = []
    encoder.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mask = np.zeros(encoder.num_frames(20801), dtype=bool)  # over two windows of 50 frames
    mask[[3, 49, 52]] = True
    encode(encoder, [CLIPS[2]], [mask])
    hidden_WT = (seen[0] == 0).all(1)
    assert hidden_WT.nonzero().tolist() == [[0, 6], [0, 7], [0, 98], [0, 99], [1, 4], [1, 5]]


@every_kind
@torch.no_grad()
def test_a_deep_copy_keeps_no_state_of_its_original(encoder: SpeechEncoder) -> None:
    copy = shared_view(encoder)
    expected = [encode(encoder, [clip])[0] for clip in CLIPS]
    encode(encoder, [CLIPS[1], CLIPS[0]])  # leaves its lengths behind
    assert same(encode(copy, [CLIPS[0], CLIPS[3]]), [expected[0], expected[3]])
    encode(copy, [CLIPS[1], CLIPS[0]])
    assert same(encode(encoder, [CLIPS[2], CLIPS[3]]), expected[2:])


@pytest.mark.parametrize("kind", CONFORMERS)
def test_conformers_train_without_the_statistics_of_the_batch(
    kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SpeechEncoder, "train", nn.Module.train)
    assert not invariant(without_dropout(folders[kind], tmp_path / kind), CLIPS[1:3])


@pytest.mark.parametrize("kind", [kind for kind in (*ENCODERS, *VARIANTS) if "group" in kind or "batch" in kind])
def test_an_unmasked_group_norm_is_noticed(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MaskedGroupNorm, "forward", nn.GroupNorm.forward)
    assert not invariant(fresh(folders[kind]), CLIPS[1:3])


@pytest.mark.parametrize("kind", [*CONFORMERS, "hubert-batch-norm"])
def test_an_unmasked_convolution_is_noticed(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MaskedConv1d, "forward", nn.Conv1d.forward)
    assert not invariant(fresh(folders[kind]), CLIPS[1:3])


@pytest.mark.parametrize("kind", PADDED)
def test_a_missing_attention_mask_is_noticed(kind: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = fresh(models / kind)
    forward = encoder.model.forward
    monkeypatch.setattr(encoder.model, "forward", lambda inputs, attention_mask: forward(inputs))
    assert not invariant(encoder, CLIPS[1:3])
