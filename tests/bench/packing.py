"""Packing: CPU time of training steps and of label scores, padded against packed, with the lengths of AnnoMI's turns.

    python -m tests.bench packing

Turns are read as text, with ten before them, or as features of their sound; the clips have AnnoMI's lengths.
"""

import statistics

from tests.bench.materials import epoch_starts, settings, trainer
from tests.bench.measure import Cost, Row, in_turns, ratios

STEPS, ROUNDS = 1, 3
INPUTS = {"dialogues": {"data.history": 10}, "single turns": {"data.history": 0}}


def run() -> list[Row]:
    """Return how many times the CPU time of packed examples padded ones take."""
    rows = []
    for name, changed in INPUTS.items():
        config = settings(**changed, **{"model.modality": "text", "model.trainable": "lora"})
        trainers = {
            packing: trainer(config.with_values({"train.packing": packing}), splits=("train", "val"))
            for packing in ("off", "on")
        }
        for what, taken in (
            ("training", in_turns({key: epoch_starts(trained, STEPS) for key, trained in trainers.items()}, ROUNDS)),
            ("label scores", in_turns({key: trained.validate for key, trained in trainers.items()}, ROUNDS)),
        ):
            note = ", ".join(f"{key} {_seconds(costs):.2f} s" for key, costs in taken.items())
            rows.append(Row(f"{what}, {name}, packed", "padded", ratios(taken["off"], taken["on"]), 1.0, note=note))
    return rows


def _seconds(costs: list[Cost]) -> float:
    return statistics.median(cost.cpu for cost in costs)
