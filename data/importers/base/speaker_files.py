"""Find the recordings of the speakers of a session, where each has one, as Zoom writes them for its participants.

The name of such a file is that of the session and that of the speaker or role, in any order (s1_client.wav), or that of
the speaker in a folder with the name of the session (s1/client.m4a, s1/audioSamLee21592136839.m4a). If there is only
one session, its name may be left out. All files of a session begin at the same time.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data.corpus.issues import Finding
from data.corpus.schema import Conversation, is_rejected
from data.errors import DataError, listed
from data.importers.base.builder import SPEAKERS, TurnBuilder
from data.importers.base.cells import clean_name, speaker_key

_DEPTH = 3  # folders in the folder of a session: Zoom puts the files into "Audio Record"


def set_speaker_files(
    conversation: Conversation, audio: Path, suffixes: tuple[str, ...], builder: TurnBuilder, *, alone: bool
) -> bool:
    """Set the recording of every turn to that of its speaker; return whether any speaker has one.

    A speaker without one gets the name of a file that does not exist, which the validation reports.

    Args:
        conversation: a session without a recording.
        audio: the folder of recordings.
        suffixes: of recordings; of two files with one name the first suffix wins.
        builder: knows the speakers as the source writes them.
        alone: whether the corpus has only this session.

    Raises:
        DataError: several files are as good for a speaker.
    """
    spoken = {turn.id: builder.names[turn.id] for turn in conversation.turns if not is_rejected(turn.flags)}
    files = dict(_candidates(conversation.id, audio, suffixes, alone))
    found: dict[str, Path | None] = {}
    for turn in conversation.turns:
        name = spoken.get(turn.id)
        if name is not None and name not in found:
            found[name] = _file_of(name, turn.speaker, files, conversation.id)
    if not any(found.values()):
        return False
    for turn in conversation.turns:
        if (name := spoken.get(turn.id)) is not None:
            turn.recording = found[name] or audio / f"{conversation.id}_{name.replace('/', '_')}{suffixes[0]}"
    names = ", ".join(f"{name}: {path.name}" for name, path in found.items() if path is not None)
    where = conversation.turns[0].where
    builder.findings.append(
        Finding("W_AUDIO_SPEAKERS", where, conversation.id, f"each speaker has a recording ({names})")
    )
    return True


def _candidates(session: str, audio: Path, suffixes: tuple[str, ...], alone: bool) -> Iterator[tuple[Path, str]]:
    """Yield the files that may belong to a session, and what their names say beside its name."""
    for path in sorted(audio.iterdir()):
        rest = _without(path.stem if path.is_file() else path.name, session)
        if path.is_file() and path.suffix.lower() in suffixes and (rest is not None or alone):
            yield path, path.stem if rest is None else rest
        elif path.is_dir() and (alone or rest == ""):
            for inner in _files_in(path, suffixes, _DEPTH):
                within = _without(inner.stem, session)
                yield inner, inner.stem if within is None else within


def _files_in(folder: Path, suffixes: tuple[str, ...], depth: int) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and depth > 1:
            yield from _files_in(path, suffixes, depth - 1)
        elif path.suffix.lower() in suffixes and path.is_file() and not path.name.startswith("."):
            yield path


def _without(name: str, session: str) -> str | None:
    """Return a name without that of the session at its beginning or end; None if the session is not in it."""
    name, session = clean_name(name).casefold(), clean_name(session).casefold()
    if name == session:
        return ""
    if name.startswith(session) and not name[len(session)].isalnum():
        return name[len(session) + 1 :]
    if name.endswith(session) and not name[-len(session) - 1].isalnum():
        return name[: -len(session) - 1]
    return None


def _file_of(name: str, role: str, files: dict[Path, str], session: str) -> Path | None:
    """Return the file with the name of a speaker, or else with the name of the role."""
    of_role = {_exact(word) for word, usual in SPEAKERS.items() if usual == role} | {_exact(role)}
    for matches in (
        [path for path, rest in files.items() if _exact(rest) == _exact(name)],
        [path for path, rest in files.items() if _letters(rest) == _letters(name) != ""],
        [path for path, rest in files.items() if _exact(rest) in of_role],
    ):
        stems = {path.with_suffix("") for path in matches}
        if len(stems) > 1:
            several = listed(path.name for path in matches)
            raise DataError(
                f"{session}: {several} are all recordings of {name!r}; leave one, or name the files in a column "
                "(columns.recording)"
            )
        if matches:
            return matches[0]
    return None


def _exact(name: str) -> str:
    return "".join(character for character in speaker_key(name) if character.isalnum())


def _letters(name: str) -> str:
    """Return the letters of a name, without Zoom's prefix and its numbers of the participant and the meeting."""
    return re.sub(r"\d", "", _exact(name).removeprefix("audio").removeprefix("only"))
