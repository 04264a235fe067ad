"""Helpers of the tests of losses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from data.loading.examples import Example
from model.config import LossConfig
from model.speech_llm.prompt import IGNORE
from model.speech_llm.speech_llm import SpeechLLM
from tests.model.common import replies

ALL = LossConfig(distillation=0.5, temperature=2.0, hidden=0.25)


def mixed(examples: list[Example]) -> list[Example]:
    """Return examples with labels and with texts in one batch."""
    return [*examples[::2], *replies(examples[1::2])]


def student_rows(model: SpeechLLM, example: Example) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, last hidden states and targets where the model predicts a token of the answer."""
    (prompt,) = model.prompts([example])
    answer = model.answer(example)
    sequence = torch.cat([prompt, model.embed(answer.inputs)])
    hidden = model.llm.base_model.model.model(inputs_embeds=sequence[None], use_cache=False).last_hidden_state[0]
    steps = [step for step, target in enumerate(answer.targets) if target != IGNORE]
    rows = hidden[[len(prompt) - 1 + step for step in steps]]
    return model.llm.get_output_embeddings()(rows), rows, torch.tensor([answer.targets[step] for step in steps])


def counted(monkeypatch: pytest.MonkeyPatch, kind: type) -> list[Any]:
    """Return a list that grows with every call of a module's forward."""
    calls: list[Any] = []
    original = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    return calls
