"""`corpus.json` in a sweep's folder: what a reader of its results must know about the labels of the corpus.

These are doubts about the labels, the codes that a class merges, and how far annotators agree. They are kept, because
the corpus may be on another machine than the one that shows the results.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from data.atomic import write_file
from model.evaluation.ceiling import Ceiling

FILE = "corpus.json"


def save_corpus_notes(folder: Path, notes: Sequence[str], classes: str = "", ceilings: Sequence[Ceiling] = ()) -> None:
    """Save the notes of a sweep, the codes that each class merges, and the ceilings; no file where there are none."""
    if notes or classes or ceilings or (folder / FILE).exists():
        content: dict[str, object] = {"notes": list(notes)}
        if classes:
            content["classes"] = classes
        if ceilings:
            content["ceilings"] = [ceiling.model_dump(mode="json") for ceiling in ceilings]
        write_file(folder / FILE, json.dumps(content, indent=1))


def read_corpus_notes(folder: Path) -> list[str]:
    """Return the notes of a sweep; none where an older version started it, or where the file is damaged."""
    try:
        content = json.loads((folder / FILE).read_bytes())
        return [str(note) for note in content["notes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def read_classes(folder: Path) -> str:
    """Return the codes that each class of the labels merges; "" where none does, or where it is not known."""
    try:
        return str(json.loads((folder / FILE).read_bytes()).get("classes", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def read_ceilings(folder: Path, split: str = "val") -> list[Ceiling]:
    """Return the human ceiling of each task in a split; none where annotators do not say, or where it is not known."""
    try:
        found = json.loads((folder / FILE).read_bytes()).get("ceilings", [])
        ceilings = [Ceiling.model_validate(ceiling) for ceiling in found]
    except (OSError, ValueError, AttributeError, TypeError):
        return []
    return [ceiling for ceiling in ceilings if ceiling.split == split]
