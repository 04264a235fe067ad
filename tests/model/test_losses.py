"""Losses equal explicit formulas over single unpadded examples."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from data.loading.examples import Example
from model.config import LossConfig
from model.objectives.losses import answer_losses, divergence
from model.objectives.teacher import top_log_probs
from model.speech_llm.language_model import load_llm
from model.speech_llm.prompt import PromptBuilder
from model.speech_llm.speech_llm import SpeechLLM
from tests.model.common import ANSWERS, build, close, settings
from tests.model.losses import ALL, counted, mixed, student_rows

BARE = {"modality": "text", "cls": "none", "end_of_audio": "none"}


def teacher_rows(model: SpeechLLM, example: Example) -> tuple[Tensor, Tensor]:
    """Return logits and last hidden states of the published LLM reading token ids of text alone."""
    prompts = PromptBuilder(model.prompt_builder.tokenizer, model.config.model_copy(update=BARE))
    prompt, answer = prompts.prompt(example).ids, prompts.answer(example.answer)
    llm = AutoModelForCausalLM.from_pretrained(model.config.llm.path).eval()
    with torch.no_grad():
        hidden = llm.model(input_ids=torch.tensor([[*prompt, *answer.inputs]]), use_cache=False).last_hidden_state[0]
        rows = hidden[len(prompt) - 1 :]
        return llm.lm_head(rows), rows


def merged(log_probs: Tensor, top: Tensor) -> Tensor:
    """Return the probabilities of the likeliest tokens, and of all other tokens together."""
    others = torch.ones_like(log_probs).scatter(-1, top, 0.0)
    probabilities = log_probs.double().exp()
    return torch.cat([probabilities.gather(-1, top), (probabilities * others).sum(-1, keepdim=True)], dim=-1)


def divergences(teacher: Tensor, student: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the divergence summed over tokens: over the teacher's 64 likeliest tokens and the rest, and over all."""
    p, q = ((logits.double() / temperature).log_softmax(-1) for logits in (teacher, student))
    whole = (p.exp() * (p - q)).sum() * temperature**2
    top = p.argsort(-1, descending=True)[:, :64]
    if p.shape[-1] <= 64:
        return whole.float(), whole.float()
    p, q = merged(p, top), merged(q, top)
    return ((p * (p.log() - q.log())).sum() * temperature**2).float(), whole.float()


@pytest.mark.parametrize(
    ("changed", "temperature"),
    [
        ({"cls": "none"}, 1.0),
        ({"cls": "after"}, 2.0),
        ({"cls": "before", "modality": "speech"}, 2.0),
        ({"cls": "before", "modality": "text"}, 1.0),
    ],
)
@torch.no_grad()
def test_losses_equal_those_of_single_unpadded_examples(
    changed: dict[str, str], temperature: float, models: Path, examples: list[Example]
) -> None:
    """The next token, distillation from the LLM that reads the transcript, and hidden states."""
    model, batch = build(models, **changed), mixed(examples)
    config = LossConfig(distillation=1.0, temperature=temperature, hidden=1.0)
    losses = answer_losses(model, batch, config)
    for row, example in enumerate(batch):
        logits, hidden, targets = student_rows(model, example)
        assert close(losses.next_token_B[row], F.cross_entropy(logits, targets, reduction="sum"))
        assert losses.count_B[row] == len(targets)
        teacher, teacher_hidden = teacher_rows(model, example)
        expected, whole = divergences(teacher, logits, temperature)
        assert close(losses.distillation_B[row], expected, 1e-4)
        assert expected < whole
        distance = (hidden - teacher_hidden).square().mean(-1).sum()
        assert close(losses.hidden_B[row], distance, 1e-4)
        assert min(expected, distance) > 1e-3
    alone = answer_losses(model, batch, LossConfig())
    assert alone.by_name().keys() == {"next_token"}
    assert torch.equal(alone.weighted_sum(LossConfig(next_token=0.3)), 0.3 * losses.next_token_B)
    assert losses.by_name().keys() == {"next_token", "distillation", "hidden"}
    total = losses.next_token_B + 0.5 * losses.distillation_B + 0.25 * losses.hidden_B
    assert close(losses.weighted_sum(ALL), total, 1e-6)


@torch.no_grad()
def test_lm_head_computes_predicted_positions_only(models: Path, examples: list[Example]) -> None:
    model, computed = build(models), []
    model.llm.get_output_embeddings().register_forward_hook(lambda _, args, logits: computed.append(logits.shape[:-1]))
    losses = answer_losses(model, mixed(examples), LossConfig())
    assert computed == [(sum(losses.count_B),)]
    assert len(set(losses.count_B)) > 1


@pytest.mark.parametrize("vocabulary", [5, 64, 65, 300])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_divergence_over_the_likeliest_is_a_lower_bound(vocabulary: int, temperature: float) -> None:
    """It is exact without other tokens or with others in proportion, and so is its gradient."""
    teacher, logits = (3 * torch.randn(40, vocabulary, generator=torch.manual_seed(seed)) for seed in (0, 1))
    logits.requires_grad_()
    ids_PK, log_probs_PK = top_log_probs(teacher, temperature)
    assert ids_PK.shape == (40, min(64, vocabulary))
    assert log_probs_PK.exp().sum(-1).allclose(torch.ones(40))
    value = divergence(logits / temperature, ids_PK, log_probs_PK).sum() * temperature**2
    expected, whole = divergences(teacher, logits, temperature)
    assert close(value, expected, 1e-5)
    assert (value < 0.9999 * whole) == (vocabulary > 65)  # one other token alone is in proportion
    (gradient,), (wanted,) = (torch.autograd.grad(loss, logits, retain_graph=True) for loss in (value, expected))
    assert close(gradient, wanted, 1e-4)
    assert close(divergence(teacher / temperature, ids_PK, log_probs_PK) + 1, torch.ones(40), 1e-6)
    shifted = teacher.clone()
    shifted.scatter_(-1, ids_PK.long(), torch.randn(ids_PK.shape, generator=torch.manual_seed(2)))
    value = divergence(shifted / temperature, ids_PK, log_probs_PK).sum() * temperature**2
    assert close(value, divergences(teacher, shifted, temperature)[1], 1e-4)


def test_probability_of_other_tokens_is_exact_however_small() -> None:
    """1 minus the sum of the rest would be 0 or less."""
    teacher = torch.cat([torch.zeros(1, 64), torch.full((1, 36), -40.0)], dim=-1)
    ids_PK, log_probs_PK = top_log_probs(teacher, 1.0)
    assert log_probs_PK[0, -1].item() == pytest.approx(-40 + np.log(36) - np.log(64), abs=1e-5)
    student = torch.cat([torch.zeros(1, 64), torch.full((1, 36), -90.0)], dim=-1).requires_grad_()
    divergence(student, ids_PK, log_probs_PK).sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_student_equal_to_its_teacher_learns_nothing(models: Path, examples: list[Example]) -> None:
    """LoRA starts with an update of zero."""
    model = SpeechLLM(settings(models, trainable="lora", **BARE), ANSWERS).eval()
    losses = answer_losses(model, mixed(examples), ALL)
    assert losses.distillation_B.abs().max() < 1e-5
    assert losses.hidden_B.abs().max() < 1e-9
    (ALL.distillation * losses.distillation_B + ALL.hidden * losses.hidden_B).sum().backward()
    assert all(p.grad.abs().max() < 1e-5 for p in model.parameters() if p.requires_grad and p.grad is not None)
    moved = answer_losses(build(models, trainable="lora", **BARE), mixed(examples), ALL)
    assert min(moved.distillation_B.min(), moved.hidden_B.min()) > 1e-3


@torch.no_grad()
def test_losses_do_not_depend_on_the_batch(models: Path, examples: list[Example]) -> None:
    model, batch = build(models), mixed(examples)
    together = answer_losses(model, batch, ALL).by_name()
    alone = [answer_losses(model, [example], ALL).by_name() for example in batch]
    for name, values_B in together.items():
        assert close(torch.cat([losses[name] for losses in alone]), values_B)


@torch.no_grad()
def test_teacher_reads_text_and_no_audio(models: Path, examples: list[Example]) -> None:
    """The teacher's logits are the same for any clip, so only the student's audio can move the divergence."""
    silent = [replace(example, pcm=np.zeros_like(example.pcm)) for example in examples]
    for changed, equal in (({**BARE, "trainable": "lora"}, True), ({}, False)):
        model = build(models, **changed)
        heard, unheard = (
            answer_losses(model, batch, LossConfig(distillation=1.0)).distillation_B for batch in (examples, silent)
        )
        assert torch.equal(heard, unheard) if equal else not close(heard, unheard, 1e-3)


def test_teacher_reads_the_turns_of_the_student(models: Path, examples: list[Example]) -> None:
    """The text of the audio turn is beyond the student's limit, which neither drops a turn nor is an error."""
    example = next(example for example in examples if len(example.turns) > 2)
    speech = {"modality": "speech", "cls": "none", "end_of_audio": "none"}
    roomy = build(models, **speech)
    cut = replace(example, turns=example.turns[1:], audio_turn=len(example.turns) - 2)
    tokens = sum(token >= 0 for token in roomy.prompt_builder.prompt(cut).ids)
    tight = build(models, **speech, llm={"path": str(models / "llm"), "max_text_tokens": tokens})
    assert tight.prompt_builder.prompt(example).dropped_turns == 1
    config = LossConfig(next_token=0, distillation=1)
    losses, expected = (answer_losses(*pair, config) for pair in ((tight, [example]), (roomy, [cut])))
    assert close(losses.distillation_B, expected.distillation_B)


@pytest.mark.parametrize(
    ("config", "passes"),
    [
        (LossConfig(), 1),
        (LossConfig(distillation=0.0, hidden=0.0, temperature=3.0), 1),
        (LossConfig(distillation=0.1), 4),
        (LossConfig(hidden=0.1), 4),
    ],
)
def test_teacher_runs_only_for_losses_that_need_it(
    config: LossConfig, passes: int, models: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads one example at a time, so its output does not depend on the batch."""
    model = build(models)
    calls = counted(monkeypatch, LlamaForCausalLM)
    losses = answer_losses(model, examples[:3], config)
    assert len(calls) == passes
    assert (losses.distillation_B is None) == (config.distillation == 0)
    assert (losses.hidden_B is None) == (config.hidden == 0)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_teacher_is_the_llm_that_is_loaded_already(
    device: str, models: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever torch calls its device."""
    model = SpeechLLM(settings(models), ANSWERS, device)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded again"))
    assert answer_losses(model, examples[:2], ALL).distillation_B is not None


@pytest.mark.parametrize("trainable", ["adapter+lora+tokens", "adapter+lora+tokens+llm"])
def test_teacher_gets_no_gradient_and_does_not_change(trainable: str, models: Path, examples: list[Example]) -> None:
    base = load_llm(str(models / "llm"), "float32", "cpu")
    versions = [tensor._version for tensor in base.parameters()]
    model = build(models, trainable=trainable).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = teacher_rows(model, examples[0])[0]
    answer_losses(model, examples[:4], ALL).weighted_sum(ALL).sum().backward()
    optimizer.step()
    assert [tensor._version for tensor in base.parameters()] == versions
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in base.parameters())
    assert not any(module.training for module in base.modules())
    assert torch.equal(teacher_rows(model, examples[0])[0], before)
    model.eval()
    with torch.no_grad():
        losses = answer_losses(model, examples[:1], LossConfig(distillation=1.0))
        expected, _ = divergences(before, student_rows(model, examples[0])[0], 1.0)
    assert close(losses.distillation_B[0], expected, 1e-4)
