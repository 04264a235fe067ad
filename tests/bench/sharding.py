"""An LLM that two workers divide: the memory of each, against that of one worker with the whole LLM.

    python -m tests.bench sharding --record

Two processes with gloo on this machine. The LLM has 48 layers and 310 million parameters, 3 % of them embeddings, which
stay whole, as those of a base with 70 billion; activations are recomputed. Resident memory is measured from before the
model is built, but after a step of a tiny one, at the peak of two steps after it was.
"""

import ctypes
import functools
import importlib
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from data.loading.batching import plan, share
from model.runtime.memory import WORKER, Peak, baseline, free
from model.tiny import fixed_seed, tiny_tokenizer
from tests.bench.materials import made, settings, train_steps, trainer
from tests.bench.measure import Row
from tests.forked import Forked

GOAL, ROUNDS, STEPS = 0.6, 2, 2
MMAP_THRESHOLD = -3  # of `mallopt`


def run() -> list[Row]:
    """Return the share of one worker's memory that each of two workers takes."""
    torch.set_num_threads(1)
    for name in ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor"):
        importlib.import_module(name)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**16)  # so that what is freed is not kept: 320 MB with 1 MiB, a third
    llm = made("llama-48-layers", _make_llm)
    runs, note = [], ""
    for _ in range(ROUNDS):
        alone = Forked(functools.partial(peak, llm)).result()
        with tempfile.TemporaryDirectory() as folder:
            both = [Forked(functools.partial(peak, llm, rank, folder)) for rank in range(2)]
            divided = [worker.result() for worker in both]
        runs.append(max(divided) / alone)
        note = f"{max(divided) / 1e6:,.0f} MB against {alone / 1e6:,.0f} MB, weights and activations"
    return [Row("memory of a worker, LLM divided between two", "one worker", runs, GOAL, most=True, note=note)]


def _make_llm(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=12_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=48,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    with fixed_seed(seed=0):
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def peak(llm: Path, rank: int = 0, rendezvous: str | None = None) -> int:
    """Return the peak memory of a worker in bytes, without that of a process that has no model.

    Args:
        llm: its folder.
        rank: of this worker.
        rendezvous: a folder in which two workers find each other; None: it is alone.
    """
    values = {"model.modality": "text", "data.history": 3, "train.batch_size": 4}
    train_steps(trainer(settings(**values)), 0, 1)  # of a tiny LLM: what a step imports and reserves is no model
    free()
    baseline()
    workers = 1 if rendezvous is None else 2
    if rendezvous is not None:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}/file", rank=rank, world_size=workers)
    resources = {"resources.workers": workers, "resources.shard": workers > 1}
    base = {"model.llm.path": str(llm), "model.llm.gradient_checkpointing": True}
    trained = trainer(settings(**values | resources | base))
    free()
    measured = Peak("cpu")
    trained.model.train()
    steps = plan(trained.train.costs, batch_size=trained.config.batch_size, seed=0, epoch=0)[:STEPS]
    parts = [share(step, rank, workers) for step in steps]
    for step, part, examples in zip(steps, parts, trained.data.read("train", parts), strict=True):
        trained.optimizer_step(step, part, examples)
    found = measured.read() - WORKER
    if rendezvous is not None:
        dist.destroy_process_group()
    return found
