"""The contract of a kind of cached numbers (encoder features, teacher logits), and what trials request of a kind."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic

from data.loading.cached_arrays import CacheFile, CacheJob, Key, Row, missing_files
from sweep.config.resolve import ResolvedConfig
from sweep.config.schema import Config


@dataclass(frozen=True)
class CacheRequest(Generic[Row, Key]):
    """The cache files that some trials of a sweep read."""

    kind: "CacheKind[Row, Key]"
    key: Key
    folder: Path  # <cache>/<kind>/<key>
    files: Sequence[CacheFile[Row]]
    config: ResolvedConfig  # of one such trial

    @property
    def missing(self) -> list[CacheFile[Row]]:
        """Return the files that have not been computed yet."""
        return missing_files(self.folder, self.files)

    def lacks(self, file: CacheFile[Row]) -> bool:
        """Return whether a file is one of the request's, and has not been computed yet."""
        return file.name in self._names and not (self.folder / file.name).exists()

    @functools.cached_property
    def _names(self) -> set[str]:
        return {file.name for file in self.files}


AnyRequest = CacheRequest[Any, Any]


class CacheKind(ABC, Generic[Row, Key]):
    """A kind of numbers that a frozen model computes once for all trials."""

    name: ClassVar[str]  # its folder in a cache
    axes: ClassVar[tuple[str, ...]]  # prefixes of the settings that decide which numbers a trial reads

    def requests(
        self, config: ResolvedConfig, cache: Path, sweep: Config | None = None
    ) -> list[CacheRequest[Row, Key]]:
        """Return what a trial may read; nothing if it must compute the numbers itself.

        Args:
            config: of the trial.
            cache: folder of the cache.
            sweep: whose other trials may read the same key; None: what the trial reads by itself.
        """
        folders = {cache / self.name / key.key: key for key in self.keys(config)}
        return [
            CacheRequest(self, key, folder, self.files(config, folder, sweep), config)
            for folder, key in folders.items()
        ]

    def identity(self, request: CacheRequest[Row, Key]) -> Hashable:
        """Return a value that is equal for requests that `merged` makes one of."""
        return (request.folder, *(file.name for file in request.files))

    def merged(self, first: CacheRequest[Row, Key], second: CacheRequest[Row, Key]) -> CacheRequest[Row, Key]:
        """Return one request for two of the same identity."""
        return first

    def aligned(self, requests: Sequence[CacheRequest[Row, Key]]) -> list[CacheRequest[Row, Key]]:
        """Return requests of one forward pass as the cache is now; what they lack in common is in the same files."""
        return list(requests)

    @abstractmethod
    def keys(self, config: ResolvedConfig) -> list[Key]:
        """Return the cache keys of a trial in the order of reading; none if it cannot use cached numbers."""

    @abstractmethod
    def files(self, config: ResolvedConfig, folder: Path, sweep: Config | None) -> list[CacheFile[Row]]:
        """Return all files of a trial that has a key; see `requests`."""

    @abstractmethod
    def pass_key(self, request: CacheRequest[Row, Key]) -> str:
        """Return a string that is equal for requests that one forward pass of the model can compute."""

    @abstractmethod
    def jobs(
        self, requests: Sequence[CacheRequest[Row, Key]], files: Sequence[CacheFile[Row]]
    ) -> Sequence[CacheJob[Row, Key]]:
        """Return the jobs that compute `files` for those of the requests, all of one forward pass, that lack them."""

    @abstractmethod
    def work(self, request: CacheRequest[Row, Key], size: int) -> float:
        """Return the cost of computing an input of this size: positions times parameters."""

    @abstractmethod
    def epoch_size(self, request: CacheRequest[Row, Key]) -> int:
        """Return the input size of what a trial reads in an epoch."""

    @abstractmethod
    def bytes(self, request: CacheRequest[Row, Key], files: Sequence[CacheFile[Row]]) -> int:
        """Return an estimate of the disk space of some files."""

    @abstractmethod
    def describe(self, keys: Sequence[Key], config: ResolvedConfig) -> str:
        """Return a phrase that names the numbers and their model; the keys differ in nothing that `topic` has."""

    def topic(self, key: Key) -> Key:
        """Return what is equal for keys that one line describes."""
        return key

    @abstractmethod
    def format_size(self, size: int) -> str:
        """Return an input size with its unit."""


def model_name(path: str) -> str:
    """Return the Hugging Face id of a model, or the name of its folder."""
    return Path(path).name if Path(path).exists() else path
