"""Importer for folders like DAIC-WOZ: each session has a tab-separated transcript and a recording."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.schema import Conversation, Corpus
from data.errors import DataError
from data.importers.base.builder import TurnBuilder, refuse_no_turns
from data.importers.base.cells import clean_name
from data.importers.base.recordings import SUFFIXES, recordings_by_name, refuse_missing_folder, refuse_no_recordings
from data.importers.base.sessions import Segment, conversation
from data.importers.base.tabular import read_rows

COLUMNS = ("start_time", "stop_time", "speaker", "value")
SPEAKERS = {"ellie": "therapist", "participant": "client"}
TRANSCRIPT = "_TRANSCRIPT.csv"

Listing = Callable[[Path], dict[str, Path]]


def read_daic(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read transcripts of DAIC-WOZ; they have no labels.

    Args:
        source: folder with `<id>_TRANSCRIPT.csv`, at any depth.
        audio: folder with `<id>_AUDIO.<wav|flac|…>` or with folders `<id>_P` that contain it; None: a recording
            beside the transcript is used if there is one.
        config: settings.

    Raises:
        DataError: there are no transcripts or, in `audio`, no recordings, or a transcript cannot be read.
    """
    if source.is_file():
        raise DataError(f"{source}: is a file, but the format reads a folder; give the folder with the sessions")
    paths = sorted(source.rglob(f"*{TRANSCRIPT}"))
    if not paths:
        raise DataError(f"{source}: no <id>{TRANSCRIPT} in this folder; give the folder with the sessions")
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
    return source.is_dir() and next(source.rglob(f"*{TRANSCRIPT}"), None) is not None


def _conversation(
    path: Path, audio: Path | None, listing: Listing, builder: TurnBuilder, *, may_be_empty: bool
) -> Conversation | None:
    name = path.name.removesuffix(TRANSCRIPT)
    rows = read_rows(path, COLUMNS, builder.config, may_be_empty=may_be_empty)
    if not rows:
        builder.skip_session(name, path.name)
        return None
    segments = [Segment(row.where, row["speaker"], row["value"], row["start_time"], row["stop_time"]) for row in rows]
    session = conversation(name, segments, builder)
    session.recording = _recording(name, path.parent, audio, listing)
    return session


def _recording(name: str, beside: Path, audio: Path | None, listing: Listing) -> Path | None:
    for folder in (beside,) if audio is None else (audio, audio / f"{name}_P", beside):
        path = listing(folder).get(clean_name(f"{name}_AUDIO"))
        if path is not None:
            return path
    return None if audio is None else audio / f"{name}_AUDIO{SUFFIXES[0]}"
