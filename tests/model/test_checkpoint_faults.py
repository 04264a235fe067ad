"""A kill between any two operations on files leaves the newest checkpoint or the one before, complete."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.checkpoints.checkpoint import FILE, PREVIOUS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What was left after each kill. In a process of its own: it forks, and its calls on files are watched."""
    command = [sys.executable, "-m", "tests.model.faults", str(tmp_path_factory.mktemp("faults"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_every_operation_was_the_last_one_once(rows: list[dict[str, Any]]) -> None:
    for links in (True, False):
        for former in (0, 1, 2):
            own = [row for row in rows if (row["links"], row["former"]) == (links, former)]
            assert [row["killed"] for row in own] == [True] * (len(own) - 1) + [False]
            assert len(own) > 20


def test_a_kill_at_any_operation_leaves_the_newest_or_the_one_before(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["number"] in (row["former"], row["former"] + 1), row
        assert row["notes"] == [], row
    for links in (True, False):
        for former in (0, 1, 2):  # both happen, and once the new one is there it stays
            own = [row["number"] for row in rows if (row["links"], row["former"]) == (links, former)]
            assert own == sorted(own)
            assert set(own) == {former, former + 1}


def test_a_name_is_always_there_where_there_are_hard_links(rows: list[dict[str, Any]]) -> None:
    names = {(row["links"], row["name"]) for row in rows if row["former"]}
    assert names == {(True, FILE), (False, FILE), (False, PREVIOUS)}


def test_the_next_attempt_leaves_nothing_unfinished_and_goes_on(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert not [name for name in row["files"] if "unfinished" in name], row
        assert sum(name.startswith("attempt-") for name in row["files"]) == 1, row
        assert row["next"] == 9
        assert row["previous"] == (row["number"] > 0), row
