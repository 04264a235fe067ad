"""What the driver and the workers of a trial exchange; this module imports nothing heavy, since all of them load it."""

from dataclasses import dataclass
from typing import Literal, TypedDict


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


class FitReport(TypedDict, total=False):
    """A result of Ray Tune: an epoch, or how a trial ended in its workers."""

    epoch: int
    metrics: str  # JSON, by name
    finished: bool
    interrupted: bool
    failed: str  # message for people
    reason: str  # kind of failure
    common: bool  # whether every trial would fail alike
    outside: bool  # whether the cause is outside the trial's configuration
    done: bool  # Tune's own key: the trial ends here
