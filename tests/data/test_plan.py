"""The batch plan: a pure function with every utterance once and little padding, for any workers and memory."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from data.loading.batching import PAD_TOLERANCE, PADDING, Cost, groups, micro_batches, packs, plan, plan_hash, share


def costs(count: int, seed: int = 0) -> list[Cost]:
    """Lengths as in dialogues: text and audio correlate weakly, and both vary by a factor of ten."""
    rng = np.random.default_rng(seed)
    frames = np.clip(rng.lognormal(5.3, 0.9, count), 15, 1700)
    tokens = 60 + rng.integers(0, 450, count) + frames / 4
    return [Cost(*pair) for pair in zip(tokens.astype(int).tolist(), frames.astype(int).tolist(), strict=True)]


COSTS, MANY = costs(1003), costs(6000)


def padding(parts: Sequence[Sequence[int]]) -> float:
    """Fraction of padding, given the lengths that are computed together."""
    return 1 - sum(map(sum, parts)) / sum(max(part) * len(part) for part in parts)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1003, 3200, 3201])
def test_every_utterance_is_in_exactly_one_step(count: int) -> None:
    steps = plan(costs(count), batch_size=16, seed=3, epoch=2)
    assert Counter(position for step in steps for position in step) == Counter(range(count))
    assert sorted(map(len, steps), reverse=True) == [16] * (count // 16) + [count % 16] * (count % 16 > 0)


def test_plan_depends_on_seed_and_epoch() -> None:
    """In another epoch an utterance is with different ones, although they are sorted by length."""
    first = plan(COSTS, batch_size=16, seed=3, epoch=2)
    assert first == plan(COSTS, batch_size=16, seed=3, epoch=2)
    assert first != plan(COSTS, batch_size=16, seed=3, epoch=3)
    assert first != plan(COSTS, batch_size=16, seed=4, epoch=2)
    epochs = [plan(MANY, batch_size=16, seed=0, epoch=epoch) for epoch in range(2)]
    pairs = [{pair for step in steps for pair in itertools.combinations(sorted(step), 2)} for steps in epochs]
    assert len(pairs[0] & pairs[1]) < 0.25 * len(pairs[0])


def test_steps_are_similar_in_both_costs_with_little_padding() -> None:
    steps = plan(MANY, batch_size=16, seed=3, epoch=0)
    mixed = np.random.default_rng(0).permutation(6000)[: 16 * 375].reshape(-1, 16)
    for kind in ("tokens", "frames"):
        planned, random = (
            padding([[getattr(MANY[position], kind) for position in step] for step in chosen])
            for chosen in (steps, mixed)
        )
        assert planned < 0.4 * random
    parts, clips = [], []
    for step in steps:
        for part in micro_batches([MANY[position] for position in step], 16_384):
            frames = [MANY[step[item]].frames for item in part]
            parts.append([MANY[step[item]].tokens for item in part])
            clips += [[frames[item] for item in group] for group in groups(frames)]
    assert max(padding(parts), padding(clips)) < 0.015
    assert sum(map(len, parts)) / len(parts) > 3  # utterances are not computed one by one


@pytest.mark.parametrize("seed", range(12))
def test_killed_runs_see_every_utterance_once(seed: int) -> None:
    """A run is killed several times and resumes from its last step with another number of workers each time."""
    rng = np.random.default_rng(seed)
    every, batch_size = costs(int(rng.integers(1, 400)), seed), int(rng.integers(1, 40))
    seen: Counter[int] = Counter()
    done = 0
    while left := plan(every, batch_size=batch_size, seed=seed, epoch=1)[done:]:
        world = int(rng.integers(1, 9))
        kept = int(rng.integers(1, len(left) + 1))  # steps until the last checkpoint
        read = [[share(step, rank, world) for step in left] for rank in range(world)]
        assert {len(steps) for steps in read} == {len(left)}
        seen.update(position for steps in read for part in steps[:kept] for position in part)
        done += kept
    assert seen == Counter(range(len(every)))


@pytest.mark.parametrize("budget", [1, 300, 1000, 5000, 10**9])
def test_micro_batches_fit_the_budget(budget: int) -> None:
    batch = COSTS[:40]
    parts = micro_batches(batch, budget)
    assert sorted(item for part in parts for item in part) == list(range(40))
    for part in parts:
        longest = max(batch[item].tokens for item in part) + max(batch[item].frames for item in part)
        assert len(part) == 1 or longest * len(part) <= budget
    assert micro_batches([], budget) == []


@pytest.mark.parametrize("budget", [1, 1000, 10**9])
def test_packs_fit_the_budget(budget: int) -> None:
    batch = COSTS[:40]
    parts = packs(batch, budget)
    assert sorted(item for part in parts for item in part) == list(range(40))
    assert all(len(part) == 1 or sum(sum(batch[item]) for item in part) <= budget for part in parts)
    assert len(parts) == {1: 40, 10**9: 1}.get(budget, len(parts))
    assert packs([], budget) == []


def test_groups_are_as_large_as_padding_allows() -> None:
    lengths = [cost.frames for cost in COSTS]
    found = groups(lengths)
    assert sorted(item for group in found for item in group) == list(range(len(lengths)))
    for group, following in itertools.pairwise(found):
        for together, allowed in ((group, True), ([*group, following[0]], False)):
            frames = [lengths[item] for item in together]
            computed = max(frames) * len(frames)
            assert (computed - sum(frames) <= max(PAD_TOLERANCE, PADDING * computed)) == allowed
    assert groups([]) == []
    assert len(groups(lengths, 2048)) < len(found) / 2
    assert groups([0] * 5) == [[0, 1, 2, 3, 4]]


def test_hash_depends_on_corpus_costs_and_settings() -> None:
    changed = [*COSTS[:-1], Cost(1, 1)]
    cases = [(COSTS, "a", 16, 0), (COSTS, "b", 16, 0), (COSTS[:-1], "a", 16, 0), (changed, "a", 16, 0)]
    cases += [(COSTS, "a", 8, 0), (COSTS, "a", 16, 1)]
    assert len({plan_hash(*case) for case in cases}) == len(cases)
