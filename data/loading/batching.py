"""The batch plan: the utterances of every optimizer step, as a pure function, so that a run can resume at any step.

The utterances of a step do not depend on the number of workers or their memory. A step is distributed over the workers
(`share`), each worker cuts its part into micro-batches that fit into memory (`micro_batches`, or `packs` where examples
are packed), and the encoder encodes the clips of a micro-batch in groups of similar length (`groups`). This keeps
padding small and changes no result.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

POOL = 200  # batches that are sorted together, enough to find utterances that are similar in both costs
PADDING = 0.015  # maximum fraction of padding in a part ...
PAD_TOLERANCE = 32  # ... or this many positions, which cost less than computing another part


class Cost(NamedTuple):
    """The cost of computing an utterance."""

    tokens: int  # positions of the LLM, including those of the audio
    frames: int = 0  # frames of the encoder


def plan(
    costs: Sequence[Cost], *, batch_size: int, seed: int, epoch: int, weights: Sequence[float] | None = None
) -> list[list[int]]:
    """Return the steps of an epoch as positions in `costs`; without weights every position occurs exactly once.

    Positions are shuffled. Within a pool they are sorted by tokens and cut into slices, and each slice is sorted by
    frames, so the utterances of a step are similar in both costs. Finally the steps are shuffled.

    Args:
        costs: cost of each utterance before augmentation.
        batch_size: utterances per optimizer step; the last step of the epoch may be smaller.
        seed: seed of the run.
        epoch: from 0.
        weights: weight of each utterance: `len(costs)` positions are drawn with replacement in proportion to them.
    """
    rng = np.random.default_rng([seed, epoch])
    if weights is None:
        order = rng.permutation(len(costs))
    else:
        order = rng.choice(len(costs), len(costs), p=np.asarray(weights) / np.sum(weights))
    pools = np.split(order, range(batch_size * POOL, len(order), batch_size * POOL))
    steps = [step for pool in pools for step in _steps(_sort_by_cost(pool, costs, batch_size), batch_size)]
    return [steps[index] for index in rng.permutation(len(steps))]


def _sort_by_cost(pool: np.ndarray, costs: Sequence[Cost], batch_size: int) -> np.ndarray:
    """Return the pool in an order in which neighbours have similar costs."""
    tokens, frames = np.asarray([costs[position] for position in pool], dtype=int).reshape(-1, 2).T
    by_tokens = np.argsort(tokens, kind="stable")
    size = batch_size * max(1, round((len(pool) / batch_size) ** 0.5))  # as many slices as batches in a slice
    slices = np.split(by_tokens, range(size, len(pool), size))
    order = np.concatenate([part[np.argsort(frames[part], kind="stable")] for part in slices])
    ordered: np.ndarray = pool[order]
    return ordered


def _steps(ordered: np.ndarray, batch_size: int) -> list[list[int]]:
    """Cut ordered positions into steps of neighbours.

    Copies of a position that was drawn several times are neighbours. They are distributed over as many steps, so that
    no step contains a position twice.
    """
    copies = max(1, np.bincount(ordered, minlength=1).max())
    runs = np.split(ordered, range(batch_size * copies, len(ordered), batch_size * copies))
    counts = [-(-len(run) // batch_size) for run in runs]
    return [run[first::count].tolist() for run, count in zip(runs, counts, strict=True) for first in range(count)]


def share(step: Sequence[int], rank: int, world: int) -> list[int]:
    """Return the part of a step that worker `rank` of `world` computes; it may be empty if the step is small."""
    return list(step[rank::world])


def micro_batches(costs: Sequence[Cost], budget: int, pad_tolerance: int = PAD_TOLERANCE) -> list[list[int]]:
    """Cut a batch into parts of similar tokens, each with longest cost x count within the budget.

    Args:
        costs: cost of each item of the batch.
        budget: maximum number of positions of a part; a single item may exceed it.
        pad_tolerance: positions of padding that cost less than computing another part.
    """

    def fits(part: Sequence[int]) -> bool:
        longest = max(costs[item].tokens for item in part) + max(costs[item].frames for item in part)
        return longest * len(part) <= budget

    return _cut([cost.tokens for cost in costs], fits, pad_tolerance)


def packs(costs: Sequence[Cost], budget: int) -> list[list[int]]:
    """Cut a batch into parts that are packed without padding, in order of tokens.

    Args:
        costs: cost of each item of the batch.
        budget: maximum number of tokens and frames of a part; a single item may exceed it.
    """
    parts: list[list[int]] = []
    computed = 0  # in the last part
    for item in sorted(range(len(costs)), key=lambda item: costs[item].tokens):
        computed += sum(costs[item])
        if parts and computed <= budget:
            parts[-1].append(item)
        else:
            parts.append([item])
            computed = sum(costs[item])
    return parts


def groups(lengths: Sequence[int], pad_tolerance: int = PAD_TOLERANCE) -> list[list[int]]:
    """Cut clips, given by their lengths in frames, into groups that are padded and encoded together."""
    return _cut(lengths, lambda part: True, pad_tolerance)


def _cut(lengths: Sequence[int], fits: Callable[[Sequence[int]], bool], pad_tolerance: int) -> list[list[int]]:
    """Return parts in order of length, each as large as `fits` and the limits of padding allow."""
    parts: list[list[int]] = []
    total = 0  # sum of the lengths in the last part
    for item in sorted(range(len(lengths)), key=lambda item: lengths[item]):
        longer = [*parts[-1], item] if parts else []
        computed = len(longer) * lengths[item]
        total += lengths[item]
        if longer and computed - total <= max(pad_tolerance, PADDING * computed) and fits(longer):
            parts[-1] = longer
        else:
            parts.append([item])
            total = lengths[item]
    return parts


def plan_hash(
    costs: Sequence[Cost], fingerprint: str, batch_size: int, seed: int, weights: Sequence[float] | None = None
) -> str:
    """Return a hash of all epochs of a plan; a checkpoint can only be resumed with the same plan."""
    content = hashlib.sha256(f"{fingerprint} {batch_size} {seed} {len(costs)} ".encode())
    content.update(np.asarray(costs, dtype="<i8").tobytes())
    content.update(np.asarray(weights or (), dtype="<f8").tobytes())
    return content.hexdigest()[:16]
