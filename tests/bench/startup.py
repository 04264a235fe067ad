"""What a command takes that only reads: CPU-seconds from its start to its end, as on a quiet core.

    python -m tests.bench startup

The sweep has 40 trials with predictions of 384 items each; their intervals are stored, as by the driver when they end.
"""

import os
import resource
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
            runs = [_cpu_seconds(words) for _ in range(ROUNDS + 1)][1:]
            name = command.removesuffix(" CACHE").replace(" SWEEP", "")
            note = f"{TRIALS} trials" if "SWEEP" in command else ""
            rows.append(Row(f"`sweep {name}`", "CPU-seconds of the command", runs, GOAL, True, note))
        return rows


def _cpu_seconds(words: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "sweep", *words], check=True, stdout=subprocess.DEVNULL, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
