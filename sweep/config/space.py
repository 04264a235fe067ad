"""The search: its axes, its fixed points, and the rule that prunes trials."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, Self

from pydantic import Field, JsonValue, model_validator

from data.config import Section
from model.config import Count

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = JsonValue  # of a setting; lists and mappings are values, too
Stored = bool | int | float | str | None  # a value as Optuna stores it
Values = dict[str, Value]  # of axes, by dotted key
SMALL = ("loss", "perplexity", "ece", "seconds", "steps")  # endings of metrics that are to be minimized
LEAST_EPOCHS = 4  # of a trial that the noise between two trainings is estimated from
EPOCHS, FOLD = "train.epochs", "data.fold"
# Share of the epochs before trials are compared: earlier, trials that start fast lead those that will win.
LATE = Fraction(3, 5)
PROMOTE = {
    "keep": 0.34,
    "after_trials": 6,
    "noise": 1.0,
    "agreement": 0.8,
    "audit": 0.0,
}  # defaults of `search.pruning.kind: promote`


class Sampler(Protocol):
    """The methods of an Optuna trial that draw values."""

    def suggest_categorical(self, name: str, choices: list[Stored]) -> Stored: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...
    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float: ...


def encode(value: object) -> Stored:
    """Return a value as Optuna stores it: lists and mappings as JSON, because choices must be hashable."""
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    assert value is None or isinstance(value, bool | int | float | str)
    return value


def plain(value: object) -> object:
    """Return the value of a setting as YAML has it, with lists for tuples."""
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


class Axis(Section):
    """The values of one setting: a list of choices, or a range (of whole numbers if both ends are whole)."""

    choices: list[Value] | None = Field(None, description="List of values; a plain list is short for this.")
    low: int | float | None = Field(None, description="Lower end of a range, included.")
    high: int | float | None = Field(None, description="Upper end of a range, included.")
    step: int | float | None = Field(None, description="Distance between values of a range.")
    log: bool = Field(False, description="Sample the range on a logarithmic scale.")
    when: dict[str, list[Value]] = Field(
        {}, description="Vary this setting only in trials where other settings have one of these values."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_list(cls, value: Any) -> Any:
        if not isinstance(value, dict | list | Axis):
            raise ValueError("give a list of choices, or a mapping with low and high")
        return {"choices": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            json.dumps([self.choices, self.when], allow_nan=False)
        except ValueError:
            raise ValueError("choices and values of `when` must be finite numbers: they are stored as JSON") from None
        if self.choices is not None:
            if not self.choices or len({repr(encode(choice)) for choice in self.choices}) < len(self.choices):
                raise ValueError("choices must be a list of different values, at least one")
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise ValueError("give either choices, or low and high")
            return self
        if self.low is None or self.high is None:
            raise ValueError("give a list of choices, or low and high")
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise ValueError("low and high must be finite numbers")
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

    @property
    def is_numeric(self) -> bool:
        """Return whether all values are numbers."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.extremes())

    @property
    def last(self) -> int | float:
        """The largest value of a range: `high`, or the last step before it."""
        assert self.low is not None
        assert self.high is not None
        if self.step is None:
            return self.high
        return self.low + self._steps * self.step if self._whole else self._at(self._steps)

    @property
    def _steps(self) -> int:
        """Number of steps in a range."""
        assert self.low is not None
        assert self.high is not None
        assert self.step is not None
        if self._whole:
            return int(self.high - self.low) // int(self.step)
        return math.floor((self.high - self.low) / self.step + 1e-8)

    def extremes(self) -> list[Value]:
        """Return all choices, or both ends of the range; with `inside` they decide whether the axis is valid."""
        if self.choices is not None:
            return list(self.choices)
        return [self.low] if self.low == self.last else [self.low, self.last]

    def values(self) -> Sequence[Value] | None:
        """Return all values of the axis; None if there are infinitely many."""
        if self.choices is not None:
            return list(self.choices)
        if self._whole:
            low, high, step = self.low, self.high, self.step or 1
            assert isinstance(low, int)
            assert isinstance(high, int)
            return range(low, high + 1, int(step))
        if self.step is None:
            return None
        return [self._at(index) for index in range(self._steps + 1)]

    def _at(self, index: int) -> float:
        """Return a value of a range with steps, computed as Optuna does: 3 steps of 0.1 are 0.3, not a little more."""
        return float(Decimal(str(self.low)) + index * Decimal(str(self.step)))

    def by_sign(self) -> list[Value]:
        """Return the largest extreme above 0 and one that is not above it, as far as there are such."""
        ordered = sorted(self.extremes(), key=lambda value: value if isinstance(value, int | float) else 0)
        return list({isinstance(value, int | float) and value > 0: value for value in ordered}.values())

    def inside(self) -> Value:
        """Return a value between the extremes; a fractional one if the range has any, for settings that refuse it."""
        if self.choices is not None or self._whole:
            return self.extremes()[0]
        assert self.low is not None
        assert self.high is not None
        return self.low + 0.381966 * (self.high - self.low)

    def contains(self, value: object) -> bool:
        """Return whether a value lies on the axis."""
        if self.choices is not None:
            return plain(value) in self.choices
        assert self.low is not None
        assert self.high is not None
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        if (self._whole and not isinstance(value, int)) or not self.low <= value <= self.high:
            return False
        if self.step is None:
            return True
        steps = (value - self.low) / self.step
        return math.isclose(steps, round(steps), abs_tol=1e-8)

    def same(self, value: Value) -> Stored:
        """Return what is equal for equal values of the axis: numbers may differ in type, and on steps by rounding."""
        if self.choices is not None:
            return encode(next((choice for choice in self.choices if choice == value), value))
        if not isinstance(value, int | float):
            return encode(value)
        assert self.low is not None
        if self._whole:
            return int(value)
        return float(value) if self.step is None else round((value - self.low) / self.step)

    def decode(self, stored: Stored) -> Value:
        """Return a value from what Optuna stored."""
        lists = (choice for choice in self.choices or [] if isinstance(choice, list | dict))
        return next((choice for choice in lists if encode(choice) == stored), stored)

    def distribution(self) -> "BaseDistribution":
        """Return the Optuna distribution that `suggest` draws from."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices is not None:
            return CategoricalDistribution([encode(choice) for choice in self.choices])
        low, high, step = self.low, self.last, self.step
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, step=int(step or 1), log=self.log)
        assert low is not None
        assert high is not None
        return FloatDistribution(float(low), float(high), step=None if step is None else float(step), log=self.log)

    def describe(self) -> str:
        """Return what may be chosen, for an error message."""
        if self.choices is not None:
            return f"choose from {self.choices}"
        return f"choose from {self.low} to {self.high}" + (f" in steps of {self.step}" if self.step else "")

    def suggest(self, key: str, sampler: Sampler) -> Value:
        """Draw a value for this axis."""
        if self.choices is not None:
            return self.decode(sampler.suggest_categorical(key, [encode(choice) for choice in self.choices]))
        low, high = self.low, self.last
        if isinstance(low, int) and isinstance(high, int):
            return sampler.suggest_int(key, low, high, step=int(self.step or 1), log=self.log)
        assert low is not None
        assert high is not None
        step = None if self.step is None else float(self.step)
        return sampler.suggest_float(key, float(low), float(high), step=step, log=self.log)


class PruningConfig(Section):
    """Asynchronous successive halving (Li et al., 2020, arXiv 1810.05934) over the epochs."""

    kind: Literal["promote", "stop", "none"] = Field(
        "stop",
        description="promote: a trial pauses at a rung until it is among the best there, and any paused trial may "
        "continue later. stop: a trial that is not among the best at a rung ends there. none: no trial is pruned.",
    )
    first_epoch: Count | None = Field(
        None,
        description="First epoch after which trials are compared; the next ones double it. null: with promote, the "
        "first one; with stop, three fifths of train.epochs (of its largest value if it is an axis), because learning "
        "curves cross earlier and a trial that was stopped is lost.",
    )
    keep: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Share of the trials that continues at each. With promote, the default is 0.34."
    )
    after_trials: Count = Field(
        4,
        description="Trials that must have reached an epoch before one is pruned, or continues from there. With "
        "promote, the default is 6.",
    )
    noise: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="A trial also continues if it is behind by no more than this many standard errors of its objective "
        "on the validation split (resampling sessions). With promote, the default is 1.",
    )
    agreement: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="No trial is pruned at an epoch before after_trials trials have trained to their end and this "
        "share of their pairs has the same order at the epoch as at the end. 0: it does not matter. With promote, the "
        "default is 0.8.",
    )
    finish: Count = Field(
        3, description="With promote: trials that are trained to their end at least; the best paused ones are chosen."
    )
    audit: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1,
        description="Share of the trials that is never pruned, to measure what pruning costs. 0: none. 1: all, so that "
        "the rule is only evaluated. With promote, the default is 0.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_promote(cls, value: Any) -> Any:
        is_promote = isinstance(value, dict) and value.get("kind") == "promote"
        return PROMOTE | value if is_promote else value


class BudgetConfig(Section):
    """Limits of what a sweep may spend; the first that is reached ends it."""

    gpu_hours: Annotated[float, Field(gt=0)] | None = Field(None, description="Hours of GPUs, in finished epochs.")
    hours: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Hours by the clock in which trials ran; those between two runs of the sweep do not count."
    )
    steps: Count | None = Field(None, description="Optimizer steps of all trials.")
    trials: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Trainings at full length; a pruned trial counts by its share of the epochs."
    )

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if not self.limits():
            raise ValueError("a budget needs a limit: set gpu_hours, hours, steps or trials, or budget to null")
        return self

    def limits(self) -> dict[str, float]:
        """Return the limits that are set, by name."""
        return {name: limit for name, limit in self if limit is not None}


class SearchConfig(Section):
    """What is searched, with how many trials, and by which metric."""

    trials: Count = Field(12, description="Total number of trials, failed ones included; raise it to extend a sweep.")
    metric: str = Field(
        "macro_f1",
        description="Objective on the validation split after the epoch that train.keep names: of the first task, or "
        "<task>/<metric>.",
    )
    learn_from: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="Folders of earlier sweeps of the same tasks, whose trials advise this search; auto: all sweeps "
        "beside this one that have trials. null: none.",
    )
    metrics: list[str] | None = Field(
        None,
        description="Several objectives, of which `metric` is the first: metrics, gpu_seconds, seconds or steps of a "
        "trial. They need pruning: null. null: `metric` alone.",
    )
    budget: BudgetConfig | None = Field(
        None, description="Ends the sweep before search.trials; running trials train to their end. null: no budget."
    )
    stop_when: Literal["noise"] | None = Field(
        None,
        description="noise: end the sweep once twice as many trials are expected to gain less than the noise between "
        "two trainings. null: never.",
    )
    pruning: PruningConfig | None = Field(
        PruningConfig(kind="promote"),
        description="null: no trial is pruned. Where it is given without a kind, that is stop.",
    )
    sampler: Literal["auto", "tpe", "gp", "cmaes", "qmc", "random", "grid"] = Field(
        "auto",
        description="Optuna's sampler. auto: grid where search.trials reaches all combinations, and else tpe.",
    )
    startup_trials: Count = Field(6, description="Trials drawn at random before the TPE sampler uses their results.")
    space: dict[str, Axis] = Field({}, description="Axes, by the dotted key of the setting that they vary.")
    points: list[dict[str, Value]] = Field([], description="Trials that run first: values for some or all axes.")

    @model_validator(mode="after")
    def _no_cycle(self) -> Self:
        try:
            self.order()
        except CycleError as error:
            raise ValueError(f"the conditions of {', '.join(error.args[1][1:])} form a cycle; remove one") from None
        return self

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Whether the metric is to be maximized or minimized."""
        return self.directions[0]

    @property
    def objectives(self) -> list[str]:
        """All objectives; `metric` is the first one."""
        return self.metrics or [self.metric]

    @property
    def rule(self) -> PruningConfig | None:
        """The rule that prunes trials; None if none does."""
        return None if self.pruning is None or self.pruning.kind == "none" else self.pruning

    @property
    def directions(self) -> list[Literal["maximize", "minimize"]]:
        """Whether each objective is to be maximized or minimized."""
        return ["minimize" if name.endswith(SMALL) else "maximize" for name in [self.metric, *self.objectives[1:]]]

    def first_rung(self, epochs: int) -> int | None:
        """Return the first epoch after which trials are compared; None without pruning.

        Args:
            epochs: `train.epochs` of the sweep. If that is an axis, its largest value counts, so that the epoch is the
                same for all trials; trials with fewer epochs may all end before it.
        """
        if self.rule is None:
            return None
        default = 1 if self.rule.kind == "promote" else math.ceil(self._longest(epochs) * LATE)
        return self.rule.first_epoch or default

    def rungs(self, epochs: int) -> list[int]:
        """Return the epochs after which trials are compared: they double, and end before the last epoch.

        Args:
            epochs: see `first_rung`.
        """
        first, rungs = self.first_rung(epochs), list[int]()
        while first is not None and first < self._longest(epochs):
            rungs.append(first)
            first *= 2
        return rungs

    def expected_share(self, epochs: int, trials: int) -> float:
        """Return the mean share of its epochs that a trial trains for, if the rule prunes as many trials as it may.

        Args:
            epochs: see `first_rung`.
            trials: total number of trials.
        """
        rule, last, going, done, before = self.rule, self._longest(epochs), float(trials), 0.0, 0
        for rung in self.rungs(epochs):
            assert rule is not None
            done, before = done + going * (rung - before), rung
            # That many are never pruned.
            never = rule.after_trials if rule.agreement else rule.after_trials - 1
            first = min(going, max(never, rule.finish) if rule.kind == "promote" else never)
            going = first + (going - first) * (rule.audit + (1 - rule.audit) * rule.keep)
        return (done + going * (last - before)) / (trials * last)

    def mean_epochs(self, epochs: int) -> float:
        """Return the mean number of epochs of a trial without pruning."""
        axis = self.space.get(EPOCHS)
        values = [epochs] if axis is None else _whole_numbers(axis)
        return sum(values) / len(values)

    def _longest(self, epochs: int) -> int:
        axis = self.space.get(EPOCHS)
        values = [] if axis is None else _whole_numbers(axis)
        return max([*values, epochs] if axis is None or axis.when else values)

    def order(self) -> list[str]:
        """Return the axes in the order of drawing: an axis comes after those that its condition names.

        Raises:
            CycleError: the conditions form a cycle.
        """
        needs = {key: [name for name in axis.when if name in self.space] for key, axis in self.space.items()}
        return list(TopologicalSorter(needs).static_order())

    def ancestors(self, keys: Iterable[str]) -> set[str]:
        """Return axes with all axes that decide whether they are varied."""
        found, left = set[str](), [key for key in keys if key in self.space]
        while left:
            key = left.pop()
            if key not in found:
                found.add(key)
                left += [name for name in self.space[key].when if name in self.space]
        return found

    def suggest(self, sampler: Sampler, base: Mapping[str, object]) -> Values:
        """Draw a value for every axis whose condition holds.

        Args:
            sampler: an Optuna trial; asked again, it gives the same values.
            base: settings by dotted key, for conditions on settings that are not axes.
        """
        values: Values = {}
        for key in self.order():
            if self.is_varied(key, values, base):
                values[key] = self.space[key].suggest(key, sampler)
        return values

    def is_varied(self, key: str, values: Mapping[str, Value], base: Mapping[str, object]) -> bool:
        """Return whether the condition of an axis holds.

        Args:
            key: of the axis.
            values: of the axes before it, see `order`.
            base: settings by dotted key, for axes without a value and for conditions on other settings.
        """
        when = self.space[key].when
        return all(values.get(name, plain(base.get(name))) in allowed for name, allowed in when.items())

    def covers(self, values: Mapping[str, Value], base: Mapping[str, object]) -> bool:
        """Return whether values are those of a trial of this search: one on each axis that is varied, and no others.

        Args:
            values: by axis.
            base: settings by dotted key, see `is_varied`.
        """
        varied = {key for key in self.space if self.is_varied(key, values, base)}
        return values.keys() == varied and all(self.space[key].contains(value) for key, value in values.items())

    def same(self, values: Mapping[str, Value]) -> str:
        """Return what is equal for trials that would train the same."""
        same = {key: self.space[key].same(value) if key in self.space else value for key, value in values.items()}
        return repr(sorted(same.items()))

    def complete(self, values: Mapping[str, Value], base: Mapping[str, Any]) -> Values:
        """Return the values of a trial, with the sweep's setting on axes that were added after it was drawn.

        Args:
            values: as they were drawn.
            base: settings by dotted key.
        """
        completed: dict[str, Any] = dict(values)
        for key in self.order():
            if key not in completed and self.is_varied(key, completed, base):
                completed[key] = plain(base[key])
        return completed


def whole(value: Value) -> int:
    """Return the value of a setting that is a whole number; 0 for anything else, which has been refused before."""
    return int(value) if isinstance(value, int | float | str) else 0


def _whole_numbers(axis: Axis) -> list[int]:
    """Return the extremes of an axis of whole numbers."""
    return [whole(value) for value in axis.extremes() if value is not None]
