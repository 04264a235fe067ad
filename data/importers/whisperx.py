"""WhisperX with speakers: one JSON file a session, whose segments are the turns."""

import json
from pathlib import Path
from typing import Any

from data.corpus.config import CorpusConfig
from data.corpus.schema import Conversation, Corpus, Turn
from data.errors import DataError, reason
from data.importers.builder import TurnBuilder
from data.importers.recordings import set_recordings
from data.importers.tabular import as_text, read_text
from data.importers.timestamps import read_time, set_ends


def read_whisperx(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read transcripts of WhisperX; a segment may have a `label` besides, a word or a list of them.

    Args:
        source: a JSON file, or a folder of them; a session is called like its file.
        audio: folder with `<session>.<wav|flac|…>`; None: text only.
        config: settings; `roles` says who SPEAKER_00 is.

    Raises:
        DataError: a file cannot be read or has no segments, or there are no recordings.
    """
    paths = sorted(source.glob("*.json")) if source.is_dir() else [source]
    if not paths:
        raise DataError(f"{source}: no JSON files; give the folder that holds one a session")
    draft = TurnBuilder("whisperx", config)
    conversations = [_conversation(path, draft) for path in paths]
    set_recordings(conversations, audio)
    return draft.corpus(conversations)


def _conversation(path: Path, draft: TurnBuilder) -> Conversation:
    turns = [
        _turn(path.stem, index, segment, f"{path.name}:segments[{index}]", draft)
        for index, segment in enumerate(_segments(path, draft.config.encoding))
    ]
    set_ends(turns, draft.findings)
    return Conversation(path.stem, path.stem, turns)


def _segments(path: Path, encoding: str) -> list[Any]:
    try:
        content = json.loads(read_text(path, encoding))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path.name}:{error.lineno}: not readable as JSON (column {error.colno}: {error.msg}); write it anew"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}:1: not readable as JSON ({reason(error)}); write it anew") from None
    segments = content.get("segments") if isinstance(content, dict) else None
    if not isinstance(segments, list) or not segments:
        raise DataError(f"{path.name}:1: no segments; give JSON files of WhisperX, and remove those without speech")
    return segments


def _turn(conversation: str, index: int, segment: Any, where: str, draft: TurnBuilder) -> Turn:
    if not isinstance(segment, dict) or not isinstance(segment.get("text"), str):
        raise DataError(f"{where}: the segment has no text; write the file anew, or remove the segment")
    speaker, code = as_text(segment.get("speaker")), as_text(segment.get("label"))
    turn = draft.turn(conversation, str(index), speaker, segment["text"], [code], where)
    turn.index = index
    times = (as_text(segment.get(name)) for name in ("start", "end"))
    turn.start, turn.end = (read_time(time, turn, draft.findings, draft.config.time_unit) for time in times)
    return turn
