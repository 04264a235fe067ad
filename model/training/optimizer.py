"""AdamW with a learning rate for every part of the model, and its schedule."""

from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from model.config import TrainConfig
from model.parts import part_of
from model.speech_llm.speech_llm import SpeechLLM


def make_optimizer(model: SpeechLLM, config: TrainConfig) -> AdamW:
    """Return AdamW over all parameters that train, with one group for every learning rate of the configuration.

    It is fused: one pass over the memory, and only a fused optimizer can skip its step on the device, see
    `compat.skip_steps_if`.
    """
    groups: dict[float, list[Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = getattr(config.learning_rates, part_of(name), None) or config.learning_rate
            groups.setdefault(rate, []).append(parameter)
    return AdamW(
        [{"params": parameters, "lr": rate} for rate, parameters in groups.items()],
        weight_decay=config.weight_decay,
        fused=True,
    )


def make_schedule(optimizer: Optimizer, config: TrainConfig, steps: int) -> LRScheduler:
    """Return the schedule of the learning rates over a number of optimizer steps."""
    kind = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    schedule: LRScheduler = get_scheduler(kind, optimizer, round(config.warmup * steps), steps)
    return schedule
