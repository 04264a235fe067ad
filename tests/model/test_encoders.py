"""The conformance suite: every encoder kind gives a clip the same frames whatever else is in the batch.

The reference is a clip encoded alone, which in turn equals what the stock model of transformers yields for it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModel

from data.corpus.audio import MIN_SAMPLES
from data.corpus.schema import SAMPLE_RATE
from data.errors import ConfigError
from model.encoders import whisper
from model.encoders.base import OUTPUT, SpeechEncoder
from model.encoders.masked_layers import MaskedConv1d, MaskedGroupNorm
from model.speech_llm.language_model import shared_view
from tests.model.common import close
from tests.model.encoders import (
    BELOW,
    CLIPS,
    LONG,
    VARIANTS,
    encode,
    fresh,
    gradient,
    invariant,
    masks_of,
    noise,
    same,
    split,
    without_dropout,
)
from tests.tiny_models import AUDIO_LLMS, ENCODERS

ALL = [*ENCODERS, *VARIANTS]
EVERY = [*ALL, *AUDIO_LLMS]  # with the encoders of audio LLMs, whose stock frames test_audio_llms.py compares
CONFORMERS = ["conformer-relative", "conformer-rotary", "conformer-group", "conformer-no-positions"]


@pytest.mark.parametrize("kind", EVERY)
def test_frames_do_not_depend_on_the_batch(kind: str, folders: dict[str, Path]) -> None:
    """With clips from one sample on, and silence next to noise."""
    encoder = fresh(folders[kind])
    assert encoder.num_frames(BELOW) == encoder.num_frames(1) == 1
    shortest = [noise(n_samples, n_samples) for n_samples in (BELOW, 1)]
    silence = [np.zeros(n_samples, np.float32) for n_samples in (5637, MIN_SAMPLES)]
    assert invariant(encoder, [*CLIPS, *shortest, *silence])


@torch.no_grad()
def stock(folder: Path, clips: Sequence[np.ndarray]) -> list[Tensor]:
    """Return what transformers yields for each unpadded clip, with the feature extractor of the folder."""
    model, extractor = AutoModel.from_pretrained(folder).eval(), AutoFeatureExtractor.from_pretrained(folder)
    frames = []
    for clip in clips:
        inputs = extractor(clip, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        if model.config.model_type == "whisper":
            frames.append(model.get_encoder()(**inputs).last_hidden_state[0])
        else:
            frames_FD = model(**inputs).last_hidden_state[0]
            half = model.config.model_type == "wav2vec2-bert" and not inputs["attention_mask"][0, -1]
            frames.append(frames_FD[:-1] if half else frames_FD)
    return frames


@pytest.mark.parametrize("kind", ALL)
def test_clip_alone_equals_the_stock_model(kind: str, folders: dict[str, Path]) -> None:
    encoder = fresh(folders[kind])
    clips = [clip[:SAMPLE_RATE] for clip in CLIPS] if "whisper" in kind else CLIPS  # stock Whisper reads one window
    if kind == "whisper-clip":
        clips = clips[2:]  # which fill it
    expected = stock(folders[kind], clips)
    if "whisper" in kind:
        expected = [frames[: encoder.num_frames(len(clip))] for frames, clip in zip(expected, clips, strict=True)]
    with torch.no_grad():
        assert same([encode(encoder, [clip])[0] for clip in clips], expected)


@pytest.mark.parametrize("kind", ["hubert-layer", "conformer-rotary", "w2v-bert"])
def test_frame_count_equals_the_stock_model(kind: str, folders: dict[str, Path]) -> None:
    """At every edge of the first frames, and at odd lengths."""
    encoder = fresh(folders[kind])
    first = range(encoder.min_samples, encoder.min_samples + 4 * 320)
    edges = {n for n in first if encoder.num_frames(n) != encoder.num_frames(n + 1)}
    lengths = sorted({encoder.min_samples, *edges, *(n + 1 for n in edges), 4321, 5637, 16000, 23457})
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


@pytest.mark.parametrize("kind", EVERY)
def test_training_does_not_depend_on_the_batch(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Nothing is drawn: SpecAugment hides the frames that it is given, and no layer is dropped."""
    encoder = without_dropout(folders[kind], tmp_path / kind)
    parameters = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    masks = masks_of(encoder, CLIPS)

    def masked(*batches: Sequence[int]) -> Tensor:
        pairs = [([CLIPS[index] for index in batch], [masks[index] for index in batch]) for batch in batches]
        return gradient(parameters, [encode(encoder, *pair) for pair in pairs])

    alone = masked([0], [1], [2], [3])
    assert len(alone) == sum(parameter.numel() for parameter in parameters)
    assert alone.abs().max() > 0
    assert close(masked([3, 0], [2, 1]), alone)
    assert close(masked([1, 3, 0, 2]), alone)
    buffers = dict(fresh(folders[kind]).named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in encoder.named_buffers())
    with torch.no_grad():
        trained = encode(encoder, CLIPS)
        assert same([encode(encoder, [clip])[0] for clip in CLIPS], trained)
        assert same(trained, encode(encoder.eval(), CLIPS))


@pytest.mark.parametrize("kind", [*ENCODERS, *AUDIO_LLMS, "hubert-without-specaugment"])
@torch.no_grad()
def test_masks_hide_frames_whatever_the_batch(kind: str, folders: dict[str, Path]) -> None:
    encoder = fresh(folders[kind])
    masks = masks_of(encoder, CLIPS)
    assert all(mask.any() for mask in masks)
    alone = [encode(encoder, [clip], [mask])[0] for clip, mask in zip(CLIPS, masks, strict=True)]
    for order in ([3, 1, 0, 2], [2, 1, 3]):
        batched = encode(encoder, [CLIPS[index] for index in order], [masks[index] for index in order])
        assert same(batched, [alone[index] for index in order])
    plain = encode(encoder, CLIPS)
    assert not any(close(masked, frames, 1e-3) for masked, frames in zip(alone, plain, strict=True))
    assert same(encode(encoder, CLIPS, [np.zeros_like(mask) for mask in masks]), plain)


@pytest.mark.parametrize("kind", ["w2v-bert", "wavlm-group"])
def test_hidden_frames_carry_no_audio(kind: str, models: Path) -> None:
    """Where no convolution over time follows the mask."""
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
    inputs = []
    encoder.model.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    mask = np.zeros(encoder.num_frames(20801), dtype=bool)  # over two windows of 50 frames
    mask[[3, 49, 52]] = True
    encode(encoder, [CLIPS[2]], [mask])
    hidden_WT = (inputs[0] == 0).all(1)
    assert hidden_WT.nonzero().tolist() == [[0, 6], [0, 7], [0, 98], [0, 99], [1, 4], [1, 5]]


@pytest.mark.parametrize("kind", [*ENCODERS, *AUDIO_LLMS])
@torch.no_grad()
def test_deep_copy_keeps_no_state_of_its_original(kind: str, folders: dict[str, Path]) -> None:
    encoder = fresh(folders[kind])
    copy, clips = shared_view(encoder), CLIPS[:3]
    expected = [encode(encoder, [clip])[0] for clip in clips]
    encode(encoder, [clips[1], clips[0]])  # leaves its lengths behind
    assert same(encode(copy, [clips[0], clips[2]]), [expected[0], expected[2]])
    encode(copy, [clips[1], clips[0]])
    assert same(encode(encoder, clips[1:]), expected[1:])


FAULTS = [
    *(("batch norm in training", kind) for kind in CONFORMERS),
    *(("unmasked group norm", kind) for kind in ALL if "group" in kind or "batch" in kind),
    *(("unmasked convolution", kind) for kind in [*CONFORMERS, "hubert-batch-norm"]),
    *(("no attention mask", kind) for kind in ENCODERS if kind != "whisper"),
    ("no mask of clips", "whisper-clip"),
]


@pytest.mark.parametrize(("fault", "kind"), FAULTS)
def test_faults_are_noticed(
    fault: str, kind: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suite that compares clips of other lengths fails with each fault."""
    if fault == "batch norm in training":
        monkeypatch.setattr(SpeechEncoder, "train", nn.Module.train)
        encoder = without_dropout(folders[kind], tmp_path / kind)
    else:
        encoder = fresh(folders[kind])
    if fault == "unmasked group norm":
        monkeypatch.setattr(MaskedGroupNorm, "forward", nn.GroupNorm.forward)
    if fault == "unmasked convolution":
        monkeypatch.setattr(MaskedConv1d, "forward", nn.Conv1d.forward)
    if fault == "no attention mask":
        forward = encoder.model.forward
        monkeypatch.setattr(encoder.model, "forward", lambda inputs, attention_mask: forward(inputs))
    if fault == "no mask of clips":
        monkeypatch.setattr(whisper, "create_bidirectional_mask", lambda *arguments: None)
    assert not invariant(encoder, CLIPS[1:3])


@torch.no_grad()
def test_whisper_at_clip_length_differs_by_attention_alone(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convolutions and positions are those of the window: with layers that do nothing, frames are equal."""
    window, clip = fresh(folders["whisper"]), fresh(folders["whisper-clip"])
    assert [clip.num_computed_frames(n) for n in (1, 5637, SAMPLE_RATE, LONG)] == [1, 18, 50, 175]
    assert not same(encode(window, CLIPS[1:2]), encode(clip, CLIPS[1:2]))
    for layer in (*window.transformer.layers, *clip.transformer.layers):
        monkeypatch.setattr(layer, "forward", lambda hidden, *mask, **_: hidden)
    clip.model.load_state_dict(window.model.state_dict())
    assert same(encode(clip, CLIPS), encode(window, CLIPS))


def test_context_of_an_encoder_without_window_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"model.encoder.context: clip is for Whisper, .* \(hubert\) .* set window"):
        fresh(folders["hubert-layer"]).set_context("clip")


# Frozen layers and the layers above them ------------------------------------------------------------------------------


def upper(encoder: SpeechEncoder, hidden: Sequence[Tensor], clips: Sequence[np.ndarray], start: int) -> list[Tensor]:
    return split(encoder, *encoder.forward_from_layer(hidden, [len(clip) for clip in clips], start), clips)


@pytest.mark.parametrize(
    "kind", [*ENCODERS, *AUDIO_LLMS, "whisper-clip", "hubert-batch-norm", "conformer-no-positions", "w2v-bert-rotary"]
)
@torch.no_grad()
def test_two_steps_yield_the_frames_of_one(kind: str, folders: dict[str, Path]) -> None:
    """Clips alone up to a layer and in any batch from there on equal the whole encoder over a clip alone."""
    encoder, clips = fresh(folders[kind]), [*CLIPS[:3], noise(BELOW, 1)]
    assert len(encoder.transformer.layers) == 2
    whole = [encode(encoder, [clip])[0] for clip in clips]
    inputs = [encoder.layer_inputs(clip, [1, OUTPUT, 2]) for clip in clips]
    for start in (1, 2):
        hidden = [by_start[start] for by_start in inputs]
        assert [row.shape for row in hidden] == [
            (encoder.num_computed_frames(len(clip)), encoder.width) for clip in clips
        ]
        for order in ([0], [3, 2, 1, 0]):
            frames = upper(encoder, [hidden[index] for index in order], [clips[index] for index in order], start)
            assert same(frames, [whole[index] for index in order])
        assert torch.equal(encoder.layer_inputs(clips[1], [start])[start], hidden[1])  # whatever ran before
    output = [by_start[OUTPUT][: len(frames)] for by_start, frames in zip(inputs, whole, strict=True)]
    assert all(map(torch.equal, output, whole))
    assert same(encode(encoder, clips), whole)


@pytest.mark.parametrize(
    "kind", ["hubert-group", "wavlm-layer", "conformer-relative", "w2v-bert", "whisper", *AUDIO_LLMS]
)
def test_upper_layers_train_whatever_the_batch(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = without_dropout(folders[kind], tmp_path / kind)
    hidden = [encoder.layer_inputs(clip, [1])[1] for clip in CLIPS[:3]]
    parameters = list(encoder.transformer.layers[1].parameters())

    def above(*batches: Sequence[int]) -> Tensor:
        pairs = [([hidden[index] for index in batch], [CLIPS[index] for index in batch]) for batch in batches]
        return gradient(parameters, [upper(encoder, *pair, 1) for pair in pairs])

    alone = above([0], [1], [2])
    assert len(alone) == sum(parameter.numel() for parameter in parameters)
    assert alone.abs().max() > 0
    assert close(above([2, 0], [1]), alone)
    assert close(above([1, 0, 2]), alone)


# bfloat16 and mixed precision -----------------------------------------------------------------------------------------


def sound(n_samples: int, seed: int) -> np.ndarray:
    """Return gliding tones in noise: clips that differ enough to get different labels from a random classifier."""
    rng = np.random.default_rng(seed)
    time_N = np.arange(n_samples) / SAMPLE_RATE
    tones_N = sum(
        rng.random() * np.sin(2 * np.pi * pitch * time_N * (1 + 0.3 * rng.standard_normal() * time_N))
        for pitch in rng.uniform(80, 4000, 3)
    )
    swell_N = 0.2 + np.abs(np.sin(np.pi * rng.uniform(0.5, 4) * time_N))
    noise_N = rng.choice([0.02, 0.2, 1.0]) * rng.standard_normal(n_samples)
    return (rng.uniform(0.01, 0.3) * (tones_N * swell_N + noise_N)).astype(np.float32)


@torch.no_grad()
def mean_frames(encoder: SpeechEncoder, clips: Sequence[np.ndarray], size: int) -> Tensor:
    """Return the mean frame of every clip, in batches of mixed lengths, [clips, D]."""
    order = np.random.default_rng(0).permutation(len(clips)).tolist()
    means: dict[int, Tensor] = {}
    for batch in (order[start : start + size] for start in range(0, len(order), size)):
        frames = encode(encoder, [clips[index] for index in batch])
        means |= {index: row.float().mean(0) for index, row in zip(batch, frames, strict=True)}
    return torch.stack([means[index] for index in range(len(clips))])


@pytest.mark.parametrize("count", [40, pytest.param(120, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", [*ENCODERS, *AUDIO_LLMS])
def test_bfloat16_gives_the_same_labels_in_any_batch(kind: str, count: int, models: Path) -> None:
    """A fixed random classifier, whose bias centres it on the clips so that it uses every label; 99 % must agree."""
    clips = [sound(int(n_samples), seed) for seed, n_samples in enumerate(np.linspace(MIN_SAMPLES, 8000, count))]
    encoder = fresh(models / kind, "bfloat16")
    weight_DK = torch.randn(encoder.width, 3, generator=torch.Generator().manual_seed(0))
    alone, batched = mean_frames(encoder, clips, 1), mean_frames(encoder, clips, 8)
    labels, batched_labels = (((means - alone.mean(0)) @ weight_DK).argmax(1) for means in (alone, batched))
    assert labels.bincount(minlength=3).min() > 0
    assert (labels != batched_labels).sum() <= count // 100


@pytest.mark.parametrize("kind", [*ENCODERS, *AUDIO_LLMS])
def test_mixed_precision_trains_and_leaves_no_trace(kind: str, models: Path) -> None:
    encoder = fresh(models / kind)
    expected = encode(encoder, CLIPS[:3])
    with torch.autocast("cpu", torch.bfloat16):
        frames = encode(encoder.train(), CLIPS[:3], masks_of(encoder, CLIPS[:3]))
        torch.cat(frames).square().mean().backward()
    assert torch.cat(frames).isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)
    assert all(map(torch.equal, encode(encoder.eval(), CLIPS[:3]), expected))


@pytest.mark.parametrize("kind", ["conformer-rotary", "w2v-bert-rotary"])
def test_rotary_positions_differ_in_bfloat16(kind: str, folders: dict[str, Path]) -> None:
    encoder = fresh(folders[kind], "bfloat16")
    encode(encoder, [noise(7 * SAMPLE_RATE, 1)])
    cosines = encoder.model.encoder.embed_positions.cached_rotary_positional_embedding[0, :, 0, 0, 0]
    positions = torch.arange(encoder.num_frames(7 * SAMPLE_RATE))
    assert len(positions) > 300
    assert (cosines.float() - positions.cos()).abs().max() < 0.01
