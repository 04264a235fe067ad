"""The start of a sweep: the demo with one slot and a cold feature cache, against a script that makes its first step.

    python -m tests.bench timeline --record              # time and CPU time until the first optimizer step
    python -m tests.bench.timeline docs/timeline.png     # the processes of the sweep over time

The script imports the same libraries, loads the same model and data, and makes the first step of the first trial.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.bench.measure import Row
from tests.bench.records import machine
from tests.kill.steps import FILE, parsed

TRIALS, EVERY = 2, 0.2
TIME_GOAL, CPU_GOAL = 2.0, 3.0
FAULTS = Path(__file__).parents[1] / "kill/faults"  # whose `sitecustomize` records each optimizer step
SWEEP = ("-m", "sweep", "run", "demo", "--trials", str(TRIALS), "--set", "resources.slots=1", "--out")
SCRIPT = """
import sys
from pathlib import Path
from data.loading.batching import plan
from model.training.dry_run import _step
from model.training.trainer import Trainer
from sweep.config.files import load
from sweep.config.resolve import resolve
from sweep.execution.trial import build
from sweep.search.candidates import first_trial

config = first_trial(resolve(load("demo")))
model, data = build(config, "local", ("train", "val"), "cpu")
trainer = Trainer(model, data, config.train, config.tasks, config.seed, Path(sys.argv[1]))
weights = trainer.sampling_weights
steps = plan(trainer.train.costs, batch_size=config.train.batch_size, seed=config.seed, epoch=0, weights=weights)
_step(trainer, steps[0], 1)
"""


@dataclass
class Life:
    """A process, as it was seen."""

    name: str
    first: float  # s since the command
    last: float = 0.0
    cpu: list[tuple[float, float]] = field(default_factory=list)  # time, and CPU-seconds until then

    def used(self, until: float) -> float:
        """Return the CPU-seconds until a time."""
        return max((cpu for moment, cpu in self.cpu if moment <= until), default=0.0)


@dataclass
class Run:
    """A command that makes an optimizer step."""

    first_step: float  # s since the command
    lives: list[Life]
    trials: list[float] = field(default_factory=list)  # when each trial made its first step

    @property
    def cpu(self) -> float:
        """Return the CPU-seconds of all processes until the first step."""
        return sum(life.used(self.first_step) for life in self.lives)


def run() -> list[Row]:
    """The goals of the first step."""
    sweep, script = start_sweep(), start_script()
    kinds = Counter(life.name for life in sweep.lives)
    note = f"{sweep.first_step:.1f} s against {script.first_step:.1f} s; {len(sweep.lives)} processes"
    cpu = f"{sweep.cpu:.1f} s against {script.cpu:.1f} s"
    rows = [
        Row(
            "time to the first step, demo",
            "a bare script",
            [sweep.first_step / script.first_step],
            TIME_GOAL,
            True,
            note,
        ),
        Row("CPU time to the first step, demo", "a bare script", [sweep.cpu / script.cpu], CPU_GOAL, True, cpu),
    ]
    for name, count in kinds.items():
        lives = [life for life in sweep.lives if life.name == name]
        until, whole = (sum(life.used(end) for life in lives) for end in (sweep.first_step, float("inf")))
        text = f"{count} of them; " if count > 1 else ""
        rows.append(
            Row(f"process: {name}", "CPU-seconds to the first step", [until], note=f"{text}{whole:.1f} s to the end")
        )
    return rows


def start_sweep() -> Run:
    """Run the sweep to its end, and look at its processes."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"KILL_FOLDER": folder, "PYTHONPATH": os.pathsep.join((str(FAULTS), *sys.path[:1]))}
        began, lives = time.time(), watch([sys.executable, *SWEEP, f"{folder}/demo"], environment)
        steps = list(parsed((Path(folder) / FILE).read_bytes()))
        trials = {step.trial: step.time - began for step in reversed(steps)}
        return Run(min(trials.values()), lives, sorted(trials.values()))


def start_script() -> Run:
    """Run the script, which ends with the first step."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.time()
        lives = watch([sys.executable, "-c", SCRIPT, folder], {})
        return Run(time.time() - began, lives)


def watch(command: list[str], environment: dict[str, str]) -> list[Life]:
    """Run a command, and return all processes that were seen below it."""
    lives: dict[int, Life] = {}
    began = time.time()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | environment
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            now = time.time() - began
            for member in members(process.pid):
                with contextlib.suppress(psutil.Error):
                    life = lives.setdefault(member.pid, Life("", now))
                    life.name = title(member, process.pid) or life.name
                    times = member.cpu_times()
                    life.cpu.append((now, times.user + times.system))
                    life.last = now
            time.sleep(EVERY)
        assert process.returncode == 0, command
    return list(lives.values())


def members(pid: int) -> Iterator[psutil.Process]:
    """Yield a process and all below it."""
    with contextlib.suppress(psutil.Error):
        root = psutil.Process(pid)
        yield from (root, *root.children(recursive=True))


def title(process: psutil.Process, root: int) -> str:
    """Return what a process is called; Ray's processes change their titles."""
    if process.pid == root:
        return "driver"
    words = process.cmdline()
    first = Path(words[0].split()[0]).name if words and words[0] else process.name()
    if first.startswith("ray::"):
        return first.removeprefix("ray::").partition(".")[0]
    return {"sweep-node": "raylet"}.get(first, first)


def draw(shown: Run, path: Path) -> None:
    """Draw each process as a line from its start to its end, darker where it uses more CPU."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    lives = sorted(shown.lives, key=lambda life: life.first)
    lives = [life for life in lives if life.last - life.first > 1]
    figure, axis = pyplot.subplots(figsize=(9, 0.22 * len(lives) + 1), layout="constrained")
    for row, life in enumerate(lives):
        axis.plot([life.first, life.last], [row, row], color="lightgray", linewidth=6, solid_capstyle="butt")
        for (before, used), (after, more) in zip(life.cpu[:-1], life.cpu[1:], strict=True):
            share = min(1.0, (more - used) / max(after - before, 1e-9))
            axis.plot([before, after], [row, row], color="tab:blue", alpha=share, linewidth=6, solid_capstyle="butt")
        axis.text(life.last, row, f" {life.cpu[-1][1]:.1f}", fontsize=7, va="center")
    for moment in shown.trials:
        axis.axvline(moment, color="tab:red", linewidth=0.8)
    axis.set_yticks(range(len(lives)), [life.name for life in lives], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("seconds since the command; red: first step of a trial; numbers: CPU-seconds")
    axis.set_title(f"Processes of the demo with one slot; {machine()['name']}", fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(start_sweep(), Path(sys.argv[1]))
