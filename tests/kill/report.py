"""The tables of a run, and its JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.kill.fire import Kill
from tests.kill.plan import Shot
from tests.kill.verdict import Row


@dataclass
class Result:
    """A finished play."""

    name: str
    kills: list[Kill]
    rows: list[Row]
    starts: int
    seconds: float
    alone: float  # seconds of the comparison
    calm: float | None = None  # seconds of the undisturbed sweep
    states: dict[int, str] = field(default_factory=dict)
    unfired: list[Shot] = field(default_factory=list)  # the sweep ended first

    @property
    def faults(self) -> list[str]:
        """All violations."""
        return [f"{row.what}: {fault}" for row in self.rows for fault in row.faults]

    def count(self, what: str) -> int:
        """Return the number of violations by which something was lost, or doubled."""
        return sum(len(row.faults) for row in self.rows if row.counts == what)


def show(results: Sequence[Result], console: Console) -> None:
    """Print all tables."""
    console.print(kills_table(results), checks_table(results), kinds_table(results))
    for result in results:
        for fault in result.faults:
            console.print(f"FAULT, {result.name}: {fault}", style="red", soft_wrap=True, markup=False)
    console.print(headline(results))


def headline(results: Sequence[Result]) -> str:
    """Return the result in a line."""
    kills = sum(len(result.kills) for result in results)
    lost, doubled = (sum(result.count(what) for result in results) for what in ("lost", "doubled"))
    others = sum(len(result.faults) for result in results) - lost - doubled
    line = f"{kills} kills over {len(results)} sweep{'s' if len(results) > 1 else ''}: {lost} lost, {doubled} doubled"
    return line + (f", {others} other faults" if others else "")


def kills_table(results: Sequence[Result]) -> Table:
    """Return a table of every kill."""
    table = Table(title="kills")
    for column in ("play", "kill", "victim", "at step", "exit", "first s", "all s", "redone"):
        table.add_column(column)
    for place, result in enumerate(results, start=1):
        for kill in result.kills:
            where = " ".join(f"{number}@{step}" for number, step in kill.running.items())
            redone = " ".join(f"{number}:{count}" for number, count in kill.redone.items())
            name = f"{kill.shot.name}{' early' if kill.shot.early else ''} {kill.shot.at}"
            codes = " ".join(map(str, kill.codes))
            times = [_seconds(kill.first), _seconds(kill.all)]
            victims = "; ".join(victim[:50] for victim in kill.victims)
            table.add_row(str(place), name, victims, where, codes, *times, redone)
    return table


def checks_table(results: Sequence[Result]) -> Table:
    """Return a table of the conditions, by play."""
    table = Table(title="\n".join(f"{n}: {_title(result)}" for n, result in enumerate(results, start=1)))
    table.add_column("what must hold")
    for place in range(1, len(results) + 1):
        table.add_column(str(place))
    for what in dict.fromkeys(row.what for result in results for row in result.rows):
        cells = []
        for result in results:
            row = next((row for row in result.rows if row.what == what), None)
            cells.append("" if row is None else f"{len(row.faults)} FAULTS" if row.faults else f"yes  {row.note}")
        table.add_row(what, *cells)
    return table


def _title(result: Result) -> str:
    title = f"{result.name}: {len(result.kills)} kills, {result.starts} starts, {result.seconds:.0f} s"
    return title + (f" (undisturbed {result.calm:.0f} s)" if result.calm else "")


def kinds_table(results: Sequence[Result]) -> Table:
    """Return a table of what a kill costs, by kind."""
    kills = [kill for result in results for kill in result.kills]
    table = Table(title="what a kill costs: seconds until a trial, and all trials, train again; repeated steps")
    for column in ("kind", "kills", "median first", "median all", "max all", "most steps"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for name in sorted({kill.shot.name for kill in kills}):
        alike = [kill for kill in kills if kill.shot.name == name]
        first = [kill.first for kill in alike if kill.first is not None]
        every = [kill.all for kill in alike if kill.all is not None]
        times = [_seconds(median(first) if first else None), _seconds(median(every) if every else None)]
        times.append(_seconds(max(every, default=None)))
        steps = max((count for kill in alike for count in kill.redone.values()), default=0)
        table.add_row(name, str(len(alike)), *times, str(steps))
    return table


def content(results: Sequence[Result]) -> dict[str, Any]:
    """Return the content of the JSON file."""
    return {"headline": headline(results), "plays": [asdict(result) for result in results]}


def _seconds(number: float | None) -> str:
    return "" if number is None else f"{number:.1f}"
