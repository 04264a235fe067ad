"""Importer for subtitles with speakers, WebVTT and SRT, as Zoom and Teams export them: one file a session.

A cue names its speaker with `<v Name>`, or with "Name:" before the text; a cue without a name belongs to the speaker of
the one before it, unless it begins with ">>", which only says that the speaker is another one.

Cues are found by their lines of times. webvtt-py and srt do not tell the line of a cue, and they refuse or lose what
people have: SRT without numbers or with empty cues, times without hours, a WebVTT file without its header or with
decimal commas; and they read 3,5 s as 3.005 s.
"""

import html
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.errors import DataError
from data.importers.base.builder import TurnBuilder
from data.importers.base.cells import speaker_key
from data.importers.base.sessions import OtherFormatError, Segment, first_file, read_sessions
from data.importers.base.tabular import read_text
from data.importers.transcripts.speakers import names_of, no_speakers, split_name, timeline_of
from data.importers.transcripts.words import Spoken, Word, split, with_speakers

SUFFIXES = (".vtt", ".srt")
_TIME = r"(?:(\d{1,4}):)?(\d{1,2}):(\d{2})(?:[.,](\d{1,9}))?"
_TIMING = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?")
_NO_CUE = ("NOTE", "STYLE", "REGION", "WEBVTT")  # first words of the other blocks of WebVTT
_VOICE = re.compile(r"<v(?:\.[^\s>]*)?(?:\s+([^>]*))?>")
_INSTANT = re.compile(r"<((?:\d+:)?\d{1,2}:\d\d\.\d+)>")  # when the next word begins
_TAG = re.compile(r"</?(?:[cibuv]|ruby|rt|lang|font)(?:[.\s][^>]*)?>|<(?:\d+:)?\d{1,2}:\d\d\.\d+>|\{\\[^}]*\}")
ROLLING = 0.5  # share of the cues that repeat a line of the one before, so that these lines are left out
CHANGE = ">>"  # before what another speaker says
FEW = 3  # fewer repetitions are repeated words
GAP = 0.1  # s between a line and its repetition, at most


class _Cue(NamedTuple):
    """A cue: its times in seconds, and its lines with their numbers in the file."""

    start: float
    end: float
    lines: list[tuple[int, str]]


class _Line(NamedTuple):
    """What one voice says in a line of a cue."""

    cue: int
    where: str
    voice: str | None  # None: the markup names none
    text: str
    words: tuple[Word, ...]  # if the markup has their times


def read_subtitles(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read WebVTT or SRT files with speakers.

    Args:
        source: a file or a folder of them; the file name is the session id. A file `<session>.rttm` beside one without
            speakers says who speaks.
        audio: folder with `<session>.<wav|flac|…>`; None: text only.
        config: settings; `roles` maps names to roles.

    Raises:
        DataError: a file cannot be read or has no speakers, or there are no recordings.
    """
    return read_sessions(TurnBuilder("subtitles", config), source, audio, SUFFIXES, _parse)


def is_subtitles(source: Path) -> bool:
    """Return whether a source is a subtitle file, or a folder of them."""
    return first_file(source, SUFFIXES) is not None


def _parse(path: Path, builder: TurnBuilder) -> list[Segment]:
    cues = list(_cues(path, builder.config.encoding))
    lines = _lines(path, cues)
    unnamed = [line for line in lines if line.voice is None]
    firsts = [line for line in unnamed if line.where == f"{path.name}:{cues[line.cue].lines[0][0]}"]
    names = names_of([line.text for line in unnamed], builder, path.stem, [line.text for line in firsts])
    places: list[str] = []
    spoken: list[Spoken] = []
    cue = -1  # of the last one
    for line in lines:
        found = split_name(line.text)
        speaker, text, words = line.voice, line.text, line.words
        if speaker is None and found is not None and speaker_key(found[0]) in names:
            speaker, text = found
            words = ()
        if speaker is None:
            speaker = spoken[-1].speaker if spoken and not text.startswith(CHANGE) else ""
        text = text.removeprefix(CHANGE).lstrip("> ") if text.startswith(CHANGE) else text
        if line.cue == cue and spoken[-1].speaker == speaker:
            last = spoken[-1]
            spoken[-1] = last._replace(text=f"{last.text} {text}", words=(*last.words, *words))
        else:
            spoken.append(Spoken(text, cues[line.cue].start, cues[line.cue].end, speaker, words))
            places.append(line.where)
        cue = line.cue
    if spoken and not any(part.speaker for part in spoken):
        timeline = timeline_of(path, builder)
        if timeline is None:
            raise no_speakers(path, "subtitles")
        spoken = with_speakers(spoken, timeline, "s")
    return [
        segment
        for part, where in zip(spoken, places, strict=True)
        for segment in split(part, where, path.stem, builder)
    ]


def _cues(path: Path, encoding: str) -> Iterator[_Cue]:
    """Yield the cues of a file; texts may contain empty lines, as long as no cue begins behind them.

    Raises:
        DataError: the file is no subtitle file, or the times of a cue cannot be read.
    """
    lines = read_text(path, encoding).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    timings = [_TIMING.fullmatch(line) for line in lines]
    fractions = {len(match[place]) for match in timings if match is not None for place in (4, 8) if match[place]}
    counts = 3 in fractions and min(fractions) < 3  # then "5" are 5 ms of a writer that does not pad them
    cue: _Cue | None = None
    other = False  # whether the block is no cue
    for index, line in enumerate(lines):
        timing, empty = timings[index], not line.strip()
        before_empty = index == 0 or not lines[index - 1].strip()
        if before_empty and not empty:
            other = line.split(maxsplit=1)[0].startswith(_NO_CUE)
        if timing is not None and not other:
            if cue is not None:
                yield cue
            cue = _Cue(_seconds(timing.groups()[:4], counts), _seconds(timing.groups()[4:], counts), [])
        elif "-->" in line and not other:
            raise DataError(
                f"{path.name}:{index + 1}: {line.strip()[:60]!r} is no time of a cue; write 00:00:01.000 --> …"
            )
        elif cue is not None and not other and not empty and not _is_identifier(lines, timings, index, before_empty):
            cue.lines.append((index + 1, line))
    if cue is not None:
        yield cue
    elif not lines[0].startswith("WEBVTT"):
        raise OtherFormatError(
            f"{path.name}:1: not readable as {path.suffix[1:].upper()}, it has no times such as 00:00:01.000 --> "
            "00:00:02.000; export it again, or rename it if it is another format"
        )


def _is_identifier(
    lines: Sequence[str], timings: Sequence[re.Match[str] | None], index: int, before_empty: bool
) -> bool:
    """Return whether a line is the number or the name of the cue whose times follow."""
    follows = index + 1 < len(lines) and timings[index + 1] is not None
    return follows and (before_empty or lines[index].strip().isdecimal())


def _seconds(parts: Sequence[str | None], counts: bool) -> float:
    hours, minutes, seconds, fraction = (part or "0" for part in parts)
    shares = int(fraction) / 1000 if counts and len(fraction) <= 3 else float(f"0.{fraction}")
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds) + shares


def _lines(path: Path, cues: Sequence[_Cue]) -> list[_Line]:
    """Return what is said in all cues, without the lines that rolling captions repeat from the cue before."""
    plain = [[_plain(raw) for _, raw in cue.lines] for cue in cues]
    repeats = [
        {text for text in before if text} if cue.start <= last.end + GAP else set[str]()
        for (last, cue), before in zip(pairwise(cues), plain, strict=False)
    ]
    repeated = sum(bool(now) and now[0] in known for now, known in zip(plain[1:], repeats, strict=True))
    tagged = any(_INSTANT.search(raw) for cue in cues for _, raw in cue.lines)
    rolling = repeated > 0 and (tagged or repeated >= max(FEW, ROLLING * len(repeats)))
    lines: list[_Line] = []
    for number, (cue, shown) in enumerate(zip(cues, [set[str](), *repeats], strict=False)):
        voice: str | None = None
        for place, raw in cue.lines:
            pieces = _VOICE.split(raw)  # text, then a name and a text for each voice
            for index in range(0, len(pieces), 2):
                if index:
                    voice = " ".join(html.unescape(pieces[index - 1] or "").split())
                said = _plain(pieces[index])
                if said and not (rolling and said in shown):
                    lines.append(_Line(number, f"{path.name}:{place}", voice, said, _words(pieces[index], cue)))
    return lines


def _words(raw: str, cue: _Cue) -> tuple[Word, ...]:
    """Return the words of a line with times between them, as in the captions that YouTube makes."""
    parts = _INSTANT.split(raw)
    if len(parts) == 1:
        return ()
    starts = [cue.start]
    for instant in parts[1::2]:
        *front, seconds = instant.split(":")
        minutes = [*map(int, front)]
        starts.append(sum(part * 60 ** (len(minutes) - place) for place, part in enumerate(minutes)) + float(seconds))
    ends = [*starts[1:], cue.end]
    said = zip(map(_plain, parts[::2]), starts, ends, strict=True)
    return tuple(Word(text, start, end) for text, start, end in said if text)


def _plain(raw: str) -> str:
    return " ".join(html.unescape(_TAG.sub("", raw)).split())
