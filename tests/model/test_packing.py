"""Packed rows: which LLMs compute them, how they are cut, and the kernel of a GPU by its reference.

That packed examples equal unpacked ones is in `test_invariance.py`.
"""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen
from torch import Tensor, nn

from data.errors import ConfigError
from data.loading.batching import Cost
from model.evaluation.llm_check import resolve_packing
from model.speech_llm import packing
from model.speech_llm.packing import pack, packed_attention, set_packing
from tests.model.common import build, close, settings
from tests.model.families import make


@pytest.mark.parametrize(("family", "packs"), [("llama", True), ("gpt_oss", False)])
def test_family_that_cannot_pack_is_found_by_computation(family: str, packs: bool, tmp_path: Path) -> None:
    """Sinks of attention are unknown to the attention of packed rows."""
    llm = {"path": str(make(family, tmp_path))}
    config = settings(tmp_path, modality="text", trainable="lora", end_of_audio="none", llm=llm)
    assert not any(resolve_packing(config, packing, "cpu") for packing in ("auto", "off"))
    if packs:
        assert resolve_packing(config, "on", "cpu")
    else:
        with pytest.raises(ConfigError, match=r"^train\.packing: on needs .* the gpt_oss model .* does not; .*=auto$"):
            resolve_packing(config, "on", "cpu")


def test_micro_batches_are_packed_or_padded(models: Path) -> None:
    """Rows are cut by the sum of their costs, and padded batches by the longest, with little padding."""
    model, costs = build(models), [Cost(700), Cost(40, 30), Cost(700), Cost(650)]
    assert model.micro_batches(costs, 10**6) == [[1], [3], [0, 2]]
    assert model.count_computed(costs[:2]) == 2 * (700 + 30)
    set_packing(model.llm, packs=True)
    assert model.micro_batches(costs, 10**6) == [[1, 3, 0, 2]]
    assert model.micro_batches(costs, 1400) == [[1, 3], [0, 2]]
    assert model.micro_batches(costs, 10**6, pads=True) == [[1], [3], [0, 2]]
    assert model.count_computed(costs[:2]) == 700 + 40 + 30


def test_flash_attention_is_given_the_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is here, so its kernel is replaced by its definition."""
    kernel = inspect.signature(torch.nn.attention.varlen.varlen_attn)

    def varlen_attn(*arguments: Any, **options: Any) -> Tensor:
        given = kernel.bind(*arguments, **options).arguments
        assert given["window_size"] == (-1, 0)
        assert given["max_q"] == given["max_k"] == 5
        assert torch.equal(given["cu_seq_q"], given["cu_seq_k"])
        sizes = given["cu_seq_q"].diff().tolist()
        parts = zip(*(given[name].transpose(0, 1).split(sizes, 1) for name in ("query", "key", "value")), strict=True)
        scale, grouped = given["scale"], given["enable_gqa"]
        attend = nn.functional.scaled_dot_product_attention
        outputs = [attend(*part, is_causal=True, scale=scale, enable_gqa=grouped) for part in parts]
        return torch.cat(outputs, dim=1).transpose(0, 1)

    torch.manual_seed(0)
    heads = [torch.randn(1, count, 9, 8) for count in (4, 2, 2)]
    row = pack([torch.zeros(length, 1) for length in (3, 5, 1)]).row
    layer = nn.Module()
    layer.num_key_value_groups = 2
    expected, _ = packed_attention(layer, *heads, None, packed=row, scaling=0.3)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(packing, "flash_dtype", lambda query: torch.float32)
    bounds = torch.tensor([0, 3, 8, 9], dtype=torch.int32)
    found, _ = packed_attention(layer, *heads, None, packed=packing.Row(row.lengths, None, bounds), scaling=0.3)
    assert close(found, expected)
