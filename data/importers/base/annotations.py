"""Annotations in brackets, such as <sync> and [laughter]: no words that were spoken."""

import re
from collections.abc import Iterable

from data.corpus.config import CorpusConfig
from data.corpus.issues import Finding
from data.corpus.schema import Turn, flag

ANNOTATION = re.compile(r"<[A-Za-z/][^<>\n]{0,60}>|\[[^\[\]\n]{1,80}\]")


def spoken_text(text: str, config: CorpusConfig) -> str:
    """Return the text of a transcript without annotations, or with them if the settings keep them."""
    return text if config.annotations == "keep" else ANNOTATION.sub(" ", text)


def silence_annotations(turns: Iterable[Turn], findings: list[Finding]) -> None:
    """Take the audio from turns that contain only annotations and have no code, because nothing is said in them."""
    for turn in turns:
        if turn.label is None and turn.start is not None and not ANNOTATION.sub("", turn.text).strip():
            flag(turn, findings, "W_NO_WORDS", "the turn has no words")
            turn.end = None
