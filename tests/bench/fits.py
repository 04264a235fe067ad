"""What fits on a GPU: the tokens of a micro-batch for Llama bases of four sizes, as the plan estimates them.

    python -m tests.bench.fits docs/gpu.md   # write the table of the page

Trials train LoRA of rank 8 on all linear layers and an adapter for HuBERT-large in bf16, with cached features, packed
rows of 512 tokens and AdamW. A GPU of N GB may use N·10⁹ bytes; it has 7 % more, which its context and its allocator
take. No weights are loaded.
"""

import sys
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from torch import nn
from transformers import LlamaConfig

from data.atomic import write_file
from model.config import LoadIn, ModelConfig
from model.speech_llm.language_model import load_llm_with_lora
from model.training.memory_estimate import MemoryEstimate, step_memory, weight_memory

BEGIN, END = "<!-- fits: written by `python -m tests.bench.fits docs/gpu.md` -->", "<!-- end -->"
GPUS = (24, 48, 80)  # GB
ROW = [512] * 4  # sequences of which a step is computed; memory grows in proportion
LEAST = 512  # tokens: less does not count as fitting
ENCODER_WIDTH = 1024
SHAPES = {
    "1B (Llama-3.2)": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64
    ),
    "3B (Llama-3.2)": LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128
    ),
    "8B (Llama-3.1)": LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32, head_dim=128
    ),
    "70B (Llama-3.1)": LlamaConfig(
        hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, head_dim=128
    ),
}


class Stored(NamedTuple):
    """How the LLM is stored."""

    load_in: LoadIn
    workers: int  # that divide it

    def __str__(self) -> str:
        return self.load_in if self.workers == 1 else f"none, `shard` over {self.workers}"


ALONE = [Stored("none", 1), Stored("8bit", 1), Stored("4bit", 1)]
WAYS = {
    name: [*ALONE, *(Stored("none", workers) for workers in {"8B": (2,), "70B": (2, 4, 8)}.get(name.split()[0], ()))]
    for name in SHAPES
}


def estimates(name: str) -> dict[Stored, list[MemoryEstimate]]:
    """Return the estimates of a base for each way to store it: without recomputation, and with."""
    config = SHAPES[name]
    config.vocab_size, config.num_key_value_heads, config.max_position_embeddings = 128_256, 8, 131_072
    config.tie_word_embeddings = "3.2" in name
    found: dict[Stored, list[MemoryEstimate]] = {stored: [] for stored in WAYS[name]}
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        for recomputes in (False, True):
            llm_settings = {"path": folder, "dtype": "bfloat16", "gradient_checkpointing": recomputes}
            plain = ModelConfig.model_validate({"llm": llm_settings, "precision": "bfloat16"})
            llm = load_llm_with_lora(plain, "meta")
            for parameter_name, parameter in llm.named_parameters():
                parameter.requires_grad_("lora_" in parameter_name)
            adapter = nn.Linear(ENCODER_WIDTH, config.hidden_size, device="meta")
            model = nn.ModuleDict({"llm": llm, "adapter": adapter})
            step = step_memory(llm, plain, ROW)
            for stored, of_stored in found.items():
                of_stored.append(replace(weight_memory(model, llm, stored.load_in, stored.workers), step=step))
    return found


def tokens(estimate: MemoryEstimate, gpu: int) -> int:
    """Return the tokens that fit at once on a GPU of so many GB, in steps of 512."""
    free = gpu * 10**9 - (estimate.total - estimate.step)
    return max(0, int(free / (estimate.step / sum(ROW))) // LEAST * LEAST)


def lines(name: str) -> list[str]:
    """Return the lines of a base in the table."""
    rows = []
    for stored, (kept, recomputed) in estimates(name).items():
        cells = [
            " / ".join(f"{count:,}" if (count := tokens(one, gpu)) else "-" for one in (kept, recomputed))
            for gpu in GPUS
        ]
        weights = f"{(kept.frozen + kept.trained) / 1e9:.1f} GB"
        rows.append(" | ".join([f"| {name}", str(stored), weights, *cells]) + " |")
    return rows


def table() -> str:
    """Return the whole table."""
    head = ["base", "stored", "weights", *(f"{gpu} GB" for gpu in GPUS)]
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *chain.from_iterable(map(lines, SHAPES))]
    )


if __name__ == "__main__":
    path = Path(sys.argv[1])
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    write_file(path, f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")
