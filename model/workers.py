"""The workers of a trial: each computes a part of every step, and all of them must decide alike."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

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


def any_worker(said: bool, device: torch.device) -> bool:
    """Whether one of the workers says so; all of them have to ask."""
    if world()[1] == 1:
        return said
    flag = torch.tensor(float(said), device=device)
    dist.all_reduce(flag)
    return flag.item() > 0


def sum_over_workers(parameters: Sequence[torch.nn.Parameter], numbers: Sequence[float]) -> list[float]:
    """Sum the gradients of all workers in place, and some numbers; what has no gradient gets zeros."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if world()[1] == 1:
        return list(numbers)
    flat = torch.tensor(numbers, dtype=torch.float64, device=parameters[0].device)
    dist.all_reduce(flat)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    vector = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(vector)
    for gradient, part in zip(gradients, vector.split([own.numel() for own in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    summed: list[float] = flat.tolist()
    return summed
