"""AnnoMI-simple (Wu et al., ICASSP 2022): one CSV of utterances, optionally one audio file a transcript.

Times are starts only, in whole seconds: a turn ends where the next one starts. Turns without a positive length, and
the last of each transcript, stay as text context and get no sound.
"""

import csv
import io
import re
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path

from data.errors import DataError
from data.schema import Conversation, Corpus, Finding, Turn, flag

ROLES = {
    "client": ("change", "neutral", "sustain"),
    "therapist": ("other", "question", "reflection", "therapist_input"),
}
LABEL_COLUMN = {"client": "client_talk_type", "therapist": "main_therapist_behaviour"}
QUALITIES = ("high", "low")  # of a session
COLUMNS = ("transcript_id", "mi_quality", "video_url", "utterance_id", "interlocutor", "timestamp", "utterance_text")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus")


def read_annomi(csv_path: Path, audio: Path | None = None) -> Corpus:
    """Read AnnoMI-simple; with `audio`, a folder that holds `<transcript_id>.<wav|flac|…>`.

    Raises:
        DataError: a missing file or column, bytes that are not UTF-8, a duplicate id, an unknown role or label, or an
            audio folder that holds no recording of this corpus.
    """
    findings: list[Finding] = []
    conversations = list(_conversations(csv_path, findings))
    if not conversations:
        raise DataError(f"{csv_path}: no utterances; is this the AnnoMI-simple CSV?")
    for conversation in conversations:
        _set_ends(conversation, findings)
    if audio is not None:
        _attach(conversations, audio, findings)
    labels = tuple(label for group in ROLES.values() for label in group)
    return Corpus("annomi", labels, ROLES, conversations, findings, QUALITIES)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """("file:line", row) for each row of the CSV."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the CSV ({error.strerror}); give the file with --csv") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: byte {error.start} is not UTF-8; save the CSV as UTF-8") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    present = reader.fieldnames or []
    needed = (*COLUMNS, *LABEL_COLUMN.values())
    missing = [name for name in needed if name not in present]
    if missing:
        raise DataError(
            f"{path}:1: missing column(s) {', '.join(missing)}; the file has {', '.join(present) or 'none'}"
        )
    start = reader.line_num + 1
    for row in _parsed(path, reader):
        where = f"{path.name}:{start}"
        if any(row[name] is None for name in needed):
            raise DataError(f"{where}: the row has fewer cells than the header; mend or remove it")
        yield where, row
        start = reader.line_num + 1


def _parsed(path: Path, reader: "csv.DictReader[str]") -> Iterator[dict[str, str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(
            f"{path.name}:{reader.line_num}: not readable as CSV ({error}); look for an open quote"
        ) from None


def _conversations(path: Path, findings: list[Finding]) -> Iterator[Conversation]:
    sessions: dict[str, Conversation] = {}
    seen: dict[str, str] = {}
    for where, row in _rows(path):
        turn = _turn(where, row, findings)
        if turn.id in seen:
            raise DataError(f"{where}: utterance {turn.id} stands already at {seen[turn.id]}; remove one of them")
        seen[turn.id] = where
        session = row["transcript_id"].strip()
        quality = row["mi_quality"].strip().lower()
        if quality not in QUALITIES:
            raise DataError(f"{where}: mi_quality {quality!r} is unknown; known: {', '.join(QUALITIES)}")
        new = Conversation(session, row["video_url"].strip(), [], quality=quality)
        conversation = sessions.setdefault(session, new)
        if quality != conversation.quality:
            raise DataError(
                f"{where}: mi_quality {quality!r}, and transcript {session} began with {conversation.quality!r}; a "
                "session has one quality"
            )
        conversation.turns.append(turn)
    for conversation in sessions.values():
        conversation.turns.sort(key=lambda turn: turn.index)
        yield conversation


def _turn(where: str, row: dict[str, str], findings: list[Finding]) -> Turn:
    number, role = row["utterance_id"].strip(), row["interlocutor"].strip().lower()
    if not number.isdigit():
        raise DataError(f"{where}: utterance_id {number!r} is not a whole number")
    identity = f"{row['transcript_id'].strip()}/{number}"
    if role not in ROLES:
        raise DataError(f"{where}: utterance {identity} has interlocutor {role!r}; known: {', '.join(ROLES)}")
    label = row[LABEL_COLUMN[role]].strip().lower()
    if label not in ROLES[role]:
        near = get_close_matches(label, ROLES[role], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"{where}: utterance {identity} has unknown {role} label {label!r}{hint} (known: {', '.join(ROLES[role])})"
        )
    turn = Turn(identity, int(number), role, " ".join(row["utterance_text"].split()), label, where=where)
    turn.start = _seconds(row["timestamp"].strip(), turn, findings)
    return turn


def _seconds(stamp: str, turn: Turn, findings: list[Finding]) -> float | None:
    parts = re.fullmatch(r"(\d+):(\d+):(\d+)", stamp)
    fields = [int(part) for part in parts.groups()] if parts else [0, 99, 99]
    if fields[1] > 59 or fields[2] > 59:
        flag(turn, findings, "E_TS_FORMAT", f"time {stamp!r} is not HH:MM:SS; kept as text, without sound")
        return None
    if not re.fullmatch(r"\d\d:\d\d:\d\d", stamp):
        flag(turn, findings, "W_TS_FORMAT", f"time {stamp!r} is not HH:MM:SS; read as {fields[2]} s past the minute")
    return float(fields[0] * 3600 + fields[1] * 60 + fields[2])


def _set_ends(conversation: Conversation, findings: list[Finding]) -> None:
    turns = conversation.turns
    for turn, following in pairwise(turns):
        if turn.start is None:
            continue
        if following.start is None:
            flag(turn, findings, "W_TS_OPEN", "the next turn's time is unreadable: no end; kept as text, without sound")
            continue
        span = f"{turn.start:.0f} s, next turn at {following.start:.0f} s"
        if following.start > turn.start:
            turn.end = following.start
        elif following.start == turn.start:
            flag(turn, findings, "W_TS_ZERO", f"zero length ({span}); kept as text, without sound")
        else:
            flag(turn, findings, "W_TS_ORDER", f"the next turn starts earlier ({span}); kept as text, without sound")
    if turns[-1].start is not None:
        flag(turns[-1], findings, "W_TS_OPEN", "last turn: no end is given; kept as text, without sound")


def _attach(conversations: list[Conversation], audio: Path, findings: list[Finding]) -> None:
    if not audio.is_dir():
        raise DataError(f"{audio}: no such folder; give the folder that holds <transcript_id>.wav with --audio")
    for conversation in conversations:
        paths = (audio / f"{conversation.id}{suffix}" for suffix in AUDIO_SUFFIXES)
        conversation.recording = next((path for path in paths if path.exists()), None)
        if conversation.recording is None:
            message = f"no {conversation.id}{{{','.join(AUDIO_SUFFIXES)}}} in {audio.name}; its turns have no sound"
            findings.append(Finding("E_AUDIO_MISSING", audio.name, conversation.id, message))
    if all(conversation.recording is None for conversation in conversations):
        raise DataError(f"{audio}: none of {len(conversations)} transcripts has a recording here (<transcript_id>.wav)")
