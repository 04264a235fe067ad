"""Benchmarks of the goals: each compares in one run, and says what, against what, and whether its goal is met.

python -m tests.bench [NAME …] [--json | --record]
python -m tests.bench --docs   # the tables of docs/speed.md, from the records
"""

import argparse
import importlib
import json
import sys

import psutil
from rich.console import Console
from rich.table import Table

from data.atomic import write_file
from tests.bench.measure import Row
from tests.bench.records import PAGE, page, read, record

NAMES = (
    *("steps", "rate", "packing", "frozen", "options", "audio", "padding", "reading", "waiting", "preparing", "memory"),
    *("lean", "slots", "groups", "sharding", "search", "learning", "ties", "multilora", "sweeps", "growth"),
    *("startup", "timeline", "gpu"),
)


def main() -> int:
    """Run the benchmarks that are named, or all; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--json", action="store_true", help="print [{name, against, ratio, goal, runs}] instead")
    parser.add_argument("--record", action="store_true", help="write tests/bench/results/NAME.json, too")
    parser.add_argument("--docs", action="store_true", help="measure nothing; write the tables of docs/speed.md")
    asked = parser.parse_args()
    if asked.docs:
        write_file(PAGE, page(PAGE.read_text(encoding="utf-8"), read()))
        return 0
    unknown = set(asked.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark is called {min(unknown)}; there are {', '.join(NAMES)}")
    rows: list[Row] = []
    for name in asked.names or NAMES:
        measured = importlib.import_module(f"tests.bench.{name}").run()
        if asked.record:
            print(record(name, measured), file=sys.stderr)
        rows += measured
    if asked.json:
        keys = ("name", "against", "ratio", "goal", "runs")
        print(json.dumps([{key: getattr(row, key) for key in keys} for row in rows], indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 150).print(_table(rows))
    return int(any(row.met is False for row in rows))


def _table(rows: list[Row]) -> Table:
    load = psutil.getloadavg()[0]
    table = Table(title=f"median of the rounds (least … most); {psutil.cpu_count()} CPUs, load {load:.1f}")
    for column in ("what", "against", "ratio", "spread", "goal", "met?", "note"):
        table.add_column(column, justify="right" if column in ("ratio", "goal") else "left")
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.3g}"
        spread = f"{min(row.runs):.3g} … {max(row.runs):.3g}" if row.runs else ""
        goal = "" if row.goal is None else f"{'≤' if row.most else '≥'} {row.goal:g}"
        met = {True: "yes", False: "NO", None: "" if row.goal is None else "not run"}[row.met]
        table.add_row(row.name, row.against, ratio, spread, goal, met, row.note)
    return table


if __name__ == "__main__":
    sys.exit(main())
