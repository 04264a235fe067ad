"""Every wait for something outside the process has a limit, and docs/limits.md lists it.

The sources are read: a call that may wait without a limit must stand in the second table, with what ends it. The first
table names constants, and must have their values.
"""

import ast
import importlib
import re
from collections.abc import Iterator

import pytest

from tests.test_structure import ROOT, SOURCES

LIMITS = (ROOT / "docs/limits.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\|.*\| ([\d,.]+) (s|min|h) \|.*`([\w/]+\.py):([A-Z_]+)` \|$", flags=re.MULTILINE)
ENDED = re.compile(r"^\| `([\w/]+\.py):([\w.]+)` \| `([\w.]+)` \| .{20,} \|$", flags=re.MULTILINE)
SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
# Calls that wait, by the last parts of their names, and whether a positional argument is their limit.
WITH_LIMIT = {
    "ray.get": False,
    "ray.wait": False,
    "wait": True,
    "wait_for": False,
    "join": True,  # of a thread; that of a text always has an argument
    "result": True,
    "communicate": False,
    "acquire": True,
    "urlopen": False,
    "subprocess.run": False,
    "subprocess.call": False,
    "subprocess.check_call": False,
    "subprocess.check_output": False,
    "FileLock": True,
    "create_connection": True,
    "get_nowait": True,
}
WITHOUT_LIMIT = ("ray.init", "dist.barrier", "init_process_group", "fcntl.flock", "fcntl.lockf", "JobSubmissionClient")
WITHOUT_LIMIT += ("requests.get", "requests.post", "requests.request", "asyncio.run", "tuner.fit", "iter_batches")


def name_of(node: ast.expr) -> str:
    """Return the dotted name of what is called."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unlimited(call: ast.Call) -> str | None:
    """Return the name of a call that may wait without end."""
    name = name_of(call.func)
    if name == "file.iter_batches":  # of a Parquet file, not of a dataset of Ray
        return None
    for known, positional in WITH_LIMIT.items():
        if name == known or name.endswith(f".{known}"):
            given = any(word.arg in ("timeout", "connect_timeout") for word in call.keywords)
            return None if given or (positional and call.args and known != "FileLock") else known
    return next((known for known in WITHOUT_LIMIT if name == known or name.endswith(f".{known}")), None)


class Finder(ast.NodeVisitor):
    """Collects the calls of a file that may wait without end, with the functions around them."""

    def __init__(self) -> None:
        self.scope: list[str] = []
        self.found: set[tuple[str, str]] = set()

    def visit_scope(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self.scope.append(node.name)
        self.generic_visit(node)
        self.scope.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = visit_scope  # noqa: N815 — names of `NodeVisitor`

    def visit_Call(self, node: ast.Call) -> None:
        if (name := unlimited(node)) is not None:
            self.found.add((".".join(self.scope), name))
        self.generic_visit(node)


def waits() -> Iterator[tuple[str, str, str]]:
    """Yield file, function and call of each wait without a limit."""
    for file, path in SOURCES.items():
        finder = Finder()
        finder.visit(ast.parse(path.read_text(encoding="utf-8")))
        yield from ((file, scope, name) for scope, name in finder.found)


def test_waits_without_a_limit_are_explained() -> None:
    assert set(waits()) == set(ENDED.findall(LIMITS))


def test_limits_of_the_page_are_those_of_the_code() -> None:
    rows = ROW.findall(LIMITS)
    assert len(rows) > 25
    stated = {(file, constant): float(number.replace(",", "")) * SECONDS[unit] for number, unit, file, constant in rows}
    actual = {
        (file, constant): getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), constant)
        for file, constant in stated
    }
    assert stated == actual


def test_constants_that_are_limits_are_on_the_page() -> None:
    """By their names: `…_SECONDS` beside a wait, `PATIENCE`, `TIMEOUT` and `GRACE`."""
    listed = {(file, constant) for _, _, file, constant in ROW.findall(LIMITS)}
    for file, path in SOURCES.items():
        text = path.read_text(encoding="utf-8")
        for constant in re.findall(r"^([A-Z_]+) = [\d.*\s]+(?:#|$)", text, flags=re.MULTILINE):
            if constant != "MOMENT" and re.search(
                rf"(timeout=|join\(|within\(|acquire\(|communicate\(){constant}\b", text
            ):
                assert (file, constant) in listed, f"docs/limits.md: add {file}:{constant}"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("ray.get(x)", "ray.get"),
        ("ray.get(x, timeout=5)", None),
        ("ray.wait([x])", "ray.wait"),
        ("thread.join()", "join"),
        ("thread.join(5)", None),
        ("', '.join(names)", None),
        ("process.communicate()", "communicate"),
        ("self.event.wait()", "wait"),
        ("self.event.wait(3)", None),
        ("subprocess.run(words, check=True)", "subprocess.run"),
        ("urllib.request.urlopen(url)", "urlopen"),
        ("FileLock(path)", "FileLock"),
        ("lock.acquire(timeout=0)", None),
        ("requests.get(url)", "requests.get"),
        ("json.loads(x)", None),
    ],
)
def test_scan_finds_calls_that_wait(code: str, found: str | None) -> None:
    call = ast.parse(code, mode="eval").body
    assert isinstance(call, ast.Call)
    assert unlimited(call) == found
