"""Layers, read from the imports: data ← model ← sweep; trackers and executors in `sweep` only, Ray Data in one file."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "data": {"model", "sweep", "ray", "mlflow", "optuna", "peft", "transformers"},
    "model": {"sweep", "ray", "mlflow", "optuna"},
    "sweep": set(),
}
ALLOWED = {("data/stream.py", "ray")}  # Ray Data, and nothing else of Ray


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("layer", FORBIDDEN)
def test_layer_imports_only_what_lies_below(layer: str) -> None:
    found = []
    for path in sorted((ROOT / layer).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        for module in imports(path):
            top = module.split(".")[0]
            if top in FORBIDDEN[layer] and (name, top) not in ALLOWED:
                found.append(f"{name} imports {module}")
    assert not found


def test_ray_data_is_the_only_ray_in_the_data_layer_and_stays_there() -> None:
    assert {module for module in imports(ROOT / "data/stream.py") if module.startswith("ray")} <= {
        "ray.data",
        "ray.data._internal.execution.execution_callback",  # a class of callbacks that has no public name
        "ray.data.block",
        "ray.data.datasource",
    }
    others = [path for path in (ROOT / "sweep").rglob("*.py") if any(m.startswith("ray.data") for m in imports(path))]
    assert not others


def test_every_source_file_is_small_enough_to_read() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): count
        for layer in FORBIDDEN
        for path in (ROOT / layer).rglob("*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 350
    }
    assert not long
