"""Write checkpoints in a thread, from a copy of the state, while the training makes its next steps."""

import threading
from collections.abc import Mapping
from typing import TypeVar, cast

from torch import Tensor

from model.checkpoints.checkpoint import CheckpointState
from model.checkpoints.fingerprint import digest
from model.training.run_folder import RunFolder

T = TypeVar("T")
MAX_COPY = 2**30  # bytes; a larger state is written before the training continues, as the copy would take its memory


class CheckpointWriter:
    """Writes one checkpoint at a time; an error of the thread is raised in the next call.

    Args:
        folder: of the training.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, state: CheckpointState) -> None:
        """Copy the state and start to write it, once the checkpoint before is written.

        Raises:
            StaleAttemptError, StorageError: as `checkpoint.save`, of this checkpoint or of the one before.
        """
        self.wait()
        copies = _bytes([state["tensors"], state["optimizer"]]) <= MAX_COPY
        # The weights of the best epoch are a copy already.
        written = cast(CheckpointState, _copy({**state, "kept": None}) | {"kept": state["kept"]}) if copies else state
        self._thread = threading.Thread(target=self._write, args=(written,), name="checkpoint")
        self._thread.start()
        if not copies:
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint is complete under its name.

        Raises:
            StaleAttemptError, StorageError: as `checkpoint.save`.
        """
        self.close()
        self.check()

    def check(self) -> None:
        """Raise the error of a checkpoint that could not be written, without waiting for one that is written now."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait until nothing is written, and raise nothing."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, state: CheckpointState) -> None:
        try:
            state["digest"] = digest(state["tensors"])
            self.folder.save(state)
        except BaseException as error:  # raised by the training
            self._error = error


def _copy(value: T) -> T:
    """Return a copy of nested tensors and plain values that later steps do not change; tensors are on the host."""
    if isinstance(value, Tensor):
        return cast(T, value.detach().to("cpu", copy=True))
    if isinstance(value, Mapping):
        return cast(T, {key: _copy(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return cast(T, type(value)(map(_copy, value)))
    return value


def _bytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_bytes, items))
