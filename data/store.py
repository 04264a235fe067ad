"""A folder of files, on this disk or behind a URL that pyarrow or fsspec understands (s3://, gs://, memory:// …)."""

import contextlib
import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from data.errors import DataError, reason


class Store:
    """Reads and writes whole files; a file is there complete or not at all. Pickles as its place alone."""

    def __init__(self, place: Path | str) -> None:
        self.place = str(place)
        self.local = None if "://" in self.place else Path(place)
        if self.local is None:
            self._files, self._root = _open(self.place)

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (self.place,)

    def __truediv__(self, name: str) -> str:
        """A file's full name, for messages; without the options of a URL."""
        return f"{self.place.partition('?')[0].rstrip('/')}/{name}"

    def names(self) -> list[str]:
        """Files that are there, in order; none if the folder does not exist."""
        if self.local is not None:
            return sorted(path.name for path in self.local.iterdir()) if self.local.is_dir() else []
        found = self._files.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.File)

    def open(self, name: str) -> pa.NativeFile:
        """For reading at any place; memory-mapped on this disk.

        Raises:
            FileNotFoundError: it is not there.
        """
        if self.local is not None:
            return pa.memory_map(str(self.local / name))
        return self._files.open_input_file(f"{self._root}/{name}")

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: it is not there.
        """
        if self.local is not None:
            return (self.local / name).read_bytes()
        with self.open(name) as file:
            content: bytes = file.readall()
        return content

    def write(self, name: str, content: bytes | memoryview | pa.Buffer) -> None:
        """Write or replace a file in one move; on this disk it is safe from a power cut, too."""
        if self.local is None:
            with self._files.open_output_stream(f"{self._root}/{name}") as stream:
                stream.write(content)
            return
        self.local.mkdir(parents=True, exist_ok=True)
        unfinished = self.local / f".{name}.unfinished-{os.getpid()}"
        try:
            with unfinished.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.local / name)
        finally:
            unfinished.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.local is not None:
            (self.local / name).unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError):
            self._files.delete_file(f"{self._root}/{name}")

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        if self.local is not None:
            shutil.rmtree(self.local, ignore_errors=True)
        else:
            self._files.delete_dir_contents(self._root, missing_dir_ok=True)


def _open(url: str) -> tuple[fs.FileSystem, str]:
    if "@" in urlsplit(url).netloc or "secret" in urlsplit(url).query.lower():
        raise DataError(
            f"{url.partition('://')[0]}://…: a URL must not hold credentials, it is written into configurations; give "
            "them in the environment, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    try:
        try:
            files, root = fs.FileSystem.from_uri(url)
        except pa.ArrowInvalid:
            import fsspec

            remote, root = fsspec.core.url_to_fs(url)
            files = fs.PyFileSystem(fs.FSSpecHandler(remote))
    except (ValueError, ImportError, OSError) as error:
        raise DataError(f"{url}: not a store that can be opened ({reason(error)}); use a folder or s3://…") from None
    return files, root.rstrip("/")
