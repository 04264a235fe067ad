"""Searches whose trials are played, not trained: predictions follow from the parameters and the seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from model.evaluation.metrics import Record, summarise
from sweep.config.diff import claim_folder
from sweep.config.paths import trial_folder
from sweep.config.schema import Config, parse
from sweep.search.study import StudyStore
from tests.conftest import LABELS

SPACE = {
    "model.modality": ["speech", "text"],
    "model.lora.rank": [4, 8, 16],
    "train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "model.end_of_audio": {"choices": ["none", "learned"], "when": {"model.modality": ["speech"]}},
}
REFERENCE = {
    "model.modality": "speech",
    "model.lora.rank": 8,
    "train.learning_rate": 1e-3,
    "model.end_of_audio": "none",
}
TEXT = {key: value for key, value in REFERENCE.items() if key != "model.end_of_audio"} | {"model.modality": "text"}
POINTS = [REFERENCE, TEXT, REFERENCE | {"model.lora.rank": 16}, REFERENCE | {"model.end_of_audio": "learned"}]
SESSIONS, TURNS, FOLDS = 16, 24, 3


def settings(**search: Any) -> Config:
    """Return a sweep over some points, followed by drawn trials."""
    defaults = {"trials": 6, "pruning": None, "space": SPACE, "points": POINTS}
    return parse({"name": "played", "train": {"epochs": 2}, "search": defaults | search}, "test")


def said(params: Mapping[str, Any], seed: int, split: str = "val") -> list[Record]:
    """Return the predictions of a trial: speech is right for 8 of 10, text for 6; the rest matters little."""
    skill = (0.8 if params.get("model.modality", "speech") == "speech" else 0.6) + 0.001 * params["model.lora.rank"]
    items = np.random.default_rng([1 if split == "val" else 2])
    labels = items.choice(LABELS, SESSIONS * TURNS)
    drawn = np.random.default_rng([seed, int(1e6 * params["train.learning_rate"]), params["model.lora.rank"]])
    records = []
    for index, label in enumerate(labels):
        prediction = str(label) if drawn.random() < skill else str(drawn.choice(LABELS))
        scores = tuple(0.0 if name == prediction else -2.0 for name in LABELS)
        session = f"{split}{index % SESSIONS}"
        key = f"{session}/{index}"
        records.append(Record(key, "classify", session, "client", None, str(label), prediction, scores, 1.0, 2))
    return records


def held(records: Sequence[Record], params: Mapping[str, Any], split: str = "val") -> list[Record]:
    """Return the records that a trial on a fold predicts: `data.fold` is its test fold, and the next one validates."""
    if "data.fold" not in params:
        return list(records)
    part = (params["data.fold"] + (split == "val")) % FOLDS
    return [record for record in records if int(record.conversation.removeprefix(split)) % FOLDS == part]


def write(folder: Path, records: Sequence[Record]) -> None:
    """Write predictions as a trial does."""
    content = {"labels": {"classify": LABELS}, "records": [asdict(record) for record in records]}
    (folder / "predictions.json").write_text(json.dumps(content))


def played(config: Config, folder: Path, allow_other_base: bool = False) -> int:
    """Do what `sweep run` does without training anything, and return the exit code 0."""
    claim_folder(config, folder)
    study = StudyStore.open(folder, config)
    study.bind("f" * 16, "0+abc")
    while (asked := study.ask([], config.search.trials)) is not None:
        number, params = asked
        (trial := trial_folder(folder, number)).mkdir(parents=True)
        records = held(said(params, params.get("seed", 0)), params)
        write(trial, records)
        metrics = summarise(records, {"classify": LABELS}, {}) | {"seconds": 60.0 + number}
        for epoch in range(1, config.train.epochs + 1):
            study.report(number, epoch, metrics | {"steps": 12 * epoch})
        study.complete(number)
    return 0
