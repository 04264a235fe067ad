"""What starts take: commands that only read, and the imports of each kind of process; CPU-seconds to their end.

    python -m tests.bench startup

The sweep has 40 trials with predictions of 384 items each; their intervals are stored, as by the driver when they end.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from sweep.analysis.leaderboard import leaderboard
from sweep.search.study import StudyStore
from tests.bench.measure import Row
from tests.sweep import searched

ROUNDS, TRIALS, GOAL = 5, 40, 1.0
COMMANDS = ("status SWEEP", "status SWEEP --json", "best SWEEP --json", "cache ls CACHE", "report --help", "--help")

# Kinds of processes by what they import, and what it was before `model.compat.defer_imports` and metrics without
# scikit-learn: what is imported before `model` is not deferred.
EAGER = "import torch._dynamo, transformers.modeling_utils, peft, sklearn.metrics; "
IMPORTS = {
    "driver, imports": ("import sweep.runner", EAGER),
    "process that trains or encodes, imports": ("import sweep.execution.trial", EAGER),
    "Tune's actor of a worker group, imports": ("import sweep.execution.worker_group", ""),
    "mailbox, imports": ("import sweep.execution.mailbox", ""),
    "torch alone, imports": ("import torch", ""),
}


def run() -> list[Row]:
    """Measure each command in processes of its own; a first round fills the caches of files."""
    with tempfile.TemporaryDirectory() as folder:
        sweep, cache = Path(folder) / "sweep", Path(folder) / "cache"
        cache.mkdir()
        config = searched.settings(trials=TRIALS)
        searched.played(config, sweep)
        leaderboard(config, sweep, StudyStore.of(sweep).trials())
        rows = []
        for command in COMMANDS:
            words = [{"SWEEP": str(sweep), "CACHE": str(cache)}.get(word, word) for word in command.split()]
            runs = [_cpu_seconds(["-m", "sweep", *words]) for _ in range(ROUNDS + 1)][1:]
            name = command.removesuffix(" CACHE").replace(" SWEEP", "")
            note = f"{TRIALS} trials" if "SWEEP" in command else ""
            rows.append(Row(f"`sweep {name}`", "CPU-seconds of the command", runs, GOAL, True, note))
        return [*rows, *imports()]


def imports() -> list[Row]:
    """Measure the imports of each kind of process, in turns with what they were."""
    rows = []
    for name, (code, eager) in IMPORTS.items():
        pairs = [
            (_cpu_seconds(["-c", code]), _cpu_seconds(["-c", eager + code]) if eager else 0.0)
            for _ in range(ROUNDS + 1)
        ][1:]
        before = f"{statistics.median(before for _, before in pairs):.2f} s with all that was loaded before"
        rows.append(Row(name, "CPU-seconds of a process", [now for now, _ in pairs], note=before if eager else ""))
    return rows


def _cpu_seconds(words: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
