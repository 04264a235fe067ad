"""What is killed, how, and when: drawn from a seed, so that a run can be repeated."""

import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass

KILL, TERM, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1
NAMES = {KILL: "-9", TERM: "-15", USR1: "USR1"}
ORDERLY = (TERM, USR1)  # the driver has to end by itself, with the code for "unfinished"
# In the order of a write: between any two operations of a checkpoint, and of the files around it.
POINTS = (
    "open checkpoint.pt",
    "write checkpoint.pt",
    "fsync checkpoint.pt",
    "link checkpoint.previous.pt",
    "replace checkpoint.previous.pt",
    "unlink checkpoint.previous.pt",
    "replace checkpoint.pt",
    "fsync folder",
    "unlink checkpoint.pt",
    "write metrics.jsonl",
    "replace predictions.json",
    "fsync metrics.jsonl",
)
AT_CLAIM = "unlink attempt"  # a resumed trial: its worker is killed, and the next one as soon as it begins
IN_DRIVER = ("replace lease.json", "replace config.yaml", "replace mlflow.json")
IN_CLUSTER = ("worker", "group", "mailbox", "controller", "raylet")


@dataclass(frozen=True)
class Shot:
    """One kill.

    Args:
        kind: of the process.
        number: of the signal.
        at: for a fault point, the operation before which (or in which) a process dies.
        skip: operations of that name to skip.
        early: do not wait until the sweep has recovered from the previous kill.
        delay: seconds from the moment that is waited for.
    """

    kind: str
    number: int = KILL
    at: str = ""
    skip: int = 0
    early: bool = False
    delay: float = 0.0

    @property
    def name(self) -> str:
        """Name of its row in the table."""
        return self.kind if self.at else f"{self.kind} {NAMES[signal.Signals(self.number)]}"


def deck(rng: random.Random) -> list[Shot]:
    """Return every kind of kill once, in a random order; kills of the driver and the cluster come with each signal."""
    shots = [Shot(kind, number) for kind in IN_CLUSTER for number in (KILL, TERM)]
    shots += [Shot("driver", number) for number in (KILL, TERM, USR1)]
    shots += [Shot("cluster"), Shot("mlflow"), Shot("gcs")]
    shots += [Shot("fault point", at=at, skip=rng.randrange(3)) for at in rng.sample(POINTS, 3)]
    shots += [Shot("fault at resume", at=AT_CLAIM), Shot("fault in driver", at=rng.choice(IN_DRIVER))]
    rng.shuffle(shots)
    return shots


def draw(kills: int, plays: Sequence[bool], seed: int) -> list[list[Shot]]:
    """Return the kills of each play.

    Args:
        kills: in all.
        plays: of each, whether it has an MLflow server.
        seed: of everything random.
    """
    rng = random.Random(seed)
    shots: list[Shot] = []
    while len(shots) < kills:
        shots += [shot for shot in deck(rng) if shot.kind != "mlflow" or any(plays)]
    plans: list[list[Shot]] = [[] for _ in plays]
    share = -(-kills // len(plays))
    for shot in sorted(shots[:kills], key=lambda shot: shot.kind != "mlflow"):
        free = [plan for plan, server in zip(plans, plays, strict=True) if server or shot.kind != "mlflow"]
        free = [plan for plan in free if len(plan) < share] or free
        rng.choice(free).append(timed(shot, rng))
    for plan in plans:
        rng.shuffle(plan)
    return plans


def timed(shot: Shot, rng: random.Random) -> Shot:
    """Return the shot with its moment: mostly while trials train, and sometimes during the recovery."""
    early = shot.kind in ("driver", "cluster") and rng.random() < 0.25
    delay = rng.uniform(2, 15) if early else rng.uniform(0, 1.2)
    return Shot(shot.kind, shot.number, shot.at, shot.skip, early, round(delay, 2))
