"""A store of files: a local folder, or a URL that pyarrow or fsspec understands (s3://, gs://, memory:// …)."""

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
SECRET = ("key", "secret", "token", "password", "sig")  # parts of names of URL options that contain credentials


class Store:
    """Reads and writes whole files; a file is complete or does not exist. A pickle contains only the address.

    All methods raise a DataError if the store cannot be used.

    Args:
        address: path of a folder, or a URL.
    """

    def __init__(self, address: Path | str) -> None:
        self.address = str(address)
        self.local = None if "://" in self.address else Path(address).absolute()
        if self.local is None:
            self._files, self._root = _open(self.address)

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return Store, (str(self.local or self.address),)  # absolute, because a worker has another working directory

    def __truediv__(self, name: str) -> str:
        """Return the full name of a file for messages, without the options of a URL."""
        return f"{self.address.partition('?')[0].rstrip('/')}/{name}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock a local folder against other preparations; remove folders that this creates and that stay empty."""
        if self.local is None:
            yield
            return
        created = [folder for folder in (self.local, *self.local.parents) if not folder.exists()]
        with self._data_errors():
            self.local.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.local / LOCK)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise DataError(
                    f"{self.address}: another `sweep prepare` is running here; wait for it, or stop it"
                ) from None
        try:
            yield
        finally:
            self.delete(LOCK)
            lock.release()
            with contextlib.suppress(OSError):  # the folder is not empty
                for folder in created:
                    folder.rmdir()

    def names(self) -> list[str]:
        """Return the names of files and folders in order; [] if the folder does not exist."""
        with self._data_errors():
            if self.local is not None:
                names = [path.name for path in self.local.iterdir()] if self.local.exists() else []
            else:
                infos = self._files.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
                names = [info.base_name for info in infos]
        return sorted(name for name in names if name != LOCK)

    def open(self, name: str) -> pa.NativeFile:
        """Open a file for random access; a local file is memory-mapped.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        with self._data_errors():
            if self.local is not None:
                return pa.memory_map(str(self.local / name))
            return self._files.open_input_file(f"{self._root}/{name}")

    def read(self, name: str) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        with self._data_errors():
            if self.local is not None:
                return (self.local / name).read_bytes()
            with self._files.open_input_file(f"{self._root}/{name}") as file:
                content: bytes = file.readall()
            return content

    def write(self, name: str, content: bytes | memoryview | pa.Buffer) -> None:
        """Write or replace a file atomically; a local file also survives a power failure."""
        with self._data_errors():
            if self.local is None:
                with self._files.open_output_stream(f"{self._root}/{name}") as stream:
                    stream.write(content)
                return
            self.local.mkdir(parents=True, exist_ok=True)
            temporary = self.local / f".{name}{UNFINISHED}{os.getpid()}"
            write_file(self.local / name, memoryview(content), temporary=temporary, durable=True)

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        with self._data_errors(), contextlib.suppress(FileNotFoundError):
            if self.local is not None:
                (self.local / name).unlink()
            else:
                self._files.delete_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def _data_errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            address = self.address.partition("?")[0]
            raise DataError(f"{address}: cannot be used ({reason(error)}); check path, rights and connection") from None


def credentials_message(url: str) -> str:
    """Return an error message, without the credentials, if a URL contains credentials; else ""."""
    scheme, _, rest = url.partition("://")
    head, _, options = rest.partition("?")
    names = [option.partition("=")[0].lower() for option in options.split("&")]
    if "@" not in head.partition("/")[0] and not any(word in name for name in names for word in SECRET):
        return ""
    return (
        f"{scheme}://…: a URL must not contain credentials, because it is stored in configurations; set them in the "
        "environment, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    )


def _open(url: str) -> tuple[fs.FileSystem, str]:
    if message := credentials_message(url):
        raise DataError(message)
    try:
        try:
            files, root = fs.FileSystem.from_uri(url)
        except pa.ArrowInvalid:
            import fsspec

            remote, root = fsspec.core.url_to_fs(url)
            files = fs.PyFileSystem(fs.FSSpecHandler(remote))
    except (ValueError, ImportError, OSError) as error:
        raise DataError(f"{url}: the store cannot be opened ({reason(error)}); use a folder or s3://…") from None
    return files, root.rstrip("/")
