"""Fixtures that several files of this folder share."""

from pathlib import Path

import pytest

from data.corpus.schema import Turn
from data.shards.dataset import Shards
from tests.conftest import LABELS
from tests.model.common import voted
from tests.model.encoders import VARIANTS
from tests.tiny_models import AUDIO_LLMS, ENCODERS


@pytest.fixture(scope="session")
def folders(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of every encoder kind and variant."""
    made = tmp_path_factory.mktemp("variants")
    for name, make in VARIANTS.items():
        make(made / name)
    return {name: models / name for name in (*ENCODERS, *AUDIO_LLMS)} | {name: made / name for name in VARIANTS}


@pytest.fixture(scope="session")
def disputed(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Ten annotators coded two turns of three, and agree in one of them."""

    def vote(number: int, turn: Turn) -> dict[str, int]:
        assert turn.label is not None
        other = LABELS[(LABELS.index(turn.label) + 1) % 3]
        return [{}, {turn.label: 10}, {turn.label: 6, other: 4}][number % 3]

    return voted(tmp_path_factory.mktemp("votes") / "shards", vote)
