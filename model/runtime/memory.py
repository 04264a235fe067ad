"""Memory of a worker: base models that it caches, its peak, and what happens when it runs out."""

import contextlib
import ctypes
import functools
import gc
import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import nn

from data.errors import UserError

CACHE_SHARE = 1 / 8  # of a device's memory, for base models that no trial uses at the moment
CACHE_SIZE = 8  # base models, those without weights included
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# Bytes that a worker's process takes before it has a model: 571 MB measured with torch, transformers and Ray. All
# workers share the pages of libraries.
WORKER = 600 * 10**6
CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
Stamp = tuple[tuple[str, int, int], ...]  # see `folder_stamp`
ADVICE = "lower data.history or model.llm.max_text_tokens, set model.llm.gradient_checkpointing, or use a larger device"


class OutOfMemoryError(UserError):
    """A trial needs more memory than its device has, however little is computed at once."""

    reason = "out of memory"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch could not allocate memory: on a CPU only the message tells."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


def single_example_error(tokens: int) -> OutOfMemoryError:
    """Return the error for an example of `tokens` tokens and frames that does not fit by itself."""
    return OutOfMemoryError(f"out of memory with one example at a time ({tokens} tokens); {ADVICE}")


def free() -> None:
    """Release memory that is no longer referenced. Call it outside the `except` block that holds the frames."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # returns the heap of former models to the system
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def required_for(purpose: str) -> Iterator[None]:
    """Report missing memory for something that a smaller token budget does not make smaller.

    Raises:
        OutOfMemoryError: in place of torch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory in {purpose}; train fewer parameters, or use a larger device") from None


class Peak:
    """Measures the peak memory of this process from its construction on.

    On a CPU this is resident memory (Linux): that of a worker without a model, and what was added in this process.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        free()
        self.device = device
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            baseline()
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Return the peak in bytes."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return _resident("VmHWM") - baseline() + WORKER


@functools.cache
def baseline() -> int:
    """Return the resident bytes of this process at the first call, which comes before it has a model."""
    return _resident("VmRSS")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def capacity(device: str) -> int:
    """Return the bytes of memory of the GPU, or of this machine or container."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    limits = [Path(limit).read_text().strip() for limit in CONTAINER_LIMITS if Path(limit).exists()]
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *(int(limit) for limit in limits if limit.isdigit())])


Load = TypeVar("Load", bound=Callable[..., nn.Module])
Models = OrderedDict[tuple[object, ...], nn.Module]
CACHES: list[Models] = []  # of all functions that are `cached`


def cached_models() -> set[int]:
    """Return the ids of the cached models of this process."""
    return {id(model) for models in CACHES for model in models.values()}


def forget_models(kept: Collection[int] = ()) -> None:
    """Drop the cached models of this process, and release their memory.

    Args:
        kept: the ids of models that stay, see `cached_models`.
    """
    for models in CACHES:
        for key in [key for key, model in models.items() if id(model) not in kept]:
            del models[key]
    free()


def cached(load: Load) -> Load:
    """Cache the models that a function of a path, a device and more loads: a search over base models reuses each.

    The newest model always stays. Older ones stay while all together take no more than `CACHE_SHARE` of the device's
    memory; the least recently used one is dropped first, before another model is loaded. A folder whose files have
    changed is loaded again: a process may live longer than the weights it has read.
    """
    models: Models = OrderedDict()
    CACHES.append(models)
    signature = inspect.signature(load)

    @functools.wraps(load)
    def cached_load(*args: object, **kwargs: object) -> nn.Module:
        (call := signature.bind(*args, **kwargs)).apply_defaults()
        arguments = tuple(call.arguments.values())
        key = (*arguments, folder_stamp(call.arguments["path"]))
        if key not in models:
            limit = CACHE_SHARE * capacity(call.arguments["device"])
            while models and (len(models) == CACHE_SIZE or _size_with_another(models.values()) > limit):
                models.popitem(last=False)
            models[key] = load(*arguments)
        models.move_to_end(key)
        return models[key]

    return cast(Load, cached_load)


def folder_stamp(path: str) -> Stamp:
    """Return names, sizes and times of the files in a folder; nothing for the id of a model."""
    entries = Path(path).iterdir() if Path(path).is_dir() else ()
    files = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files))


def _size_with_another(models: Iterable[nn.Module]) -> int:
    """Return the bytes of models, and of one more that is as large as the largest of them."""
    sizes = [sum(tensor.nbytes for tensor in model.parameters() if not tensor.is_meta) for model in models]
    return sum(sizes) + max(sizes)
