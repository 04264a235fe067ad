"""Memory: base models that a process keeps, what it holds, and how it ends where nothing smaller can be computed."""

import contextlib
import ctypes
import functools
import gc
import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from data.errors import UserError

KEPT_SHARE = 1 / 8  # of a device's memory, for base models that wait for a trial to use them again
MOST_KEPT = 8  # base models, also of those without weights
SIGNS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# Bytes that a worker's process has for itself before it has a model (571 MB measured, of torch, transformers and Ray);
# the pages of libraries are shared by all of them.
WORKER = 600 * 10**6
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
ADVICE = "lower data.history or model.llm.max_text_tokens, set model.llm.gradient_checkpointing, or use a larger device"


class OutOfMemoryError(UserError):
    """A trial needs more memory than its device has, however little is computed at once."""

    reason = "out of memory"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not get memory: on a GPU there is a class for it, on a CPU words alone."""
    return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)


def one_at_a_time(tokens: int) -> OutOfMemoryError:
    """The error where an example does not fit by itself."""
    return OutOfMemoryError(f"out of memory with one example at a time ({tokens} tokens); {ADVICE}")


def free() -> None:
    """Give back what nothing refers to any more. To be called outside of the `except` that holds the frames."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def told(what: str) -> Iterator[None]:
    """Tell that there is no memory for something that no token budget makes smaller.

    Raises:
        OutOfMemory: in place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory in {what}; train fewer parameters, or use a larger device") from None


class Peak:
    """The most memory that this process holds at a time, from now on.

    On a CPU that is resident memory (Linux): of a worker that has no model yet, and what was added to it here.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        free()
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what former models left in the heap
            _at_rest()
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Bytes."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return _resident("VmHWM") - _at_rest() + WORKER


@functools.cache
def _at_rest() -> int:
    """Of this process when it was first asked: before it had a model."""
    return _resident("VmRSS")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def capacity(device: str) -> int:
    """Bytes of the device: of a GPU, or of this machine or container."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    limits = [Path(limit).read_text().strip() for limit in LIMITS if Path(limit).exists()]
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *(int(limit) for limit in limits if limit.isdigit())])


Load = TypeVar("Load", bound=Callable[..., nn.Module])


def kept(load: Load) -> Load:
    """Keep what a function of a path, a device and more has loaded: a search over base models comes back to each.

    The newest is kept in any case. Those before it stay as long as all together take no more than a share of the
    device's memory; the one that was not used for longest goes first, before another is loaded.
    """
    found: OrderedDict[tuple[Any, ...], nn.Module] = OrderedDict()
    signature = inspect.signature(load)

    @functools.wraps(load)
    def loaded(*given: Any, **named: Any) -> nn.Module:
        (call := signature.bind(*given, **named)).apply_defaults()
        key = tuple(call.arguments.values())
        if key not in found:
            room = KEPT_SHARE * capacity(call.arguments["device"])
            while found and (len(found) == MOST_KEPT or _with_another(found.values()) > room):
                found.popitem(last=False)
            found[key] = load(*key)
        found.move_to_end(key)
        return found[key]

    return loaded  # type: ignore[return-value]


def _with_another(models: Iterable[nn.Module]) -> int:
    """Bytes of models, and of one more like the largest of them."""
    sizes = [sum(own.nbytes for own in model.parameters() if not own.is_meta) for model in models]
    return sum(sizes) + max(sizes)
