"""Plays from their beginning to their verdict."""

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
from tests.kill.server import Server
from tests.kill.studies import config_of
from tests.kill.verdict import Row, again_row, bits_row, cost_rows, ledger_rows, left_rows, reference_row
from tests.kill.verdict_mlflow import mlflow_rows

EXTRA = 2  # plays that may be added for kills that the others had no time for


def run(kills: int, sweeps: int, seed: int, say: Say, calm: bool = True) -> list[Result]:
    """Several plays, of all variants in turn.

    Args:
        kills: in all.
        sweeps: plays.
        seed: of the kills and their moments.
        say: is told what happens.
        calm: run every variant undisturbed once, too.
    """
    root = Path(tempfile.mkdtemp(prefix="kill-"))
    say(f"everything lies in {root}, which is kept if there are faults")
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
    """The trials of a variant when nothing is killed, and what it took."""
    say(f"undisturbed: {variant.name}")
    own = Play(variant, stuff, root)
    attack = Attack(own, None, random.Random(0), say)
    attack.run([])
    if attack.faults or attack.starts != 1:
        raise RuntimeError(f"the undisturbed sweep failed: {attack.faults}; see {own.log}")
    shutil.rmtree(own.scratch, ignore_errors=True)
    return entries_of(own), time.time() - attack.begun


def play(
    variant: Variant,
    stuff: Stuff,
    root: Path,
    shots: Sequence[Shot],
    rng: random.Random,
    say: Say,
    calm: tuple[Mapping[int, TrialRecord], float] | None = None,
) -> Result:
    """A sweep under fire, and what is to be said of it."""
    say(f"under fire: {variant.name}; {', '.join(shot.name for shot in shots)}")
    own = Play(variant, stuff, root)
    server = Server(root / "server") if variant.server else None
    if server is not None:
        server.start()
        server.wait()
        own.tracking = server.uri
    try:
        attack = Attack(own, server, rng, say)
        attack.run(list(shots))
        seconds = time.time() - attack.begun
    finally:
        if server is not None:
            server.kill()
        left = left_rows(own)
        shutil.rmtree(own.scratch, ignore_errors=True)
    uri = server.database if server is not None else f"sqlite:///{own.folder.parent / 'mlflow.db'}"
    started = time.time()
    say("training the trials alone")
    rows = judge(own, attack, uri, calm[0] if calm else None) + left
    states = {number: entry.state for number, entry in entries_of(own).items()}
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


def judge(own: Play, attack: Attack, uri: str, calm: Mapping[int, TrialRecord] | None) -> list[Row]:
    """All that must hold."""
    entries = entries_of(own)
    epochs = {number: max(entry.curve) for number, entry in entries.items() if entry.curve}
    alone.train(own.folder, own.root / "alone", epochs, own.variant.workers)
    rows = [Row("the driver did as it should", attack.faults)]
    rows += ledger_rows(entries, attack.kills, own)
    if calm is not None:
        rows.append(reference_row(entries, calm, attack.kills, len(config_of(own.folder).search.points)))
    rows.append(bits_row({number: entries[number] for number in epochs}, own.folder, own.root / "alone"))
    rows += [*cost_rows(attack.kills, attack.before), again_row(own.folder)]
    return rows + mlflow_rows(entries, own.folder, uri)


def entries_of(own: Play) -> dict[int, TrialRecord]:
    """The ledger of a play that is over."""
    return {entry.number: entry for entry in StudyStore.read(own.folder, config_of(own.folder)).trials()}
