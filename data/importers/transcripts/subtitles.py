"""Importer for subtitles with speakers, WebVTT and SRT, as Zoom, Teams and Google Meet export them: one file a session.

A cue names its speaker with `<v Name>`, or with "Name:" before the text; a cue without a name belongs to the speaker of
the one before it.
"""

import html
import io
import re
from pathlib import Path
from typing import NamedTuple

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.errors import DataError
from data.importers.base.builder import TurnBuilder
from data.importers.base.cells import speaker_key
from data.importers.base.extras import import_extra
from data.importers.base.sessions import Segment, first_file, read_sessions
from data.importers.base.tabular import read_text
from data.importers.transcripts.speakers import names_of, no_speakers, rttm_beside, speaker_of, split_name

SUFFIXES = (".vtt", ".srt")
_TIMING = re.compile(
    r"\s*((?:\d{1,4}:)?\d{1,2}:\d\d[.,]\d{1,3})\s*-->\s*((?:\d{1,4}:)?\d{1,2}:\d\d[.,]\d{1,3})(?:\s.*)?"
)
_VOICE = re.compile(r"<v(?:\.[^\s>]+)?\s+([^>]+)>")
_TAG = re.compile(r"</?(?:[cibuv]|ruby|rt|lang|font)(?:[.\s][^>]*)?>|<(?:\d+:)?\d{1,2}:\d\d\.\d+>|\{\\[^}]*\}")


class _Line(NamedTuple):
    """A line of a cue: its text, and the name of its voice if the markup has one."""

    cue: int  # its line in the file
    where: str
    start: str
    end: str
    voice: str
    text: str


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
    lines = _lines(path, builder.config.encoding)
    names = names_of([line.text for line in lines if not line.voice], builder, path.stem)
    segments: list[Segment] = []
    cue = 0  # of the last segment
    for line in lines:
        found = split_name(line.text)
        speaker, text = line.voice, line.text
        if not speaker and found is not None and speaker_key(found[0]) in names:
            speaker, text = found
        if not speaker and segments:
            speaker = segments[-1].speaker
        if line.cue == cue and segments[-1].speaker == speaker:
            segments[-1] = segments[-1]._replace(text=f"{segments[-1].text} {text}")
        else:
            segments.append(Segment(line.where, speaker, text, line.start, line.end))
        cue = line.cue
    if segments and not any(segment.speaker for segment in segments):
        return _with_speakers(path, segments, builder)
    return segments


def _lines(path: Path, encoding: str) -> list[_Line]:
    """Return the lines of all cues, without those that rolling captions repeat from the cue before.

    Raises:
        DataError: the file is no subtitle file, or the times of a cue cannot be read.
    """
    webvtt = import_extra("webvtt", "subtitles", path.name)
    errors = import_extra("webvtt.errors", "subtitles", path.name)
    text = read_text(path, encoding).replace("\r\n", "\n").replace("\r", "\n")
    numbers = [number for number, line in enumerate(text.split("\n"), start=1) if _TIMING.fullmatch(line)]
    try:
        captions = list(webvtt.from_buffer(io.StringIO(text), format=path.suffix.lower()[1:]))
    except (errors.MalformedFileError, errors.MalformedCaptionError) as error:
        raise DataError(
            f"{path.name}:1: not readable as {path.suffix[1:].upper()} ({error}); export it again, or rename it if it "
            "is another format"
        ) from None
    _refuse_lost_cues(path, text, len(captions), numbers)
    lines: list[_Line] = []
    rolling = "<c>" in text  # automatic captions of YouTube show each line twice
    shown: set[str] = set()  # by the cue before
    for number, caption in zip(numbers, captions, strict=True):
        texts = [(_VOICE.search(raw), _plain(raw)) for raw in caption.lines]
        voice = ""
        for index, (match, plain) in enumerate(texts, start=number + 1):
            voice = match[1].strip() if match else voice
            if plain and not (rolling and plain in shown):
                lines.append(_Line(number, f"{path.name}:{index}", caption.start, caption.end, voice, plain))
        shown = {plain for _, plain in texts}
    return lines


def _refuse_lost_cues(path: Path, text: str, found: int, numbers: list[int]) -> None:
    """Raise a DataError if the library left cues out whose times it could not read."""
    is_note = False
    for number, line in enumerate(text.split("\n"), start=1):
        is_note = bool(line.strip()) and (is_note or line.startswith(("NOTE", "STYLE", "REGION")))
        if "-->" in line and not is_note and number not in numbers:
            raise DataError(
                f"{path.name}:{number}: {line.strip()[:60]!r} is no time of a cue; write 00:00:01.000 --> …"
            )
    if found != len(numbers):
        raise DataError(
            f"{path.name}: {len(numbers)} cues, of which only {found} can be read; look for cues without an empty line "
            "between them"
        )


def _plain(raw: str) -> str:
    return html.unescape(_TAG.sub("", raw)).strip()


def _with_speakers(path: Path, segments: list[Segment], builder: TurnBuilder) -> list[Segment]:
    intervals = rttm_beside(path, builder)
    if not intervals:
        raise no_speakers(path, "subtitles")
    return [
        segment._replace(speaker=speaker_of(_seconds(segment.start), _seconds(segment.end), intervals))
        for segment in segments
    ]


def _seconds(stamp: str | float) -> float:
    hours, minutes, seconds = str(stamp).split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
