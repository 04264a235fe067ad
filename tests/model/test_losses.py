"""Losses: what is minimised equals what one writes down for single unpadded examples."""

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
    """Logits and last hidden states of the LLM as it was published, reading token ids of words alone."""
    prompter = PromptBuilder(model.prompt_builder.tokenizer, model.config.model_copy(update=BARE))
    prompt, answer = prompter.prompt(example).ids, prompter.answer(example.answer)
    llm = AutoModelForCausalLM.from_pretrained(model.config.llm.path).eval()
    with torch.no_grad():
        hidden = llm.model(input_ids=torch.tensor([[*prompt, *answer.inputs]]), use_cache=False).last_hidden_state[0]
        rows = hidden[len(prompt) - 1 :]
        return llm.lm_head(rows), rows


@pytest.mark.parametrize("cls", ["none", "before", "after"])
@pytest.mark.parametrize("modality", ["text", "speech", "text+speech"])
@torch.no_grad()
def test_the_next_token_loss_is_the_sum_over_the_answer(
    modality: str, cls: str, models: Path, examples: list[Example]
) -> None:
    model = build(models, modality=modality, cls=cls)
    asked = mixed(examples)
    found = answer_losses(model, asked, LossConfig())
    for row, example in enumerate(asked):
        logits, _, targets = student_rows(model, example)
        assert close(found.next_token_B[row], F.cross_entropy(logits, targets, reduction="sum"))
        assert found.count_B[row] == len(targets)
    assert found.by_name().keys() == {"next_token"}
    assert torch.equal(found.weighted_sum(LossConfig(next_token=0.3)), 0.3 * found.next_token_B)


@torch.no_grad()
def test_the_lm_head_computes_the_predicted_positions_alone(models: Path, examples: list[Example]) -> None:
    model, computed = build(models), []
    model.llm.get_output_embeddings().register_forward_hook(lambda _, given, logits: computed.append(logits.shape[:-1]))
    found = answer_losses(model, mixed(examples), LossConfig())
    assert computed == [(sum(found.count_B),)]
    assert len(set(found.count_B)) > 1


def merged(log_probs: Tensor, likeliest: Tensor) -> Tensor:
    """Probabilities of the likeliest tokens, and of all others together."""
    others = torch.ones_like(log_probs).scatter(-1, likeliest, 0.0)
    probabilities = log_probs.double().exp()
    return torch.cat([probabilities.gather(-1, likeliest), (probabilities * others).sum(-1, keepdim=True)], dim=-1)


def divergences(taught: Tensor, logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of a student from a teacher, summed over tokens: over its 64 likeliest tokens and the rest, and over all."""
    p, q = ((rows.double() / temperature).log_softmax(-1) for rows in (taught, logits))
    whole = (p.exp() * (p - q)).sum() * temperature**2
    likeliest = p.argsort(-1, descending=True)[:, :64]
    if p.shape[-1] <= 64:
        return whole.float(), whole.float()
    p, q = merged(p, likeliest), merged(q, likeliest)
    return ((p * (p.log() - q.log())).sum() * temperature**2).float(), whole.float()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("changed", [{"cls": "none"}, {"cls": "after"}, {"cls": "before", "modality": "speech"}])
@torch.no_grad()
def test_distillation_is_the_divergence_from_the_llm_that_reads_the_transcript(
    changed: dict[str, str], temperature: float, models: Path, examples: list[Example]
) -> None:
    model = build(models, **changed)
    asked = mixed(examples)
    found = answer_losses(model, asked, LossConfig(distillation=1.0, temperature=temperature, hidden=1.0))
    for row, example in enumerate(asked):
        logits, hidden, _ = student_rows(model, example)
        taught, taught_hidden = teacher_rows(model, example)
        expected, whole = divergences(taught, logits, temperature)
        assert close(found.distillation_B[row], expected, 1e-4)
        assert expected < whole
        distance = (hidden - taught_hidden).square().mean(-1).sum()
        assert close(found.hidden_B[row], distance, 1e-4)
        assert min(expected, distance) > 1e-3


@pytest.mark.parametrize("vocabulary", [5, 64, 65, 300])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_divergence_over_the_likeliest_is_a_lower_bound(vocabulary: int, temperature: float) -> None:
    """And all of it where there are no others, or where they are in proportion; so is its gradient."""
    taught, logits = (3 * torch.randn(40, vocabulary, generator=torch.manual_seed(seed)) for seed in (0, 1))
    logits.requires_grad_()
    ids_PK, log_probs_PK = top_log_probs(taught, temperature)
    assert ids_PK.shape == (40, min(64, vocabulary))
    assert log_probs_PK.exp().sum(-1).allclose(torch.ones(40))
    found = divergence(logits / temperature, ids_PK, log_probs_PK).sum() * temperature**2
    expected, whole = divergences(taught, logits, temperature)
    assert close(found, expected, 1e-5)
    assert (found < 0.9999 * whole) == (vocabulary > 65)  # one other alone is in proportion
    (gradient,), (wanted,) = (torch.autograd.grad(value, logits, retain_graph=True) for value in (found, expected))
    assert close(gradient, wanted, 1e-4)
    assert close(divergence(taught / temperature, ids_PK, log_probs_PK) + 1, torch.ones(40), 1e-6)
    shifted = taught.clone()
    shifted.scatter_(-1, ids_PK.long(), torch.randn(ids_PK.shape, generator=torch.manual_seed(2)))
    own = divergence(shifted / temperature, ids_PK, log_probs_PK).sum() * temperature**2
    assert close(own, divergences(taught, shifted, temperature)[1], 1e-4)


def test_what_is_left_for_others_is_exact_however_small() -> None:
    """In place of 1 minus the sum of the rest, which would be 0 or less."""
    taught = torch.cat([torch.zeros(1, 64), torch.full((1, 36), -40.0)], dim=-1)
    ids_PK, log_probs_PK = top_log_probs(taught, 1.0)
    assert log_probs_PK[0, -1].item() == pytest.approx(-40 + np.log(36) - np.log(64), abs=1e-5)
    student = torch.cat([torch.zeros(1, 64), torch.full((1, 36), -90.0)], dim=-1).requires_grad_()
    divergence(student, ids_PK, log_probs_PK).sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_student_that_is_the_teacher_has_nothing_to_learn(models: Path, examples: list[Example]) -> None:
    """As LoRA starts: with an update of zero."""
    model = SpeechLLM(settings(models, trainable="lora", **BARE), ANSWERS).eval()
    asked = mixed(examples)
    found = answer_losses(model, asked, ALL)
    assert found.distillation_B.abs().max() < 1e-5
    assert found.hidden_B.abs().max() < 1e-9
    (ALL.distillation * found.distillation_B + ALL.hidden * found.hidden_B).sum().backward()
    assert all(p.grad.abs().max() < 1e-5 for p in model.parameters() if p.requires_grad and p.grad is not None)
    moved = answer_losses(build(models, trainable="lora", **BARE), asked, ALL)
    assert moved.distillation_B.min() > 1e-3
    assert moved.hidden_B.min() > 1e-3


@torch.no_grad()
def test_the_weighted_sum_is_over_all_losses(models: Path, examples: list[Example]) -> None:
    found = answer_losses(build(models), examples, ALL)
    expected = found.next_token_B + 0.5 * found.distillation_B + 0.25 * found.hidden_B
    assert close(found.weighted_sum(ALL), expected, 1e-6)
    assert found.by_name().keys() == {"next_token", "distillation", "hidden"}


@torch.no_grad()
def test_no_loss_depends_on_the_batch(models: Path, examples: list[Example]) -> None:
    model, asked = build(models), mixed(examples)
    together = answer_losses(model, asked, ALL).by_name()
    alone = [answer_losses(model, [example], ALL).by_name() for example in asked]
    for name, values_B in together.items():
        assert close(torch.cat([parts[name] for parts in alone]), values_B)


@torch.no_grad()
def test_the_teacher_reads_the_words_and_not_the_sound(models: Path, examples: list[Example]) -> None:
    """Its logits are the same for any clip, so what the student hears is all that can move the divergence."""
    config = LossConfig(distillation=1.0)
    deaf = build(models, **BARE, trainable="lora")
    silent = [replace(example, pcm=np.zeros_like(example.pcm)) for example in examples]
    one, other = (answer_losses(deaf, asked, config).distillation_B for asked in (examples, silent))
    assert torch.equal(one, other)
    hearing = build(models)
    one, other = (answer_losses(hearing, asked, config).distillation_B for asked in (examples, silent))
    assert not close(one, other, 1e-3)


def test_the_teacher_reads_the_turns_of_the_student(models: Path, examples: list[Example]) -> None:
    """The words of the heard turn are beyond the student's limit, and no reason to drop a turn or to stop."""
    example = next(example for example in examples if len(example.turns) > 2)
    speech = {"modality": "speech", "cls": "none", "end_of_audio": "none"}
    roomy = build(models, **speech)
    cut = replace(example, turns=example.turns[1:], audio_turn=len(example.turns) - 2)
    tokens = sum(token >= 0 for token in roomy.prompt_builder.prompt(cut).ids)
    tight = build(models, **speech, llm={"path": str(models / "llm"), "max_text_tokens": tokens})
    assert tight.prompt_builder.prompt(example).dropped_turns == 1
    config = LossConfig(next_token=0, distillation=1)
    found, expected = (answer_losses(*pair, config) for pair in ((tight, [example]), (roomy, [cut])))
    assert found.distillation_B is not None
    assert expected.distillation_B is not None
    assert close(found.distillation_B, expected.distillation_B)


@pytest.mark.parametrize(
    ("config", "passes"),
    [
        (LossConfig(), 1),
        (LossConfig(distillation=0.0, hidden=0.0, temperature=3.0), 1),
        (LossConfig(distillation=0.1), 4),
        (LossConfig(hidden=0.1), 4),
        (ALL, 4),
    ],
)
def test_the_teacher_reads_only_where_it_is_asked(
    config: LossConfig, passes: int, models: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One example at a time, so that what it says does not depend on the others."""
    model = build(models)
    calls = counted(monkeypatch, LlamaForCausalLM)
    found = answer_losses(model, examples[:3], config)
    assert len(calls) == passes
    assert (found.distillation_B is None) == (config.distillation == 0)
    assert (found.hidden_B is None) == (config.hidden == 0)


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_the_teacher_is_the_llm_that_is_loaded_already(
    device: str, models: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever torch calls its device."""
    model = SpeechLLM(settings(models), ANSWERS, device)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded again"))
    assert answer_losses(model, examples[:2], ALL).distillation_B is not None


@pytest.mark.parametrize("trainable", ["adapter+lora+tokens", "adapter+lora+tokens+llm"])
def test_the_teacher_gets_no_gradient_and_stays_as_it_was(
    trainable: str, models: Path, examples: list[Example]
) -> None:
    base = load_llm(str(models / "llm"), "float32", "cpu")
    versions = [tensor._version for tensor in base.parameters()]
    model = build(models, trainable=trainable).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    taught = teacher_rows(model, examples[0])[0]
    for _ in range(2):
        answer_losses(model, examples, ALL).weighted_sum(ALL).sum().backward()
        optimizer.step()
    assert [tensor._version for tensor in base.parameters()] == versions
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in base.parameters())
    assert not any(module.training for module in base.modules())
    assert torch.equal(teacher_rows(model, examples[0])[0], taught)
    model.eval()
    with torch.no_grad():
        found = answer_losses(model, examples[:1], LossConfig(distillation=1.0)).distillation_B
        expected, _ = divergences(taught, student_rows(model, examples[0])[0], 1.0)
    assert close(found[0], expected, 1e-4)
