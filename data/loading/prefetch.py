"""Read batches ahead of the training step in a thread."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from queue import SimpleQueue

from data.loading.augment import Draw
from data.loading.examples import Example
from data.loading.tasks import Item

Batches = Sequence[Sequence[Item]]
Batch = list[Example]
Source = Callable[[Batches, Draw | None], Generator[Batch, None, None]]  # None: as recorded
BURST = 8  # batches read in a row: to wake the thread for each costs as much as to read it
PREFETCH = 2 * BURST  # batches read ahead of the training step, at most


class Prefetcher:
    """Batches in their order, read ahead by a thread from the moment on that this is made. Iterate over it once.

    Args:
        read: makes the batches; runs in the thread.
        after: what is read first. This starts once that has been read, or is wanted itself.
    """

    def __init__(self, read: Callable[[], Generator[Batch, None, None]], after: "Prefetcher | None" = None) -> None:
        self.waited = 0.0  # seconds for which the consumer was blocked
        self._over, self._taken = False, 0
        self._batches: SimpleQueue[Batch | BaseException | None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()  # an entry for each burst that may be read
        for _ in range(PREFETCH // BURST):
            self._room.put(None)
        self._wanted, self._stop = threading.Event(), threading.Event()
        former = None if after is None else after.thread
        # The thread must not hold this object: one that nobody holds any longer is closed.
        own = (read, former, self._batches, self._room, self._wanted, self._stop)
        self.thread: threading.Thread = threading.Thread(target=_fill, args=own, daemon=True, name="reading")
        self.thread.start()

    @property
    def ended(self) -> bool:
        """Whether nothing more will be read."""
        return not self.thread.is_alive()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            Exception: what the reading raised, as it was.
        """
        if self._over:
            raise StopIteration
        self._wanted.set()
        started = time.monotonic()
        batch = self._batches.get()
        self.waited += time.monotonic() - started
        if isinstance(batch, list):
            self._taken += 1
            if self._taken % BURST == 0:
                self._room.put(None)
            return batch
        self._over = True
        raise StopIteration if batch is None else batch

    def close(self) -> None:
        """End the thread with the batch that it is reading."""
        self._over = True
        self._stop.set()
        self._room.put(None)  # the thread may be waiting for it

    __del__ = close


def _fill(
    read: Callable[[], Generator[Batch, None, None]],
    former: threading.Thread | None,
    batches: "SimpleQueue[Batch | BaseException | None]",
    room: "SimpleQueue[None]",
    wanted: threading.Event,
    stop: threading.Event,
) -> None:
    end: BaseException | None = None
    while former is not None and former.is_alive() and not wanted.is_set() and not stop.is_set():
        former.join(0.02)
    try:
        with contextlib.closing(read()) as source:
            for number in itertools.count():
                if number % BURST == 0:
                    room.get()
                if stop.is_set() or (batch := next(source, None)) is None:
                    break
                batches.put(batch)
    except BaseException as error:  # raised again where the batch is missed
        end = error
    batches.put(end)
