"""Private APIs of dependencies that the data layer needs, each with the version that it was checked against.

tests/data/test_compat.py fails when one of them disappears.
"""

import functools
import time
from collections.abc import Callable


@functools.cache
def pausing_callback(pause: Callable[[], float]) -> type:
    """Return a Ray Data execution callback that sleeps for `pause()` seconds in every step of the control loop.

    Ray 2.60.0 has no public option for this. Without a pause the control loop spins and takes a CPU from the training.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class PausingCallback(ExecutionCallback):
        def on_execution_step(self, executor: object) -> None:
            time.sleep(pause())

    return PausingCallback
