"""The plan of a sweep as it lies in its folder, and how it compares with what came: `plan.json`, without torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data.atomic import write_file
from data.formats import format_duration
from sweep.config.schema import Config
from sweep.search.cost import device_seconds, format_device_hours
from sweep.search.study import TrialRecord

FILE = "plan.json"


@dataclass(frozen=True)
class Forecast:
    """What a sweep was expected to take, by the attempt that said so first."""

    trials: int  # in all
    before: float  # seconds of trials that had been then
    work: float  # seconds of trials that were left
    seconds: float  # by the clock, for these
    took: float | None = None  # by the clock, where one attempt did them all


def read(folder: Path) -> dict[str, Any]:
    """The plan of a sweep: `steps`, results by key; `excluded`, lines; `forecast`. Empty where there is none."""
    try:
        content = json.loads((folder / FILE).read_text())
    except (FileNotFoundError, ValueError, RecursionError):  # a crash of the machine left it empty: it is made again
        return {}
    return content if isinstance(content, dict) else {}


def write(folder: Path, **changed: Any) -> None:
    """Change a part of the plan, in one move."""
    write_file(folder / FILE, json.dumps(read(folder) | changed, indent=1))


def forecast(folder: Path) -> Forecast | None:
    """What was said first; None where nothing is left of it."""
    try:
        return TypeAdapter(Forecast).validate_python(read(folder).get("forecast"))
    except ValidationError:
        return None


def remember(folder: Path, said: Forecast) -> None:
    """Keep a forecast; one about as many trials is there already where a sweep goes on, and stays."""
    known = forecast(folder)
    if known is None or known.trials != said.trials:
        write(folder, forecast=asdict(said))


def ended(folder: Path, said: Forecast, seconds: float) -> None:
    """Note what the trials took, where the attempt that made the forecast did them all."""
    if forecast(folder) == said:
        write(folder, forecast=asdict(said) | {"took": seconds})


def lines(config: Config, folder: Path, entries: Sequence[TrialRecord]) -> list[str]:
    """What the plan excluded; and once all trials have ended, how it compares with what they took."""
    told = read(folder).get("excluded")
    excluded = [f"plan: {line}" for line in told] if isinstance(told, list) else []
    said = forecast(folder)
    done = sum(entry.state != "RUNNING" for entry in entries)
    if said is None or said.trials != config.search.trials or done < said.trials:
        return excluded
    used = device_seconds(entries) - said.before
    expected, real = (format_device_hours(config, seconds) for seconds in (said.work, used))
    hours = f"{expected} estimated, {real} used{_times(used, said.work)}"
    if said.took is None:
        return [*excluded, f"plan: {hours}, by several attempts"]
    estimated, taken = format_duration(said.seconds), format_duration(said.took)
    took = f"{estimated} estimated, {taken} taken{_times(said.took, said.seconds)}"
    return [*excluded, f"plan: {took}; {hours}"]


def _times(real: float, expected: float) -> str:
    return f" ({real / expected:.2f} times that)" if expected > 0 else ""
