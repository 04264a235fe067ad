"""The search: its axes, the points it must contain, and how losers end early."""

import math
from collections.abc import Mapping
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self

from pydantic import Field, model_validator

from data.config import Section
from model.config import Count

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Scalar = bool | int | float | str | None
EPOCHS, FOLD = "train.epochs", "data.fold"
# Of the epochs, before anybody is ended: earlier on, quick starters lead those that will win.
LATE = Fraction(3, 5)


class Sampler(Protocol):
    """The part of an Optuna trial that draws values."""

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...
    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float: ...


class Axis(Section):
    """The values of one setting: a list of choices, or a range (of whole numbers if both ends are whole)."""

    choices: list[Scalar] | None = Field(None, description="The values themselves; a bare list is short for this.")
    low: int | float | None = Field(None, description="Lower end of a range, included.")
    high: int | float | None = Field(None, description="Upper end of a range, included.")
    step: int | float | None = Field(None, description="Distance between values of a range.")
    log: bool = Field(False, description="Sample the range on a logarithmic scale.")
    when: dict[str, list[Scalar]] = Field(
        {}, description="Only vary this setting in trials in which others have one of these values."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        return {"choices": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.choices is not None:
            if not self.choices or len(set(map(repr, self.choices))) < len(self.choices):
                raise ValueError("choices must be a list of different values, at least one")
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError("give either choices, or low and high")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give a list of choices, or low and high")
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("a logarithmic range needs low above 0 and has no step")
        if self.step is not None and (self.step <= 0 or (self._whole and not isinstance(self.step, int))):
            raise ValueError(f"step ({self.step}) must be above 0, and whole where low and high are")
        return self

    @property
    def _whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def extremes(self) -> list[Any]:
        """The values that decide whether all of the axis is allowed, together with `inside`."""
        return list(self.choices) if self.choices is not None else [self.low, self.high]

    def inside(self) -> Any:
        """A value between the extremes: one that a setting for whole numbers refuses, if the range holds such."""
        if self.choices is not None or self._whole:
            return self.extremes()[0]
        assert self.low is not None
        assert self.high is not None
        return self.low + 0.381966 * (self.high - self.low)

    def contains(self, value: Any) -> bool:
        """Whether a value lies on the axis."""
        if self.choices is not None:
            return value in self.choices
        assert self.low is not None
        assert self.high is not None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or (self._whole and not isinstance(value, int)) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / (self.step or 1)
        return self.step is None or math.isclose(steps, round(steps), abs_tol=1e-8)

    def distribution(self) -> "BaseDistribution":
        """What `suggest` draws from, as Optuna notes it with a value."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices is not None:
            return CategoricalDistribution(self.choices)
        low, high, step = self.low, self.high, self.step
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, step=int(step or 1), log=self.log)
        assert low is not None
        assert high is not None
        return FloatDistribution(float(low), float(high), step=None if step is None else float(step), log=self.log)

    def describe(self) -> str:
        """The axis in words."""
        if self.choices is not None:
            return f"choose from {self.choices}"
        return f"choose from {self.low} to {self.high}" + (f" in steps of {self.step}" if self.step else "")

    def suggest(self, key: str, sampler: Sampler) -> Any:
        """Draw a value."""
        if self.choices is not None:
            return sampler.suggest_categorical(key, self.choices)
        low, high = self.low, self.high
        if isinstance(low, int) and isinstance(high, int):
            return sampler.suggest_int(key, low, high, step=int(self.step or 1), log=self.log)
        assert low is not None
        assert high is not None
        step = None if self.step is None else float(self.step)
        return sampler.suggest_float(key, float(low), float(high), step=step, log=self.log)


class PruningConfig(Section):
    """Asynchronous successive halving (Li et al., 2020, arXiv 1810.05934) over the epochs."""

    first_epoch: Count | None = Field(
        None,
        description="First epoch after which a trial may end; later ones double. null: three fifths of train.epochs, "
        "of its largest value where it is an axis, since learning curves cross before.",
    )
    keep: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="Share of the trials that goes on at each.")
    after_trials: Count = Field(4, description="Trials that must have reached an epoch before one is ended there.")
    audit: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1,
        description="Share of the trials that is never ended: they show what pruning costs. 0: none; 1: all, so that "
        "the rule is only watched.",
    )


class SearchConfig(Section):
    """What is searched, for how long, and by which number."""

    trials: Count = Field(12, description="Trials in all, those that fail included; `--trials` raises it later.")
    metric: str = Field(
        "macro_f1",
        description="On the validation split, after a trial's last epoch; of the first task, or as <task>/<metric>.",
    )
    pruning: PruningConfig | None = Field(PruningConfig(), description="null: every trial trains to its end.")
    startup_trials: Count = Field(6, description="Trials drawn at random before the sampler (TPE) learns from them.")
    space: dict[str, Axis] = Field({}, description="Axes by the dotted key of the setting.")
    points: list[dict[str, Scalar]] = Field([], description="Trials to run first: values for some or all axes.")

    @model_validator(mode="after")
    def _no_circle(self) -> Self:
        try:
            self.order()
        except CycleError as error:
            raise ValueError(f"the conditions of {', '.join(error.args[1][1:])} form a circle; remove one") from None
        return self

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Of the metric."""
        return "minimize" if self.metric.endswith(("loss", "perplexity", "ece")) else "maximize"

    def first_rung(self, epochs: int) -> int | None:
        """The first epoch after which trials are compared; None where nothing is pruned.

        Args:
            epochs: `train.epochs` of the sweep. Where that is an axis its largest value counts, so that the epoch is
                one and the same for all trials; those that have fewer epochs may all end before it.
        """
        if self.pruning is None:
            return None
        return self.pruning.first_epoch or math.ceil(self._longest(epochs) * LATE)

    def rungs(self, epochs: int) -> list[int]:
        """The epochs after which trials are compared: they double, and nobody is judged after the last one.

        Args:
            epochs: as of `first_rung`.
        """
        first, found = self.first_rung(epochs), list[int]()
        while first is not None and first < self._longest(epochs):
            found.append(first)
            first *= 2
        return found

    def expected_share(self, epochs: int, trials: int) -> float:
        """The share of its epochs that a trial is trained for, on average over `trials` of them, by the rule alone.

        Args:
            epochs: as of `first_rung`.
            trials: in all.
        """
        rule, last, going, done, before = self.pruning, self._longest(epochs), float(trials), 0.0, 0
        for rung in self.rungs(epochs):
            assert rule is not None
            done, before = done + going * (rung - before), rung
            first = min(going, rule.after_trials - 1)  # which nothing ends
            going = first + (going - first) * (rule.audit + (1 - rule.audit) * rule.keep)
        return (done + going * (last - before)) / (trials * last)

    def mean_epochs(self, epochs: int) -> float:
        """Of trials that are drawn, before any is pruned."""
        axis = self.space.get(EPOCHS)
        values = [epochs] if axis is None else [int(value) for value in axis.extremes()]
        return sum(values) / len(values)

    def _longest(self, epochs: int) -> int:
        axis = self.space.get(EPOCHS)
        known = [] if axis is None else [int(value) for value in axis.extremes()]
        return max([*known, epochs] if axis is None or axis.when else known)

    def order(self) -> list[str]:
        """The axes in the order of drawing: an axis comes after those that its condition names.

        Raises:
            CycleError: axes depend on each other in a circle.
        """
        needs = {key: [other for other in axis.when if other in self.space] for key, axis in self.space.items()}
        return list(TopologicalSorter(needs).static_order())

    def suggest(self, sampler: Sampler, base: Mapping[str, Any]) -> dict[str, Any]:
        """Draw a value for every axis whose condition holds.

        Args:
            sampler: an Optuna trial; asked again, it gives the same values.
            base: settings by dotted key, for conditions on settings that are not axes.
        """
        values: dict[str, Any] = {}
        for key in self.order():
            axis = self.space[key]
            if all(values.get(other, base.get(other)) in allowed for other, allowed in axis.when.items()):
                values[key] = axis.suggest(key, sampler)
        return values

    def complete(self, values: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a trial that was drawn before some axes were there: these had the sweep's setting until then.

        Args:
            values: as they were drawn.
            base: settings by dotted key.
        """
        found = dict(values)
        for key in self.order():
            when = self.space[key].when
            if key not in found and all(
                found.get(other, base.get(other)) in allowed for other, allowed in when.items()
            ):
                found[key] = base[key]
        return found
