"""What a sweep found: its progress, its cost, the predictions of its trials, and the JSON that scripts rely on."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.errors import UserError, reason
from data.formats import format_duration, format_hours
from model.evaluation.metrics import Record
from sweep.config.schema import Config
from sweep.search.cost import device_hours, device_name, device_seconds
from sweep.search.study import TrialRecord, best_first, horizon

VAGUE = ("dtype", "enabled", "init_from", "kind", "path")  # names of settings that say nothing by themselves
ORDER = ("COMPLETE", "PRUNED", "RUNNING", "FAIL")


def ranked(config: Config, entries: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Complete trials first, best first; then the others by how far they came."""
    sign = -1 if config.search.direction == "maximize" else 1

    def key(entry: TrialRecord) -> tuple[int, int, float, int]:
        reached = 0 if entry.state == "COMPLETE" else -len(entry.curve)
        return ORDER.index(entry.state), reached, sign * (entry.value if entry.value is not None else 0), entry.number

    return sorted(entries, key=key)


@dataclass(frozen=True)
class Progress:
    """How far a sweep is."""

    target: int  # trials in all
    complete: int
    pruned: int
    failed: int
    running: int  # by the ledger: begun and not ended, whether or not somebody works on them
    best: TrialRecord | None
    seconds_left: float | None  # an estimate; None before the first epoch, and when nothing is left
    hours: float  # of the devices, in the epochs that were finished
    device: Literal["GPU", "CPU"]

    @property
    def done(self) -> int:
        """Trials in a final state."""
        return self.complete + self.pruned + self.failed

    def hours_text(self) -> str:
        """What was used."""
        return format_hours(self.hours, self.device)

    def line(self) -> str:
        """In a line."""
        counts = {"complete": self.complete, "running": self.running, "pruned": self.pruned, "failed": self.failed}
        parts = [f"{self.done}/{self.target} trials done"]
        parts += [", ".join(f"{count} {name}" for name, count in counts.items() if count)]
        parts += [f"best {self.best.value:.3f} (#{self.best.number})"] if self.best else []
        parts += [_time_left(self.seconds_left)] if self.seconds_left is not None else []
        return "; ".join(part for part in [*parts, self.hours_text() if self.hours else ""] if part)


def progress(config: Config, entries: Sequence[TrialRecord], slots: int | None = None) -> Progress:
    """How far a sweep is.

    Args:
        config: of the sweep.
        entries: of its ledger.
        slots: trials at a time, if that is known; else as many as are set, or as run.
    """
    states, resources = Counter(entry.state for entry in entries), config.resources
    return Progress(
        target=max(config.search.trials, len(entries)),
        complete=states["COMPLETE"],
        pruned=states["PRUNED"],
        failed=states["FAIL"],
        running=states["RUNNING"],
        best=next(iter(best_first(config, entries)), None),
        seconds_left=_seconds_left(config, entries, slots or resources.slots or max(1, states["RUNNING"])),
        hours=device_hours(config, device_seconds(entries)),
        device=device_name(config),
    )


def _seconds_left(config: Config, entries: Sequence[TrialRecord], slots: int) -> float | None:
    """Median seconds of an epoch, times the epochs that a slot still has to do, as far as one can know."""
    paces = [
        entry.metrics["seconds"] / len(entry.curve) for entry in entries if entry.curve and "seconds" in entry.metrics
    ]
    running = [horizon(config, entry.params) - len(entry.curve) for entry in entries if entry.state == "RUNNING"]
    new = max(0, config.search.trials - len(entries))
    if not paces or not (running or new):
        return None
    # Trials to come are thought to come as far as those that ended did: pruning cuts many of them short.
    ended = [len(entry.curve) for entry in entries if entry.state in ("COMPLETE", "PRUNED")]
    each = statistics.mean(ended) if ended else config.train.epochs
    epochs = max((sum(running) + new * each) / slots, max(running, default=0))
    return float(statistics.median(paces) * epochs)


def _time_left(seconds: float) -> str:
    return f"about {format_duration(max(10, round(seconds / 10) * 10) if seconds < 90 else seconds)} left"


def read_predictions(folder: Path, name: str = "predictions.json") -> dict[str, tuple[list[str], list[Record]]]:
    """By task, the labels and the predictions of a trial's last evaluation; empty if there was none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / name
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        records = [Record(**{**row, "scores": tuple(row["scores"])}) for row in content["records"]]
        return {
            task: (labels, [record for record in records if record.task == task])
            for task, labels in content["labels"].items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: damaged ({reason(error)}); remove it, and do without this trial's intervals"
        ) from None


def entry_json(entry: TrialRecord, run_id: str | None, attempts: int | None = None) -> dict[str, Any]:
    """A trial in the form that scripts rely on.

    Args:
        entry: of the ledger.
        run_id: of MLflow, if it has one.
        attempts: how often it was started, if that is known.
    """
    return {
        "number": entry.number,
        "state": entry.state,
        "params": entry.params,
        "value": _finite(entry.value),
        "metrics": {name: _finite(value) for name, value in entry.metrics.items()},
        "steps": entry.steps,
        "epochs": len(entry.curve),
        "audited": entry.audited,
        "spared": entry.exempted_at,
        "attempts": attempts,
        "reason": entry.reason,
        "why": entry.why,
        "mlflow_run_id": run_id,
    }


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest endings of dotted keys that still tell them apart, and say something."""
    names = {}
    for key in keys:
        parts = key.split(".")
        for size in range(1 + (parts[-1] in VAGUE), len(parts) + 1):
            ending = ".".join(parts[-size:])
            if sum(f".{other}".endswith(f".{ending}") for other in keys) == 1:
                break
        names[key] = ending
    return names


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
