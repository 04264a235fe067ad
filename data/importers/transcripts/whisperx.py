"""Importer for WhisperX output with speakers: one JSON file per session, whose segments are the turns.

WhisperX gives a segment the speaker of most of its words; a segment with words of two speakers is split here.
"""

import json
from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.issues import Finding
from data.corpus.schema import Corpus
from data.errors import DataError, reason
from data.importers.base.builder import TurnBuilder
from data.importers.base.sessions import Segment, first_file, read_sessions
from data.importers.base.tabular import as_text, read_text

SUFFIXES = (".json",)


def read_whisperx(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read transcripts of WhisperX; a segment may also have a `label`, one word or a list of words.

    Args:
        source: a JSON file or a folder of them; the file name is the session id.
        audio: folder with `<session>.<wav|flac|…>`; None: text only.
        config: settings; `roles` maps SPEAKER_00 to a role.

    Raises:
        DataError: a file cannot be read or has no segments, or there are no recordings.
    """
    return read_sessions(TurnBuilder("whisperx", config), source, audio, SUFFIXES, _parse)


def is_whisperx(source: Path) -> bool:
    """Return whether a source is a JSON file with segments, or a folder of such files."""
    path = first_file(source, SUFFIXES)
    return path is not None and bool(_segments(path, "utf-8"))


def _parse(path: Path, builder: TurnBuilder) -> list[Segment]:
    return [
        part
        for index, segment in enumerate(_segments(path, builder.config.encoding))
        for part in _parts(segment, f"{path.name}:segments[{index}]", path.stem, builder)
    ]


def _segments(path: Path, encoding: str) -> list[object]:
    try:
        content = json.loads(read_text(path, encoding))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name}:{error.lineno}: not readable as JSON (column {error.colno}: {error.msg}); export it again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}:1: not readable as JSON ({reason(error)}); export it again") from None
    segments = content.get("segments") if isinstance(content, dict) else None
    if not isinstance(segments, list):
        raise DataError(f"{path.name}:1: no segments; give JSON files of WhisperX and remove those without speech")
    return segments


def _parts(segment: object, where: str, conversation: str, builder: TurnBuilder) -> list[Segment]:
    """Return a segment, split where the speaker of its words changes.

    A code of the segment belongs to the longest part of the segment's own speaker.
    """
    if not isinstance(segment, dict) or not isinstance(segment.get("text"), str):
        raise DataError(f"{where}: the segment has no text; export the file again, or remove the segment")
    words = segment.get("words")
    runs = _runs([word for word in words if isinstance(word, dict)] if isinstance(words, list) else [])
    if len(runs) == 1 and not as_text(segment.get("speaker")):
        return [_segment({**segment, "speaker": runs[0][0]}, where)]
    if len(runs) < 2:
        return [_segment(segment, where)]
    own = [run for run in runs if run[0] == as_text(segment.get("speaker"))] or runs
    coded = max(own, key=lambda run: len(run[1]))
    contents: list[dict[str, object]] = []
    rest = segment["text"]
    for number, run in enumerate(runs):
        speaker, said = run
        last = number == len(runs) - 1
        text, rest = (rest, "") if last else _cut_text(rest, [as_text(word.get("word")) for word in said])
        starts = [word["start"] for word in said if word.get("start") is not None]
        ends = [word["end"] for word in said if word.get("end") is not None]
        start = segment.get("start") if number == 0 else next(iter(starts), contents[-1]["end"])
        end = segment.get("end") if last else (ends or [start])[-1]
        code = segment.get("label") if run is coded else None
        contents.append({"start": start, "end": end, "text": text, "speaker": speaker, "label": code})
    speakers = ", ".join(dict.fromkeys(speaker for speaker, _ in runs))
    message = f"its words are of {speakers}; it becomes {len(runs)} turns"
    builder.findings.append(Finding("W_SPEAKERS_SPLIT", where, conversation, message))
    return [_segment(content, where) for content in contents]


def _runs(words: list[dict[str, object]]) -> list[tuple[str, list[dict[str, object]]]]:
    """Return the words in runs of one speaker; a word without speaker belongs to the one before it."""
    runs: list[tuple[str, list[dict[str, object]]]] = []
    waiting: list[dict[str, object]] = []  # before the first word with a speaker
    for word in words:
        speaker = as_text(word.get("speaker"))
        if not speaker and not runs:
            waiting.append(word)
        elif not speaker or (runs and runs[-1][0] == speaker):
            runs[-1][1].append(word)
        else:
            runs.append((speaker, [*waiting, word]))
            waiting = []
    return runs


def _cut_text(text: str, words: list[str]) -> tuple[str, str]:
    """Return the text up to the last of the words, and the rest; only the words if the text does not contain them."""
    place = 0
    for word in words:
        found = text.find(word.strip(), place)
        if found < 0:
            return " ".join(words), text
        place = found + len(word.strip())
    return text[:place], text[place:]


def _code(segment: dict[str, object]) -> str:
    """Return the label of a segment as a cell; a list of words is several codes."""
    label = segment.get("label")
    if isinstance(label, dict) or (isinstance(label, list) and not all(isinstance(part, str) for part in label)):
        return json.dumps(label)
    return as_text(label)


def _segment(content: dict[str, object], where: str) -> Segment:
    speaker, start, end = (as_text(content.get(name)) for name in ("speaker", "start", "end"))
    return Segment(where, speaker, str(content["text"]), start, end, _code(content))
