"""Importer for folders like DAIC-WOZ and E-DAIC: each session has a transcript as a table and a recording.

DAIC-WOZ names the speakers; the transcripts of E-DAIC have only what the participant says.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.schema import Conversation, Corpus
from data.errors import DataError
from data.importers.base.builder import TurnBuilder, refuse_no_turns
from data.importers.base.cells import clean_name, column_key
from data.importers.base.recordings import SUFFIXES, recordings_by_name, refuse_missing_folder, refuse_no_recordings
from data.importers.base.sessions import Segment, conversation
from data.importers.base.tabular import columns_of, read_rows

WOZ = {"speaker": "speaker", "text": "value", "start": "start_time", "end": "stop_time"}
EXTENDED = {"text": "text", "start": "start_time", "end": "end_time"}  # E-DAIC
PARTICIPANT = "participant"
SPEAKERS = {"ellie": "therapist", PARTICIPANT: "client"}
TRANSCRIPT = re.compile(r"(.+)_transcript\.(?:csv|tsv|txt|xlsx)", re.IGNORECASE)

Listing = Callable[[Path], dict[str, Path]]


def read_daic(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read transcripts of DAIC-WOZ or E-DAIC; they have no labels.

    Args:
        source: folder with `<id>_TRANSCRIPT.csv` or `<id>_Transcript.csv`, at any depth.
        audio: folder with `<id>_AUDIO.<wav|flac|…>` or with folders `<id>_P` that contain it; None: a recording
            beside the transcript is used if there is one.
        config: settings.

    Raises:
        DataError: there are no transcripts or, in `audio`, no recordings, or a transcript cannot be read.
    """
    if source.is_file():
        raise DataError(f"{source}: is a file, but the format reads a folder; give the folder with the sessions")
    paths = sorted(path for path in source.rglob("*") if TRANSCRIPT.fullmatch(path.name))
    if not paths:
        raise DataError(f"{source}: no <id>_TRANSCRIPT.csv in this folder; give the folder with the sessions")
    if audio is not None:
        refuse_missing_folder(audio)
    builder = TurnBuilder("daic", config, SPEAKERS)
    listing = cache(recordings_by_name)  # many sessions may share a folder
    read = (_conversation(path, audio, listing, builder, may_be_empty=len(paths) > 1) for path in paths)
    conversations = [conversation for conversation in read if conversation is not None]
    refuse_no_turns(conversations, source)
    if audio is not None:
        refuse_no_recordings((conversation.recording for conversation in conversations), audio)
    return builder.corpus(conversations)


def is_daic(source: Path) -> bool:
    """Return whether a source is a folder with transcripts."""
    return source.is_dir() and any(TRANSCRIPT.fullmatch(path.name) for path in source.rglob("*"))


def _conversation(
    path: Path, audio: Path | None, listing: Listing, builder: TurnBuilder, *, may_be_empty: bool
) -> Conversation | None:
    match = TRANSCRIPT.fullmatch(path.name)
    name = match[1] if match else path.stem
    header = columns_of(path, builder.config.encoding)
    columns = EXTENDED if column_key("speaker") not in header and column_key("end_time") in header else WOZ
    rows = read_rows(path, list(columns.values()), builder.config, may_be_empty=may_be_empty)
    if not rows:
        builder.skip_session(name, path.name)
        return None
    speaker, text, start, end = (columns.get(name) for name in ("speaker", "text", "start", "end"))
    segments = [
        Segment(row.where, row[speaker] if speaker else PARTICIPANT, row[text], row[start], row[end]) for row in rows
    ]
    session = conversation(name, segments, builder)
    session.recording = _recording(name, path.parent, audio, listing)
    return session


def _recording(name: str, beside: Path, audio: Path | None, listing: Listing) -> Path | None:
    for folder in (beside,) if audio is None else (audio, audio / f"{name}_P", beside):
        path = listing(folder).get(clean_name(f"{name}_AUDIO"))
        if path is not None:
            return path
    return None if audio is None else audio / f"{name}_AUDIO{SUFFIXES[0]}"
