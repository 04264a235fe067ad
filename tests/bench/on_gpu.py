"""`make gpu`: everything that only a GPU can show, in one run of some minutes that installs and downloads nothing.

Each figure is printed as soon as it is measured, and `tests/bench/results/gpu.json` has those so far, so a run that is
cut short still says something. In order: the rows of `tests.bench.gpu`, a profile of a step, what heard layers, LoRA on
the encoder, adapters and audio LLMs cost beside the default, a sweep of four trials on two halves of the GPU of which
one is killed, and the tests that need a GPU.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from data.atomic import write_file
from model.tiny import fixed_seed, tiny_tokenizer
from sweep.config.files import write
from sweep.config.schema import Config
from tests.bench import audio, gpu, options
from tests.bench.gpu import Scale, figures, real_shapes
from tests.bench.materials import made, settings, trainer
from tests.bench.measure import Row
from tests.bench.records import RESULTS, ROOT, record
from tests.kill.targets import find, kill
from tests.real_shapes import LLAMA_3B

TRIALS, LIMIT = 4, 300.0  # seconds that the sweep may take
PROFILE = RESULTS / "profiles" / "gpu-step.json"
SWEEP = [sys.executable, "-m", "sweep"]


def main() -> int:
    """Run everything; 1 if a goal is missed or a test fails, 2 without a GPU."""
    if not torch.cuda.is_available():
        print("make gpu: this machine has no CUDA device; run it on one with a GPU", file=sys.stderr)
        return 2
    rows = list[Row]()
    with real_shapes() as (llm, encoder):
        for row in chain(figures(Scale(), llm, encoder), profile_rows(Scale(), llm, encoder)):
            keep(rows, row)
    own = {"model.precision": "bfloat16", "resources.gpus_per_worker": 1}
    for row in chain(*(option_rows(Scale(), configs(**own)) for configs in (options.variants, audio.variants))):
        keep(rows, row)
    keep(rows, sweep_row(write_llama(), {"resources.gpus_per_worker": 0.5, "model.llm.dtype": "bfloat16"}))
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-s", "tests/gpu"], cwd=ROOT, check=False
    )
    print("tables: python -m tests.bench --docs")
    return int(tests.returncode != 0 or any(row.met is False for row in rows))


def keep(rows: list[Row], row: Row) -> None:
    """Print a row, and record it with those before."""
    rows.append(row)
    figure = "not measured" if row.ratio is None else f"{row.ratio:.3g}"
    goal = "" if row.goal is None else f" (goal {'≤' if row.most else '≥'} {row.goal:g})"
    print(f"{row.name}, against {row.against}: {figure}{goal}; {row.note}", flush=True)
    record("gpu", rows)


def profile_rows(scale: Scale, llm: Path, encoder: Path) -> Iterator[Row]:
    """Write the profile of a step, and yield the share of its time in which the device computes."""
    config = settings(**scale.settings, **{"model.llm.path": str(llm), "model.encoder.path": str(encoder)})
    found = gpu.profile(trainer(config, device=scale.device), scale.device)
    PROFILE.parent.mkdir(exist_ok=True)
    write_file(PROFILE, json.dumps(found, indent=1) + "\n")
    largest = ", ".join(f"{kernel['share']:.0%} {kernel['name'][:40]}" for kernel in found["kernels"][:3])
    yield Row("time in kernels, encoder online", "a step", [found["share_of_time_in_kernels"]], note=largest)


def option_rows(scale: Scale, configs: Mapping[str, Config]) -> Iterator[Row]:
    """Yield what a step of each configuration takes, and its memory, against the first one.

    Args:
        scale: of the device, the steps and the rounds.
        configs: by name.
    """
    options.cache(configs)
    default, first = next(iter(configs)), None
    for name, config in configs.items():
        steps = gpu.time_steps(trainer(config, options.features(config), device=scale.device), scale)
        if first is None:
            first = steps
            continue
        middle = statistics.median(first.seconds)
        note = f"{1000 * statistics.median(steps.seconds) / scale.steps:,.1f} ms a step"
        if first.gigabytes:
            note += f"; peak {steps.gigabytes:.2f} GB, {steps.gigabytes / first.gigabytes:.2f} times the default's"
        yield Row(f"seconds of a step, {name}", default, [seconds / middle for seconds in steps.seconds], note=note)


def write_llama() -> Path:
    """Return a folder with random weights of Llama-3.2-3B's shapes, which the workers of a sweep load."""

    def make(folder: Path) -> None:
        with fixed_seed(seed=0), torch.device("cuda"):
            AutoModelForCausalLM.from_config(LLAMA_3B, dtype=torch.bfloat16).cpu().save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)

    return made("llama-3b-random", make)


def sweep_row(llm: Path, changed: dict[str, Any]) -> Row:
    """Run a sweep of four trials, kill a worker that trains, and return how many trials are complete."""
    config = settings(
        **changed,
        **{
            "model.modality": "text",
            "model.trainable": "lora",
            "model.llm.path": str(llm),
            "train.epochs": 2,
            "search.trials": TRIALS,
            "search.space": {"train.learning_rate": {"low": 1e-4, "high": 1e-3, "log": True}},
            "search.pruning": {"kind": "none"},
        },
    )
    with tempfile.TemporaryDirectory() as name:
        file, out = Path(name) / "gpu.yaml", Path(name) / "sweep"
        write(config, file)
        started, killed = time.monotonic(), 0
        process = subprocess.Popen([*SWEEP, "run", str(file), "--out", str(out)], cwd=ROOT, env=os.environ)
        try:
            while process.poll() is None and time.monotonic() < started + LIMIT:
                if not killed and any(out.glob("trials/*/checkpoint.pt")):
                    workers = find("worker", process.pid)[:1]
                    kill(workers, signal.SIGKILL)
                    killed = len(workers)
                time.sleep(0.5)
        finally:
            process.terminate()
            process.wait(60)
        status = subprocess.run([*SWEEP, "status", str(out), "--json"], capture_output=True, text=True, check=False)
        states = [trial["state"] for trial in json.loads(status.stdout or "{}").get("trials", ())]
    note = f"{killed} worker killed, {time.monotonic() - started:.0f} s"
    return Row(
        "trials complete of a sweep in which one is killed", "trials", [states.count("COMPLETE")], TRIALS, note=note
    )


if __name__ == "__main__":
    sys.exit(main())
