"""Committed results of the benchmarks: one dated JSON file for each, from which the table of docs/speed.md is made.

python -m tests.bench steps --record   # measure, and write tests/bench/results/steps.json
python -m tests.bench --docs           # write the tables of docs/speed.md from all records
"""

import json
import platform
import re
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TypedDict

import psutil

from data.atomic import write_file
from tests.bench.measure import Row

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
PAGE = ROOT / "docs/speed.md"
PACKAGES = ("torch", "transformers", "peft", "ray", "optuna", "mlflow", "pyarrow")
BEGIN, END = "<!-- {}: written by `python -m tests.bench --docs` -->", "<!-- end -->"


class Figures(TypedDict):
    """One row of a benchmark, see `tests.bench.measure.Row`."""

    name: str
    against: str
    runs: list[float]
    goal: float | None
    most: bool
    note: str


class Record(TypedDict):
    """One run of a benchmark."""

    benchmark: str
    date: str  # of the measurement, ISO 8601
    commit: str  # that was measured; with "+" where files differed from it
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    rows: list[Figures]


def record(benchmark: str, rows: list[Row], folder: Path = RESULTS) -> Path:
    """Write what a benchmark measured on this machine; return the file."""
    content: Record = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "rows": [Figures(**asdict(row)) for row in rows],
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"{benchmark}.json"
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def read(folder: Path = RESULTS) -> dict[str, Record]:
    """Return the committed records by the name of their benchmark."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def table(records: list[Record]) -> str:
    """Return a Markdown table of records, a line for each figure."""
    lines = ["| what | against | measured | goal | when, on what |", "|---|---|---|---|---|"]
    for content in records:
        where = f"{content['date']}, {content['machine']['name']}"
        for figures in content["rows"]:
            row = Row(**figures)
            cells = (row.name, row.against, _measured(row), _goal(row), where)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def page(text: str, records: dict[str, Record]) -> str:
    """Return the text of docs/speed.md with its tables rewritten from the records that each names."""

    def fill(match: re.Match[str]) -> str:
        names = match["names"].split(", ")
        return f"{BEGIN.format(match['names'])}\n{table([records[name] for name in names])}\n{END}"

    begin = re.escape(BEGIN).replace(r"\{\}", "(?P<names>[a-z, ]+)")
    return re.sub(rf"{begin}\n.*?{re.escape(END)}", fill, text, flags=re.DOTALL)


def _measured(row: Row) -> str:
    if row.ratio is None:
        return row.note
    spread = f" ({min(row.runs):.3g} to {max(row.runs):.3g}, {len(row.runs)} rounds)" if len(row.runs) > 1 else ""
    return f"{row.ratio:.4g}{spread}" + (f": {row.note}" if row.note else "")


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    return f"{'≤' if row.most else '≥'} {row.goal:g}" + (": **missed**" if row.met is False else "")


def commit(root: Path = ROOT) -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")


def machine() -> dict[str, str | int | float]:
    import torch

    cpus, gpu = len(psutil.Process().cpu_affinity()), torch.cuda.is_available()
    return {
        "name": torch.cuda.get_device_name() if gpu else f"{cpus} CPUs",
        "processor": re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0],
        "cpus": cpus,
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "load": round(psutil.getloadavg()[0], 1),  # when the benchmark ended
    }
