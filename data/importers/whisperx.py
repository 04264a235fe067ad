"""Importer for WhisperX output with speakers: one JSON file per session, whose segments are the turns."""

import json
from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.schema import Conversation, Corpus, Turn
from data.errors import DataError, reason
from data.importers.builder import TurnBuilder
from data.importers.recordings import set_recordings
from data.importers.tabular import as_text, read_text
from data.importers.timestamps import read_time, set_ends


def read_whisperx(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read transcripts of WhisperX; a segment may also have a `label`, one word or a list of words.

    Args:
        source: a JSON file or a folder of them; the file name is the session id.
        audio: folder with `<session>.<wav|flac|…>`; None: text only.
        config: settings; `roles` maps SPEAKER_00 to a role.

    Raises:
        DataError: a file cannot be read or has no segments, or there are no recordings.
    """
    paths = sorted(source.glob("*.json")) if source.is_dir() else [source]
    if not paths:
        raise DataError(f"{source}: no JSON files in this folder; give the folder with one file per session")
    builder = TurnBuilder("whisperx", config)
    conversations = [_conversation(path, builder) for path in paths]
    set_recordings(conversations, audio)
    return builder.corpus(conversations)


def _conversation(path: Path, builder: TurnBuilder) -> Conversation:
    turns = [
        _turn(path.stem, index, segment, f"{path.name}:segments[{index}]", builder)
        for index, segment in enumerate(_segments(path, builder.config.encoding))
    ]
    set_ends(turns, builder.findings)
    return Conversation(path.stem, path.stem, turns)


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
    if not isinstance(segments, list) or not segments:
        raise DataError(f"{path.name}:1: no segments; give JSON files of WhisperX and remove those without speech")
    return segments


def _turn(conversation: str, index: int, segment: object, where: str, builder: TurnBuilder) -> Turn:
    if not isinstance(segment, dict) or not isinstance(segment.get("text"), str):
        raise DataError(f"{where}: the segment has no text; export the file again, or remove the segment")
    speaker, code = as_text(segment.get("speaker")), as_text(segment.get("label"))
    turn = builder.turn(conversation, str(index), speaker, segment["text"], [code], where)
    turn.index = index
    times = (as_text(segment.get(name)) for name in ("start", "end"))
    turn.start, turn.end = (read_time(time, turn, builder.findings, builder.config.time_unit) for time in times)
    return turn
