"""What several commands show: the parts of a model, the trials of a sweep, the best of them."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sweep.terminal import console

if TYPE_CHECKING:
    from model.speech_llm import SpeechLLM
    from sweep.config import Config
    from sweep.ledger import Entry, Ledger


def show_model(resolved: "Config") -> "tuple[SpeechLLM, Config]":
    """The parts of the model, of a search's first trial; that model without its weights, and its configuration."""
    from sweep.inputs import first_trial, skeleton
    from sweep.inspect import notes, parts_table

    config = first_trial(resolved)
    model = skeleton(config)
    which = ", first trial" if resolved.search.space else ""
    console.print(parts_table(model, config, f"parts of the model{which}"))
    for note in notes(model):
        console.print(note, markup=False, highlight=False)
    return model, config


def show_trials(config: "Config", folder: Path, entries: "Sequence[Entry]") -> None:
    """The leaderboard of a search; of trainings that confirm one, what each of them is."""
    from sweep import leaderboard, trainings

    search = trainings.search_of(config, folder)
    if search is None:
        console.print(leaderboard.table(config, folder, entries))
        told = leaderboard.notes(entries)
    else:
        told = trainings.lines(config, folder, search, entries)
    for line in told:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def print_best(ledger: "Ledger", folder: Path) -> None:
    from sweep.watch import near, train_command

    best = ledger.best()
    assert best is not None
    console.print(f"\nbest: trial {best.number}, {ledger.config.search.metric} {best.value:.3f}", style="bold")
    for key, value in best.params.items():
        console.print(f"  {key}: {value}", highlight=False)
    where = near(folder)
    again = f"{program('sweep')} {train_command(folder, best.params)}"
    console.print(f"again:      {again}", soft_wrap=True, highlight=False)
    console.print(f"on test:    {program('sweep')} evaluate {where} --split test", soft_wrap=True, highlight=False)
    console.print(f"is it best? {program('sweep')} confirm {where}", soft_wrap=True, highlight=False)
    console.print(f"a page:     {program('sweep')} report {where}", soft_wrap=True, highlight=False)


def program(name: str) -> str:
    """How a program of this environment is called from here."""
    from sweep.watch import near

    path = Path(sys.executable).parent / name
    return name if shutil.which(name) == str(path) else str(near(path))
