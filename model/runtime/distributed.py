"""Communication between the workers of a trial: each computes a part of every step, and all must decide alike."""

import functools
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import UserError

T = TypeVar("T")


def world() -> tuple[int, int]:
    """Return (rank, number of workers) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_first_worker(function: Callable[[], T]) -> T:
    """Call a function on rank 0 and return its result on every worker.

    Raises:
        Exception: what the function raised, on every worker.
    """
    rank, workers = world()
    if workers == 1:
        return function()
    result: list[tuple[T | None, Exception | None]] = [(None, None)]
    if rank == 0:
        try:
            result = [(function(), None)]
        except Exception as error:
            if isinstance(error, UserError):
                error.in_every_worker = True
            result = [(None, error)]
    dist.broadcast_object_list(result, src=0)
    value, failure = result[0]
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]  # None only where the function returns it


def gather(value: T) -> list[T]:
    """Return the picklable values of all workers, by rank, on every worker."""
    workers = world()[1]
    if workers == 1:
        return [value]
    values: list[T] = [value] * workers
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until all workers are here."""
    if world()[1] > 1:
        dist.barrier()


def in_turns(function: Callable[[], T]) -> T:
    """Call a function on every worker, on those of one machine one after another, and return its result.

    Raises:
        Exception: what the function raised on this worker, after the others had their turns.
    """
    rank = world()[0]
    hosts = gather(socket.gethostname())
    result, failure = list[T](), None
    for turn in range(max(map(hosts.count, hosts))):
        if turn == hosts[:rank].count(hosts[rank]):
            try:
                result.append(function())
            except Exception as error:
                failure = error
        barrier()
    if failure is not None:
        raise failure
    return result[0]


def any_worker(*flags: bool) -> list[bool]:
    """Return for each flag whether it is set on any worker.

    All workers must call this. It sums in host memory, so it does not wait for a device.
    """
    if world()[1] == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.float32)
    dist.all_reduce(counts, group=_host_group(dist.group.WORLD))
    return [count > 0 for count in counts.tolist()]


@functools.lru_cache(maxsize=1)
def _host_group(workers: dist.ProcessGroup) -> dist.ProcessGroup:
    """Return the same workers as a group that sums tensors in host memory."""
    return workers if dist.get_backend(workers) == "gloo" else cast(dist.ProcessGroup, dist.new_group(backend="gloo"))


def sum_gradients(parameters: Sequence[torch.nn.Parameter], total: Tensor) -> Tensor:
    """Sum the gradients of all workers in place, and return the sum of `total` (float64, a scalar).

    A parameter without a gradient gets zeros.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if world()[1] == 1:
        return total
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    vector = torch.cat([*(gradient.flatten() for gradient in gradients), total.float().reshape(1)])
    dist.all_reduce(vector)
    *summed, summed_total = vector.split([*(gradient.numel() for gradient in gradients), 1])
    for gradient, values in zip(gradients, summed, strict=True):
        gradient.copy_(values.view_as(gradient))
    result: Tensor = summed_total[0].double()
    return result


def sum_over_workers(values: Tensor) -> Tensor:
    """Sum a tensor over all workers, in place, and return it."""
    if world()[1] > 1:
        dist.all_reduce(values)
    return values
