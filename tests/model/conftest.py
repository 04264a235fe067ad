"""Fixtures that several files of this folder share."""

from pathlib import Path

import pytest

from model.encoders.base import SpeechEncoder
from tests.conftest import ENCODERS
from tests.model.encoders import VARIANTS, fresh


@pytest.fixture(scope="module")
def folders(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of every kind and variant."""
    made = tmp_path_factory.mktemp("variants")
    for name, make in VARIANTS.items():
        make(made / name)
    return {name: models / name for name in ENCODERS} | {name: made / name for name in VARIANTS}


@pytest.fixture
def encoder(folders: dict[str, Path], request: pytest.FixtureRequest) -> SpeechEncoder:
    return fresh(folders[request.param])
