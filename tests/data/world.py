"""A clean corpus that a test spoils before it is prepared."""

import csv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from data.corpus.audio import SAMPLE_RATE
from data.corpus.config import CorpusConfig
from data.corpus.issues import Finding
from data.errors import DataError
from data.importers import IMPORTERS
from data.preparation.build import prepare
from data.report.summary import read_findings
from data.shards.dataset import Shards

SESSIONS, TURNS, EVERY, LENGTH = 9, 10, 3.0, 2.5  # turns start every 3 s and take 2.5 s
LABELS = {"client": ["change", "neutral", "sustain"], "therapist": ["question", "reflection"]}
END = (TURNS - 1) * EVERY + LENGTH
BASE: dict[str, Any] = {
    "roles": {"T": "therapist", "C": "client"},
    "labels": LABELS,
    "max_rejected": 0.2,
    "columns": {name: name for name in "conversation id speaker text label start end video split".split()},
}


@dataclass
class World:
    """Rows by id and samples by session of a corpus that is not written yet."""

    rows: list[dict[str, Any]]
    sound: dict[str, np.ndarray]  # float32 [n, channels]
    rate: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    files: list[Callable[[Path], None]] = field(default_factory=list)  # change the written files

    def row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.rows if row["id"] == name)

    def line(self, name: str) -> int:
        return 2 + max(index for index, row in enumerate(self.rows) if row["id"] == name)

    def samples(self, name: str) -> np.ndarray:
        row = self.row(name)
        rate = self.rate[row["conversation"]]
        return self.sound[row["conversation"]][round(row["start"] * rate) : round(row["end"] * rate)]

    def prepare(self, folder: Path, audio: bool = True) -> tuple[Shards, list[Finding]]:
        table, recordings = folder / "corpus.csv", folder / "audio"
        recordings.mkdir(parents=True)
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows({**row, "id": row["id"].partition("/")[2]} for row in self.rows)
        for name, samples in self.sound.items() if audio else ():
            soundfile.write(recordings / f"{name}.wav", samples, self.rate[name], subtype="FLOAT")
        for spoil in self.files:
            spoil(folder)
        config = CorpusConfig.model_validate({**BASE, **self.settings})
        corpus = IMPORTERS["table"].read(table, recordings if audio else None, config)
        shards = prepare(corpus, folder / "shards", config)
        return shards, read_findings(shards)

    def prepare_text(self, folder: Path) -> tuple[Shards, list[Finding]]:
        """Prepare the corpus without its recordings, which is faster."""
        return self.prepare(folder, audio=False)


def clean_world() -> World:
    rows, sound = [], {}
    rng = np.random.default_rng(0)
    for name in (f"s{session}" for session in range(SESSIONS)):
        sound[name] = (rng.standard_normal((round((END + 1) * SAMPLE_RATE), 1)) * 0.05).astype(np.float32)
        for turn in range(TURNS):
            role = ("therapist", "client")[turn % 2]
            row = {"conversation": name, "id": f"{name}/{turn}", "speaker": role[0].upper(), "annotator": "a"}
            row |= {"text": f"words of turn {turn} in {name}", "video": f"v{name[1:]}", "split": ""}
            times = {"start": turn * EVERY, "end": turn * EVERY + LENGTH}
            rows.append(row | times | {"label": LABELS[role][turn // 2 % len(LABELS[role])]})
    return World(rows, sound, dict.fromkeys(sound, SAMPLE_RATE))


def refused(world: World, folder: Path) -> str:
    """Return the message of a failed preparation, which leaves no shards."""
    with pytest.raises(DataError) as caught:
        world.prepare(folder)
    assert not (folder / "shards").exists()
    return str(caught.value)
