"""The batch plan: a pure function, every utterance once, little padding, whatever the workers and their memory."""

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from data.loading.batching import PAD_TOLERANCE, PADDING, Cost, groups, micro_batches, plan, plan_hash, share


def costs(count: int, seed: int = 0) -> list[Cost]:
    """Lengths as dialogues have them: words and sound hang together loosely, and both vary tenfold."""
    rng = np.random.default_rng(seed)
    frames = np.clip(rng.lognormal(5.3, 0.9, count), 15, 1700)
    tokens = 60 + rng.integers(0, 450, count) + frames / 4
    return [Cost(*pair) for pair in zip(tokens.astype(int).tolist(), frames.astype(int).tolist(), strict=True)]


COSTS = costs(1003)


def padding(parts: Sequence[Sequence[int]]) -> float:
    """Share of what is computed, given the lengths that are computed together."""
    computed = sum(max(part) * len(part) for part in parts)
    return 1 - sum(map(sum, parts)) / computed


def test_every_utterance_is_in_exactly_one_step() -> None:
    steps = plan(COSTS, batch_size=16, seed=3, epoch=2)
    assert Counter(position for step in steps for position in step) == Counter(range(len(COSTS)))
    assert sorted(map(len, steps)) == [11, *[16] * 62]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 3199, 3200, 3201, 6500])
def test_a_corpus_of_any_size_is_planned_whole(count: int) -> None:
    steps = plan(costs(count), batch_size=16, seed=0, epoch=0)
    assert sorted(position for step in steps for position in step) == list(range(count))
    assert len(steps) == -(-count // 16)


def test_the_plan_is_a_function_of_seed_and_epoch() -> None:
    first = plan(COSTS, batch_size=16, seed=3, epoch=2)
    assert first == plan(COSTS, batch_size=16, seed=3, epoch=2)
    assert first != plan(COSTS, batch_size=16, seed=3, epoch=3)
    assert first != plan(COSTS, batch_size=16, seed=4, epoch=2)


def test_an_utterance_meets_others_in_every_epoch() -> None:
    """Sorting by length must not make the same steps again and again."""
    met = []
    for epoch in range(2):
        steps = plan(costs(6000), batch_size=16, seed=0, epoch=epoch)
        met.append({pair for step in steps for pair in itertools.combinations(sorted(step), 2)})
    assert len(met[0] & met[1]) < 0.25 * len(met[0])


def test_utterances_of_a_step_are_alike_in_tokens_and_in_frames() -> None:
    own = costs(6000)
    steps = plan(own, batch_size=16, seed=3, epoch=0)
    mixed = np.random.default_rng(0).permutation(6000)[: 16 * 375].reshape(-1, 16)
    for kind in ("tokens", "frames"):
        sorted_, random = (
            padding([[getattr(own[position], kind) for position in step] for step in chosen])
            for chosen in (steps, mixed)
        )
        assert sorted_ < 0.4 * random


def test_little_is_padded() -> None:
    own = costs(6000)
    parts, clips = [], []
    for step in plan(own, batch_size=16, seed=3, epoch=0):
        for part in micro_batches([own[position] for position in step], 16_384):
            chosen = [own[step[place]] for place in part]
            parts.append([cost.tokens for cost in chosen])
            frames = [cost.frames for cost in chosen]
            clips += [[frames[place] for place in group] for group in groups(frames)]
    assert padding(parts) < 0.015
    assert padding(clips) < 0.015
    assert sum(map(len, parts)) / len(parts) > 3  # and not by computing each by itself


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_workers_share_a_step_without_loss(world: int) -> None:
    for step in plan(COSTS, batch_size=16, seed=0, epoch=0):
        parts = [share(step, rank, world) for rank in range(world)]
        assert sorted(position for part in parts for position in part) == sorted(step)


@pytest.mark.parametrize("seed", range(30))
def test_what_was_not_seen_is_seen_once_by_any_number_of_workers(seed: int) -> None:
    """A run that is killed again and again, and resumed from its last step with other workers each time."""
    rng = np.random.default_rng(seed)
    own, batch_size = costs(int(rng.integers(1, 400)), seed), int(rng.integers(1, 40))
    seen: Counter[int] = Counter()
    done = 0
    while True:
        world = int(rng.integers(1, 9))
        left = plan(own, batch_size=batch_size, seed=seed, epoch=1)[done:]
        if not left:
            break
        kept = int(rng.integers(1, len(left) + 1))  # steps until the last checkpoint
        read = [[share(step, rank, world) for step in left] for rank in range(world)]
        assert {len(steps) for steps in read} == {len(left)}
        seen.update(position for steps in read for part in steps[:kept] for position in part)
        done += kept
    assert seen == Counter(range(len(own)))


@pytest.mark.parametrize("budget", [1, 300, 1000, 5000, 10**9])
def test_micro_batches_hold_everything_within_the_budget(budget: int) -> None:
    own = COSTS[:40]
    parts = micro_batches(own, budget)
    assert sorted(place for part in parts for place in part) == list(range(40))
    for part in parts:
        longest = max(own[place].tokens for place in part) + max(own[place].frames for place in part)
        assert len(part) == 1 or longest * len(part) <= budget
    assert micro_batches([], budget) == []


def test_groups_are_as_large_as_padding_allows() -> None:
    lengths = [cost.frames for cost in COSTS]
    found = groups(lengths)
    assert sorted(place for group in found for place in group) == list(range(len(lengths)))
    for group, following in itertools.pairwise(found):
        for together, allowed in ((group, True), ([*group, following[0]], False)):
            own = [lengths[place] for place in together]
            computed = max(own) * len(own)
            assert (computed - sum(own) <= max(PAD_TOLERANCE, PADDING * computed)) == allowed
    assert groups([]) == []
    assert len(groups(lengths, 2048)) < len(found) / 2  # where another part costs as much as so many positions
    assert groups([0] * 5) == [[0, 1, 2, 3, 4]]


def test_the_hash_names_corpus_costs_and_settings() -> None:
    names = {
        plan_hash(COSTS, "a", 16, 0),
        plan_hash(COSTS, "b", 16, 0),
        plan_hash(COSTS[:-1], "a", 16, 0),
        plan_hash([*COSTS[:-1], Cost(1, 1)], "a", 16, 0),
        plan_hash(COSTS, "a", 8, 0),
        plan_hash(COSTS, "a", 16, 1),
    }
    assert len(names) == 6
