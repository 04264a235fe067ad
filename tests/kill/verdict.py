"""What must hold after a sweep under fire: of its study, its results, its processes and its files."""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.checkpoints import checkpoint
from model.runtime.system_metrics import PREFIX
from sweep.search.study import TrialRecord
from tests.kill import targets
from tests.kill.fire import Kill
from tests.kill.play import CHECKPOINT_STEPS, EPOCHS, Play
from tests.model.trials import equal

ENDED = ("COMPLETE", "PRUNED")
CLOCK = ("seconds", "data_wait")
SWEEP_FILES = (".lock", "config.yaml", "mlflow.json", "plan.json", "sweep-id", "study.journal", "study.db")
TRIAL_FILES = (
    "predictions.json",
    "intervals.json",
    ".lock",
    "attempt-*",
    "checkpoint.pt",
    "config.yaml",
    "metrics.jsonl",
    "mlflow.json",
)
BESIDE = "checkpoint.previous.pt"  # of a pruned trial: its worker does not learn in time that it should remove the file


@dataclass(frozen=True)
class Row:
    """A condition that must hold.

    Args:
        what: must hold.
        faults: a line for each violation.
        note: for people.
        counts: what a violation means: something "lost" or "doubled", or "".
    """

    what: str
    faults: Sequence[str]
    note: str = ""
    counts: str = ""


def study_rows(trials: Mapping[int, TrialRecord], kills: Sequence[Kill], play: Play) -> list[Row]:
    """Check every trial: it exists once, with its parameters, in a final state, with each epoch once."""
    states = [trial.state for trial in trials.values()]
    numbers = list(range(play.variant.trials))
    counts = f"{states.count('COMPLETE')} complete, {states.count('PRUNED')} pruned"
    return [
        Row("the same trials", [] if list(trials) == numbers else [f"{list(trials)} in place of {numbers}"], counts),
        Row(
            "each in a final state",
            [f"trial {n}: {trial.state} ({trial.why})" for n, trial in trials.items() if trial.state not in ENDED],
            counts="lost",
        ),
        Row(
            "none of the audited was pruned",
            [f"trial {n}: {trial.why}" for n, trial in trials.items() if trial.audited and trial.state == "PRUNED"],
            f"{sum(trial.audited for trial in trials.values())} audited",
        ),
        Row("parameters as they were asked", list(_changed(trials, kills)), f"{len(kills)} looks"),
        Row("what had ended stays as it was", list(_reopened(trials, kills))),
        Row(
            "no epoch twice, none left out",
            [
                f"trial {n}: {list(trial.curve)}"
                for n, trial in trials.items()
                if list(trial.curve) != _all_epochs(trial)
            ],
            counts="doubled",
        ),
    ]


def _all_epochs(trial: TrialRecord) -> list[int]:
    last = EPOCHS if trial.state == "COMPLETE" else max(trial.curve, default=0)
    return list(range(1, last + 1))


def _changed(trials: Mapping[int, TrialRecord], kills: Sequence[Kill]) -> list[str]:
    return [
        f"trial {number}: {params} became {trials[number].params if number in trials else 'nothing'}"
        for kill in kills
        for number, params in kill.params.items()
        if number not in trials or trials[number].params != params
    ]


def _reopened(trials: Mapping[int, TrialRecord], kills: Sequence[Kill]) -> list[str]:
    return [
        f"trial {number}: {ended} became {trials[number].state, trials[number].value}"
        for kill in kills
        for number, ended in kill.ended.items()
        if (trials[number].state, trials[number].value) != ended
    ]


def reference_row(
    trials: Mapping[int, TrialRecord], calm: Mapping[int, TrialRecord], kills: Sequence[Kill], points: int
) -> Row:
    """Compare with the undisturbed sweep: parameters that were given, or drawn before the first kill."""
    before = kills[0].params if kills else trials
    alike = [number for number in calm if number < points or number in before]
    faults = [
        f"trial {n}: {trials[n].params} in place of {calm[n].params}"
        for n in alike
        if n not in trials or trials[n].params != calm[n].params
    ]
    faults += [] if trials.keys() == calm.keys() else [f"trials {list(trials)} in place of {list(calm)}"]
    return Row("trials and parameters of the undisturbed sweep", faults, f"{len(alike)} of {len(calm)} comparable")


def bits_row(trials: Mapping[int, TrialRecord], folder: Path, alone: Path) -> Row:
    """Compare weights, optimizer and all metrics of every trial with those of the trial trained by itself."""
    faults = []
    for number in trials:
        ours, theirs = (_state(place / f"{number:04d}") for place in (folder / "trials", alone))
        for name, value in theirs.items():
            if not equal(ours[name], value):
                faults.append(f"trial {number}: its {name} differs")
        history = dict(ours["history"])
        if history.keys() != trials[number].curve.keys():
            faults.append(f"trial {number}: the checkpoint has epochs {list(history)}, the study others")
        elif any(trials[number].curve[n] != history[n]["macro_f1"] for n in history):
            faults.append(f"trial {number}: the study's curve is not that of the checkpoint")
        if ours["kept"]["epoch"] != trials[number].epoch:
            faults.append(f"trial {number}: the study keeps epoch {trials[number].epoch}, the checkpoint another one")
    return Row("results bit for bit those of the trial alone", faults, f"{len(trials)} trials", "lost")


def _state(folder: Path) -> dict[str, Any]:
    """Return what must not differ: everything except times and process ids."""
    state = checkpoint.load(folder / checkpoint.FILE)
    history = [
        (epoch, {k: v for k, v in known.items() if k not in CLOCK}) for epoch, known in state["progress"]["history"]
    ]
    own = {name: state[name] for name in ("tensors", "digest", "optimizer", "schedule", "kept")}
    return own | {"history": history, "steps": state["progress"]["total_steps"]}


def cost_rows(kills: Sequence[Kill], before: Mapping[int, int]) -> list[Row]:
    """Check that a kill repeats at most two checkpoint intervals of each trial: one, and the steps that were made while
    its checkpoint was written, before which the next checkpoint does not begin."""
    most_allowed = 2 * CHECKPOINT_STEPS
    faults = [f"before any kill: {dict(before)}"] if before else []
    faults += [
        f"{kill.shot.name} {kill.shot.at}: {count} steps of trial {number}"
        for kill in kills
        for number, count in kill.redone.items()
        if count > most_allowed
    ]
    most = max((count for kill in kills for count in kill.redone.values()), default=0)
    return [Row("at most two checkpoint intervals once more", faults, f"{most} of {most_allowed} steps at most")]


def again_row(folder: Path) -> Row:
    """Check that repeated steps gave the same numbers."""
    faults, twice = [], 0
    for path in sorted(folder.glob("trials/*/metrics.jsonl")):
        known: dict[tuple[str, int], Any] = {}
        for line in lines(path):
            for name, value in line["values"].items():
                if name in CLOCK or name.startswith(PREFIX):
                    continue
                twice += (name, line["step"]) in known
                if known.setdefault((name, line["step"]), value) != value:
                    faults.append(f"{path.parent.name}: {name} at {line['step']}")
    return Row("what was done twice gave the same numbers", faults, f"{twice} points")


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a metrics log."""
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def left_rows(play: Play) -> list[Row]:
    """Check that nothing runs any more and no file is left over."""
    running = targets.belonging(play.folder, play.scratch)
    left = [f"{process.pid} {targets.title(process)[:60]}" for process in running]
    temporary = sorted(path.name for path in play.scratch.iterdir())
    ray = [name for name in temporary if name.startswith("sweep-ray-")]
    others = [name for name in temporary if name not in ray]
    return [
        Row("nothing runs any more", left),
        Row("no folder of Ray's is left", ray, f"besides: {', '.join(others)}" if others else ""),
        Row("no file without an owner", strangers(play.folder)),
    ]


def strangers(folder: Path) -> list[str]:
    """Return files that nothing needs any more."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        place = path.relative_to(folder)
        names = SWEEP_FILES if len(place.parts) == 1 else TRIAL_FILES
        known = len(place.parts) in (1, 3) and any(fnmatch.fnmatch(path.name, name) for name in names)
        if not known and path.name != BESIDE:
            found.append(str(place))
    for trial in sorted(folder.glob("trials/*")):
        if len(attempts := sorted(path.name for path in trial.glob("attempt-*"))) != 1:
            found.append(f"{trial.name}: {attempts}")
    return found
