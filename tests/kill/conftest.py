"""Keeps the long form out of the suite, as tests for a GPU are where there is none."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "long" not in config.option.markexpr:
        skip = pytest.mark.skip(reason="half an hour of kills and more; ask for it with -m long")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)
