"""`corpus.json` in a sweep's folder: what a reader of its results must know about the labels of the corpus.

The notes are kept, because the corpus may be on another machine than the one that shows the results.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from data.atomic import write_file

FILE = "corpus.json"


def save_corpus_notes(folder: Path, notes: Sequence[str], classes: str = "") -> None:
    """Save the notes of a sweep, and the codes that each class merges; there is no file where there are none."""
    if notes or classes or (folder / FILE).exists():
        content = {"notes": list(notes), **({"classes": classes} if classes else {})}
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
