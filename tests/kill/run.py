"""Run plays from their start to their verdict."""

import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from sweep.search.study import StudyStore, TrialRecord
from tests.kill import alone
from tests.kill.fire import Attack, Say
from tests.kill.plan import Shot, draw
from tests.kill.play import VARIANTS, Play, Stuff, Variant, make_stuff
from tests.kill.report import Result
from tests.kill.studies import config_of
from tests.kill.verdict import Row, again_row, bits_row, cost_rows, left_rows, reference_row, study_rows
from tests.kill.verdict_mlflow import mlflow_rows
from tests.sweep.mlflow_server import Server

EXTRA = 2  # plays that may be added for kills that the others had no time for


def run(kills: int, sweeps: int, seed: int, say: Say, calm: bool = True) -> list[Result]:
    """Run several plays, of all variants in turn.

    Args:
        kills: total number.
        sweeps: plays.
        seed: of the kills and their moments.
        say: shows a line about what happens.
        calm: run every variant undisturbed once, too.
    """
    root = Path(tempfile.mkdtemp(prefix="kill-"))
    say(f"working in {root}, which is kept if there are faults")
    stuff = make_stuff(root / "stuff")
    plans = draw(kills, [VARIANTS[place % len(VARIANTS)].server for place in range(sweeps)], seed)
    known: dict[Variant, tuple[Mapping[int, TrialRecord], float]] = {}
    results: list[Result] = []
    rest: list[Shot] = []  # of plays that were over before
    while len(results) < len(plans) or (rest and len(results) < len(plans) + EXTRA):
        place = len(results)
        variant = VARIANTS[place % len(VARIANTS)]
        here = [shot for shot in rest if variant.server or shot.kind != "mlflow"]
        shots = here + (plans[place] if place < len(plans) else [])
        rest = [shot for shot in rest if shot not in here]
        if calm and variant not in known:
            known[variant] = undisturbed(variant, stuff, root / f"calm-{place}", say)
        folder, rng = root / f"play-{place}", random.Random(seed * 1000 + place)
        results.append(play(variant, stuff, folder, shots, rng, say, known.get(variant)))
        rest += results[-1].unfired
    if not any(result.faults for result in results):
        shutil.rmtree(root)
    return results


def undisturbed(variant: Variant, stuff: Stuff, root: Path, say: Say) -> tuple[Mapping[int, TrialRecord], float]:
    """Return the trials of a variant when nothing is killed, and its seconds."""
    say(f"undisturbed: {variant.name}")
    current = Play(variant, stuff, root)
    attack = Attack(current, None, random.Random(0), say)
    attack.run([])
    if attack.faults or attack.starts != 1:
        raise RuntimeError(f"the undisturbed sweep failed: {attack.faults}; see {current.log}")
    shutil.rmtree(current.scratch, ignore_errors=True)
    return trials_of(current), time.time() - attack.begun


def play(
    variant: Variant,
    stuff: Stuff,
    root: Path,
    shots: Sequence[Shot],
    rng: random.Random,
    say: Say,
    calm: tuple[Mapping[int, TrialRecord], float] | None = None,
) -> Result:
    """Run a sweep under fire and judge it."""
    say(f"under fire: {variant.name}; {', '.join(shot.name for shot in shots)}")
    current = Play(variant, stuff, root)
    server = Server(root / "server") if variant.server else None
    if server is not None:
        server.start()
        current.tracking = server.uri
    try:
        attack = Attack(current, server, rng, say)
        attack.run(list(shots))
        seconds = time.time() - attack.begun
    finally:
        if server is not None:
            server.kill()
        left = left_rows(current)
        shutil.rmtree(current.scratch, ignore_errors=True)
    uri = f"sqlite:///{server.database}" if server is not None else f"sqlite:///{current.folder.parent / 'mlflow.db'}"
    started = time.time()
    say("training the trials alone")
    rows = judge(current, attack, uri, calm[0] if calm else None) + left
    states = {number: trial.state for number, trial in trials_of(current).items()}
    return Result(
        variant.name,
        attack.kills,
        rows,
        attack.starts,
        seconds,
        time.time() - started,
        calm[1] if calm else None,
        states,
        attack.unfired,
    )


def judge(current: Play, attack: Attack, uri: str, calm: Mapping[int, TrialRecord] | None) -> list[Row]:
    """Return all conditions that must hold."""
    trials = trials_of(current)
    epochs = {number: max(trial.curve) for number, trial in trials.items() if trial.curve}
    alone.train(current.folder, current.root / "alone", epochs, current.variant.workers)
    rows = [Row("the driver ended as expected", attack.faults)]
    rows += study_rows(trials, attack.kills, current)
    if calm is not None:
        rows.append(reference_row(trials, calm, attack.kills, len(config_of(current.folder).search.points)))
    rows.append(bits_row({number: trials[number] for number in epochs}, current.folder, current.root / "alone"))
    rows += [*cost_rows(attack.kills, attack.before), again_row(current.folder)]
    return rows + mlflow_rows(trials, current.folder, uri)


def trials_of(current: Play) -> dict[int, TrialRecord]:
    """Return the trials of a finished play."""
    return {trial.number: trial for trial in StudyStore.read(current.folder, config_of(current.folder)).trials()}
