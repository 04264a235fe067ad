"""Read batches in a thread ahead of the training step."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from queue import SimpleQueue

from data.loading.sources import Batch

BURST = 8  # batches that are read in a row; waking the thread for each batch costs as much as reading it
PREFETCH = 2 * BURST  # maximum number of batches that are read ahead


class Prefetcher:
    """An iterator over batches that a thread reads ahead, starting at construction. Iterate over it once.

    Args:
        read: returns the generator of the batches, which runs in the thread.
        after: another prefetcher that is read first; this one starts when it has finished, or at the first `next`.
    """

    def __init__(self, read: Callable[[], Generator[Batch, None, None]], after: "Prefetcher | None" = None) -> None:
        self.waited = 0.0  # seconds for which the consumer was blocked
        self._over, self._taken = False, 0
        self._batches: SimpleQueue[Batch | BaseException | None] = SimpleQueue()
        self._room: SimpleQueue[None] = SimpleQueue()  # one entry for each burst that may be read
        for _ in range(PREFETCH // BURST):
            self._room.put(None)
        self._wanted, self._stop = threading.Event(), threading.Event()
        previous = None if after is None else after.thread
        # The thread must not refer to this object, so that `__del__` runs when the consumer drops it.
        args = (read, previous, self._batches, self._room, self._wanted, self._stop)
        self.thread: threading.Thread = threading.Thread(target=_fill, args=args, daemon=True, name="reading")
        self.thread.start()

    @property
    def ended(self) -> bool:
        """Return whether the thread has ended."""
        return not self.thread.is_alive()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises:
            Exception: the exception that the source raised.
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
        """Stop the thread after the batch that it is reading."""
        self._over = True
        self._stop.set()
        self._room.put(None)  # wakes a thread that waits for room

    __del__ = close


def _fill(
    read: Callable[[], Generator[Batch, None, None]],
    previous: threading.Thread | None,
    batches: "SimpleQueue[Batch | BaseException | None]",
    room: "SimpleQueue[None]",
    wanted: threading.Event,
    stop: threading.Event,
) -> None:
    """Put batches into the queue until the source ends, fails or `stop` is set; then put None or the exception."""
    end: BaseException | None = None
    while previous is not None and previous.is_alive() and not wanted.is_set() and not stop.is_set():
        previous.join(0.02)
    try:
        with contextlib.closing(read()) as source:
            for number in itertools.count():
                if number % BURST == 0:
                    room.get()
                if stop.is_set() or (batch := next(source, None)) is None:
                    break
                batches.put(batch)
    except BaseException as error:  # raised again in `__next__`
        end = error
    batches.put(end)
