"""The feature cache, with an encoder of HuBERT-base's size (random weights) and an LLM of 20 million parameters.

A step that reads cached features, or the output of frozen layers, against one that encodes; distillation with cached
teacher logits against next-token prediction alone; and whether files give the same weights as what they replace.
"""

import statistics
import time
from collections.abc import Collection

import numpy as np
from torch import Tensor

from model.training.trainer import Trainer
from sweep.config.schema import Config
from sweep.preflight.feature_cache import ENCODER_FEATURES, TEACHER_LOGITS
from tests.bench.materials import CACHE, compute, epoch_starts, format_equal, settings, trainer
from tests.bench.measure import Row, in_turns, ratios

STEPS, ROUNDS = 2, 5
HISTORIES = (10, 3)  # a long one; the preset's
PAIRS = 21  # rounds of a step each, for a goal of a few per cent
GOAL, SHARE = 5.0, 0.8  # how much faster a step with features is, where the encoder has this share of the step at least


def run() -> list[Row]:
    """Measure all steps."""
    # With features, the LLM is left, which no cache takes away.
    names = {f"step with features, {history} turns of history": {"data.history": history} for history in HISTORIES}
    rows = [compare(name, settings(**changed), goal=GOAL) for name, changed in names.items()]
    trained = settings(**{"model.trainable": "new+encoder.*.layers.1[01].*"})
    return [distillation(), *rows, compare("step, top 2 of 12 layers train, prefix from files", trained)]


def distillation() -> Row:
    """A distillation step on text; takes about a minute."""
    alone = settings(**{"model.modality": "text", "data.history": 3, "train.batch_size": 4})
    distilled = alone.with_values({"train.losses.distillation": 1.0})
    [logits] = compute(TEACHER_LOGITS.requests(distilled, CACHE))
    models = {"alone": trainer(alone), "read": trainer(distilled, teacher_logits=logits), "live": trainer(distilled)}
    taken = in_turns({name: epoch_starts(model, 1) for name, model in models.items()}, PAIRS)
    medians = {name: 1000 * statistics.median(cost.cpu for cost in costs) for name, costs in taken.items()}
    note = ", ".join(f"{median:.0f} ms {name}" for name, median in medians.items())
    live = statistics.median(ratios(taken["live"], taken["alone"]))
    note += f"; {live:.2f} with a live teacher, {format_equal(models['live'], models['read'], PAIRS + 1)}"
    runs = ratios(taken["read"], taken["alone"])
    return Row("distillation step, cached teacher", "next-token prediction alone", runs, 1.05, most=True, note=note)


def compare(name: str, config: Config, goal: float | None = None) -> Row:
    """A step that reads what is frozen against one that computes it."""
    requests = ENCODER_FEATURES.requests(config, CACHE)
    missing, started = requests[0].missing, time.monotonic()
    folders = compute(requests)
    size = ENCODER_FEATURES.format_size(sum(file.size for file in missing))
    took = f"; {size} in {time.monotonic() - started:.0f} s" if missing else ""
    live, read = (trainer(config, features) for features in ((), folders))
    works = [epoch_starts(trained, STEPS) for trained in (live, read)]
    encoding = watch_encoder(live)
    every = [[work() for work in works] for _ in range(ROUNDS + 1)]
    assert encoding
    share = sum(encoding) / STEPS / sum(online for online, _ in every)
    taken = every[1:]  # the first round warms up
    online, cached = (statistics.median(seconds) for seconds in zip(*taken, strict=True))
    note = f"{1000 * online:.0f} ms live, of which the frozen encoder takes {share:.0%}; {1000 * cached:.0f} ms read; "
    note += format_equal(live, read, (ROUNDS + 1) * STEPS) + took
    runs = [online / cached for online, cached in taken]
    return Row(name, "encoder online", runs, goal if share >= SHARE else None, note=note)


def watch_encoder(trained: Trainer) -> list[float]:
    """Return a list that gets the CPU seconds that the frozen part of the encoder takes for each clip."""
    taken, encoder = list[float](), trained.model.encoder
    assert encoder is not None
    compute = encoder.layer_inputs

    def timed(clip: np.ndarray, indices: Collection[int]) -> dict[int, Tensor]:
        started = time.process_time()
        states = compute(clip, indices)
        taken.append(time.process_time() - started)
        return states

    encoder.layer_inputs = timed  # type: ignore[method-assign]
    return taken
