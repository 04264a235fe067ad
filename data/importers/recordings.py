"""Recordings by name: the audio file of a session lies in a folder and is called like it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data.corpus.audio import exists
from data.corpus.schema import Conversation
from data.errors import DataError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus")  # of several files of one name the first is taken


def by_name(folder: Path) -> dict[str, Path]:
    """Name without suffix → audio file, of all that lie in a folder; {} without folder."""
    files = folder.iterdir() if folder.is_dir() else ()
    ranked = ((SUFFIXES.index(path.suffix.lower()), path) for path in files if path.suffix.lower() in SUFFIXES)
    known: dict[str, Path] = {}
    for _, path in sorted(ranked):
        known.setdefault(path.stem, path)
    return known


def set_recordings(conversations: Sequence[Conversation], audio: Path | None, named: Mapping[str, str] = {}) -> None:
    """Give sessions their recordings; one that is not there is found missing by the validation.

    Args:
        conversations: get `recording`.
        audio: folder; None: the corpus is text only.
        named: conversation → file, relative to `audio`; else the file is called like the conversation.

    Raises:
        DataError: there is no such folder, or it holds no recording of this corpus.
    """
    if audio is None:
        return
    refuse_no_folder(audio)
    known = by_name(audio)
    for one in conversations:
        where = one.turns[0].where
        if one.id in named:
            one.recording = within(audio, named[one.id], where)
        else:
            one.recording = known.get(one.id) or within(audio, f"{one.id}{SUFFIXES[0]}", where)
    refuse_none((one.recording for one in conversations), audio)


def within(audio: Path, name: str, where: str) -> Path:
    """A file of a folder by its name in a table.

    Raises:
        DataError: the name leads out of the folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{where}: {name!r} leads out of the folder of recordings; name files inside {audio}")
    return audio / name


def refuse_no_folder(audio: Path) -> None:
    """Raise a DataError where the folder of recordings does not exist."""
    if not audio.is_dir():
        raise DataError(f"{audio}: no such folder; give the one that holds the recordings with --audio")


def refuse_none(paths: Iterable[Path | None], audio: Path) -> None:
    """Raise a DataError where none of the audio files exists: the folder is the wrong one."""
    looked_for = [path for path in paths if path is not None]
    if not any(map(exists, looked_for)):
        example = looked_for[0].name if looked_for else "none is named"
        raise DataError(
            f"{audio}: none of {len(looked_for)} recordings is here ({example} …); give their folder with --audio"
        )
