"""The batch plan: a pure function, every utterance once, steps that do not depend on workers or memory."""

from collections import Counter

import numpy as np
import pytest

from data.plan import micro_batches, plan, plan_hash, share

COSTS = np.random.default_rng(0).integers(5, 400, 1003).tolist()


def test_every_utterance_is_in_exactly_one_step() -> None:
    steps = plan(COSTS, batch_size=16, seed=3, epoch=2)
    assert Counter(position for step in steps for position in step) == Counter(range(len(COSTS)))
    assert sorted(map(len, steps))[1:] == [16] * 62


def test_the_plan_is_a_function_of_seed_and_epoch() -> None:
    first = plan(COSTS, batch_size=16, seed=3, epoch=2)
    assert first == plan(COSTS, batch_size=16, seed=3, epoch=2)
    assert first != plan(COSTS, batch_size=16, seed=3, epoch=3)
    assert first != plan(COSTS, batch_size=16, seed=4, epoch=2)


def test_similar_utterances_share_a_step() -> None:
    steps = plan(COSTS, batch_size=16, seed=3, epoch=0)
    computed = sum(max(COSTS[position] for position in step) * len(step) for step in steps)
    assert 1 - sum(COSTS) / computed < 0.05  # padding; in random order it is over 40 %


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_workers_share_a_step_without_loss(world: int) -> None:
    for step in plan(COSTS, batch_size=16, seed=0, epoch=0):
        parts = [share(step, rank, world) for rank in range(world)]
        assert sorted(position for part in parts for position in part) == sorted(step)


@pytest.mark.parametrize("budget", [1, 300, 1000, 10**9])
def test_micro_batches_hold_everything_within_the_budget(budget: int) -> None:
    costs = COSTS[:40]
    parts = micro_batches(costs, budget)
    assert sorted(place for part in parts for place in part) == list(range(40))
    for part in parts:
        assert len(part) == 1 or max(costs[place] for place in part) * len(part) <= budget
    assert micro_batches([], budget) == []


def test_the_hash_names_corpus_costs_and_settings() -> None:
    names = {
        plan_hash(COSTS, "a", 16, 0),
        plan_hash(COSTS, "b", 16, 0),
        plan_hash(COSTS[:-1], "a", 16, 0),
        plan_hash(COSTS, "a", 8, 0),
        plan_hash(COSTS, "a", 16, 1),
    }
    assert len(names) == 5
