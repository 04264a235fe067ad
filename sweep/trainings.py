"""The trainings of `sweep confirm`, which are no search: the trial that each repeats, its seed and its fold."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sweep.config import Config
from sweep.ledger import Entry, Ledger, best_first
from sweep.space import FOLD

SUFFIX, FOLDED, FILE = "-confirm", "-folds", "confirmed.json"
SEED = "seed"


def search_of(config: Config, folder: Path) -> Path | None:
    """The folder of the search that a sweep confirms; None where it is a search itself."""
    folder, points = folder.absolute(), config.search.points
    for suffix in (SUFFIX, FOLDED):
        search = folder.with_name(folder.name.removesuffix(suffix))
        if search != folder and (search / "config.yaml").exists() and points and all(SEED in one for one in points):
            return search
    return None


def without_luck(params: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration is, under whatever seed and on whatever fold."""
    return {key: value for key, value in params.items() if key not in (SEED, FOLD)}


def lines(config: Config, folder: Path, search: Path, entries: Sequence[Entry]) -> list[str]:
    """A line for each training, in their order; then what came out, once they were compared.

    Args:
        config: of the sweep that confirms.
        folder: of it.
        search: folder of the search.
        entries: of the ledger of the sweep that confirms.
    """
    ledger = Ledger.of(search)
    best, path = best_first(ledger.config, ledger.entries()), folder / FILE
    said = json.loads(path.read_text(encoding="utf-8"))["lines"] if path.exists() else []
    return [*(_line(config, entry, best) for entry in entries), *said]


def _line(config: Config, entry: Entry, best: Sequence[Entry]) -> str:
    own = without_luck(entry.params)
    number = next((str(first.number) for first in best if without_luck(first.params) == own), "unknown")
    which = f"trial {number}, seed {entry.params[SEED]}"
    which += f", fold {entry.params[FOLD]}" if FOLD in entry.params else ""
    value = "" if entry.value is None else f", {config.search.metric} {entry.value:.3f}"
    why = "" if entry.state in ("COMPLETE", "RUNNING") else f": {entry.why}"
    return f"#{entry.number} {which}: {entry.state}{value}{why}"
