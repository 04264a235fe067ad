"""Waiting: the share of its time for which training in the demo is blocked on the next batch, with the Ray reader.

One slot: its first trial waits for Ray's read processes to start, those after it find them.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.measure import Row

TRIALS = 5


def run() -> list[Row]:
    """The goal of waiting."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sweep", "run", "demo", "--trials", str(TRIALS), "--out", f"{folder}/demo"]
        # Frozen trials read files: without them, all that hear are fed by Ray.
        command += ["--set", "data.reader=ray", "--set", "resources.slots=1", "--set", "storage.features=live"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        first, *others = [last(trial) for trial in sorted(Path(folder).glob("demo/trials/*/metrics.jsonl"))]
    shares = [values["data_wait"] / values["seconds"] for values in others]
    waits = ", ".join(f"{values['data_wait']:.2f}" for values in others)
    cold = f"{first['data_wait']:.1f} of {first['seconds']:.1f} s"
    return [
        Row("data wait, demo", "time of training", shares, 0.01, most=True, note=f"{waits} s a trial"),
        Row("data wait, first trial of a slot", "time of training", [first["data_wait"] / first["seconds"]], note=cold),
    ]


def last(curve: Path) -> dict[str, Any]:
    """What was reported after a trial's last epoch."""
    values = [json.loads(line)["values"] for line in curve.read_text().splitlines()]
    found: dict[str, Any] = [entry for entry in values if "data_wait" in entry][-1]
    return found
