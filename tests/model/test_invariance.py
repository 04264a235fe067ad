"""The same number at any batch size, order and padding: every stage of the model, in fp32, to a relative 1e-5.

The reference is each example computed alone. Each fault that is known to break this is also put back, one at a time,
to show that these tests would notice.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.audio import waveform
from data.examples import Example
from model import encoder as encoder_module
from model import speech_llm
from model.adapter import clip_list
from model.speech_llm import SpeechLLM
from tests.conftest import ENCODERS
from tests.model.common import build, close

SIZES = (1, 2, 3, 8)


def batches(items: Sequence[Example], size: int, order: Sequence[int]) -> list[list[int]]:
    return [list(order[start : start + size]) for start in range(0, len(items), size)]


ORDERS: dict[str, list[int]] = {
    "given": list(range(8)),
    "reversed": list(range(8))[::-1],
    "shuffled": np.random.default_rng(1).permutation(8).tolist(),
}


def by_example(
    compute: Callable[[list[Example]], Sequence[Tensor]], examples: list[Example], size: int, order: list[int]
) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for batch in batches(examples, size, order):
        found |= dict(zip(batch, compute([examples[place] for place in batch]), strict=True))
    return [found[place] for place in range(len(examples))]


def frames(model: SpeechLLM) -> Callable[[list[Example]], list[Tensor]]:
    assert model.encoder is not None
    return lambda part: clip_list(*model.encoder([waveform(example.pcm) for example in part]))


def embeddings(model: SpeechLLM) -> Callable[[list[Example]], list[Tensor]]:
    return lambda part: list(model._clips(part))


def prompts(model: SpeechLLM) -> Callable[[list[Example]], list[Tensor]]:
    return lambda part: list(model._prompts(part))


def scores(model: SpeechLLM) -> Callable[[list[Example]], list[Tensor]]:
    return lambda part: list(model.score(part))


STAGES = {"encoder": frames, "adapter": embeddings, "prompt": prompts, "scores": scores}


def invariant(stage: str, model: SpeechLLM, examples: list[Example]) -> bool:
    compute = STAGES[stage](model)
    with torch.no_grad():
        alone = by_example(compute, examples, 1, ORDERS["given"])
        return all(
            one.shape == other.shape and close(one, other)
            for size in SIZES
            for order in ORDERS.values()
            for one, other in zip(by_example(compute, examples, size, order), alone, strict=True)
        )


@pytest.fixture(params=ENCODERS)
def model(request: pytest.FixtureRequest, models: Path) -> SpeechLLM:
    return build(models, request.param)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_depends_on_its_own_example_only(stage: str, model: SpeechLLM, examples: list[Example]) -> None:
    assert invariant(stage, model, examples)


@pytest.mark.parametrize("cls", ["none", "before", "after"])
@pytest.mark.parametrize("modality", ["text", "speech", "text+speech"])
def test_scores_are_invariant_in_every_variant(cls: str, modality: str, models: Path, examples: list[Example]) -> None:
    assert invariant("scores", build(models, cls=cls, modality=modality), examples)


def loss_and_gradient(model: SpeechLLM, examples: list[Example], parts: list[list[int]]) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for part in parts:
        loss, predicted = model.loss([examples[place] for place in part])
        loss.backward()
        total, count = total + loss.detach(), count + predicted
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient = torch.cat([(parameter.grad / count).flatten() for parameter in trained if parameter.grad is not None])
    return total / count, gradient


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("order", ORDERS)
def test_loss_and_gradient_do_not_depend_on_the_cut(
    size: int, order: str, model: SpeechLLM, examples: list[Example]
) -> None:
    loss, gradient = loss_and_gradient(model, examples, [[place] for place in range(8)])
    again, gradient_again = loss_and_gradient(model, examples, batches(examples, size, ORDERS[order]))
    assert close(again, loss)
    assert close(gradient_again, gradient)
    assert gradient.abs().max() > 0


def no_encoder_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import HubertModel

    forward = HubertModel.forward
    monkeypatch.setattr(
        HubertModel, "forward", lambda self, values, attention_mask=None: forward(self, values, attention_mask=None)
    )


def unmasked_group_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module.MaskedGroupNorm, "forward", torch.nn.GroupNorm.forward)


def default_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    pad_left = speech_llm.pad_left

    def without(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        embeddings_BTE, mask_BT, positions_BT = pad_left(sequences)
        return embeddings_BTE, mask_BT, torch.arange(mask_BT.shape[1]).expand_as(positions_BT)

    monkeypatch.setattr(speech_llm, "pad_left", without)


def no_llm_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    pad_left = speech_llm.pad_left

    def without(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        embeddings_BTE, mask_BT, positions_BT = pad_left(sequences)
        return embeddings_BTE, torch.ones_like(mask_BT), positions_BT

    monkeypatch.setattr(speech_llm, "pad_left", without)


def padding_reaches_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_llm, "clip_list", lambda values_BTE, lengths_B: list(torch.unbind(values_BTE)))


FAULTS = {
    "no encoder mask": (no_encoder_mask, "hubert-layer", "encoder"),
    "unmasked group norm": (unmasked_group_norm, "hubert-group", "encoder"),
    "no mask in the LLM": (no_llm_mask, "hubert-layer", "scores"),
    "padded embeddings in the sequence": (padding_reaches_the_adapter, "hubert-layer", "scores"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_is_put_back_is_noticed(
    fault: str, models: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_back, encoder, stage = FAULTS[fault]
    model = build(models, encoder)
    put_back(monkeypatch)
    assert not invariant(stage, model, examples)


def test_wrong_positions_are_noticed(models: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions are relative, so a shift alone is harmless; between the prompt and its labels it is not."""
    model = build(models)
    default_positions(monkeypatch)
    assert not invariant("scores", model, examples)
