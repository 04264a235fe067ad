"""Fixtures that several files of this folder share."""

import pytest

from tests.data.world import World, clean_world


@pytest.fixture
def world() -> World:
    return clean_world()
