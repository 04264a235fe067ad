"""What the driver and the workers of a group exchange; this module imports nothing heavy, since all of them load it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self, TypedDict

if TYPE_CHECKING:
    from ray import ObjectRef

RETRIES = 3  # restarts of a job inside its worker group without a new epoch in between


@dataclass(frozen=True, repr=False)
class TrialJob:
    """A trial as its workers receive it. Tune copies and keeps it, so it is flat and holds strings."""

    folder: str  # of the trial
    config: str  # JSON of the trial's `ResolvedConfig`
    reader: Literal["local", "ray"]
    features: tuple[str, ...]  # folders of cached encoder features; none: the trial computes them itself
    teacher_logits: str | None  # folder of cached teacher logits; None: the trial computes them itself
    bases: str = "{}"  # JSON of the base models that the driver found, by setting; see `BaseIdentity`
    allow_other_base: bool = False  # whether a checkpoint of another base model may be continued


@dataclass(frozen=True, repr=False)
class Task:
    """Work besides trials: a dry run, or some files of the feature cache. See `sweep.execution.tasks`."""

    calls: "ObjectRef"  # a list of functions; each worker of the group calls a share of them
    restarts: int  # how often new workers repeat the task after they have died
    temporary: bool  # whether no trial needs the models that it loads

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Return the same task: Tune copies what it gets, and a reference of Ray's must not be copied."""
        return self


@dataclass(frozen=True)
class Standby:
    """The workers wait: there is nothing to do until the queue of tasks and trials changes."""

    version: int  # of the queue when there was nothing to do, see `Events`


Job = TrialJob | Task | Standby


class FitReport(TypedDict, total=False):
    """A result of Ray Tune: an epoch, or how a trial or a task ended in its workers."""

    epoch: int
    metrics: str  # JSON, by name
    finished: bool
    results: list[str]  # of the functions of a task, in order
    interrupted: bool
    failed: str  # message for people
    reason: str  # kind of failure
    common: bool  # whether every trial would fail alike
    outside: bool  # whether the cause is outside the trial's configuration
    done: bool  # Tune's own key: the trial ends here
