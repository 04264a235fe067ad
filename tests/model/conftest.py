"""Fixtures that several files of this folder share."""

from pathlib import Path

import pytest

from tests.model.encoders import VARIANTS
from tests.tiny_models import ENCODERS


@pytest.fixture(scope="session")
def folders(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of every encoder kind and variant."""
    made = tmp_path_factory.mktemp("variants")
    for name, make in VARIANTS.items():
        make(made / name)
    return {name: models / name for name in ENCODERS} | {name: made / name for name in VARIANTS}
