"""Loading encoders: what is refused, and what loading leaves unchanged."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import ConfigError
from model.encoders.loading import encoder_kind, load_encoder
from tests.model.encoders import CLIPS, edited, encode, fresh, same
from tests.tiny_models import ENCODERS

REFUSED = {
    **{
        f"{kind} with an adapter": (kind, {"add_adapter": True}, {}, "add_adapter")
        for kind in ("wav2vec2-layer", "wavlm-group", "conformer-relative", "w2v-bert")
    },
    "another kind": ("hubert-layer", {"model_type": "unispeech"}, {}, "a unispeech model.*use one of hubert, wav2vec2"),
    "unknown kind": ("hubert-layer", {"model_type": "nonsense"}, {}, "cannot load an encoder"),
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
def test_unsupported_encoder_is_refused_without_weights(name: str, models: Path, tmp_path: Path) -> None:
    kind, config, extractor, message = REFUSED[name]
    folder = edited(models / kind, tmp_path / "model", config, extractor)
    (folder / "model.safetensors").unlink()
    for load in (encoder_kind, partial(load_encoder, device="cpu")):
        with pytest.raises(ConfigError, match=f"^model.encoder.path: .*{message}") as error:
            load(str(folder))
        assert "\n" not in str(error.value)


def test_incomplete_encoder_is_refused(models: Path, tmp_path: Path) -> None:
    def refused(folder: Path, message: str, device: str = "cpu") -> None:
        with pytest.raises(ConfigError, match=message):
            load_encoder(str(folder), device)

    refused(tmp_path / "nowhere", r"cannot load an encoder from .*nowhere")
    folder = edited(models / "whisper", tmp_path / "extractor", {})
    (folder / "preprocessor_config.json").unlink()
    refused(folder, "cannot load an encoder")
    folder = edited(models / "hubert-layer", tmp_path / "layers", {"num_hidden_layers": 3})
    refused(folder, r"lacks 16 of the encoder's tensors.* \(encoder.layers.2")
    folder = edited(models / "hubert-layer", tmp_path / "width", {"intermediate_size": 128})
    refused(folder, r"lacks 6 of the encoder's tensors, or has them in another shape")
    folder = edited(models / "hubert-layer", tmp_path / "cut", {})
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    refused(folder, "cannot load an encoder")
    folder = edited(models / "hubert-layer", tmp_path / "heads", {"num_attention_heads": 5})
    refused(folder, "embed_dim must be divisible by num_heads", "meta")


@pytest.mark.parametrize("kind", ENCODERS)
def test_structure_is_known_without_weights(kind: str, models: Path, tmp_path: Path) -> None:
    """Convolutions are frozen, and loading keeps the random state."""
    folder = edited(models / kind, tmp_path / "model", {})
    (folder / "model.safetensors").unlink()
    assert encoder_kind(str(folder)) == json.loads((folder / "config.json").read_text())["model_type"]
    before = torch.get_rng_state()
    skeleton, loaded = load_encoder(str(folder), "meta"), fresh(models / kind)
    assert torch.equal(torch.get_rng_state(), before)
    sizes, expected = (
        {name: (p.shape, p.requires_grad) for name, p in encoder.named_parameters()} for encoder in (skeleton, loaded)
    )
    assert sizes == expected
    assert {p.device.type for p in [*skeleton.parameters(), *skeleton.buffers()]} == {"meta"}
    assert skeleton.num_frames(5637) == loaded.num_frames(5637)
    frozen = {name.split(".")[1] for name, p in loaded.named_parameters() if not p.requires_grad} - {"encoder"}
    others = {"whisper": {"conv1", "conv2", "embed_positions"}, "w2v-bert": set()}
    assert frozen == others.get(kind, {"feature_extractor"})


def test_checkpoint_without_a_mask_vector_hides_with_zeros(models: Path, tmp_path: Path) -> None:
    folder = edited(models / "wav2vec2-group", tmp_path / "model", {})
    tensors = load_file(folder / "model.safetensors")
    del tensors["masked_spec_embed"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    encoder = fresh(folder)
    assert not encoder.model.masked_spec_embed.any()
    assert same(encode(encoder, CLIPS), encode(fresh(models / "wav2vec2-group"), CLIPS))
