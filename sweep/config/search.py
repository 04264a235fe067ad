"""The settings of a search: its axes and fixed points, its budget, and the rule that prunes trials."""

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from data.config import Section
from model.config import Count
from sweep.config.space import EPOCHS, Axis, Sampler, Value, Values, plain, whole

SMALL = ("loss", "perplexity", "ece", "seconds", "steps")  # endings of metrics that are to be minimized
LEAST_EPOCHS = 4  # of a trial that the noise between two trainings is estimated from
# Share of the epochs before trials are compared: earlier, trials that start fast lead those that will win.
LATE = Fraction(3, 5)
PROMOTE = {"keep": 0.34, "after_trials": 3, "compare": "loss", "rungs": 1, "audit": 0.0}  # defaults of `kind: promote`
EARLY = Fraction(1, 8)  # share of the epochs before the first rung of `kind: promote`


# With `search.fidelity: data`, trials are compared on these shares of the training groups, one after another.
SHARES, LEAST_GROUPS = (0.25, 0.5, 1.0), 16  # so that the first share has four groups


class PruningConfig(Section):
    """Asynchronous successive halving (Li et al., 2020, arXiv 1810.05934) over the epochs."""

    kind: Literal["promote", "stop", "none"] = Field(
        "stop",
        description="promote: a trial pauses at a rung until it is among the best there, and any paused trial may "
        "continue later. stop: a trial that is not among the best at a rung ends there. none: no trial is pruned.",
    )
    first_epoch: Count | None = Field(
        None,
        description="First epoch after which trials are compared; the next ones double it. null: with promote, an "
        "eighth of train.epochs (of its largest value if it is an axis), rounded up; with stop, three fifths, "
        "because learning curves cross earlier and a trial that was stopped is lost.",
    )
    rungs: Count | None = Field(
        None,
        description="Number of epochs after which trials are compared, at most; null: all that fit. With promote, the "
        "default is 1. With search.fidelity: data, trials are compared after each share.",
    )
    compare: Literal["objective", "loss"] = Field(
        "objective",
        description="What is compared: the objective, or the loss of its task on the validation split, which says more "
        "after few epochs than F1 or accuracy does. With promote, the default is loss.",
    )
    keep: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Share of the trials that continues at each. With promote, the default is 0.34."
    )
    after_trials: Count = Field(
        4,
        description="Trials that must have reached an epoch before one is pruned, or continues from there. With "
        "promote, the default is 3, of each branch.",
    )
    noise: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="A trial also continues if it is behind by no more than this many standard errors of what is "
        "compared (resampling the sessions of the validation split).",
    )
    agreement: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="No trial is pruned at an epoch before after_trials trials have trained to their end and this "
        "share of their pairs has the same order at the epoch as at the end. 0: it does not matter.",
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
    tie_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="Share of the trials and of the budget that is kept for further seeds of the best configurations, "
        "as far as they are tied within noise; 0.15 is a good choice from 20 trials on. 0: none.",
    )
    fidelity: Literal["epochs", "data"] = Field(
        "epochs",
        description="What pruning compares trials by. epochs: rungs are epochs of a training. data: a trial trains on "
        "a quarter of the training groups, then on half of them, then on all, each time from the start and for all "
        "epochs; the last training is that of a trial without pruning.",
    )
    pruning: PruningConfig | None = Field(
        PruningConfig(kind="promote"),
        description="null: no trial is pruned. Where it is given without a kind, that is stop.",
    )
    sampler: Literal["auto", "tpe", "gp", "cmaes", "qmc", "random", "grid"] = Field(
        "auto",
        description="Optuna's sampler. auto: grid where search.trials reaches all combinations, and else tpe.",
    )
    startup_trials: Count = Field(
        6,
        description="Trials drawn at random before the sampler uses their results. With promote, they must have "
        "trained to their end: a trial that paused early says little.",
    )
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

    @property
    def compared(self) -> str:
        """The metric by which trials are compared at rungs: the objective, or the loss of its task."""
        if self.rule is None or self.rule.compare == "objective" or self.metric.endswith(SMALL):
            return self.metric
        task, slash, _ = self.metric.rpartition("/")
        return f"{task}{slash}loss"

    @property
    def branching(self) -> list[str]:
        """The axes in which trials that are compared do not differ: with promote, those that others depend on.

        Models that differ in them have other parts, and learn at another speed.
        """
        if self.rule is None or self.rule.kind != "promote":
            return []
        return sorted({name for axis in self.space.values() for name in axis.when if name in self.space})

    def first_rung(self, epochs: int) -> int | None:
        """Return the first epoch after which trials are compared; None without pruning.

        Args:
            epochs: `train.epochs` of the sweep. If that is an axis, its largest value counts, so that the epoch is the
                same for all trials; trials with fewer epochs may all end before it.
        """
        if self.rule is None:
            return None
        if self.fidelity == "data":
            return epochs
        share = EARLY if self.rule.kind == "promote" else LATE
        return self.rule.first_epoch or math.ceil(self._longest(epochs) * share)

    def rungs(self, epochs: int) -> list[int]:
        """Return the epochs after which trials are compared: they double, and end before the last epoch.

        There are `rule.rungs` at most. With `fidelity: data`, they are the last ones of all shares but the whole,
        counted over all trainings.

        Args:
            epochs: see `first_rung`.
        """
        if self.fidelity == "data":
            return [epochs * number for number in range(1, len(self.shares))] if self.rule else []
        first, rungs = self.first_rung(epochs), list[int]()
        while first is not None and first < self._longest(epochs):
            rungs.append(first)
            first *= 2
        return rungs[: self.rule.rungs] if self.rule else []

    def expected_share(self, epochs: int, trials: int) -> float:
        """Return the mean share of a full training that a trial costs, if the rule prunes as many trials as it may.

        Args:
            epochs: see `first_rung`.
            trials: total number of trials.
        """
        rule, last, going, done, before = self.rule, self._longest(epochs), float(trials), 0.0, 0
        ends = last * len(self.shares)
        for rung in self.rungs(epochs):
            assert rule is not None
            done, before = done + going * (rung - before) * self.share_at(rung, last), rung
            # That many are never pruned.
            never = rule.after_trials if rule.agreement else rule.after_trials - 1
            first = min(going, max(never, rule.finish) if rule.kind == "promote" else never)
            going = first + (going - first) * (rule.audit + (1 - rule.audit) * rule.keep)
        return (done + going * (ends - before)) / (trials * last)

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares of the training groups that a trial trains on, one after another."""
        return SHARES if self.fidelity == "data" else (1.0,)

    def share_at(self, epoch: int, epochs: int) -> float:
        """Return the share that a trial trains on in an epoch.

        Args:
            epoch: counted over all trainings of the trial, from 1.
            epochs: of each training.
        """
        return self.shares[min((epoch - 1) // epochs, len(self.shares) - 1)]

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


def _whole_numbers(axis: Axis) -> list[int]:
    """Return the extremes of an axis of whole numbers."""
    return [whole(value) for value in axis.extremes() if value is not None]
