"""Corpora written with one word per turn; every text and every clip is unique to its turn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus.schema import Conversation, Corpus, Turn, split_label
from data.loading.examples import Example
from data.preparation.build import prepare
from data.shards.dataset import Shards

ROLES = {"client": ("change", "neutral"), "therapist": ("other", "question", "reflection")}
LABELS = ("change", "neutral", "other", "question", "reflection")


def text(session: int, index: int) -> str:
    return f"session {session} turn {index}"


def clip(session: int, index: int) -> np.ndarray:
    """Return noise; its samples and length are different for every turn."""
    noise = np.random.default_rng((session, index)).standard_normal(2000 + 100 * session + index)
    return (noise * 1000).astype(np.int16)


def turns(dialogue: str, session: int) -> list[Turn]:
    """Return the turns of a dialogue such as "T:question C:change! C": role, label, and ! for a clip."""
    found = []
    for index, word in enumerate(dialogue.split()):
        role, _, label = word.removesuffix("!").partition(":")
        turn = Turn(f"{session}/{index}", index, {"C": "client", "T": "therapist"}[role], text(session, index))
        turn.label, turn.audio = label or None, clip(session, index) if word.endswith("!") else None
        found.append(turn)
    return found


def corpus(dialogues: Sequence[str], qualities: Sequence[str | None] = ("high",)) -> Corpus:
    """Return a corpus with a session for every dialogue; qualities are repeated in turn."""
    conversations = [
        Conversation(
            f"s{session}", f"g{session}", turns(dialogue, session), quality=qualities[session % len(qualities)]
        )
        for session, dialogue in enumerate(dialogues)
    ]
    labels = {label for one in conversations for turn in one.turns if turn.label for label in split_label(turn.label)}
    assert labels <= set(LABELS)
    return Corpus("hand", LABELS, ROLES, conversations, qualities=("high", "low"))


def make(folder: Path, dialogue: str, sessions: int = 6, **changed: Any) -> Shards:
    """Prepare a corpus of equal sessions; of six, four are in train and one each in val and test."""
    return prepare(corpus([dialogue] * sessions, **changed), folder)


def same(one: Example, other: Example) -> bool:
    names = [name for name in Example.__slots__ if name not in ("pcm", "features", "teacher_logits")]
    return all(getattr(one, name) == getattr(other, name) for name in names) and (
        one.pcm is other.pcm is None or np.array_equal(one.pcm, other.pcm)
    )
