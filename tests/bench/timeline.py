"""The start of a sweep: the demo with one slot and a cold feature cache, until a trial makes its first optimizer step.

    python -m tests.bench timeline --record              # against a bare script, the stock stack and transformers
    python -m tests.bench.timeline docs/timeline.png [ROOT …]   # processes over time, of older checkouts, too

The script imports the same libraries, loads the same model and data, and makes the first step of the first trial.
Times and CPU-seconds are those until the first step of a trial; dry runs do not count.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from sweep.config.files import load, write
from sweep.config.resolve import resolve
from tests.bench.measure import Row
from tests.bench.records import ROOT, commit, machine
from tests.bench.sweeps import MODULES, STOCK, TRAINER
from tests.kill.steps import FILE, parsed

TRIALS, ROUNDS, EVERY = 2, 3, 0.2
TIME_GOAL, CPU_GOAL = 2.0, 3.0
SWEEP, SCRIPT = "sweep run", "a bare script"
FAULTS = "tests/kill/faults"  # whose `sitecustomize` records each optimizer step
CODE = """
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


def run() -> list[Row]:
    """The goals of the first step, and the processes of a sweep."""
    runs: dict[str, list[Run]] = {name: [] for name in (SWEEP, SCRIPT, STOCK, TRAINER)}
    for _ in range(ROUNDS):
        for name, taken in runs.items():
            taken.append(start(name))
    rows = []
    for name in (SWEEP, STOCK, TRAINER):
        goals = (TIME_GOAL, CPU_GOAL) if name == SWEEP else (None, None)
        what = "" if name == SWEEP else f", {name}"
        for kind, of, goal in (("time", wall, goals[0]), ("CPU-seconds", cpu, goals[1])):
            pairs = [(of(own), of(bare)) for own, bare in zip(runs[name], runs[SCRIPT], strict=True)]
            note = "; ".join(f"{own:.1f} s against {bare:.1f} s" for own, bare in pairs)
            ratios = [own / bare for own, bare in pairs]
            rows.append(Row(f"{kind} to the first step, demo{what}", SCRIPT, ratios, goal, True, note))
    return rows + processes(runs[SWEEP])


def processes(runs: list[Run]) -> list[Row]:
    """Return what each kind of process of a sweep uses."""
    rows = []
    for kind in dict.fromkeys(life.name for shown in runs for life in shown.lives):
        before, whole, counts = [], [], []
        for shown in runs:
            lives = [life for life in shown.lives if life.name == kind]
            before.append(sum(life.used(shown.first_step) for life in lives))
            whole.append(sum(life.used(float("inf")) for life in lives))
            counts.append(len(lives))
        count = max(counts)
        note = (f"{count} of them; " if count > 1 else "") + f"{statistics.median(whole):.1f} to the end of two trials"
        rows.append(Row(f"process: {kind}", "CPU-seconds to the first step", before, note=note))
    return rows


def wall(run: Run) -> float:
    """Return the seconds until the first step."""
    return run.first_step


def cpu(run: Run) -> float:
    """Return the CPU-seconds of all processes until the first step."""
    return sum(life.used(run.first_step) for life in run.lives)


def start(name: str, root: Path = ROOT) -> Run:
    """Run the demo with the code of a checkout: by `sweep run` to its end, by others to the first step."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"KILL_FOLDER": folder, "PYTHONPATH": os.pathsep.join((str(root / FAULTS), str(root)))}
        out = f"{folder}/out"
        command = {
            SWEEP: ["-m", "sweep", "run", "demo", "--trials", str(TRIALS), "--set", "resources.slots=1", "--out", out],
            SCRIPT: ["-c", CODE, out],
        }.get(name)
        if command is None:
            config = load("demo")
            first = {"search.trials": 1, "search.points": config.search.points[:1]}  # the others leave axes out
            write(resolve(config.with_values(first)), Path(folder) / "demo.yaml")
            command = ["-m", MODULES[name], f"{folder}/demo.yaml", out]
        steps, began = Path(folder) / FILE, time.time()
        ended = steps.exists if name in MODULES else lambda: False
        own = root / ".venv/bin/python"  # of an older checkout, with the packages that it needs
        lives = watch([str(own) if own.exists() else sys.executable, *command], environment, root, ended)
        if name == SCRIPT:
            return Run(time.time() - began, lives)
        trials = {step.trial: step.time - began for step in reversed(list(parsed(steps.read_bytes())))}
        return Run(min(trials.values()), lives, sorted(trials.values()))


def watch(command: list[str], environment: Mapping[str, str], root: Path, ended: Callable[[], bool]) -> list[Life]:
    """Run a command in a folder until its end, or until `ended`; return all processes that were seen below it."""
    lives: dict[int, Life] = {}
    began = time.time()
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | environment
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=variables, cwd=root, **silent) as process:
        while process.poll() is None and not ended():
            now = time.time() - began
            for member in members(process.pid):
                with contextlib.suppress(psutil.Error):
                    life = lives.setdefault(member.pid, Life("", now))
                    life.name = title(member, process.pid) or life.name
                    times = member.cpu_times()
                    life.cpu.append((now, times.user + times.system))
                    life.last = now
            time.sleep(EVERY)
        code = process.poll()
        if code is None:
            for member in reversed(list(members(process.pid))):
                with contextlib.suppress(psutil.Error):
                    member.kill()
        assert not code, command
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


def draw(shown: Mapping[str, Run], path: Path) -> None:
    """Draw each process as a line from its start to its end, darker where it uses more CPU; one picture above another.

    Args:
        shown: runs by title.
        path: of the picture.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    lives = {name: sorted(run.lives, key=lambda life: life.first) for name, run in shown.items()}
    lives = {name: [life for life in all_lives if life.last - life.first > 1] for name, all_lives in lives.items()}
    heights = [len(all_lives) for all_lives in lives.values()]
    figure, axes = pyplot.subplots(
        len(shown),
        1,
        figsize=(9, 0.2 * sum(heights) + len(shown)),
        sharex=True,
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for axis, (name, run) in zip(axes[:, 0], shown.items(), strict=True):
        for row, life in enumerate(lives[name]):
            axis.plot([life.first, life.last], [row, row], color="lightgray", linewidth=6, solid_capstyle="butt")
            for (before, used), (after, more) in zip(life.cpu[:-1], life.cpu[1:], strict=True):
                share = min(1.0, (more - used) / max(after - before, 1e-9))
                axis.plot(
                    [before, after], [row, row], color="tab:blue", alpha=share, linewidth=6, solid_capstyle="butt"
                )
            axis.text(life.last, row, f" {life.cpu[-1][1]:.1f}", fontsize=7, va="center")
        for moment in run.trials:
            axis.axvline(moment, color="tab:red", linewidth=0.8)
        axis.set_yticks(range(len(lives[name])), [life.name for life in lives[name]], fontsize=7)
        axis.invert_yaxis()
        axis.set_title(f"{name}: {len(run.lives)} processes, {cpu(run):.0f} CPU-seconds to the first step", fontsize=9)
    axes[-1, 0].set_xlabel("seconds since the command; red: first step of a trial; numbers: CPU-seconds")
    figure.suptitle(f"The demo with two trials and one slot; {machine()['name']}", fontsize=10)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    older = {f"before ({commit(Path(root))})": start(SWEEP, Path(root)) for root in sys.argv[2:]}
    draw({**older, f"now ({commit()})": start(SWEEP)}, Path(sys.argv[1]))
