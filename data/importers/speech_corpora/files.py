"""Find the audio files that manifests name, whose paths are those of the machine that wrote them."""

from pathlib import Path, PurePosixPath

from data.corpus.audio import exists


def named_file(name: str, audio: Path) -> str | None:
    """Return the file in the folder of recordings that ends like a path, relative to it; None if there is none.

    Args:
        name: a path, perhaps of another machine; only its parts below the folder are used.
        audio: the folder.
    """
    parts = [part for part in PurePosixPath(name.replace("\\", "/")).parts if part not in ("/", ".")]
    if ".." in parts:
        parts = parts[len(parts) - parts[::-1].index("..") :]
    for start in range(len(parts)):
        path = PurePosixPath(*parts[start:])
        if not path.is_absolute() and exists(audio / path):
            return str(path)
    return None
