"""AdamW with a learning rate for every part, and its schedule."""

from typing import Any

import torch
from transformers import get_scheduler

from model.config import TrainConfig
from model.parts import part_of
from model.speech_llm.speech_llm import SpeechLLM


def make_optimizer(model: SpeechLLM, config: TrainConfig) -> torch.optim.AdamW:
    """For all parameters that train: one group for every learning rate that the configuration tells apart.

    Fused: one pass over the memory, and the only kind that looks by itself, on the device, whether to make the step:
    it makes none where its `found_inf` is not 0.
    """
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = getattr(config.learning_rates, part_of(name), None)
            groups.setdefault(own or config.learning_rate, []).append(parameter)
    rates = [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]
    return torch.optim.AdamW(rates, weight_decay=config.weight_decay, fused=True)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Any:
    """The learning rate over a number of steps."""
    kind = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(kind, optimizer, round(config.warmup * steps), steps)
