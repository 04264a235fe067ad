"""Every encoder kind gives a clip the same frames whatever else is in the batch: the conformance suite.

The reference is a clip encoded alone, which in turn equals what the stock model of transformers yields for it.
"""

import itertools
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoFeatureExtractor, AutoModel

from data.audio import MIN_SAMPLES
from data.errors import ConfigError
from data.schema import SAMPLE_RATE
from model.encoder import MaskedConv1d, MaskedGroupNorm, SpeechEncoder, encoder_kind, load_encoder, time_mask
from model.llm import shared_view
from tests import tiny_models
from tests.conftest import ENCODERS
from tests.model.common import close

LONG = 6 * SAMPLE_RATE
BELOW = 200  # samples: fewer than any kind but Whisper needs for a frame
VARIANTS = {  # accepted too, but not of a published layout that ENCODERS has
    "hubert-batch-norm": partial(tiny_models.random_hubert, norm="group", conv_pos_batch_norm=True),
    "hubert-without-specaugment": partial(tiny_models.random_hubert, norm="layer", mask_time_prob=0.0),
    "conformer-group": partial(tiny_models.random_conformer, positions="relative", norm="group"),
    "conformer-no-positions": partial(tiny_models.random_conformer, positions=None),
    "w2v-bert-relative": partial(tiny_models.random_w2v_bert, positions="relative"),
    "w2v-bert-rotary": partial(tiny_models.random_w2v_bert, positions="rotary"),
}
PADDED = [kind for kind in ENCODERS if kind != "whisper"]
CONFORMERS = ["conformer-relative", "conformer-rotary", "conformer-group", "conformer-no-positions"]


@pytest.fixture(scope="module")
def folders(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of every kind and variant."""
    made = tmp_path_factory.mktemp("variants")
    for name, make in VARIANTS.items():
        make(made / name)
    return {name: models / name for name in ENCODERS} | {name: made / name for name in VARIANTS}


def fresh(folder: Path, dtype: str = "float32") -> SpeechEncoder:
    """An encoder that no other test has."""
    return load_encoder.__wrapped__(str(folder), "cpu", dtype)


@pytest.fixture
def encoder(folders: dict[str, Path], request: pytest.FixtureRequest) -> SpeechEncoder:
    return fresh(folders[request.param])


every_kind = pytest.mark.parametrize("encoder", ENCODERS, indirect=True)


def noise(n_samples: int, seed: int) -> np.ndarray:
    """A clip with a level and an offset of its own."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(0.01, 0.3) * rng.standard_normal(n_samples) + rng.uniform(-0.05, 0.05)).astype(np.float32)


CLIPS = [noise(n_samples, seed) for seed, n_samples in enumerate((MIN_SAMPLES, 5637, 20801, LONG))]


def encode(
    encoder: SpeechEncoder, clips: Sequence[np.ndarray], masks: Sequence[np.ndarray] | None = None
) -> list[Tensor]:
    """The frames of each clip, of the length that the one formula says and zero beyond it."""
    frames_BFD, lengths_B = encoder(clips, masks)
    lengths = [encoder.frames(len(clip)) for clip in clips]
    assert lengths_B.tolist() == lengths
    assert frames_BFD.shape == (len(clips), max(lengths), encoder.width)
    for row, length in zip(frames_BFD, lengths, strict=True):
        assert not row[length:].any()
    return [row[:length] for row, length in zip(frames_BFD, lengths, strict=True)]


def same(frames: Sequence[Tensor], reference: Sequence[Tensor]) -> bool:
    return all(
        bool(one.isfinite().all()) and one.shape == other.shape and close(one, other)
        for one, other in zip(frames, reference, strict=True)
    )


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
    assert [encoder.frames(n_samples) for n_samples in (BELOW, 1)] == [1, 1]
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
        expected = [frames[: encoder.frames(len(clip))] for frames, clip in zip(expected, clips, strict=True)]
    with torch.no_grad():
        assert same([encode(encoder, [clip])[0] for clip in clips], expected)


@pytest.mark.parametrize("kind", ["hubert-layer", "conformer-rotary", "w2v-bert"])
def test_the_length_formula_is_the_stock_models(kind: str, folders: dict[str, Path]) -> None:
    """At every edge of the first frames, and at odd lengths."""
    encoder = fresh(folders[kind])
    first = range(encoder.minimum, encoder.minimum + 4 * 320)
    edges = {n for n in first if encoder.frames(n) != encoder.frames(n + 1)}
    lengths = sorted({encoder.minimum, *edges, *(n + 1 for n in edges), 4321, 5637, 16000, 23457, 48111})
    expected = [len(frames) for frames in stock(folders[kind], [noise(n, n) for n in lengths])]
    assert len(edges) >= 3
    assert [encoder.frames(n) for n in lengths] == expected
    encode(encoder, [noise(n, n) for n in lengths])


def test_whisper_reads_long_clips_window_by_window(models: Path) -> None:
    encoder = fresh(models / "whisper")
    clip, window = CLIPS[2], SAMPLE_RATE
    parts = [part for start in range(0, len(clip), window) for part in encode(encoder, [clip[start : start + window]])]
    assert close(encode(encoder, [clip])[0], torch.cat(parts))
    for n_samples in (1, 319, 320, 321, window - 1, window, window + 1, 5637):
        assert encoder.frames(n_samples) == -(-n_samples // 320)
        encode(encoder, [noise(n_samples, 1)])
    assert [encoder.cost(n) for n in (1, window, window + 1)] == [50, 50, 100]


# Frozen layers, and the rest ------------------------------------------------------------------------------------------


def on_top(encoder: SpeechEncoder, hidden: Sequence[Tensor], clips: Sequence[np.ndarray], start: int) -> list[Tensor]:
    """The frames of each clip from what layer `start` reads, of their lengths and zero beyond."""
    frames_BFD, lengths_B = encoder.rest(hidden, [len(clip) for clip in clips], start)
    lengths = [encoder.frames(len(clip)) for clip in clips]
    assert lengths_B.tolist() == lengths
    assert frames_BFD.shape == (len(clips), max(lengths), encoder.width)
    assert not any(row[length:].any() for row, length in zip(frames_BFD, lengths, strict=True))
    return [row[:length] for row, length in zip(frames_BFD, lengths, strict=True)]


@pytest.mark.parametrize("kind", [*ENCODERS, "hubert-batch-norm", "conformer-no-positions", "w2v-bert-rotary"])
@torch.no_grad()
def test_an_encoder_in_two_steps_yields_the_same_frames(kind: str, folders: dict[str, Path]) -> None:
    """Clips by themselves up to a layer, and in any batch from there: what the whole yields for a clip alone."""
    encoder, clips = fresh(folders[kind]), [*CLIPS[:3], noise(BELOW, 1)]
    assert len(encoder.stack.layers) == 2
    whole = [encode(encoder, [clip])[0] for clip in clips]
    for start in (1, 2):
        hidden = [encoder.states(clip, [start])[start] for clip in clips]
        assert [row.shape for row in hidden] == [(encoder.cost(len(clip)), encoder.width) for clip in clips]
        for order in ([0], [3, 2, 1, 0]):
            frames = on_top(encoder, [hidden[place] for place in order], [clips[place] for place in order], start)
            assert same(frames, [whole[place] for place in order])
        assert torch.equal(encoder.states(clips[1], [start])[start], hidden[1])  # whatever was computed before
    assert same(encode(encoder, clips), whole)
    every = encoder.states(clips[0], [1, 0, 2])  # in one pass
    assert torch.equal(every[0], whole[0])
    assert all(torch.equal(every[start], encoder.states(clips[0], [start])[start]) for start in (1, 2))


@pytest.mark.parametrize("kind", ["hubert-group", "wavlm-layer", "conformer-relative", "w2v-bert", "whisper"])
def test_upper_layers_train_independently_of_the_batch(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = without_dropout(folders[kind], tmp_path / kind)
    hidden = [encoder.states(clip, [1])[1] for clip in CLIPS[:3]]
    direction_D = torch.randn(encoder.width, generator=torch.Generator().manual_seed(0))

    def gradient(*batches: Sequence[int]) -> Tensor:
        encoder.zero_grad()
        for batch in batches:
            frames = on_top(encoder, [hidden[place] for place in batch], [CLIPS[place] for place in batch], 1)
            torch.stack([(row @ direction_D).sum() for row in frames]).sum().backward()
        gradients = [parameter.grad for parameter in encoder.stack.layers[1].parameters()]
        return torch.cat([part.flatten() for part in gradients if part is not None])

    alone = gradient([0], [1], [2])
    assert len(alone) == sum(parameter.numel() for parameter in encoder.stack.layers[1].parameters())
    assert alone.abs().max() > 0
    assert close(gradient([2, 0], [1]), alone)
    assert close(gradient([1, 0, 2]), alone)


# Training -------------------------------------------------------------------------------------------------------------


def edited(folder: Path, to: Path, config: dict[str, Any], extractor: dict[str, Any] | None = None) -> Path:
    """A copy of a model's folder with other settings."""
    shutil.copytree(folder, to)
    for name, changes in (("config.json", config), ("preprocessor_config.json", extractor or {})):
        path = to / name
        if path.exists():
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return to


def without_dropout(folder: Path, to: Path) -> SpeechEncoder:
    """In training mode; layer drop, SpecAugment and batch norm stay as the checkpoint has them."""
    settings = json.loads((folder / "config.json").read_text())
    copy = edited(folder, to, {name: 0.0 for name in settings if "dropout" in name})
    return fresh(copy).train()


def masks_of(encoder: SpeechEncoder, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [time_mask(encoder.frames(len(clip)), 0.4, np.random.default_rng(len(clip)), span=4) for clip in clips]


def gradient(encoder: SpeechEncoder, batches: Sequence[Sequence[int]]) -> Tensor:
    """Of the frames of all clips times a fixed vector, summed, cut into batches; for every trained parameter."""
    direction_D = torch.randn(encoder.width, generator=torch.Generator().manual_seed(0))
    encoder.zero_grad()
    for batch in batches:
        clips = [CLIPS[place] for place in batch]
        frames = encode(encoder, clips, masks_of(encoder, clips))
        torch.stack([(row @ direction_D).sum() for row in frames]).sum().backward()
    gradients = [parameter.grad for parameter in encoder.parameters() if parameter.requires_grad]
    return torch.cat([part.flatten() for part in gradients if part is not None])


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
    mask = np.zeros(encoder.frames(20801), dtype=bool)  # over two windows of 50 frames
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


# bfloat16 -------------------------------------------------------------------------------------------------------------


def sound(n_samples: int, seed: int) -> np.ndarray:
    """Gliding tones in noise: clips that differ enough to get different labels from a random classifier."""
    rng = np.random.default_rng(seed)
    time_N = np.arange(n_samples) / SAMPLE_RATE
    tones_N = sum(
        rng.random() * np.sin(2 * np.pi * pitch * time_N * (1 + 0.3 * rng.standard_normal() * time_N))
        for pitch in rng.uniform(80, 4000, 3)
    )
    swell_N = 0.2 + np.abs(np.sin(np.pi * rng.uniform(0.5, 4) * time_N))
    noise_N = rng.choice([0.02, 0.2, 1.0]) * rng.standard_normal(n_samples)
    return (rng.uniform(0.01, 0.3) * (tones_N * swell_N + noise_N)).astype(np.float32)


SOUNDS = [sound(int(n_samples), seed) for seed, n_samples in enumerate(np.linspace(MIN_SAMPLES, SAMPLE_RATE, 120))]


@torch.no_grad()
def means(encoder: SpeechEncoder, size: int) -> Tensor:
    """The mean frame of every sound, in batches of mixed lengths, [clips, D]."""
    order = np.random.default_rng(0).permutation(len(SOUNDS)).tolist()
    found: dict[int, Tensor] = {}
    for batch in (order[start : start + size] for start in range(0, len(order), size)):
        frames = encode(encoder, [SOUNDS[place] for place in batch])
        found |= {place: row.float().mean(0) for place, row in zip(batch, frames, strict=True)}
    return torch.stack([found[place] for place in range(len(SOUNDS))])


@pytest.mark.parametrize("kind", ENCODERS)
def test_bfloat16_gives_the_same_labels_alone_and_batched(kind: str, models: Path) -> None:
    """By a fixed random classifier, whose bias centres it on the clips: every label is used."""
    usual_D = means(fresh(models / kind), 8).mean(0)
    encoder = fresh(models / kind, "bfloat16")
    weight_DK = torch.randn(encoder.width, 3, generator=torch.Generator().manual_seed(0))
    alone, batched = (((means(encoder, size) - usual_D) @ weight_DK).argmax(1) for size in (1, 8))
    assert alone.bincount(minlength=3).min() >= 5
    assert (alone == batched).float().mean() >= 0.99


@pytest.mark.parametrize("kind", ENCODERS)
def test_mixed_precision_trains_and_leaves_nothing_behind(kind: str, models: Path) -> None:
    encoder = fresh(models / kind)
    expected = encode(encoder, CLIPS[:3])
    with torch.autocast("cpu", torch.bfloat16):
        frames = encode(encoder.train(), CLIPS[:3], masks_of(encoder, CLIPS[:3]))
        torch.cat(frames).square().mean().backward()
    assert torch.cat(frames).isfinite().all()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)
    again = encode(encoder.eval(), CLIPS[:3])
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


@pytest.mark.parametrize("kind", ["conformer-rotary", "w2v-bert-rotary"])
def test_rotary_positions_stay_apart_in_bfloat16(kind: str, folders: dict[str, Path]) -> None:
    encoder = fresh(folders[kind], "bfloat16")
    encode(encoder, [noise(7 * SAMPLE_RATE, 1)])
    cosines = encoder.model.encoder.embed_positions.cached_rotary_positional_embedding[0, :, 0, 0, 0]
    positions = torch.arange(encoder.frames(7 * SAMPLE_RATE))
    assert len(positions) > 300
    assert (cosines.float() - positions.cos()).abs().max() < 0.01


# Loading --------------------------------------------------------------------------------------------------------------

REFUSED = {
    **{
        f"{kind} with an adapter": (kind, {"add_adapter": True}, {}, "add_adapter")
        for kind in ("wav2vec2-layer", "wavlm-group", "conformer-relative", "w2v-bert")
    },
    "another kind": ("hubert-layer", {"model_type": "unispeech"}, {}, "a unispeech model.*use one of hubert, wav2vec2"),
    "no kind at all": ("hubert-layer", {"model_type": "nonsense"}, {}, "cannot load an encoder"),
    "a language model": ("llm", {}, {}, "a llama model"),
    "dither": ("whisper", {}, {"dither": 1e-4}, "dither"),
    "another rate": ("hubert-group", {}, {"sampling_rate": 8000}, "8000 Hz"),
    "another model's features": (
        "w2v-bert",
        {},
        {"feature_extractor_type": "Wav2Vec2FeatureExtractor"},
        "yields input_values, the model reads input_features",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_pass_is_refused_before_any_weight_is_read(name: str, models: Path, tmp_path: Path) -> None:
    kind, config, extractor, said = REFUSED[name]
    folder = edited(models / kind, tmp_path / "model", config, extractor)
    (folder / "model.safetensors").unlink()
    for load in (encoder_kind, partial(load_encoder, device="cpu")):
        with pytest.raises(ConfigError, match=f"^model.encoder.path: .*{said}") as caught:
            load(str(folder))
        assert "\n" not in str(caught.value)


def test_what_is_incomplete_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot load an encoder from .*nowhere"):
        encoder_kind(str(tmp_path / "nowhere"))
    folder = edited(models / "whisper", tmp_path / "extractor", {})
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match="cannot load an encoder"):
        encoder_kind(str(folder))
    folder = edited(models / "hubert-layer", tmp_path / "layers", {"num_hidden_layers": 3})
    with pytest.raises(ConfigError, match=r"lacks 16 of the encoder's tensors.* \(encoder.layers.2"):
        load_encoder(str(folder), "cpu")
    folder = edited(models / "hubert-layer", tmp_path / "width", {"intermediate_size": 128})
    with pytest.raises(ConfigError, match=r"lacks 6 of the encoder's tensors, or has them in another shape"):
        load_encoder(str(folder), "cpu")
    folder = edited(models / "hubert-layer", tmp_path / "cut", {})
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="cannot load an encoder"):
        load_encoder(str(folder), "cpu")
    folder = edited(models / "hubert-layer", tmp_path / "heads", {"num_attention_heads": 5})
    with pytest.raises(ConfigError, match="embed_dim must be divisible by num_heads"):
        load_encoder(str(folder), "meta")


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_kind_is_known_without_weights(kind: str, models: Path, tmp_path: Path) -> None:
    folder = edited(models / kind, tmp_path / "model", {})
    (folder / "model.safetensors").unlink()
    assert encoder_kind(str(folder)) == json.loads((folder / "config.json").read_text())["model_type"]
    skeleton, loaded = load_encoder(str(folder), "meta"), load_encoder(str(models / kind), "cpu")
    sizes = [{name: (p.shape, p.requires_grad) for name, p in one.named_parameters()} for one in (skeleton, loaded)]
    assert sizes[0] == sizes[1]
    assert {p.device.type for p in [*skeleton.parameters(), *skeleton.buffers()]} == {"meta"}
    assert skeleton.frames(5637) == loaded.frames(5637)


@pytest.mark.parametrize("kind", ENCODERS)
def test_loading_leaves_the_random_state(kind: str, models: Path) -> None:
    before = torch.get_rng_state()
    fresh(models / kind)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_without_a_mask_vector_hides_with_zeros(models: Path, tmp_path: Path) -> None:
    folder = edited(models / "wav2vec2-group", tmp_path / "model", {})
    tensors = load_file(folder / "model.safetensors")
    del tensors["masked_spec_embed"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    encoder = fresh(folder)
    assert not encoder.model.masked_spec_embed.any()
    assert same(encode(encoder, CLIPS), encode(fresh(models / "wav2vec2-group"), CLIPS))


def test_convolutions_stay_frozen(models: Path) -> None:
    for kind in ENCODERS:
        named = load_encoder(str(models / kind), "cpu").named_parameters()
        frozen = {name.split(".")[1] for name, parameter in named if not parameter.requires_grad}
        expected = {"whisper": {"conv1", "conv2", "embed_positions"}, "w2v-bert": set()}
        assert frozen - {"encoder"} == expected.get(kind, {"feature_extractor"})


@pytest.mark.parametrize("n_frames", [1, 2, 3, 7, 10, 19, 20, 250])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.65, 0.99])
def test_a_time_mask_hides_spans_but_never_all(n_frames: int, share: float) -> None:
    masks = [time_mask(n_frames, share, np.random.default_rng(seed)) for seed in range(300)]
    assert all(mask.shape == (n_frames,) and mask.dtype == bool and not mask.all() for mask in masks)
    assert np.array_equal(masks[7], time_mask(n_frames, share, np.random.default_rng(7)))
    hidden = np.mean(masks)
    assert hidden <= share * 1.1 + 0.02
    if share == 0 or n_frames == 1:
        assert hidden == 0
    else:
        assert hidden >= share * 0.4
    if n_frames == 250 and share == 0.1:
        edges = [np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)) for mask in masks]
        assert min(np.diff(edge)[::2].min() for edge in edges if len(edge)) == 10
