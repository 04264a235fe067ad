"""The axes of a search, and their values."""

import json
import math
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Protocol, Self

from pydantic import Field, JsonValue, model_validator

from data.config import Section

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Value = JsonValue  # of a setting; lists and mappings are values, too
Stored = bool | int | float | str | None  # a value as Optuna stores it
Values = dict[str, Value]  # of axes, by dotted key
EPOCHS, FOLD, SEED = "train.epochs", "data.fold", "seed"


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


def whole(value: Value) -> int:
    """Return the value of a setting that is a whole number; 0 for anything else, which has been refused before."""
    return int(value) if isinstance(value, int | float | str) else 0
