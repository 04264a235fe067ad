"""Folders like DAIC-WOZ: a tab-separated transcript and a recording a session, perhaps in a folder of their own."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.schema import Conversation, Corpus, Turn
from data.errors import DataError
from data.importers.builder import TurnBuilder
from data.importers.recordings import SUFFIXES, by_name, refuse_no_folder, refuse_none
from data.importers.tabular import Row, read_rows
from data.importers.timestamps import read_time, set_ends

COLUMNS = ("start_time", "stop_time", "speaker", "value")
SPEAKERS = {"ellie": "therapist", "participant": "client"}
TRANSCRIPT = "_TRANSCRIPT.csv"

Listing = Callable[[Path], dict[str, Path]]


def read_daic(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read transcripts of DAIC-WOZ; they have no labels.

    Args:
        source: folder with `<id>_TRANSCRIPT.csv`, at any depth.
        audio: folder with `<id>_AUDIO.<wav|flac|…>`, or with folders `<id>_P` that hold it; None: beside the
            transcript, where there is one.
        config: settings.

    Raises:
        DataError: there are no transcripts or, in `audio`, no recordings, or a transcript cannot be read.
    """
    paths = sorted(source.rglob(f"*{TRANSCRIPT}"))
    if not paths:
        raise DataError(f"{source}: no <id>{TRANSCRIPT} in it; give the folder that holds the sessions")
    if audio is not None:
        refuse_no_folder(audio)
    draft = TurnBuilder("daic", config, SPEAKERS)
    listing = cache(by_name)  # many sessions may share a folder
    conversations = [_conversation(path, audio, listing, draft) for path in paths]
    if audio is not None:
        refuse_none((one.recording for one in conversations), audio)
    return draft.corpus(conversations)


def _conversation(path: Path, audio: Path | None, listing: Listing, draft: TurnBuilder) -> Conversation:
    name = path.name.removesuffix(TRANSCRIPT)
    rows = read_rows(path, COLUMNS, draft.config)
    turns = [_turn(name, index, row, draft) for index, row in enumerate(rows)]
    set_ends(turns, draft.findings)
    return Conversation(name, name, turns, _recording(name, path.parent, audio, listing))


def _recording(name: str, beside: Path, audio: Path | None, listing: Listing) -> Path | None:
    for folder in (beside,) if audio is None else (audio, audio / f"{name}_P", beside):
        found = listing(folder).get(f"{name}_AUDIO")
        if found is not None:
            return found
    return None if audio is None else audio / f"{name}_AUDIO{SUFFIXES[0]}"


def _turn(conversation: str, index: int, row: Row, draft: TurnBuilder) -> Turn:
    turn = draft.turn(conversation, str(index), row["speaker"], row["value"], (), row.where)
    turn.index = index
    times = (row["start_time"], row["stop_time"])
    turn.start, turn.end = (read_time(time, turn, draft.findings, draft.config.time_unit) for time in times)
    return turn
