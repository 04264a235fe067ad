"""The batch plan: which utterances make up which optimizer step. A pure function, so a run can resume anywhere.

A step's utterances do not depend on how many workers train or how much memory they have: the step is dealt to the
workers (`share`), and each worker cuts its part into micro-batches that fit (`micro_batches`).
"""

import hashlib
from collections.abc import Sequence

import numpy as np

POOL = 50  # batches sorted by length together: padding falls to a few percent while the order stays random


def plan(costs: Sequence[int], *, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Steps of one epoch; every position of `costs` appears exactly once.

    Positions are shuffled, sorted by cost inside pools, cut into steps of `batch_size` and the steps shuffled again.

    Args:
        costs: of each utterance, what it costs to compute (frames or tokens), to put similar ones together.
        batch_size: utterances in an optimizer step; the last step of the epoch may be smaller.
        seed: of the run.
        epoch: from 0.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(costs))
    cost = np.asarray(costs)
    pools = np.split(order, range(batch_size * POOL, len(order), batch_size * POOL))
    ordered = np.concatenate([pool[np.argsort(cost[pool], kind="stable")] for pool in pools])
    steps = [ordered[start : start + batch_size].tolist() for start in range(0, len(ordered), batch_size)]
    return [steps[index] for index in rng.permutation(len(steps))]


def share(step: Sequence[int], rank: int, world: int) -> list[int]:
    """The part of a step that one of `world` workers computes; may be empty when the step is small."""
    return list(step[rank::world])


def micro_batches(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Cut a batch, given by the cost of its items, so that longest x count of each part stays within `budget`.

    An item that is over the budget by itself makes a part of its own.
    """
    order = sorted(range(len(costs)), key=lambda item: costs[item])
    parts: list[list[int]] = []
    for item in order:
        if parts and costs[item] * (len(parts[-1]) + 1) <= budget:
            parts[-1].append(item)
        else:
            parts.append([item])
    return parts


def plan_hash(costs: Sequence[int], fingerprint: str, batch_size: int, seed: int) -> str:
    """Names all epochs of a plan: a checkpoint of another plan must not be resumed."""
    content = hashlib.sha256(f"{fingerprint} {batch_size} {seed} {len(costs)} ".encode())
    content.update(np.asarray(costs, dtype="<i8").tobytes())
    return content.hexdigest()[:16]
