"""Find recordings: the audio file of a session is in a folder and has the name of the session.

If each speaker has a recording, data/importers/base/speaker_files.py finds it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data.corpus.audio import exists
from data.corpus.decoding import StoredClip
from data.corpus.schema import Conversation
from data.errors import DataError
from data.importers.base.builder import TurnBuilder
from data.importers.base.cells import clean_name
from data.importers.base.speaker_files import set_speaker_files

# What libsndfile and FFmpeg read; of several files with one name the first suffix wins.
SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".mp3", ".m4a", ".opus", ".aif", ".aiff", ".aifc", ".caf", ".sph", ".nist", ".w64"),
    *(".rf64", ".bwf", ".au", ".snd", ".voc", ".wma", ".aac", ".amr", ".3gp", ".mp4", ".m4v", ".mov", ".webm", ".mka"),
    *(".mkv", ".oga", ".mp2", ".mpga", ".ac3", ".ape", ".wv", ".tta", ".asf", ".wmv", ".avi", ".mpg", ".mpeg"),
)


def recordings_by_name(folder: Path) -> dict[str, Path]:
    """Return the audio files of a folder by their name without suffix, in NFC; {} if there is no folder."""
    files = folder.iterdir() if folder.is_dir() else ()
    ranked = ((SUFFIXES.index(path.suffix.lower()), path) for path in files if path.suffix.lower() in SUFFIXES)
    files_by_name: dict[str, Path] = {}
    for _, path in sorted(ranked):
        files_by_name.setdefault(clean_name(path.stem), path)
    return files_by_name


def set_recordings(
    conversations: Sequence[Conversation], audio: Path | None, builder: TurnBuilder, named: Mapping[str, str] = {}
) -> None:
    """Set the recording of every conversation, or of its speakers; the validation finds those that do not exist.

    Args:
        conversations: their `recording` is set, or that of their turns, unless their turns have one already.
        audio: folder; None: the corpus is text only.
        builder: of the corpus; its setting `recordings` says which recordings there are.
        named: conversation → file relative to `audio`; by default the file has the name of the conversation.

    Raises:
        DataError: the folder does not exist, or it contains no recording of this corpus.
    """
    if audio is None:
        return
    refuse_missing_folder(audio)
    files, wanted = recordings_by_name(audio), builder.config.recordings
    for conversation in conversations:
        where = conversation.turns[0].where if conversation.turns else conversation.id
        path = files.get(clean_name(conversation.id))
        if conversation.id in named:
            conversation.recording = same_stem(inside(audio, named[conversation.id], where))
        elif any(turn.recording is not None for turn in conversation.turns):
            continue
        elif (
            wanted == "session"
            or (wanted == "auto" and path is not None)
            or not set_speaker_files(conversation, audio, SUFFIXES, builder, alone=len(conversations) == 1)
        ):
            conversation.recording = path or inside(audio, f"{conversation.id}{SUFFIXES[0]}", where)
    turns = [turn.recording for conversation in conversations for turn in conversation.turns if turn.recording]
    refuse_no_recordings([*(conversation.recording for conversation in conversations), *turns], audio)


def inside(audio: Path, name: str, where: str) -> Path:
    """Return the path of a file that a table names.

    Raises:
        DataError: the name leads out of the folder.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{where}: {name!r} is outside the folder of recordings; name files inside {audio}")
    return audio / name


def same_stem(path: Path) -> Path:
    """Return the path, or, if there is no such file, the recording beside it with the same name and another suffix.

    A table may name files as they were before they were converted, or in another form of Unicode.
    """
    if exists(path):
        return path
    try:
        return recordings_by_name(path.parent).get(clean_name(path.stem), path)
    except OSError:
        return path


def refuse_missing_folder(audio: Path) -> None:
    """Raise a DataError if the folder of recordings does not exist."""
    if exists(audio):
        raise DataError(f"{audio}: is a file; --audio takes the folder of the recordings, here {audio.parent}")
    if not audio.is_dir():
        raise DataError(f"{audio}: no such folder; give the folder of the recordings with --audio")


def refuse_no_recordings(paths: Iterable[Path | StoredClip | None], audio: Path) -> None:
    """Raise a DataError if none of the audio files exists, because then the folder is the wrong one."""
    expected = [path for path in paths if path is not None]
    if not any(map(exists, expected)):
        example = f"{expected[0].name} …" if expected else "none is named"
        raise DataError(
            f"{audio}: none of {len(expected)} recordings exists ({example}); give their folder with --audio"
        )
