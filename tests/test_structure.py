"""The structure of the code, read from its imports: ladders of folders, no cycles, small folders and files.

`LADDERS` is the order in which docs/architecture.md explains the folders: a folder may import from the
steps before it and from its own folder, and from nothing else in its package.
"""

import ast
import functools
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "model", "sweep")
LADDERS = {
    "data": (
        {"errors", "formats"},
        {"atomic", "config", "compat"},
        {"corpus"},
        {"shards", "importers"},
        {"loading"},
        {"preparation"},
        {"report"},
    ),
    "model": (
        {"config", "runtime", "compat"},
        {"parts"},
        {"checkpoints"},
        {"encoders"},
        {"speech_llm"},
        {"objectives", "tiny"},
        {"evaluation"},
        {"training", "alignment"},
    ),
    "sweep": (
        {"compat"},
        {"config"},
        {"search"},
        {"execution", "durability"},
        {"preflight"},
        {"analysis"},
        {"tracking", "export"},
        {"runner"},
        {"cli"},
        {"__main__"},
    ),
}
FORBIDDEN = {
    "data": {"model", "sweep", "ray", "mlflow", "optuna", "peft", "transformers"},
    "model": {"sweep", "ray", "mlflow", "optuna"},
    "sweep": set(),
}
ALLOWED = {("data/loading/ray_source.py", "ray"), ("data/compat.py", "ray")}  # Ray Data, and nothing else of Ray
MOST_ENTRIES = 12  # modules and folders in a folder; `__init__.py` and the marker `py.typed` do not count
MOST_LINES = 500

SOURCES = {
    path.relative_to(ROOT).as_posix(): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))
}
MODULES = {name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): name for name in SOURCES}


@functools.cache
def imports(path: Path) -> list[str]:
    """Return the modules that a file imports, those inside functions and under TYPE_CHECKING included."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += (names & MODULES.keys()) or {node.module}
    return found


def step(module: str) -> int:
    """Return the step of a module on its package's ladder."""
    package, *rest = module.split(".")
    if not rest:
        return len(LADDERS[package])  # the package's own __init__ may import everything below it
    steps = [place for place, names in enumerate(LADDERS[package]) if rest[0] in names]
    assert steps, f"{module}: add {rest[0]} to the ladder of {package}"
    return steps[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_what_is_below_it(package: str) -> None:
    found = [
        f"{name} imports {module}"
        for name, path in SOURCES.items()
        for module in imports(path)
        if name.startswith(f"{package}/")
        and (top := module.split(".")[0]) in FORBIDDEN[package]
        and (name, top) not in ALLOWED
    ]
    assert not found


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_import_only_down_the_ladder(package: str) -> None:
    found = []
    for module, name in MODULES.items():
        if module.split(".")[0] != package:
            continue
        for other in imports(SOURCES[name]):
            if other.split(".")[0] != package or other == package:
                continue
            same = module.split(".")[1:2] == other.split(".")[1:2]
            if not same and step(other) >= step(module):
                found.append(f"{name} imports {other}")
    assert not found


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        module: {other for other in imports(SOURCES[name]) if other in MODULES} for module, name in MODULES.items()
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import cycle: {' → '.join(error.args[1])}")


def test_ray_data_is_the_only_ray_in_the_data_layer() -> None:
    found = {module for name, _ in ALLOWED if name in SOURCES for module in imports(SOURCES[name])}
    assert all(module.startswith("ray.data") for module in found if module.split(".")[0] == "ray")
    others = [
        name
        for name in SOURCES
        if name.startswith("sweep/") and any(m.startswith("ray.data") for m in imports(SOURCES[name]))
    ]
    assert not others


def test_code_imports_nothing_that_the_type_check_skips() -> None:
    """mypy skips parts of packages that it checks otherwise: what is imported from them would have no type."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["overrides"]
    skipped = tuple(name.removesuffix("*") for name in settings[1]["module"])
    assert "torch._inductor." in skipped
    used = {module for path in SOURCES.values() for module in imports(path)}
    assert [module for module in sorted(used) if f"{module}.".startswith(skipped)] == []


def test_folders_are_small_enough_to_scan() -> None:
    folders = {path.parent for path in SOURCES.values()}
    entries = {
        folder.relative_to(ROOT).as_posix(): sorted(
            entry.name
            for entry in folder.iterdir()
            if entry.name not in ("__init__.py", "py.typed", "__pycache__") and not entry.name.startswith(".")
        )
        for folder in folders
    }
    assert not {folder: names for folder, names in entries.items() if len(names) > MOST_ENTRIES}


def test_files_are_short_enough_to_read() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in SOURCES.items()}
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}
