"""Losses: what is minimised equals what one writes down for single unpadded examples."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM

from data.config import DataConfig, TaskWeights
from data.errors import DataError
from data.examples import Example
from data.shards import Shards
from data.tasks import answer_sets
from model.checkpoint import seed_everything
from model.config import LossConfig, TrainConfig
from model.evaluate import TrialData
from model.llm import load_llm
from model.losses import Losses, answer_losses, divergence
from model.prompt import IGNORE, Prompter
from model.speech_llm import SpeechLLM
from model.teacher import likeliest
from model.train import Trainer
from tests.model.common import ANSWERS, build, close, replies, settings

ALL = LossConfig(distillation=0.5, temperature=2.0, hidden=0.25)
BARE = {"modality": "text", "cls": "none", "end_of_audio": "none"}
FROZEN_LLM = {"trainable": "adapter+tokens", "lora": {"enabled": False}}


def mixed(examples: list[Example]) -> list[Example]:
    """Labels and texts in one batch."""
    return [*examples[::2], *replies(examples[1::2])]


def student_rows(model: SpeechLLM, example: Example) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, last hidden states and targets where the model predicts a token of the answer."""
    (prompt,) = model.prompts([example])
    answer = model.answer(example)
    sequence = torch.cat([prompt, model.embed(answer.inputs)])
    hidden = model.llm.base_model.model.model(inputs_embeds=sequence[None], use_cache=False).last_hidden_state[0]
    places = [place for place, target in enumerate(answer.targets) if target != IGNORE]
    rows = hidden[[len(prompt) - 1 + place for place in places]]
    return model.llm.get_output_embeddings()(rows), rows, torch.tensor([answer.targets[place] for place in places])


def teacher_rows(model: SpeechLLM, example: Example) -> tuple[Tensor, Tensor]:
    """Logits and last hidden states of the LLM as it was published, reading token ids of words alone."""
    prompter = Prompter(model.prompter.vocabulary, model.config.model_copy(update=BARE))
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
    assert found.parts().keys() == {"next_token"}
    assert torch.equal(found.weighted(LossConfig(next_token=0.3)), 0.3 * found.next_token_B)


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
    ids_PK, log_probs_PK = likeliest(taught, temperature)
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
    ids_PK, log_probs_PK = likeliest(taught, 1.0)
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
    assert close(found.weighted(ALL), expected, 1e-6)
    assert found.parts().keys() == {"next_token", "distillation", "hidden"}


@torch.no_grad()
def test_no_loss_depends_on_the_batch(models: Path, examples: list[Example]) -> None:
    model, asked = build(models), mixed(examples)
    together = answer_losses(model, asked, ALL).parts()
    alone = [answer_losses(model, [example], ALL).parts() for example in asked]
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
    cut = replace(example, turns=example.turns[1:], heard=len(example.turns) - 2)
    tokens = sum(token >= 0 for token in roomy.prompter.prompt(cut).ids)
    tight = build(models, **speech, llm={"path": str(models / "llm"), "max_text_tokens": tokens})
    assert tight.prompter.prompt(example).dropped_turns == 1
    config = LossConfig(next_token=0, distillation=1)
    found, expected = (answer_losses(*pair, config) for pair in ((tight, [example]), (roomy, [cut])))
    assert found.distillation_B is not None
    assert expected.distillation_B is not None
    assert close(found.distillation_B, expected.distillation_B)


def counted(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[Any]:
    """A list that grows with every call of a module's forward."""
    calls: list[Any] = []
    original = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    return calls


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
        answer_losses(model, examples, ALL).weighted(ALL).sum().backward()
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


def gradients(model: SpeechLLM, losses: Losses, config: LossConfig) -> dict[str, Tensor]:
    model.zero_grad()
    losses.weighted(config).sum().backward()
    return {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.grad is not None}


@pytest.mark.parametrize(
    "changed",
    [{}, FROZEN_LLM, {"trainable": "adapter+lora+tokens+llm"}, {"trainable": "encoder+adapter+lora+tokens"}],
    ids=["lora", "frozen-llm", "llm", "encoder"],
)
def test_gradient_checkpointing_changes_memory_only(
    changed: dict[str, Any], models: Path, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Activations are computed again in the backward pass, also through an LLM that is frozen."""
    llm = {"path": str(models / "llm")}
    calls = counted(monkeypatch, LlamaAttention)
    found = []
    for checkpointing in (False, True):
        own = build(models, "whisper", llm=llm | {"gradient_checkpointing": checkpointing}, **changed).train()
        calls.clear()
        losses = answer_losses(own, mixed(examples), LossConfig())
        assert len(calls) == 2
        found.append((losses.next_token_B.detach(), gradients(own, losses, LossConfig())))
        assert len(calls) == (4 if checkpointing else 2)
    (one, gradient), (other, again) = found
    assert close(one, other, 1e-6)
    assert gradient.keys() == again.keys()
    scale = max(tensor.abs().max() for tensor in gradient.values())
    assert all((tensor - again[name]).abs().max() <= 1e-6 * scale for name, tensor in gradient.items())


def test_gradient_checkpointing_is_for_training(models: Path, examples: list[Example]) -> None:
    llm = {"path": str(models / "llm"), "gradient_checkpointing": True}
    with torch.no_grad():
        one = answer_losses(build(models, llm=llm, **FROZEN_LLM).eval(), examples, ALL)
        other = answer_losses(build(models, **FROZEN_LLM).eval(), examples, ALL)
    assert close(one.weighted(ALL), other.weighted(ALL))


Setup = tuple[Trainer, list[int], list[Example]]


def trainer(models: Path, corpus: Shards, folder: Path, tasks: TaskWeights, **changed: Any) -> Setup:
    """One that is about to make a step over 12 items of all tasks."""
    seed_everything(0)
    model = SpeechLLM(settings(models, "whisper", trainable="adapter+lora+tokens"), answer_sets(corpus, tasks.active()))
    data = TrialData.open(corpus, model, DataConfig(history=2), ("train", "val"))
    config = TrainConfig(batch_size=12, max_grad_norm=1e9, **changed)
    made = Trainer(model, data, config, tasks, 0, folder)
    model.train()
    last = len(data.splits["train"].items) - 1
    step = [place * last // 11 for place in range(12)]
    return made, step, next(data.read("train", [step]))


def expected_objective(setup: Setup, weigh: Callable[[str], float]) -> Tensor:
    """Sum over tasks of weight x mean over tokens; each token counts as `weigh` says of its item's label."""
    made, _, examples = setup
    total = torch.zeros(())
    for task, weight in made.task_weights.items():
        nll, shares = [], []
        for example in (one for one in examples if one.task == task):
            logits, _, targets = student_rows(made.model, example)
            nll.append(F.cross_entropy(logits, targets, reduction="none"))
            shares.append(torch.full((len(targets),), weigh(example.answer)))
        total = total + weight * (torch.cat(nll) * torch.cat(shares)).mean()
    return total


def minimised(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> tuple[float, Tensor]:
    """The loss and the gradient of an optimizer step that is not made."""
    made, step, examples = setup
    found: list[float] = []
    monkeypatch.setattr(made, "_note", lambda noted: found.append(float(noted.total)))
    monkeypatch.setattr(made.optimizer, "zero_grad", lambda set_to_none: None)
    monkeypatch.setattr(made.optimizer, "step", lambda: None)
    made._optimizer_step(step, step, examples)
    return found[0], torch.cat([parameter.grad.flatten() for parameter in made.parameters])


def gradient_of(setup: Setup, objective: Tensor) -> Tensor:
    parameters = setup[0].parameters
    grads = torch.autograd.grad(objective, parameters, allow_unused=True)
    pairs = zip(parameters, grads, strict=True)
    return torch.cat([(torch.zeros_like(own) if grad is None else grad).flatten() for own, grad in pairs])


@pytest.mark.parametrize("budget", [1, 400, 10**6])
@pytest.mark.parametrize(
    "tasks",
    [
        TaskWeights(),
        TaskWeights(classify=2.0),
        TaskWeights(classify=2.0, response=0.5),
        TaskWeights(classify=0.3, forecast=1.0, response=1.5, quality=0.7),
    ],
    ids=["one", "weighted", "two", "four"],
)
def test_a_step_minimises_the_weighted_mean_of_each_task(
    tasks: TaskWeights, budget: int, models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = trainer(models, corpus, tmp_path, tasks, token_budget=budget)
    assert {example.task for example in setup[2]} == set(tasks.active())
    objective = expected_objective(setup, lambda label: 1.0)
    loss, gradient = minimised(setup, monkeypatch)
    assert loss == pytest.approx(objective.item(), rel=1e-5)
    assert close(gradient, gradient_of(setup, objective), 1e-4)


@pytest.mark.parametrize("tasks", [TaskWeights(), TaskWeights(classify=1.0, response=2.0)], ids=["one", "two"])
def test_balanced_classes_weigh_as_scikit_learn_has_it(
    tasks: TaskWeights, models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no part of the divisor, or they would cancel in a step of one item."""
    setup = trainer(models, corpus, tmp_path, tasks, class_weights="balanced")
    own = setup[0].data.splits["train"]
    truth = [answer for (task, _), answer in zip(own.items, own.answers, strict=True) if task == "classify"]
    names = np.unique(truth)
    weights = dict(zip(names, compute_class_weight("balanced", classes=names, y=truth), strict=True))
    assert len(set(weights.values())) > 1
    objective = expected_objective(setup, lambda label: float(weights.get(label, 1.0)))
    loss, gradient = minimised(setup, monkeypatch)
    assert loss == pytest.approx(objective.item(), rel=1e-5)
    assert close(gradient, gradient_of(setup, objective), 1e-4)
    plain = expected_objective(setup, lambda label: 1.0)
    assert abs(plain.item() - loss) > 1e-4


def test_auxiliary_losses_are_part_of_the_step(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = trainer(models, corpus, tmp_path, TaskWeights(), losses=ALL)
    made, _, examples = setup
    losses = answer_losses(made.model, examples, ALL)
    loss, gradient = minimised(setup, monkeypatch)
    objective = losses.weighted(ALL).sum() / sum(losses.count_B)
    assert loss == pytest.approx(objective.item(), rel=1e-5)
    assert close(gradient, gradient_of(setup, objective), 1e-4)


def test_a_transcript_beyond_the_teachers_reach_is_told_before_training(models: Path, corpus: Shards) -> None:
    """The words of the heard turn are read by the teacher alone."""
    model = SpeechLLM(settings(models, modality="speech"), answer_sets(corpus, ["classify"]), "meta")
    plain = TrialData.open(corpus, model, DataConfig(history=2), ("train",))
    taught = TrialData.open(corpus, model, DataConfig(history=2), ("train",), teacher=True)
    assert taught.splits["train"].costs == plain.splits["train"].costs  # it reads one example at a time, or has read it
    model.reach = 20
    with pytest.raises(DataError, match=r"utterance c\d+/\d+: .* reads 20 at once"):
        TrialData.open(corpus, model, DataConfig(history=2), ("train",), teacher=True)
