"""Read JSON files as tables: lists of objects, such lists by session, and the tasks of Label Studio."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from data.errors import DataError, reason

SESSION = "conversation"  # column with the name of a list, if a file has one list of turns for each session
LABEL, ANNOTATOR = "label", "annotator"  # columns of Label Studio's annotations
Cells = dict[str, object]


def read_json(path: Path, text: str) -> tuple[list[str], list[tuple[str, Cells]]]:
    """Return the columns and the rows of a JSON file, each with its place ("[3]", or "12.html[3]").

    Args:
        path: of the file, for messages.
        text: its content.

    Raises:
        DataError: it is no JSON, or none with a list of objects.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}:1: not readable as JSON ({reason(error)}); export it again") from None
    rows = [row for place, item in _items(content) for row in _rows(place, item)]
    if not rows:
        raise DataError(
            f'{path.name}:1: no list of objects such as [{{"text": "…"}}]; export a table (CSV, JSON Lines), or a list'
        )
    return list(dict.fromkeys(name for _, cells in rows for name in cells)), rows


def _items(content: object) -> Iterator[tuple[str, Cells]]:
    """Yield the objects of a list, or of all lists of an object of lists, with the session of each list."""
    if isinstance(content, list):
        yield from ((f"[{index}]", item) for index, item in enumerate(content) if isinstance(item, dict))
    elif isinstance(content, Mapping):
        for name, part in content.items():
            for index, item in enumerate(part if isinstance(part, list) else ()):
                if isinstance(item, dict):
                    yield f"{name}[{index}]", {SESSION: Path(str(name)).stem, **item}


def _rows(place: str, item: Cells) -> Iterator[tuple[str, Cells]]:
    """Yield an object, or a task of Label Studio once for each annotation that is not skipped."""
    data, annotations = item.get("data"), item.get("annotations", item.get("completions"))
    if not isinstance(data, Mapping) or not isinstance(annotations, list):
        yield place, item
        return
    kept = [annotation for annotation in annotations if isinstance(annotation, Mapping)]
    kept = [annotation for annotation in kept if not annotation.get("was_cancelled")]
    for annotation in kept or [{}]:
        who = annotation.get("completed_by")
        who = who.get("email", who.get("id")) if isinstance(who, Mapping) else who
        label = {LABEL: _choices(annotation.get("result"))}
        yield place, {"id": item.get("id"), **data, **label, **({ANNOTATOR: who} if len(kept) > 1 else {})}


def _choices(result: object) -> object:
    """Return what an annotator chose; labels of spans with their places, which are no codes of a turn."""
    chosen: list[object] = []
    for part in result if isinstance(result, list) else ():
        value = part.get("value") if isinstance(part, Mapping) else None
        choices = value.get("choices", value.get("taxonomy")) if isinstance(value, Mapping) else None
        if isinstance(choices, list):
            chosen += [choice[-1] if isinstance(choice, list) and choice else choice for choice in choices]
        elif isinstance(value, Mapping) and "labels" in value:
            return value
    return chosen
