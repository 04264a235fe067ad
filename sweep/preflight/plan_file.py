"""`plan.json` in a sweep's folder: results of dry runs, excluded trials, and the estimated time. Needs no torch."""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from data.atomic import write_file
from data.formats import format_duration
from sweep.config.schema import Config
from sweep.search.cost import device_seconds, format_device_hours
from sweep.search.stopping import total_trials
from sweep.search.study import TrialRecord

FILE = "plan.json"


class Estimate(BaseModel):
    """The estimated cost of a sweep's remaining trials, by the first attempt that estimated it."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)
    trials: int = Field(description="Total number of trials.")
    used: float = Field(alias="before", description="Seconds of training before the estimate.")
    work: float = Field(description="Seconds of training that are left.")
    seconds: float = Field(description="Seconds by the clock until all trials have ended.")
    took: float | None = Field(None, description="Actual seconds by the clock, if one attempt ran all these trials.")


class PlanFile(BaseModel):
    """The content of the file."""

    model_config = ConfigDict(populate_by_name=True)
    steps: dict[str, JsonValue] = Field({}, description="Results of dry runs by key, see `DryRunResult`.")
    excluded: list[str] = Field([], description="A line for each trial profile that does not fit into memory.")
    estimate: Estimate | None = Field(None, alias="forecast")

    @classmethod
    def read(cls, folder: Path) -> "PlanFile":
        """Read the plan of a sweep; empty if there is none, or if a crash of the machine damaged it."""
        try:
            return cls.model_validate_json((folder / FILE).read_bytes())
        except (FileNotFoundError, ValidationError):
            return cls()

    def write(self, folder: Path) -> None:
        """Write the plan atomically."""
        content = self.model_dump(mode="json", by_alias=True, include=self.model_fields_set)
        write_file(folder / FILE, json.dumps(content, indent=1))


def save_estimate(folder: Path, estimate: Estimate) -> None:
    """Save an estimate, unless an attempt before has saved one for the same number of trials."""
    plan = PlanFile.read(folder)
    if plan.estimate is None or plan.estimate.trials != estimate.trials:
        plan.estimate = estimate
        plan.write(folder)


def save_actual_time(folder: Path, estimate: Estimate, seconds: float) -> None:
    """Save what the trials took, if the attempt with this estimate was the first one and ran all of them."""
    plan = PlanFile.read(folder)
    if plan.estimate == estimate:
        plan.estimate = estimate.model_copy(update={"took": seconds})
        plan.write(folder)


def plan_lines(config: Config, folder: Path, trials: Sequence[TrialRecord]) -> list[str]:
    """Return the excluded trial profiles and, once all trials have ended, how the estimate compares with reality."""
    plan = PlanFile.read(folder)
    excluded, estimate = [f"plan: {line}" for line in plan.excluded], plan.estimate
    ended = sum(trial.has_ended for trial in trials)
    if estimate is None or estimate.trials != config.search.trials or ended < total_trials(config, trials):
        return excluded
    used = device_seconds(trials) - estimate.used
    estimated, actual = (format_device_hours(config, seconds) for seconds in (estimate.work, used))
    hours = f"{estimated} estimated, {actual} used{_ratio(used, estimate.work)}"
    if estimate.took is None:
        return [*excluded, f"plan: {hours}, by several attempts"]
    time = f"{format_duration(estimate.seconds)} estimated, {format_duration(estimate.took)} taken"
    return [*excluded, f"plan: {time}{_ratio(estimate.took, estimate.seconds)}; {hours}"]


def _ratio(actual: float, estimated: float) -> str:
    return f" ({actual / estimated:.2f} times that)" if estimated > 0 else ""
