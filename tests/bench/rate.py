"""Near the hardware on CPUs: SmolLM2-135M with LoRA on AnnoMI's dialogues in fp32, against products of large matrices.

    REAL_MODELS=DIR python -m tests.bench rate   # DIR/smollm2-135m has the model, and ../shared the corpus

CPU time counts, so other processes disturb it little. Each number of threads has a process of its own. Steps and
products of matrices alternate, and a ratio compares those of a round.
"""

import copy
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from data.corpus.config import CorpusConfig
from data.importers.tables.annomi import read_annomi
from data.preparation.build import prepare
from model.objectives.losses import answer_losses
from model.speech_llm.kernels import fuse_lora
from model.training.trainer import Trainer
from sweep.config.files import load
from sweep.config.resolve import resolve
from sweep.config.schema import Config
from tests.bench.hardware import count_operations, matrix_product
from tests.bench.materials import made, train_steps, trainer
from tests.bench.measure import Row, in_turns, ratios
from tests.conftest import SHARED

SIDE, PRODUCTS, ROUNDS = 2048, 4, 3
CORPUS = SHARED / "AnnoMI-simple.csv"
ITEMS, VALIDATED = 8, 16  # of a step, and of the validation split


def run() -> list[Row]:
    """Measure with one and with two threads; no row has a figure where model or corpus are not at hand."""
    model = Path(os.environ.get("REAL_MODELS", "real-models")) / "smollm2-135m"
    if not model.exists() or not CORPUS.exists():
        missing = "not measured: $REAL_MODELS holds no smollm2-135m, or AnnoMI-simple.csv is not at hand"
        return [*lora_rows(), Row("training step, SmolLM2-135M", "matrix rate", goal=0.8, note=missing)]
    rows = lora_rows()
    for threads in (1, 2):
        command = [sys.executable, "-m", "tests.bench.rate", str(model), str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        found = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        rows += [Row(**row) for row in json.loads(found.splitlines()[-1])]
    return rows


def lora_rows(positions: int = 2048, width: int = 576, inner: int = 1536) -> list[Row]:
    """Return what two linear layers of SmolLM2's sizes take with LoRA of rank 8, as PEFT computes it and as we do."""
    rows = list[Row]()
    for dropout in (0.0, 0.1):
        up, down = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)
        layers = nn.Sequential(up, down).requires_grad_(False)
        lora = LoraConfig(r=8, target_modules=["0", "1"], lora_dropout=dropout)
        models = {"PEFT": get_peft_model(copy.deepcopy(layers), lora), "fused": get_peft_model(layers, lora)}
        fuse_lora(models["fused"])
        inputs = torch.randn(positions, width, requires_grad=True)
        steps = {
            name: lambda model=model, inputs=inputs: model(inputs).sum().backward() for name, model in models.items()
        }
        taken = in_turns(steps, 2 * ROUNDS + 1)
        name = f"linear layers with LoRA, forward and backward, dropout {dropout:g}"
        rows.append(Row(name, "PEFT", ratios(taken["fused"], taken["PEFT"]), 1.0, most=True))
    return rows


def settings(model: Path) -> Config:
    """Return LoRA on all linear layers, and a client's turn after the ten before it."""
    shards = made("annomi-text", lambda folder: prepare(read_annomi(CORPUS, None, CorpusConfig()), folder))
    values = {
        "data.shards": str(shards),
        "data.history": 10,
        "model.llm.path": str(model),
        "model.lora.rank": 8,
        "train.batch_size": ITEMS,
        "train.packing": "off",
        "search.space": {},
        "search.points": [],
    }
    return resolve(load("real-small").with_values(values))


def rows(config: Config, threads: int, rounds: int = ROUNDS, side: int = SIDE) -> list[Row]:
    """Return the rows of a number of threads."""
    torch.set_num_threads(threads)
    name = f"SmolLM2-135M, fp32, {threads} thread{'s' if threads > 1 else ''}"
    trained = trainer(config.with_values({"resources.cpus_per_worker": threads}), splits=("train", "val"))
    del trained.data.splits["val"].items[VALIDATED:]
    product = matrix_product(side, torch.float32, "cpu")
    operations = count_operations(trained, 1)
    taken = in_turns(
        {
            "step": lambda: train_steps(trained, 0, 1),
            "product": lambda: [product() for _ in range(PRODUCTS)],
            "forward": lambda: forward(trained),
            "validation": trained.validate,
        },
        rounds,
    )
    rate = [2 * side**3 * PRODUCTS / cost.cpu for cost in taken["product"]]
    shares = [operations / cost.cpu / most for cost, most in zip(taken["step"], rate, strict=True)]
    note = f"{operations / 1e9:.0f} billion operations, {statistics.median(rate) / 1e9:.0f} billion/s at most"
    compared = ratios(taken["validation"], taken["forward"])
    seconds = statistics.median(cost.cpu for cost in taken["validation"])
    return [
        Row(f"training step, {name}", "matrix rate", shares, 0.8, note=note),
        Row(f"validation, {name}", "forward pass of training", compared, 1.1, True, f"{seconds:.1f} CPU-seconds"),
    ]


def forward(trained: Trainer) -> None:
    """Compute the losses of the validation split as a step does, without its backward pass."""
    trained.model.train()
    items = list(range(len(trained.data.splits["val"].items)))
    costs = [trained.data.splits["val"].costs[item] for item in items]
    parts = trained.model.micro_batches(costs, trained.token_budget)
    for part, examples in zip(parts, trained.data.read("val", parts), strict=True):
        assert len(part) == len(examples)
        answer_losses(trained.model, examples, trained.config.losses)


if __name__ == "__main__":
    found = rows(settings(Path(sys.argv[1])), int(sys.argv[2]))
    print(json.dumps([vars(row) for row in found]))
