"""What the benchmarks share: models of random weights, corpora of noise, and trainers. Folders are made once."""

import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from data.corpus.config import CorpusConfig, SplitConfig
from data.corpus.schema import SAMPLE_RATE, Conversation, Corpus, Turn
from data.loading.batching import plan
from data.loading.cached_arrays import CacheFolders
from data.preparation.build import prepare
from model.runtime.device import uploaded
from model.tiny import fixed_seed, tiny_llama, tiny_tokenizer
from model.training.random_state import seed_everything
from model.training.trainer import Trainer
from sweep.config.files import load
from sweep.config.resolve import resolve
from sweep.config.schema import Config
from sweep.execution.trial import build
from sweep.preflight.cache_kinds.base import AnyRequest

CACHE = Path(tempfile.gettempdir()) / "speech-llm-sweep-bench"


def made(name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that is made once."""
    if not (folder := CACHE / name).exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=CACHE))
        make(unfinished / name)
        shutil.move(unfinished / name, folder)
    return folder


def hubert(**sizes: Any) -> Path:
    """Return an untrained encoder, laid out as facebook/hubert-base-ls960; with other sizes if they are given."""

    def make(folder: Path) -> None:
        with fixed_seed(seed=0):
            HubertModel(HubertConfig(**sizes)).eval().save_pretrained(folder)
        Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(folder)

    return made("thin-hubert" if sizes else "hubert-base", make)


def llama() -> Path:
    """Return an untrained LLM of 20 million parameters."""

    def make(folder: Path) -> None:
        tokenizer = tiny_tokenizer()
        with fixed_seed(seed=0):
            tiny_llama(tokenizer, width=512, layers=14).eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return made("llama-20m", make)


def noise(name: str, sessions: int, clips: int, longest: float = 30.0, split: SplitConfig | None = None) -> Path:
    """Return shards of noise with the envelope of speech, as many clips in each session."""

    def make(folder: Path) -> None:
        corpus = Corpus(name, ("a", "b"), {"client": ("a", "b")}, list(conversations(sessions, clips, longest)))
        prepare(corpus, folder, CorpusConfig() if split is None else CorpusConfig(split=split))

    return made(name, make)


def conversations(sessions: int, clips: int, longest: float) -> Iterator[Conversation]:
    """Yield clips with the lengths of AnnoMI's, lognormal: median 3 s, mean 4.3 s, from 0.5 s to the longest."""
    rng = np.random.default_rng(0)
    sound = rng.standard_normal(31 * SAMPLE_RATE) * np.repeat(rng.uniform(0, 1, 31 * 8), SAMPLE_RATE // 8) ** 2
    for session in range(sessions):
        turns = []
        for index in range(clips):
            seconds = float(np.clip(rng.lognormal(np.log(3), 0.85), 0.5, longest))
            start = rng.integers(0, SAMPLE_RATE)
            clip = sound[start : start + round(seconds * SAMPLE_RATE)] * rng.uniform(1000, 4000)
            text = " ".join(["word"] * max(1, round(2.5 * seconds)))
            turn = Turn(f"{session}/{index}", index, "client", text, "ab"[index % 2])
            turn.audio = clip.round().clip(-32768, 32767).astype(np.int16)
            turns.append(turn)
        yield Conversation(f"s{session}", f"g{session}", turns)


def settings(**changed: Any) -> Config:
    """Return a frozen encoder and LoRA, 16 clips a step, on twelve minutes of clips."""
    inputs: dict[str, Callable[[], Path]] = {
        "data.shards": lambda: noise("frozen-corpus", 6, 24),
        "model.encoder.path": hubert,
        "model.llm.path": llama,
    }
    values: dict[str, Any] = {
        "data.history": 10,
        "model.modality": "speech",
        "train.batch_size": 16,
        "search.space": {},
        "search.points": [],
        **{key: str(make()) for key, make in inputs.items() if key not in changed},
    }
    return resolve(load("annomi").with_values(values | changed))


def compute(requests: Sequence[AnyRequest]) -> tuple[Path, ...]:
    """Compute the missing files of requests of one forward pass in this process, and return their folders."""
    files = {file.name: file for request in requests for file in request.missing}
    for job in requests[0].kind.jobs(requests, list(files.values())) if files else ():
        job()
    return tuple(request.folder for request in requests)


def trainer(
    config: Config,
    features: Sequence[Path] = (),
    teacher_logits: Path | None = None,
    device: str = "cpu",
    splits: tuple[str, ...] = ("train",),
) -> Trainer:
    """Return a trainer whose model has just been made."""
    seed_everything(0)
    model, data = build(config, "local", splits, device, CacheFolders(tuple(features), teacher_logits))
    return Trainer(model, data, config.train, config.tasks, 0, Path(tempfile.mkdtemp()))


def train_steps(trained: Trainer, epoch: int, count: int) -> None:
    """Take the first steps of an epoch, reading included."""
    trained.model.train()
    steps = plan(trained.train.costs, batch_size=trained.config.batch_size, seed=0, epoch=epoch)[:count]
    reader = uploaded(trained.data.read("train", steps), trained.model.device)
    for step, examples in zip(steps, reader, strict=True):
        trained.optimizer_step(step, step, examples)


def epoch_starts(trained: Trainer, count: int) -> Callable[[], float]:
    """Return a function that takes the first steps of the next epoch at each call, and returns CPU seconds a step."""
    epochs = itertools.count()

    def work() -> float:
        started = time.process_time()
        train_steps(trained, next(epochs), count)
        return (time.process_time() - started) / count

    return work


def weights(trained: Trainer) -> list[Tensor]:
    """Return what trains."""
    return [parameter.detach() for parameter in trained.parameters]


def format_equal(first: Trainer, second: Trainer, steps: int) -> str:
    """Say whether two trainers have come to the same weights."""
    same = all(itertools.starmap(torch.equal, zip(weights(first), weights(second), strict=True)))
    return f"weights {'equal to the bit' if same else 'DIFFER'} after {steps} steps"
