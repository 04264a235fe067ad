"""What each option costs: CPU time of an optimizer step of the demo's models, relative to the reference, in one run.

    python -m tests.bench steps

Variants are timed in turns, so that a change of the machine's load hits all of them; the median over the rounds counts.
"""

import statistics

from sweep.config.files import load
from sweep.config.resolve import resolve
from tests.bench.materials import epoch_starts, trainer
from tests.bench.measure import Row, in_turns, ratios

STEPS, ROUNDS = 3, 7
VARIANTS: dict[str, list[str]] = {
    "reference: speech, frozen encoder, LoRA rank 8": [],
    "text": ["model.modality=text", "model.trainable=lora"],
    "text+speech": ["model.modality=text+speech"],
    "encoder trains": ["model.trainable=encoder+adapter+lora+tokens"],
    "encoder trains, SpecAugment": ["model.trainable=encoder+adapter+lora+tokens", "model.encoder.spec_augment=0.1"],
    "LoRA off": ["model.lora.enabled=false"],
    "LoRA rank 64": ["model.lora.rank=64"],
    "DoRA": ["model.lora.dora=true"],
    "adapter: stacked frames, MLP": ["model.adapter.kind=stack", "model.adapter.hidden=96"],
    "adapter: convolution": ["model.adapter.kind=conv"],
    "encoder layer 1 of 2": ["model.encoder.layers=1"],
    "encoder layers 1 and 2 side by side": ["model.encoder.layers=[1,2]"],
    "encoder layers, weighted": ["model.encoder.layers=weighted"],
    "LoRA on the encoder's upper layer": ["model.trainable=new", "model.encoder.lora={rank: 8, layers: 1}"],
    "LoRA on the encoder": ["model.trainable=new", "model.encoder.lora.rank=8"],
    "adapter: 8 queries for a clip": ["model.adapter={kind: queries, queries: 8}"],
    "adapter: 12.5 queries a second": ["model.adapter.kind=queries"],
    "adapter: merged frames": ["model.adapter.kind=merge"],
    "[CLS] and end of audio": ["model.cls=before", "model.end_of_audio=learned"],
    "gradient checkpointing": ["model.llm.gradient_checkpointing=true"],
    "bfloat16 autocast": ["model.precision=bfloat16"],
    "distillation, live teacher": ["train.losses.distillation=1"],
    "distillation, live teacher, and hidden states": ["train.losses.distillation=1", "train.losses.hidden=1"],
    "four items at once": ["train.token_budget=400"],
    "three tasks": ["tasks.forecast=1", "tasks.response=1"],
}


def run() -> list[Row]:
    """Return how many times the reference's CPU time each variant takes."""
    base = ["model.trainable=adapter+lora+tokens", "search.space={}", "search.points=[]"]
    variants = {name: trainer(resolve(load("demo", [*base, *changed]))) for name, changed in VARIANTS.items()}
    taken = in_turns({name: epoch_starts(trained, STEPS) for name, trained in variants.items()}, ROUNDS)
    reference = taken[next(iter(VARIANTS))]
    return [
        Row(
            f"CPU time of a step: {name}",
            "reference",
            ratios(costs, reference),
            note=f"{1000 * statistics.median(cost.cpu for cost in costs) / STEPS:.0f} ms",
        )
        for name, costs in taken.items()
    ]
