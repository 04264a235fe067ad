"""A play: a small sweep in its own folder, with the command and environment of its processes."""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.corpus import synthetic
from data.preparation.build import prepare
from tests import tiny_models

FAULTS = Path(__file__).with_name("faults")
CHECKPOINT_STEPS = 3
EPOCHS = 4


@dataclass(frozen=True)
class Variant:
    """The variant of a play.

    Args:
        workers: of a trial; with two of them one trial runs at a time.
        reader: of the data.
        server: whether MLflow is a server; else it is a file.
        study: see `storage.ledger`.
        trials: total number.
        processes: workers of all trials that run at a time.
        pruning: see `search.pruning.kind`; with "promote", trials pause.
    """

    workers: int
    reader: str
    server: bool = False
    study: str | None = None
    trials: int = 10
    processes: int = 2
    pruning: str = "stop"

    @property
    def name(self) -> str:
        """Title for people."""
        title = f"{self.workers} rank{'s' if self.workers > 1 else ''}, {self.reader} reader"
        title += f", {self.pruning}" + (", MLflow server" if self.server else "")
        return title + (", SQLite study" if self.study else "")


VARIANTS = (
    Variant(1, "ray"),
    Variant(2, "local", pruning="promote"),
    Variant(1, "local", server=True, study="sqlite:///study.db", pruning="promote"),
    Variant(2, "ray", server=True),
)


@dataclass(frozen=True)
class Stuff:
    """Corpus and models of all plays."""

    models: Path
    shards: Path


def make_stuff(folder: Path) -> Stuff:
    """Make a corpus in synthetic speech and untrained tiny models."""
    for name in ("whisper", "llm"):
        tiny_models.MODELS[name](folder / "models" / name)
    prepare(synthetic.corpus(sessions=9, turns=8, seed=5), folder / "shards")
    return Stuff(folder / "models", folder / "shards")


def settings(variant: Variant, stuff: Stuff) -> dict[str, Any]:
    """Return a sweep with pruning; its first parameters are given, so they do not depend on the order of events."""
    ranks = (2, 4, 8, 2, 4, 8)
    rates = (3e-3, 1e-2, 1e-3, 6e-3, 2e-3, 8e-3)
    modalities = ("speech", "text", "text+speech", "text", "speech", "text+speech")
    names = ("model.lora.rank", "train.learning_rate", "model.modality")
    return {
        "name": "kill",
        "seed": 3,
        "data": {"shards": str(stuff.shards), "history": 1, "reader": variant.reader},
        "tasks": {"forecast": 0.5},
        "model": {
            "encoder": {"path": str(stuff.models / "whisper")},
            "llm": {"path": str(stuff.models / "llm")},
            "lora": {"dropout": 0.1 if variant.workers == 1 else 0.0, "targets": ["q_proj", "v_proj"]},
        },
        "train": {"epochs": EPOCHS, "batch_size": 4, "checkpoint_steps": CHECKPOINT_STEPS, "keep": "best"},
        "resources": {"workers": variant.workers, "slots": variant.processes // variant.workers},
        "storage": {"keep": None, "ledger": variant.study},
        "search": {
            "trials": variant.trials,
            "startup_trials": 3,
            "pruning": {"kind": variant.pruning, "first_epoch": 1, "after_trials": 3, "audit": 0.1}
            | ({"agreement": 0.0} if variant.pruning == "promote" else {}),  # so that trials pause
            "space": {
                "model.lora.rank": [2, 4, 8],
                "train.learning_rate": {"low": 1e-3, "high": 1e-2, "log": True},
                "model.modality": ["speech", "text", "text+speech"],
            },
            "points": [dict(zip(names, point, strict=True)) for point in zip(ranks, rates, modalities, strict=True)],
        },
    }


class Play:
    """The folders of a sweep, and its command."""

    def __init__(self, variant: Variant, stuff: Stuff, root: Path) -> None:
        self.variant, self.root = variant, root
        self.folder = root / "runs" / "kill"
        self.faults = root / "faults"
        self.log = root / "log.txt"
        # Ray's sockets lie in it, and their names must not be long.
        self.scratch = Path(tempfile.mkdtemp(prefix="k", dir="/tmp"))
        self.tracking = ""  # of a server
        self.config = root / "kill.yaml"
        for path in (self.faults, self.folder.parent):
            path.mkdir(parents=True)
        self.config.write_text(yaml.safe_dump(settings(variant, stuff)))

    @property
    def command(self) -> list[str]:
        """The command, which is rerun after every kill."""
        return [sys.executable, "-m", "sweep", "run", str(self.config), "--out", str(self.folder)]

    def environment(self) -> dict[str, str]:
        """Return the environment of the driver and all that it starts."""
        unwanted = ("RAY_", "MLFLOW_", "KILL_", "PYTHONDONTWRITEBYTECODE", "PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        added = {"KILL_FOLDER": str(self.faults), "PYTHONPATH": str(FAULTS), "TMPDIR": str(self.scratch)}
        added["RAY_worker_niceness"] = "0"  # as the tests that run beside it
        return kept | added | ({"MLFLOW_TRACKING_URI": self.tracking} if self.tracking else {})
