"""Loading encoders: what is refused, and what loading leaves as it was."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import ConfigError
from model.encoders.loading import encoder_kind, load_encoder
from model.encoders.spec_augment import draw_time_mask
from tests.conftest import ENCODERS
from tests.model.encoders import CLIPS, edited, encode, fresh, same

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
        "yields input_values, but the model reads input_features",
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
    assert skeleton.num_frames(5637) == loaded.num_frames(5637)


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
    masks = [draw_time_mask(n_frames, share, np.random.default_rng(seed)) for seed in range(300)]
    assert all(mask.shape == (n_frames,) and mask.dtype == bool and not mask.all() for mask in masks)
    assert np.array_equal(masks[7], draw_time_mask(n_frames, share, np.random.default_rng(7)))
    hidden = np.mean(masks)
    assert hidden <= share * 1.1 + 0.02
    if share == 0 or n_frames == 1:
        assert hidden == 0
    else:
        assert hidden >= share * 0.4
    if n_frames == 250 and share == 0.1:
        edges = [np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0)) for mask in masks]
        assert min(np.diff(edge)[::2].min() for edge in edges if len(edge)) == 10
