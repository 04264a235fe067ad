"""A kill between any two operations on files leaves the newest checkpoint or the one before, complete."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from model.checkpoints.checkpoint import FILE, PREVIOUS
from tests.model.faults import kill_at_every_operation

CASES = ((True, 0), (True, 2), (False, 2))  # hard links, saves before the killed one


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What was left after each kill. The process that forks is a small one: a copy of this one costs much more."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(kill_at_every_operation, tmp_path_factory.mktemp("faults"), CASES).result()


def test_every_operation_was_killed_once(rows: list[dict[str, Any]]) -> None:
    for case in CASES:
        killed = [row["killed"] for row in rows if (row["links"], row["former"]) == case]
        assert killed == [True] * (len(killed) - 1) + [False]
        assert len(killed) > 20


def test_kill_leaves_the_newest_checkpoint_or_the_one_before(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["number"] in (row["former"], row["former"] + 1), row
        assert row["notes"] == [], row
    for case in CASES:  # both happen, and once the new one is there it stays
        numbers = [row["number"] for row in rows if (row["links"], row["former"]) == case]
        assert numbers == sorted(numbers)
        assert set(numbers) == {case[1], case[1] + 1}
    names = {(row["links"], row["name"]) for row in rows if row["former"]}
    assert names == {(True, FILE), (False, FILE), (False, PREVIOUS)}, "with hard links the name is always there"


def test_next_attempt_leaves_nothing_unfinished_and_continues(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert not [name for name in row["files"] if "unfinished" in name], row
        assert sum(name.startswith("attempt-") for name in row["files"]) == 1, row
        assert row["next"] == 9
        assert row["previous"] == (row["number"] > 0), row
