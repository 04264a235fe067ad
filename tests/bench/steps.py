"""What each option costs: CPU time of an optimizer step of the demo's models, relative to the reference, in one run.

    python -m tests.bench steps

Variants are timed in turns, so that a change of the machine's load hits all of them; the median over the rounds counts.
"""

import statistics
import tempfile
import time
from pathlib import Path

from data.loading.batching import plan
from model.training.random_state import seed_everything
from model.training.trainer import Trainer
from sweep.config.files import load
from sweep.config.resolve import resolve
from sweep.execution.trial import build
from tests.bench.measure import Row

STEPS, ROUNDS = 3, 7
VARIANTS: dict[str, list[str]] = {
    "reference: speech, frozen encoder, LoRA rank 8": [],
    "text": ["model.modality=text", "model.trainable=lora"],
    "text+speech": ["model.modality=text+speech"],
    "encoder trains": ["model.trainable=encoder+adapter+lora+tokens"],
    "encoder trains, SpecAugment": [
        "model.trainable=encoder+adapter+lora+tokens",
        "model.encoder.spec_augment=0.1",
    ],
    "LoRA off": ["model.lora.enabled=false"],
    "LoRA rank 64": ["model.lora.rank=64"],
    "DoRA": ["model.lora.dora=true"],
    "adapter: stacked frames, MLP": ["model.adapter.kind=stack", "model.adapter.hidden=96"],
    "adapter: convolution": ["model.adapter.kind=conv"],
    "[CLS] and end of audio": ["model.cls=before", "model.end_of_audio=learned"],
    "gradient checkpointing": ["model.llm.gradient_checkpointing=true"],
    "bfloat16 autocast": ["model.precision=bfloat16"],
    "distillation, live teacher": ["train.losses.distillation=1"],
    "distillation, live teacher, and hidden states": ["train.losses.distillation=1", "train.losses.hidden=1"],
    "four items at once": ["train.token_budget=400"],
    "three tasks": ["tasks.forecast=1", "tasks.response=1"],
}


def trainer(overrides: list[str]) -> Trainer:
    """A trainer on the demo's corpus."""
    base = ["model.trainable=adapter+lora+tokens", "search.space={}", "search.points=[]"]
    config = resolve(load("demo", [*base, *overrides]))
    seed_everything(0)
    model, data = build(config, "local", ("train",), "cpu")
    return Trainer(model, data, config.train, config.tasks, 0, Path(tempfile.mkdtemp()))


def seconds(made: Trainer, first: int) -> float:
    """CPU seconds a step, over STEPS steps."""
    made.model.train()
    steps = plan(made.train.costs, batch_size=made.config.batch_size, seed=0, epoch=first)[:STEPS]
    batches = list(made.data.read("train", steps))
    started = time.process_time()
    for step, examples in zip(steps, batches, strict=True):
        made.optimizer_step(step, step, examples)
    return (time.process_time() - started) / STEPS


def run() -> list[Row]:
    """How many times the reference's CPU time each variant takes."""
    made = {name: trainer(overrides) for name, overrides in VARIANTS.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for number in range(ROUNDS + 1):
        for name, own in made.items():
            taken = seconds(own, number)
            if number:  # the first round warms up
                times[name].append(taken)
    reference = next(iter(times))
    return [
        Row(
            f"CPU time of a step: {name}",
            "reference",
            [one / other for one, other in zip(taken, times[reference], strict=True)],
            note=f"{1000 * statistics.median(taken):.0f} ms",
        )
        for name, taken in times.items()
    ]
