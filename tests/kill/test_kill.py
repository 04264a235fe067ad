"""Any process may be killed at any time; rerunning the same command loses nothing and doubles nothing.

The short form is part of the suite: one sweep with trials that pause, of which a worker is killed in the middle of a
write, and later all processes at once. `pytest -m long -s tests/kill`, or `python -m tests.kill`, is the proof: 25
kills of all kinds over four sweeps.
"""

import random
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.kill.plan import KILL, Shot
from tests.kill.play import Variant, make_stuff
from tests.kill.report import Result, headline, show
from tests.kill.run import play, run

SHORT = (
    Shot("fault point", at="replace checkpoint.pt", skip=1),
    Shot("cluster", KILL, delay=0.5),
)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def check(results: list[Result], kills: int) -> None:
    show(results, Console(width=180))
    assert not [fault for result in results for fault in result.faults]
    assert headline(results).startswith(f"{kills} kills over {len(results)} sweep")
    assert headline(results).endswith(": 0 lost, 0 doubled")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sweep_under_fire_loses_and_doubles_nothing(tmp_path: Path) -> None:
    stuff = make_stuff(tmp_path / "stuff")
    result = play(
        Variant(1, "ray", trials=6, processes=1, pruning="promote"),
        stuff,
        tmp_path / "play",
        SHORT,
        random.Random(0),
        say,
    )
    check([result], len(SHORT))
    assert "PRUNED" in result.states.values()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_kills_lose_and_double_nothing() -> None:
    check(run(25, 4, seed=0, say=say), 25)
