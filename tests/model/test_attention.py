"""`model.llm.attention`: that it reaches the layers, what is refused, and flash attention by its definition.

That results do not depend on it is in `test_invariance.py`.
"""

import importlib.machinery
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from data.errors import ConfigError, UserError
from data.loading.examples import Example
from model.compat import attention_of
from model.evaluation.llm_check import resolve_packing
from model.speech_llm import attention
from model.speech_llm.language_model import load_llm
from model.speech_llm.speech_llm import SpeechLLM
from tests.model.common import ANSWERS, build, settings
from tests.model.families import make
from tests.model.test_invariance import check_stages


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let flash_attn be installed."""
    spec = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setattr(attention, "find_spec", lambda name: spec if name == "flash_attn" else util.find_spec(name))


def llm(path: Path, name: str, **changed: Any) -> dict[str, Any]:
    return {"llm": {"path": str(path), "attention": name} | changed, "modality": "text", "end_of_audio": "none"}


def test_attention_of_a_trial_is_its_own(models: Path) -> None:
    base = load_llm(str(models / "llm"), "float32", "cpu")
    for name, expected in {"eager": "eager", "sdpa": "sdpa", "auto": "sdpa"}.items():
        assert attention_of(build(models, **llm(models / "llm", name)).llm) == expected
        assert attention_of(base) == "sdpa"


@pytest.mark.parametrize(
    ("device", "changed", "message"),
    [
        ("meta", {}, "computes in half precision; set model.precision=bfloat16 or"),
        ("cpu", {"dtype": "bfloat16"}, "needs a GPU, and this model is computed on a CPU; set auto"),
    ],
)
@pytest.mark.usefixtures("installed")
def test_flash_attention_is_refused_where_it_cannot_run(
    device: str, changed: dict[str, Any], message: str, models: Path
) -> None:
    config = settings(models, trainable="lora", **llm(models / "llm", attention.FLASH, **changed))
    with pytest.raises(UserError, match=f"^model.llm.attention: flash_attention_2 {message}"):
        SpeechLLM(config, ANSWERS, device)


@pytest.mark.usefixtures("installed")
def test_old_gpu_is_refused_for_flash_attention(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    config = settings(models, **llm(models / "llm", attention.FLASH, dtype="bfloat16"))
    with pytest.raises(UserError, match=r"compute capability 8\.0 or newer, and this one has 7\.5; set auto$"):
        attention.set_attention(load_llm(str(models / "llm"), "bfloat16", "meta"), config, "cuda")


def test_flash_attention_that_is_not_installed_is_refused(models: Path) -> None:
    config = settings(models, trainable="lora", **llm(models / "llm", attention.FLASH, dtype="bfloat16"))
    with pytest.raises(UserError, match=r"needs the package flash_attn, which is not installed; set auto$"):
        SpeechLLM(config, ANSWERS, "meta")


def test_family_without_an_implementation_is_refused(tmp_path: Path) -> None:
    path = make("gpt_oss", tmp_path)
    config = settings(tmp_path, trainable="lora", **llm(path, "sdpa"))
    with pytest.raises(ConfigError, match=r"sdpa is not supported by the gpt_oss model .*; set auto$"):
        SpeechLLM(config, ANSWERS, "meta")


def test_rows_are_packed_by_torch_alone(models: Path) -> None:
    config = settings(models, **llm(models / "llm", "eager"))
    assert not resolve_packing(config, "auto", "cpu")
    with pytest.raises(ConfigError, match=r"^train\.packing: on computes attention by itself, .* is eager; set it to"):
        resolve_packing(config, "on", "cpu")


def test_flash_attention_follows_padding_and_tries(
    models: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is here, so its kernel is replaced by its definition, which knows no mask of four dimensions."""
    masks = []

    def definition(
        layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: object
    ) -> tuple[Tensor, None]:
        masks.append(mask)
        width = query.shape[2]
        visible = torch.ones(width, key.shape[2], dtype=torch.bool).tril(key.shape[2] - width)[None, None]
        if mask is not None:
            assert mask.ndim == 2
            # The outputs of padding do not count, but a row without any key would have no number.
            visible = visible & mask.bool()[:, None, None] | ~mask[:, None, -width:, None].bool()
        heads = [heads.repeat_interleave(layer.num_key_value_groups, 1) for heads in (key, value)]
        output = nn.functional.scaled_dot_product_attention(query, *heads, attn_mask=visible, scale=scaling)
        return output.transpose(1, 2), None

    monkeypatch.setattr(attention, "flash_attention_forward", definition)
    monkeypatch.setattr(attention, "_check_flash_attention", lambda *_: None)
    monkeypatch.setattr(
        PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, **_: name or "sdpa"
    )
    flash = build(models, llm={"path": str(models / "llm"), "attention": attention.FLASH})
    assert attention_of(flash.llm) == attention.FLASH
    check_stages(["scores", "losses of votes", "losses of replies"], flash, examples)
    assert {mask is None for mask in masks} == {True, False}
