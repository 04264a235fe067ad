"""A sweep under fire: its processes are killed, and the command is rerun until the sweep is done."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kill import targets
from tests.kill.plan import KILL, ORDERLY, Shot
from tests.kill.play import Play
from tests.kill.steps import Progress, Step, Steps, lives, redone
from tests.kill.studies import trials
from tests.sweep.mlflow_server import Server

STUCK = 300.0  # seconds without a recovery after which there will be none
ORDERLY_SECONDS = 90.0
SETTLE = 8.0  # seconds after a kill in which affected processes may still run
SETTLES = {"gcs": 90.0, "raylet": 20.0}  # the same for what Ray looks for in vain before it gives up
GRACE = 6.0  # seconds that processes have to end after their driver
DONE, BAD_INPUT, UNFINISHED = 0, 2, 75
DRIVER_SURVIVES = ("worker", "group", "mailbox", "controller", "mlflow", "fault point", "fault at resume")
AWAY = (10.0, 20.0)  # seconds that the MLflow server stays away
Say = Callable[[str], None]


@dataclass
class Kill:
    """What was done, and what came of it."""

    shot: Shot
    time: float = 0.0
    running: dict[int, int] = field(default_factory=dict)  # trials in flight and their steps
    params: dict[int, Any] = field(default_factory=dict)  # of all trials that there were
    ended: dict[int, Any] = field(default_factory=dict)  # state and value of those that had ended
    victims: list[str] = field(default_factory=list)
    pid: int | None = None  # of a process of Ray
    codes: list[int] = field(default_factory=list)  # of drivers that ended before the sweep had recovered
    first: float | None = None  # seconds until the first new step of any trial
    all: float | None = None  # and until every trial that was in flight had one, or had ended
    redone: dict[int, int] = field(default_factory=dict)  # steps by trial


class Finished(BaseException):
    """The sweep is done: a signal to the attack, not an error."""


class Attack:
    """One sweep, from its first command to its last."""

    def __init__(self, play: Play, server: Server | None, rng: random.Random, say: Say) -> None:
        self.play, self.server, self.rng, self.say = play, server, rng, say
        self.steps = Steps(play.faults)
        self.kills: list[Kill] = []
        self.faults: list[str] = []
        self.starts = 0
        self.begun = time.time()
        self.shot = False  # the driver was killed by us
        self.progress = Progress()  # since the last kill
        self.asked = 0.0  # when the study was last read
        self.server_back: float | None = None
        self.before: dict[int, int] = {}  # steps that were redone without a reason
        self.unfired: list[Shot] = []
        self.slow = play.faults / "slow"  # as long as it is there
        self.slow.touch()
        self.driver: subprocess.Popen[bytes]

    def run(self, shots: list[Shot]) -> None:
        """Fire all shots, as long as the sweep lasts, and wait for its end."""
        self.unfired = list(shots)
        try:
            self.start()
            for shot in shots:
                self.wait_for_moment(shot)
                if self.fire(shot):
                    self.unfired.remove(shot)
            self.slow.unlink()
            self.wait(lambda: False, "the end", patient=True)
        except Finished:
            self.check_left("the end")
        finally:
            targets.kill(targets.tree(self.driver.pid), KILL)
            self.driver.wait(30)
            self.note_redone()

    def start(self) -> None:
        """Start the command."""
        self.starts += 1
        with self.play.log.open("ab") as log:
            log.write(f"\n=== start {self.starts} after {time.time() - self.begun:.1f} s\n".encode())
            log.flush()
            self.driver = subprocess.Popen(
                self.play.command, env=self.play.environment(), stdout=log, stderr=log, start_new_session=True
            )

    def wait_for_moment(self, shot: Shot) -> None:
        """Wait until the sweep works again and some time has passed; early shots only wait for the time."""
        if not (shot.early and self.kills):
            since = time.time()
            self.wait(lambda: self.recovered() and self.steps.newest > since, "work")
        until = time.time() + shot.delay
        self.wait(lambda: time.time() >= until, "the moment")

    def recovered(self) -> bool:
        """Return whether the sweep has recovered from the last kill."""
        return not self.kills or self.kills[-1].all is not None

    def wait(self, condition: Callable[[], bool], what: str, patient: bool = False) -> None:
        """Keep the sweep running until a condition holds.

        Args:
            condition: what has to hold.
            what: name of the condition.
            patient: whether new steps of trials extend the deadline; otherwise only a restart does.

        Raises:
            Finished: the sweep has ended first.
        """
        deadline = time.monotonic() + STUCK
        while not condition():
            starts = self.starts
            if (self.turn() and patient) or self.starts > starts:
                deadline = time.monotonic() + STUCK
            if time.monotonic() > deadline:
                self.unstick(what)
                deadline = time.monotonic() + STUCK
            time.sleep(0.03)

    def turn(self) -> bool:
        """Record new steps, and rerun the command if it has ended; return whether there was anything."""
        if self.server is not None and self.server_back is not None and time.time() >= self.server_back:
            self.server_back = None
            self.server.start(wait=False)
        new = self.steps.look()
        if self.kills:
            self.note_progress(self.kills[-1], new)
        code = self.driver.poll()
        if code is None:
            return bool(new)
        self.driver_ended(code)
        return True

    def note_progress(self, kill: Kill, new: list[Step]) -> None:
        """Record the recovery from the last kill; for a while, dying processes may still make steps."""
        self.progress.add(step for step in new if step.time > kill.time)
        settle = SETTLE if kill.codes else SETTLES.get(kill.shot.kind, SETTLE)
        if time.time() < kill.time + settle or kill.all is not None:
            return
        times = {number: self.progress.resumed(number) for number in kill.running}
        kill.first = self.difference(self.progress.first(), kill)
        waiting = [number for number, when in times.items() if when is None]
        if waiting and time.time() - self.asked > 0.7:
            self.asked = time.time()
            known = trials(self.play.folder)
            if known and all(known[number].state != "RUNNING" for number in waiting):
                waiting, times = [], dict.fromkeys(times, self.asked)
        if not waiting and (times or kill.first is not None):
            last = max((when for when in times.values() if when is not None), default=None)
            kill.all = kill.first if last is None else self.difference(last, kill)
            if kill.pid is not None and lives(kill.pid):
                kill.victims.append("which survived")

    @staticmethod
    def difference(when: float | None, kill: Kill) -> float | None:
        """Seconds after a kill."""
        return None if when is None else when - kill.time

    def driver_ended(self, code: int) -> None:
        """Rerun the command unless the sweep is done."""
        self.say(f"the driver ended with code {code}")
        kill = self.kills[-1] if self.kills else None
        by_itself = not self.shot and (kill is None or kill.all is not None or code == -KILL)
        self.shot = False
        if code == DONE:
            if kill is not None and kill.all is None:
                kill.all = time.time() - kill.time
            raise Finished
        if by_itself:
            self.faults.append(f"start {self.starts}: the driver ended by itself with code {code}")
        if kill is not None and kill.shot.kind in DRIVER_SURVIVES:
            self.faults.append(f"start {self.starts}: after {kill.shot.name}, the driver ended with code {code}")
        if code == BAD_INPUT or self.starts > len(self.kills) + 5:
            self.faults.append(f"start {self.starts}: code {code}, gave up")
            raise Finished
        if kill is not None:
            kill.codes.append(code)
            kill.first = kill.all = None  # what was done since was still the old attempt's
            self.progress = Progress()
        if code != -KILL:
            self.check_left(f"start {self.starts}, code {code}")
        self.start()

    def check_left(self, when: str) -> None:
        """Check that nothing runs after an end that was not a kill."""
        end = time.monotonic() + GRACE
        while left := targets.belonging(self.play.folder, self.play.scratch):
            if time.monotonic() > end:
                names = ", ".join(f"{process.pid} {targets.title(process)[:60]}" for process in left)
                self.faults.append(f"{when}: {len(left)} processes still ran after {GRACE:.0f} s: {names}")
                return
            time.sleep(0.3)

    def fire(self, shot: Shot) -> bool:
        """Fire a shot; return whether it hit a process."""
        kill = self.new_kill(shot)
        if shot.at:
            hit = self.fire_at_point(shot, kill)
        elif shot.kind in ("driver", "cluster"):
            hit = self.fire_at_driver(shot, kill)
        elif shot.kind == "mlflow":
            hit = self.fire_at_server(kill)
        else:
            hit = self.fire_at_process(shot.kind, shot.number, kill)
        if not hit:
            self.kills.remove(kill)
            self.say(f"{shot.name} {shot.at}: not done")
        else:
            self.steps.look()
            self.progress = Progress()
            kill.running = {number: self.steps.highest.get(number, 0) for number in kill.running}
            where = ", ".join(f"{number}@{step}" for number, step in kill.running.items())
            self.say(f"{shot.name} {shot.at}: {', '.join(kill.victims)}; trials at steps {where}")
        return hit

    def new_kill(self, shot: Shot) -> Kill:
        """Record the state of the sweep before a shot."""
        self.turn()
        known = trials(self.play.folder)
        kill = Kill(shot, time.time())
        running = [number for number, trial in known.items() if trial.state == "RUNNING"]
        kill.running = {number: self.steps.highest.get(number, 0) for number in running}
        kill.params = {number: trial.params for number, trial in known.items()}
        kill.ended = {n: (trial.state, trial.value) for n, trial in known.items() if trial.has_ended}
        self.kills.append(kill)
        return kill

    def fire_at_driver(self, shot: Shot, kill: Kill) -> bool:
        members = targets.tree(self.driver.pid)
        kill.victims = [f"{len(members)} processes"] if shot.kind == "cluster" else [str(self.driver.pid)]
        kill.time, self.shot = time.time(), True
        targets.kill(members if shot.kind == "cluster" else members[:1], shot.number)
        if shot.number in ORDERLY:
            end = time.monotonic() + ORDERLY_SECONDS
            while self.driver.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            code = self.driver.poll()
            if code is None:
                self.unstick(f"the end after {shot.name}")
            elif code not in (UNFINISHED, DONE):
                self.faults.append(f"{shot.name}: the driver ended with code {code} instead of {UNFINISHED}")
            kill.victims.append(f"ended with {code} after {time.time() - kill.time:.1f} s")
        else:
            self.driver.wait(30)
        return True

    def fire_at_server(self, kill: Kill) -> bool:
        if self.server is None or self.server.process is None:
            return False
        kill.time = time.time()
        self.server.kill()
        self.server_back = time.time() + self.rng.uniform(*AWAY)
        kill.victims = [f"back {self.server_back - kill.time:.0f} s later"]
        return True

    def fire_at_process(self, kind: str, number: int, kill: Kill) -> bool:
        end = time.monotonic() + 20
        while time.monotonic() < end and self.driver.poll() is None:
            found = targets.find(kind, self.driver.pid)
            if found:
                victim = self.rng.choice(found)
                kill.victims.append(f"{victim.pid} {Path(targets.title(victim).split(' -')[0]).name[:40].strip()}")
                kill.time, kill.pid = time.time(), victim.pid
                targets.kill([victim], number)
                return True
            time.sleep(0.2)
        return False

    def fire_at_point(self, shot: Shot, kill: Kill) -> bool:
        armed, fired = self.play.faults / "armed.json", self.play.faults / "fired.json"
        unfinished = armed.with_suffix(".new")
        unfinished.write_text(json.dumps({"at": shot.at, "skip": shot.skip, "id": str(time.time())}))
        unfinished.replace(armed)
        if shot.kind == "fault at resume":
            self.fire_at_process("worker", KILL, kill)
        end = time.monotonic() + 60
        try:
            while not fired.exists() and time.monotonic() < end and self.driver.poll() is None:
                self.steps.look()
                time.sleep(0.02)
            time.sleep(0.1)  # until it is written
            if not fired.exists():
                return False
            hit = json.loads(fired.read_text())
            kill.time, self.shot = hit["time"], hit["pid"] == self.driver.pid
            kill.victims.append(f"{hit['pid']} at {os.path.relpath(hit['path'], self.play.folder)}")
            return True
        finally:
            armed.unlink()
            fired.unlink(missing_ok=True)

    def unstick(self, what: str) -> None:
        """Record a sweep that does not progress, and end it."""
        self.faults.append(f"start {self.starts}: waited {STUCK:.0f} s without success for {what}")
        self.say(self.faults[-1])
        with (self.play.root / f"stuck-{self.starts}.txt").open("w") as file:
            for member in targets.tree(self.driver.pid):
                print(member.pid, targets.title(member), file=file, flush=True)
                if "ray::" in targets.title(member) or member.pid == self.driver.pid:
                    words = [str(Path(sys.executable).with_name("py-spy")), "dump", "--pid", str(member.pid)]
                    subprocess.run(words, stdout=file, stderr=file, check=False, timeout=60)
        self.shot = True
        targets.kill(targets.tree(self.driver.pid), KILL)
        self.driver.wait(30)

    def note_redone(self) -> None:
        """Record the steps that each kill made the sweep repeat."""
        if self.steps.path.exists():
            self.before, *counts = redone(self.steps.path.read_bytes(), [kill.time for kill in self.kills])
            for kill, count in zip(self.kills, counts, strict=True):
                kill.redone = count
