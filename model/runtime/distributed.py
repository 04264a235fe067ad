"""The workers of a trial: each computes a part of every step, and all of them must decide alike."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import UserError

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, number of workers) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_first(make: Callable[[], T]) -> T:
    """What rank 0 makes, in every worker; an exception of its is raised in all of them."""
    rank, workers = world()
    if workers == 1:
        return make()
    found: list[Any] = [None]
    if rank == 0:
        try:
            found = [(make(), None)]
        except Exception as failure:
            if isinstance(failure, UserError):
                failure.in_every_worker = True
            found = [(None, failure)]
    dist.broadcast_object_list(found, src=0)
    made, error = found[0]
    if error is not None:
        raise error
    value: T = made
    return value


def any_worker(*said: bool) -> list[bool]:
    """For each flag, whether one of the workers raises it; all of them have to ask. No device is waited for."""
    if world()[1] == 1:
        return list(said)
    flags = torch.tensor(said, dtype=torch.float32)
    dist.all_reduce(flags, group=_of_hosts(dist.group.WORLD))
    return [flag > 0 for flag in flags.tolist()]


@functools.lru_cache(maxsize=1)
def _of_hosts(workers: Any) -> Any:
    """The same workers as a group that sums what lies in the memory of their hosts."""
    return workers if dist.get_backend(workers) == "gloo" else dist.new_group(backend="gloo")


def sum_gradients(parameters: Sequence[torch.nn.Parameter], total: Tensor) -> Tensor:
    """Sum the gradients of all workers in place, and return the sum of `total`; what has no gradient gets zeros."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if world()[1] == 1:
        return total
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    vector = torch.cat([*(gradient.flatten() for gradient in gradients), total.float().reshape(1)])
    dist.all_reduce(vector)
    *parts, summed = vector.split([*(own.numel() for own in gradients), 1])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    every: Tensor = summed[0].double()
    return every


def sum_numbers(numbers: Tensor) -> Tensor:
    """Sum numbers of all workers."""
    if world()[1] > 1:
        dist.all_reduce(numbers)
    return numbers
