"""The batch plan: which utterances make up which optimizer step. A pure function, so a run can resume anywhere.

A step's utterances do not depend on how many workers train or how much memory they have: the step is dealt to the
workers (`share`), each worker cuts its part into micro-batches that fit (`micro_batches`), and the encoder takes the
clips of a micro-batch in groups of nearly equal length (`groups`). So little is padded, and no result depends on it.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

POOL = 200  # batches sorted together: enough to find utterances that are alike in both costs
PADDING = 0.015  # share of what is computed together that may be padding ...
SPARED = 32  # ... or so many positions, which cost less than to compute in two parts


class Cost(NamedTuple):
    """What an utterance costs to compute."""

    tokens: int  # positions of the LLM, those of the sound included
    frames: int = 0  # of the encoder


def plan(
    costs: Sequence[Cost], *, batch_size: int, seed: int, epoch: int, weights: Sequence[float] | None = None
) -> list[list[int]]:
    """Steps of one epoch; without weights, every position of `costs` appears exactly once.

    Positions are shuffled; inside pools they are sorted by tokens, cut into slices, and each slice sorted by frames.
    So the utterances of a step are alike in both. The steps are shuffled again.

    Args:
        costs: of each utterance, as it is stored: augmentation may change it.
        batch_size: utterances in an optimizer step; the last step of the epoch may be smaller.
        seed: of the run.
        epoch: from 0.
        weights: of each utterance: as many as there are are drawn with replacement, with probabilities in proportion.
    """
    rng = np.random.default_rng([seed, epoch])
    if weights is None:
        order = rng.permutation(len(costs))
    else:
        order = rng.choice(len(costs), len(costs), p=np.asarray(weights) / np.sum(weights))
    pools = np.split(order, range(batch_size * POOL, len(order), batch_size * POOL))
    steps = [step for pool in pools for step in _deal(_alike(pool, costs, batch_size), batch_size)]
    return [steps[index] for index in rng.permutation(len(steps))]


def _alike(pool: np.ndarray, costs: Sequence[Cost], batch_size: int) -> np.ndarray:
    """The pool in an order in which neighbours have similar costs."""
    tokens, frames = np.asarray([costs[position] for position in pool], dtype=int).reshape(-1, 2).T
    by_tokens = np.argsort(tokens, kind="stable")
    size = batch_size * max(1, round((len(pool) / batch_size) ** 0.5))  # as many slices as batches in a slice
    slices = np.split(by_tokens, range(size, len(pool), size))
    order = np.concatenate([part[np.argsort(frames[part], kind="stable")] for part in slices])
    alike: np.ndarray = pool[order]
    return alike


def _deal(ordered: np.ndarray, batch_size: int) -> list[list[int]]:
    """Steps of neighbours. Where positions were drawn several times, their copies lie side by side: so many steps as
    one has copies are dealt out together, that each goes to another."""
    copies = max(1, np.bincount(ordered, minlength=1).max())
    runs = np.split(ordered, range(batch_size * copies, len(ordered), batch_size * copies))
    counts = [-(-len(run) // batch_size) for run in runs]
    return [run[first::count].tolist() for run, count in zip(runs, counts, strict=True) for first in range(count)]


def share(step: Sequence[int], rank: int, world: int) -> list[int]:
    """The part of a step that one of `world` workers computes; may be empty when the step is small."""
    return list(step[rank::world])


def micro_batches(costs: Sequence[Cost], budget: int, spared: int = SPARED) -> list[list[int]]:
    """Cut a batch, given by the costs of its items, into parts of similar tokens with longest x count within `budget`.

    An item that is over the budget by itself makes a part of its own. Another part costs more than `spared` positions
    of padding do.
    """

    def fits(part: Sequence[int]) -> bool:
        longest = max(costs[item].tokens for item in part) + max(costs[item].frames for item in part)
        return longest * len(part) <= budget

    return _cut([cost.tokens for cost in costs], fits, spared)


def groups(lengths: Sequence[int], spared: int = SPARED) -> list[list[int]]:
    """Cut clips, given by their lengths in frames, into groups that are padded and encoded together."""
    return _cut(lengths, lambda part: True, spared)


def _cut(lengths: Sequence[int], fits: Callable[[Sequence[int]], bool], spared: int) -> list[list[int]]:
    """Parts in order of length, each as large as `fits` and the limit on padding allow."""
    parts: list[list[int]] = []
    total = 0  # of the lengths in the last part
    for item in sorted(range(len(lengths)), key=lambda item: lengths[item]):
        longer = [*parts[-1], item] if parts else []
        computed = len(longer) * lengths[item]
        total += lengths[item]
        if longer and computed - total <= max(spared, PADDING * computed) and fits(longer):
            parts[-1] = longer
        else:
            parts.append([item])
            total = lengths[item]
    return parts


def plan_hash(
    costs: Sequence[Cost], fingerprint: str, batch_size: int, seed: int, weights: Sequence[float] | None = None
) -> str:
    """Names all epochs of a plan: a checkpoint of another plan must not be resumed."""
    content = hashlib.sha256(f"{fingerprint} {batch_size} {seed} {len(costs)} ".encode())
    content.update(np.asarray(costs, dtype="<i8").tobytes())
    content.update(np.asarray(weights or (), dtype="<f8").tobytes())
    return content.hexdigest()[:16]
