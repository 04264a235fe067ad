"""The private APIs of dependencies in `model/compat.py` still exist and do what they are used for."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import (
    HubertConfig,
    HubertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    WavLMConfig,
    WavLMModel,
)

from model.compat import attention_of, freeze_feature_encoder, lora_parameter_names, skip_steps_if
from tests.tiny_models import SMALL

# Names are listed once; the compiler is deferred, loaded whole by its first use, and knows what was marked before.
DEFERRED = """
import random, sys
import model, torch, transformers
from transformers.utils import import_utils
fetch, read = import_utils.fetch__all__, []
import_utils.fetch__all__ = lambda text: read.append(text) or fetch(text)
from transformers import masking_utils
from transformers.integrations import deepgemm, finegrained_fp8
assert len(read) < 100  # of 1,600 files
import peft
assert "bitsandbytes" not in sys.modules  # one that cannot be imported lies in this folder
from rouge_score.rouge_scorer import RougeScorer
assert RougeScorer(["rougeL"], use_stemmer=True).score("asks well", "asking well")["rougeL"].fmeasure == 1
assert not {"scipy", "sklearn"} & set(sys.modules)
from scipy.stats import norm  # may be imported afterwards
stand_in = sys.modules["torch._dynamo"]
called = []
left_alone = torch.compiler.disable(lambda x: called.append(x) or x + 1)
assert left_alone(1) == 2 and torch._dynamo.graph_break() is None
assert not isinstance(torch.nn.Identity(), torch._dynamo.eval_frame.OptimizedModule)  # asked when a model is saved
assert stand_in.real is None and "torch._dynamo.eval_frame" not in sys.modules
random.seed(0); drawn = random.random(); random.seed(0)
from torch._dynamo.eval_frame import OptimizedModule
assert random.random() == drawn
assert type(masking_utils.TransformGetItemToIndex()).__module__ == "torch._dynamo._trace_wrapped_higher_order_op"
assert stand_in.real is sys.modules["torch._dynamo"] is torch._dynamo
assert torch._dynamo.eval_frame is sys.modules["torch._dynamo.eval_frame"]
assert torch._dynamo.config.__spec__.name == "torch._dynamo.config"
assert deepgemm.is_sm100._dynamo_marked_constant
assert id(finegrained_fp8._load_finegrained_fp8_kernel) in torch._dynamo.trace_rules._allowed_callable_ids
graphs = []
compiled = torch.compile(lambda x: left_alone(x * 2) * 3, backend=lambda graph, _: graphs.append(graph) or graph)
assert compiled(torch.ones(1)).item() == 9 and len(graphs) == 2, graphs  # a graph ends where a function is left alone
"""
TINY = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)


def test_attention_is_what_was_set() -> None:
    llm = LlamaForCausalLM(TINY)
    llm.set_attn_implementation("eager")
    assert attention_of(llm) == "eager"


def test_freeze_feature_encoder_leaves_the_autograd_graph() -> None:
    kinds: list[tuple[type[PreTrainedModel], type]] = [(HubertModel, HubertConfig), (WavLMModel, WavLMConfig)]
    for model, config in kinds:
        convolutions = model(config(**SMALL, conv_dim=(8,) * 7)).train().feature_extractor
        assert convolutions(torch.zeros(1, 400)).requires_grad
        freeze_feature_encoder(convolutions)
        assert not convolutions(torch.zeros(1, 400)).requires_grad


@pytest.mark.parametrize("dora", [False, True])
def test_lora_parameter_names_invert_those_of_peft(dora: bool) -> None:
    model = get_peft_model(LlamaForCausalLM(TINY), LoraConfig(r=2, target_modules=["q_proj"], use_dora=dora))
    names = {name for name, _ in model.named_parameters() if "lora_" in name}
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert lora_parameter_names(saved).keys() == names
    assert len(names) == 2 + dora


def test_fused_optimizer_skips_steps_if_flag_is_set() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, flag = torch.optim.AdamW([parameter], lr=0.1, fused=True), torch.zeros(())
    skip_steps_if(flag, optimizer)
    parameter.grad = torch.ones(3)
    for value, moves in ((1.0, False), (0.0, True)):
        flag.fill_(value)
        before = parameter.detach().clone()
        optimizer.step()
        assert torch.equal(parameter, before) is not moves


def test_deferred_compiler_is_loaded_whole_by_its_first_use(tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise OSError('imported')")
    ran = subprocess.run([sys.executable, "-c", DEFERRED], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
