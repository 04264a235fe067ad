"""A folder of files, on this disk or behind a URL that pyarrow or fsspec understands (s3://, gs://, memory:// …)."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from filelock import FileLock, Timeout
from pyarrow import fs

from data.atomic import UNFINISHED, write_file
from data.errors import DataError, reason

LOCK = ".lock"
SECRET = ("key", "secret", "token", "password", "sig")  # in the name of an option of a URL


class Store:
    """Reads and writes whole files; a file is there complete or not at all. Pickles as its place alone.

    All methods raise a DataError where the store cannot be used.
    """

    def __init__(self, place: Path | str) -> None:
        self.place = str(place)
        self.local = None if "://" in self.place else Path(place).absolute()
        if self.local is None:
            self._files, self._root = _open(self.place)

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (str(self.local or self.place),)  # a worker has another current folder

    def __truediv__(self, name: str) -> str:
        """A file's full name, for messages; without the options of a URL."""
        return f"{self.place.partition('?')[0].rstrip('/')}/{name}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other preparations out of a local folder; folders that are made for it and stay empty are removed."""
        if self.local is None:
            yield
            return
        made = [folder for folder in (self.local, *self.local.parents) if not folder.exists()]
        with self._told():
            self.local.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.local / LOCK)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise DataError(f"{self.place}: another `sweep prepare` works here; wait for it, or end it") from None
        try:
            yield
        finally:
            self.delete(LOCK)
            lock.release()
            with contextlib.suppress(OSError):  # not empty: that is how it should be
                for folder in made:
                    folder.rmdir()

    def names(self) -> list[str]:
        """Files and folders that are there, in order; none if the folder does not exist."""
        with self._told():
            if self.local is not None:
                found = [path.name for path in self.local.iterdir()] if self.local.exists() else []
            else:
                inside = self._files.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
                found = [info.base_name for info in inside]
        return sorted(name for name in found if name != LOCK)

    def open(self, name: str) -> pa.NativeFile:
        """For reading at any place; memory-mapped on this disk.

        Raises:
            FileNotFoundError: it is not there.
        """
        with self._told():
            if self.local is not None:
                return pa.memory_map(str(self.local / name))
            return self._files.open_input_file(f"{self._root}/{name}")

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            FileNotFoundError: it is not there.
        """
        with self._told():
            if self.local is not None:
                return (self.local / name).read_bytes()
            with self._files.open_input_file(f"{self._root}/{name}") as file:
                content: bytes = file.readall()
            return content

    def write(self, name: str, content: bytes | memoryview | pa.Buffer) -> None:
        """Write or replace a file in one move; on this disk it is safe from a power cut, too."""
        with self._told():
            if self.local is None:
                with self._files.open_output_stream(f"{self._root}/{name}") as stream:
                    stream.write(content)
                return
            self.local.mkdir(parents=True, exist_ok=True)
            temporary = self.local / f".{name}{UNFINISHED}{os.getpid()}"
            write_file(self.local / name, memoryview(content), temporary=temporary, durable=True)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        with self._told(), contextlib.suppress(FileNotFoundError):
            if self.local is not None:
                (self.local / name).unlink()
            else:
                self._files.delete_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            place = self.place.partition("?")[0]
            raise DataError(f"{place}: cannot be used ({reason(error)}); check path, rights and connection") from None


def secret_in(url: str) -> str:
    """What to say about a URL that holds credentials, without them; "" if it holds none."""
    scheme, _, rest = url.partition("://")
    head, _, options = rest.partition("?")
    names = [option.partition("=")[0].lower() for option in options.split("&")]
    if "@" not in head.partition("/")[0] and not any(word in name for name in names for word in SECRET):
        return ""
    return (
        f"{scheme}://…: a URL must not hold credentials, it is written into configurations; give them in the "
        "environment, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )


def _open(url: str) -> tuple[fs.FileSystem, str]:
    if said := secret_in(url):
        raise DataError(said)
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
