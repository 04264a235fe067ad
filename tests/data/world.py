"""A clean corpus that a test spoils before it is prepared."""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from data.corpus.config import CorpusConfig
from data.corpus.issues import Finding
from data.errors import DataError
from data.importers import IMPORTERS
from data.preparation.build import prepare
from data.report.summary import read_findings
from data.shards.dataset import Shards

SESSIONS, TURNS, EVERY, LENGTH = 9, 20, 3.0, 2.5  # turns start every 3 s and take 2.5 s
LABELS = {"client": ["change", "neutral", "sustain"], "therapist": ["question", "reflection"]}
END = (TURNS - 1) * EVERY + LENGTH


@dataclass
class World:
    """A clean corpus that a test spoils before it is prepared: rows by id, samples by session."""

    rows: list[dict[str, Any]]
    sound: dict[str, np.ndarray]  # float32 [n, channels]
    rate: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    files: list[Callable[[Path], None]] = field(default_factory=list)  # spoil what was written

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.rows if row["id"] == name)

    def line(self, name: str) -> int:
        return 2 + max(place for place, row in enumerate(self.rows) if row["id"] == name)

    def samples(self, name: str) -> np.ndarray:
        row = self.row(name)
        rate = self.rate[row["conversation"]]
        return self.sound[row["conversation"]][round(row["start"] * rate) : round(row["end"] * rate)]

    def write(self, folder: Path) -> tuple[Path, Path]:
        table, audio = folder / "corpus.csv", folder / "audio"
        audio.mkdir(parents=True)
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows({**row, "id": row["id"].partition("/")[2]} for row in self.rows)
        for name, samples in self.sound.items():
            soundfile.write(audio / f"{name}.wav", samples, self.rate[name], subtype="FLOAT")
        for spoil in self.files:
            spoil(folder)
        return table, audio

    def prepare(self, folder: Path) -> tuple[Shards, list[Finding]]:
        table, audio = self.write(folder)
        config = CorpusConfig.model_validate({**BASE, **self.settings})
        shards = prepare(IMPORTERS["table"].read(table, audio, config), folder / "shards", config)
        return shards, read_findings(shards)


BASE: dict[str, Any] = {
    "roles": {"T": "therapist", "C": "client"},
    "labels": LABELS,
    "max_rejected": 0.2,
    "columns": {name: name for name in "conversation id speaker text label start end video split".split()},
}


def refused(world: World, folder: Path) -> str:
    """The message of a failed build, which leaves no shards."""
    with pytest.raises(DataError) as caught:
        world.prepare(folder)
    assert not (folder / "shards").exists()
    return str(caught.value)
