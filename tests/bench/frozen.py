"""Frozen passes, with an encoder of HuBERT-base's size (random weights) and an LLM of 20 million parameters.

A step that reads features, or what frozen layers made, against one that encodes; distillation from a teacher's files
against next-token prediction alone; and that files give the same weights as what they stand for.
"""

import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from data.corpus.schema import Corpus
from data.loading.batching import plan
from data.loading.cached_arrays import CacheFolders
from data.preparation.build import prepare
from model.tiny import fixed_seed, tiny_llama, tiny_tokenizer
from model.training.random_state import seed_everything
from model.training.trainer import Trainer
from sweep.config.files import load
from sweep.config.resolve import resolve
from sweep.config.schema import Config
from sweep.execution.trial import build
from sweep.preflight.cache_kind import AnyRequest
from sweep.preflight.feature_cache import ENCODER_FEATURES, TEACHER_LOGITS
from tests.bench.measure import Row, in_turns, ratios
from tests.bench.reading import CACHE, _conversations

SESSIONS, TURNS, STEPS, ROUNDS = 6, 24, 2, 5
HISTORIES = (10, 3)  # a long one; the preset's
PAIRS = 21  # rounds of a step each, for a goal of a few per cent


def run() -> list[Row]:
    """The goals of all."""
    return [distillation(), *map(features, HISTORIES), upper()]


def distillation() -> Row:
    """A distillation step on text; takes about a minute."""
    alone = settings(**{"model.modality": "text", "data.history": 3, "train.batch_size": 4})
    distilled = alone.with_values({"train.losses.distillation": 1.0})
    logits = compute(TEACHER_LOGITS.request(distilled, CACHE)).folder
    models = {"alone": trainer(alone), "read": trainer(distilled, teacher_logits=logits), "live": trainer(distilled)}
    taken = in_turns({name: steps_of(own) for name, own in models.items()}, PAIRS)
    note = ", ".join(f"{1000 * statistics.median(one.cpu for one in own):.0f} ms {name}" for name, own in taken.items())
    live = statistics.median(ratios(taken["live"], taken["alone"]))
    note += f"; {live:.2f} with a live teacher, {said_equal(models['live'], models['read'], PAIRS + 1)}"
    return Row(
        "distillation step, cached teacher",
        "next-token prediction alone",
        ratios(taken["read"], taken["alone"]),
        goal=1.05,
        most=True,
        note=note,
    )


def steps_of(own: Trainer) -> Callable[[], float]:
    """The first step of a trainer's next epoch, whenever it is called."""
    epochs = itertools.count()
    return lambda: seconds(own, next(epochs), 1)


def features(history: int) -> Row:
    """A step over clips after so many turns, the encoder frozen. What is left is the LLM, which no cache takes away."""
    name = f"step with features, {history} turns of history"
    return compared(name, settings(**{"data.history": history}), goal=5.0)


def upper() -> Row:
    """A step over clips, of whose encoder the upper layers train."""
    trained = settings(**{"model.trainable": "new+encoder.*.layers.1[01].*"})
    return compared("step, top 2 of 12 layers train, prefix from files", trained)


def compared(name: str, config: Config, goal: float | None = None) -> Row:
    """A step that reads what is frozen against one that computes it."""
    request = ENCODER_FEATURES.request(config, CACHE)
    assert request is not None
    left, started = request.missing, time.monotonic()
    compute(request)
    size = ENCODER_FEATURES.format_size(sum(file.size for file in left))
    took = f"; {size} in {time.monotonic() - started:.0f} s" if left else ""
    live, read = (trainer(config, features) for features in (None, request.folder))
    times: dict[str, list[float]] = {"live": [], "read": []}
    for number in range(ROUNDS + 1):
        for name_of, own in (("live", live), ("read", read)):
            taken = seconds(own, number)
            if number:  # the first round warms up
                times[name_of].append(taken)
    note = ", ".join(f"{1000 * statistics.median(taken):.0f} ms {name_of}" for name_of, taken in times.items())
    note += f"; {said_equal(live, read, (ROUNDS + 1) * STEPS)}{took}"
    times_less = [one / other for one, other in zip(times["live"], times["read"], strict=True)]
    return Row(name, "encoder online", times_less, goal=goal, note=note)


def compute(request: AnyRequest | None) -> AnyRequest:
    """Compute the missing files of a request in this process, and return the request."""
    assert request is not None
    for job in request.kind.jobs([request], request.missing):
        job()
    return request


def said_equal(one: Trainer, other: Trainer, steps: int) -> str:
    """Whether two trainers have come to the same weights."""
    same = all(itertools.starmap(torch.equal, zip(weights(one), weights(other), strict=True)))
    return f"weights {'equal to the bit' if same else 'DIFFER'} after {steps} steps"


def settings(**own: Any) -> Config:
    """A frozen encoder and LoRA, 16 clips a step, on twelve minutes of clips with the lengths of AnnoMI's."""
    encoder, llm, shards = (made(name, make) for name, make in MAKERS.items())
    changed: dict[str, Any] = {
        "data.shards": str(shards),
        "data.history": 10,
        "model.modality": "speech",
        "model.encoder.path": str(encoder),
        "model.llm.path": str(llm),
        "train.batch_size": 16,
        "search.space": {},
        "search.points": [],
    }
    changed |= own
    return resolve(load("annomi").with_values(changed))


def make_hubert(folder: Path) -> None:
    """Untrained, laid out as facebook/hubert-base-ls960."""
    with fixed_seed(seed=0):
        HubertModel(HubertConfig()).eval().save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(folder)


def make_llm(folder: Path) -> None:
    """Untrained, 20 million parameters."""
    tokenizer = tiny_tokenizer()
    with fixed_seed(seed=0):
        tiny_llama(tokenizer, width=512, layers=14).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_corpus(folder: Path) -> None:
    """Noise with the envelope of speech."""
    conversations = list(_conversations(SESSIONS, TURNS))
    prepare(Corpus("frozen", ("a", "b"), {"client": ("a", "b")}, conversations), folder)


MAKERS: dict[str, Callable[[Path], None]] = {
    "hubert-base": make_hubert,
    "llama-20m": make_llm,
    "frozen-corpus": make_corpus,
}


def made(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that is made once."""
    folder = CACHE / name
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=CACHE))
        make(unfinished / name)
        shutil.move(unfinished / name, folder)
    return folder


def trainer(
    config: Config, features: Path | None = None, teacher_logits: Path | None = None, device: str = "cpu"
) -> Trainer:
    """A trainer whose model has just been made."""
    seed_everything(0)
    model, data = build(config, "local", ("train",), device, CacheFolders(features, teacher_logits))
    return Trainer(model, data, config.train, config.tasks, 0, Path(tempfile.mkdtemp()))


def seconds(own: Trainer, epoch: int, count: int = STEPS) -> float:
    """CPU seconds a step, with what is read for it."""
    own.model.train()
    started = time.process_time()
    steps = plan(own.train.costs, batch_size=own.config.batch_size, seed=0, epoch=epoch)[:count]
    for step, examples in zip(steps, own.data.read("train", steps), strict=True):
        own.optimizer_step(step, step, examples)
    return (time.process_time() - started) / count


def weights(own: Trainer) -> list[Tensor]:
    """What trains."""
    return [parameter.detach() for parameter in own.parameters]
