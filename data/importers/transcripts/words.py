"""Give segments their speakers by their words: a segment is split where the speaker of its words changes.

Words may have speakers themselves, as in WhisperX, or get them from who speaks when (RTTM).
"""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from itertools import pairwise
from typing import NamedTuple

from data.corpus.issues import Finding
from data.importers.base.builder import TurnBuilder
from data.importers.base.sessions import Segment
from data.importers.base.timestamps import seconds_of
from data.importers.transcripts.speakers import Timeline

Stamp = str | float  # a time as in `Segment`
MOST_WORDS = 500  # of a segment that is compared with its words, which takes minutes for a whole session
INSTANT = 0.01  # s; of a segment or word without an end
ALIKE = 0.5  # share of the words that the text of a segment must have, so that it is cut instead of replaced by them


class Word(NamedTuple):
    """A word of a segment."""

    text: str
    start: Stamp = ""
    end: Stamp = ""
    speaker: str = ""  # "": not known


class Spoken(NamedTuple):
    """A segment before it is split by the speakers of its words."""

    text: str
    start: Stamp = ""
    end: Stamp = ""
    speaker: str = ""
    words: tuple[Word, ...] = ()  # may be missing
    code: str = ""
    session: str = ""  # "": that of the file

    @property
    def has_speaker(self) -> bool:
        return bool(self.speaker) or any(word.speaker for word in self.words)


def by_speaker(words: Iterable[Word]) -> list[Spoken]:
    """Return a segment for each run of words of one speaker."""
    segments = []
    for speaker, said in _runs(words):
        starts, ends = _edges(said)
        text = " ".join(word.text for word in said if word.text)
        segments.append(Spoken(text, (*starts, "")[0], ("", *ends)[-1], speaker, tuple(said)))
    return segments


def with_speakers(segments: Iterable[Spoken], timeline: Timeline, unit: str) -> list[Spoken]:
    """Return segments with who speaks most of each, and of each of their words that has times.

    Args:
        segments: without speakers.
        timeline: who speaks when.
        unit: unit of times that are text, as for `read_time`.
    """

    def speaker(start: Stamp, end: Stamp) -> str:
        first, last = (seconds_of(stamp, unit) for stamp in (start, end))
        if first is None:
            return ""
        return timeline.speaker(first, first + INSTANT if last is None else last)

    return [
        segment._replace(
            speaker=speaker(segment.start, segment.end),
            words=tuple(word._replace(speaker=speaker(word.start, word.end)) for word in segment.words),
        )
        for segment in segments
    ]


def split(segment: Spoken, where: str, conversation: str, builder: TurnBuilder) -> list[Segment]:
    """Return a segment, split where the speaker of its words changes.

    A code of the segment belongs to the longest part of the segment's own speaker.
    """
    runs = _runs(segment.words)
    if len(runs) < 2:
        speaker = segment.speaker or (runs[0][0] if runs else "")
        found = (where, speaker, segment.text, segment.start, segment.end, segment.code, segment.session)
        return [Segment(*found)]
    own = [run for run in runs if run[0] == segment.speaker] or runs
    coded = max(own, key=lambda run: len(run[1]))
    parts: list[Segment] = []
    for run, text in zip(runs, _texts(segment.text, [said for _, said in runs]), strict=True):
        starts, ends = _edges(run[1])
        start = (*starts, parts[-1].end)[0] if parts else segment.start
        end = ("", start, *ends)[-1] if len(parts) < len(runs) - 1 else segment.end
        code = segment.code if run is coded else ""
        parts.append(Segment(where, run[0], text, start, end, code, segment.session))
    speakers = ", ".join(dict.fromkeys(speaker for speaker, _ in runs))
    message = f"its words are of {speakers}; it becomes {len(runs)} turns"
    builder.findings.append(Finding("W_SPEAKERS_SPLIT", where, conversation, message))
    return parts


def _runs(words: Iterable[Word]) -> list[tuple[str, list[Word]]]:
    """Return the words in runs of one speaker; a word without speaker belongs to the one before it."""
    runs: list[tuple[str, list[Word]]] = []
    waiting: list[Word] = []  # before the first word with a speaker
    for word in words:
        if not word.speaker and not runs:
            waiting.append(word)
        elif not word.speaker or (runs and runs[-1][0] == word.speaker):
            runs[-1][1].append(word)
        else:
            runs.append((word.speaker, [*waiting, word]))
            waiting = []
    return runs or ([("", waiting)] if waiting else [])


def _edges(words: Iterable[Word]) -> tuple[list[Stamp], list[Stamp]]:
    words = list(words)
    return [word.start for word in words if word.start != ""], [word.end for word in words if word.end != ""]


def _texts(text: str, runs: Sequence[Sequence[Word]]) -> list[str]:
    """Return the text of a segment, cut where its runs of words begin.

    Words may differ from the text: numbers are spelled out, punctuation is missing. Where they differ too much to say
    where a run begins, each part has its words instead.
    """
    cuts = _places(text, runs) or _nearest_places(text, runs)
    if cuts is None:
        return [" ".join(word.text for word in run) for run in runs]
    edges = [0, *cuts, len(text)]
    return [text[start:end].strip() for start, end in pairwise(edges)]


def _places(text: str, runs: Sequence[Sequence[Word]]) -> list[int] | None:
    """Return where the second run and those behind it begin; None if a word is not in the text."""
    place, cuts = 0, list[int]()
    for run in runs:
        for number, word in enumerate(run):
            spelled = word.text.strip()
            found = text.find(spelled, place)
            if found < 0:
                return None
            if number == 0 and run is not runs[0]:
                cuts.append(found)
            place = found + len(spelled)
    return cuts


def _nearest_places(text: str, runs: Sequence[Sequence[Word]]) -> list[int] | None:
    """Return the same where words and text differ here and there; None if they have little in common."""
    tokens = list(re.finditer(r"\S+", text))
    words = [_bare(word.text) for run in runs for word in run]
    if len(words) > MOST_WORDS:
        return None
    matcher = SequenceMatcher(None, words, [_bare(token[0]) for token in tokens], autojunk=False)
    pairs = {block.a + step: block.b + step for block in matcher.get_matching_blocks() for step in range(block.size)}
    if len(pairs) < ALIKE * len(words):
        return None
    cuts, first = list[int](), 0
    for run, following in pairwise(runs):
        first += len(run)
        matched = [word for word in range(first, first + len(following)) if word in pairs]
        if not matched:
            return None
        token = pairs[matched[0]] - (matched[0] - first)  # words before the match have a token each, as far as known
        before = [pairs[word] for word in range(first - 1, -1, -1) if word in pairs][:1]
        token = max(token, *(place + 1 for place in before)) if before else max(token, 0)
        cuts.append(tokens[min(token, pairs[matched[0]])].start())
    return cuts


def _bare(word: str) -> str:
    return "".join(character for character in word.casefold() if character.isalnum()) or word
