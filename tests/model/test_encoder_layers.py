"""Which encoder layers are heard: the hidden states of transformers, alone or in any batch, in one step or two."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from data.errors import ConfigError
from model.config import EncoderConfig, Layers
from model.encoders.base import OUTPUT, SpeechEncoder
from model.speech_llm.speech_llm import SpeechLLM
from tests.model.common import ANSWERS, close, settings
from tests.model.encoders import CLIPS, encode, fresh, gradient, invariant, same, split, without_dropout
from tests.tiny_models import ENCODERS


def heard(folder: Path, layers: Layers) -> SpeechEncoder:
    encoder = fresh(folder)
    encoder.set_layers(layers)
    return encoder


@torch.no_grad()
def stock_states(folder: Path, encoder: SpeechEncoder, index: int) -> list[Tensor]:
    """Return a hidden state of short clips as transformers yields it, each clip alone."""
    model = AutoModel.from_pretrained(folder).eval()
    model = model.get_encoder() if "whisper" in folder.name else model
    frames = []
    for clip in CLIPS[:2]:
        inputs = encoder.extractor(clip, sampling_rate=16_000, return_tensors="pt")
        state_FD = model(**inputs, output_hidden_states=True).hidden_states[index][0]
        frames.append(state_FD[: encoder.num_frames(len(clip))])
    return frames


@pytest.mark.parametrize("kind", ENCODERS)
@torch.no_grad()
def test_layers_are_the_hidden_states_of_transformers(kind: str, models: Path) -> None:
    last = [encode(fresh(models / kind), [clip])[0] for clip in CLIPS[:2]]
    for index in (0, 1):
        encoder = heard(models / kind, index)
        assert len(encoder.transformer.layers) == index
        assert same(encode(encoder, CLIPS[:2]), stock_states(models / kind, encoder, index))
    assert same(encode(heard(models / kind, 2), CLIPS[:2]), last)
    pair = encode(heard(models / kind, [1, 2]), CLIPS[:2])
    width = last[0].shape[1]
    assert same([frames[:, width:] for frames in pair], last)
    assert same([frames[:, :width] for frames in pair], encode(heard(models / kind, 1), CLIPS[:2]))


@pytest.mark.parametrize("layers", [1, "weighted"])
@pytest.mark.parametrize("kind", [*ENCODERS, "whisper-clip"])
@torch.no_grad()
def test_heard_layers_do_not_depend_on_the_batch(kind: str, layers: Layers, folders: dict[str, Path]) -> None:
    assert invariant(heard(folders[kind], layers), CLIPS[:3])


def upper(encoder: SpeechEncoder, clips: Sequence[Any]) -> list[Tensor]:
    """Compute the second layer over cached states of each clip."""
    states = [encoder.layer_inputs(clip, [0, 1]) for clip in clips]
    lengths = [len(clip) for clip in clips]
    lower = {0: [state[0][: encoder.num_frames(length)] for state, length in zip(states, lengths, strict=True)]}
    return split(encoder, *encoder.forward_from_layer([state[1] for state in states], lengths, 1, lower), clips)


@pytest.mark.parametrize("kind", [*ENCODERS, "whisper-clip"])
@torch.no_grad()
def test_two_steps_yield_the_heard_layers_of_one(kind: str, folders: dict[str, Path]) -> None:
    encoder = heard(folders[kind], "weighted")
    assert encoder.states == (0, 1, OUTPUT)
    whole = [encode(encoder, [clip])[0] for clip in CLIPS[:3]]
    assert same(upper(encoder, CLIPS[:3]), whole)
    assert same(upper(encoder, CLIPS[2:0:-1]), whole[2:0:-1])


@pytest.mark.parametrize("kind", ["hubert-group", "conformer-relative", "w2v-bert", "whisper"])
def test_every_kept_layer_trains(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Nothing above the highest layer is left, so that no parameter trains without effect."""
    for layers in (1, [0, 2]):
        encoder = without_dropout(folders[kind], tmp_path / f"{kind}-{layers}")
        encoder.set_layers(layers)
        masked = {"masked_spec_embed", "model.masked_spec_embed"}
        trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad and name not in masked}
        gradient(list(trained.values()), [encode(encoder, CLIPS[:2])])
        assert [name for name, parameter in trained.items() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("layers", "parts", "problem"),
    [
        (3, "adapter", r"model.encoder.layers: 3 is no layer of this encoder \(whisper\), which has 2; choose from 0 "),
        ([1, 7], "adapter", r"model.encoder.layers: 7 is no layer"),
        (1, "encoder.*.layers.1.*", r"model.trainable: 'encoder\.\*\.layers\.1\.\*' matches no parameter"),
    ],
)
def test_layer_that_the_encoder_lacks_is_refused(layers: Layers, parts: str, problem: str, models: Path) -> None:
    config = settings(models, "whisper", trainable=parts + "+lora+tokens+adapter", encoder={"layers": layers})
    with pytest.raises(ConfigError, match=problem):
        SpeechLLM(config, ANSWERS, "meta")


@pytest.mark.parametrize("layers", [[2, 1], [1, 1], [], -1, "first"])
def test_layers_that_make_no_sense_are_refused(layers: object) -> None:
    with pytest.raises(ValueError, match="layers"):
        EncoderConfig.model_validate({"layers": layers})


def test_weights_of_layers_start_equal_and_belong_to_the_adapter(models: Path) -> None:
    config = settings(models, encoder={"layers": "weighted"}, trainable="adapter+lora+tokens")
    model = SpeechLLM(config, ANSWERS)
    assert model.adapter is not None
    assert model.adapter.layer_weights is not None
    assert model.adapter.layer_weights.tolist() == [0, 0, 0]
    frames_FD = torch.randn(5, 3 * 32)
    assert close(model.adapter._sum_layers(frames_FD), frames_FD.reshape(5, 3, 32).mean(1))
    assert model.meaning()["adapter"].endswith(", encoder layers weighted")
    assert SpeechLLM(settings(models, encoder={"layers": 2}), ANSWERS, "meta").meaning() == (
        SpeechLLM(settings(models), ANSWERS, "meta").meaning()
    )
