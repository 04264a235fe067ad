"""Sessions to be split."""

from collections.abc import Mapping, Sequence
from typing import Any

from data.corpus.schema import Conversation, Turn
from data.preparation.split import Assignment


def session(
    name: str, group: str | None = None, labels: Sequence[str | None] = ("change",), **more: Any
) -> Conversation:
    turns = [
        Turn(f"{name}/{index}", index, "client", "words", label, where=f"corpus.csv:{name}-{index}")
        for index, label in enumerate(labels)
    ]
    return Conversation(name, group or f"video {name}", turns, **more)


def part(place: Assignment) -> str | int:
    found = place.split if place.fold is None else place.fold
    assert found is not None
    return found


def parts(places: Mapping[str, Assignment]) -> dict[str, str | int]:
    return {name: part(place) for name, place in places.items()}
