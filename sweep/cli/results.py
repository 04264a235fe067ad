"""Commands that read a sweep: status, best, evaluate, report, confirm."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from data.errors import UserError
from sweep.cli.console import console
from sweep.cli.run import DONE, open_study_store
from sweep.cli.show import print_best, show_trials
from sweep.runner import run_sweep

if TYPE_CHECKING:
    from sweep.analysis.confirm import Confirmation
    from sweep.search.study import TrialRecord


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of a table.")]


def _trial_json(folder: Path, entry: "TrialRecord") -> dict[str, Any]:
    from model.training.metrics_log import attempts
    from sweep.analysis.results import entry_json
    from sweep.config.paths import trial_folder
    from sweep.tracking.tracker import mlflow_run_id

    return entry_json(entry, mlflow_run_id(folder, entry.number), attempts(trial_folder(folder, entry.number)))


def status(folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")], as_json: JsonOption = False) -> None:
    """Every trial and its state, also while the sweep runs."""
    from sweep.analysis.status import progress_json, status_lines

    study = open_study_store(folder)
    config, entries = study.config, study.trials()
    if not as_json:
        for line in status_lines(config, folder, entries):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        show_trials(config, folder, entries)
        return
    content = {
        "sweep": config.name,
        "objective": config.search.metric,
        "direction": config.search.direction,
        "target_trials": config.search.trials,
        "progress": progress_json(config, folder, entries),
        "trials": [_trial_json(folder, entry) for entry in entries],
    }
    print(json.dumps(content, indent=1))


def best(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    as_json: JsonOption = False,
    as_config: Annotated[bool, typer.Option("--config", help="Print its configuration, for `sweep train`.")] = False,
) -> None:
    """The best complete trial, and how to have it again; what `sweep confirm` said about it, if it was asked."""
    from sweep.analysis.confirm import read as confirmed

    study = open_study_store(folder)
    entry = study.best()
    if entry is None:
        raise UserError(f"{folder}: no trial is complete yet; `sweep status {folder}` shows how far they are")
    if as_config:
        from sweep.config.files import dump

        print(dump(study.trial_config(entry)), end="")
    elif as_json:
        config = study.trial_config(entry).model_dump(mode="json")
        print(json.dumps({**_trial_json(folder, entry), "config": config}, indent=1))
    else:
        print_best(study, folder)
        for line in (confirmed(folder) or {"lines": []})["lines"]:
            console.print(line, soft_wrap=True, markup=False, highlight=False)


def evaluate(
    source: Annotated[Path, typer.Argument(help="Folder of a sweep (its best trial), of a trial, or a checkpoint.pt.")],
    split: Annotated[str, typer.Option(help="train, val or test")] = "test",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Utterances at once; changes no result.")] = None,
    set_: Annotated[
        list[str], typer.Option("--set", help="data.key=value: the same model under a control, e.g. data.sound=zeroed.")
    ] = [],  # noqa: B006
    as_json: JsonOption = False,
) -> None:
    """Predict a split with a trained model."""
    from sweep.analysis.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(source, split, batch_size, set_)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    for task, labels in result["per_label"].items():
        table = Table(title=f"{task}: {split} split", title_justify="left")
        for name in ("label", "precision", "recall", "f1", "support"):
            table.add_column(name, justify="left" if name == "label" else "right")
        for label, row in labels.items():
            numbers = (f"{row[name]:.3f}" for name in ("precision", "recall", "f1"))
            table.add_row(label, *numbers, f"{row['support']:.0f}")
        console.print(table)
    shown = "  ".join(f"{name} {value:.3f}" for name, value in result.items() if isinstance(value, float))
    console.print(shown, highlight=False)


def confirm(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    top: Annotated[int, typer.Option(min=1, help="How many of its best configurations.")] = 3,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Trainings of each, under seeds that the search did not have; 5, or 1 with --folds."),
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=3, help="Train on each fold of a corpus that has so many, and pool them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of a table.")] = False,
) -> None:
    """Train the best again under fresh seeds, compare them in pairs, and read the test split. Goes on after a kill."""
    from sweep.analysis import confirm as own

    study = open_study_store(folder)
    seeds = seeds or (1 if folds else 5)
    planned, place = own.plan(study, folder, top, seeds, folds), own.place_of(folder, folds)
    under = f"{seeds} fresh seed{'s' if seeds > 1 else ''}" + (f" on {folds} folds" if folds else "")
    console.print(f"{len(planned.search.points)} trainings of the best {top} under {under}, in {place.name}")
    code = run_sweep(planned, place)
    if code != DONE:
        sys.exit(code)
    found = own.confirmation(study, folder, folds, console.print)
    if as_json:
        print(json.dumps(own.read(folder), indent=1))
        return
    console.print(_table(found))
    for line in found.lines():
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _table(found: "Confirmation") -> Table:
    pooled = f", {found.folds} folds pooled" if found.folds else ""
    table = Table(
        title=f"confirmed by {found.metric}",
        caption=f"means over fresh seeds{pooled}; in brackets 95 % by session and seed",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in ("trial", "seeds", "in the search", "validation", "test"):
        table.add_column(name, justify="right")
    for place, own in enumerate(found.ranked):
        row = [f"#{own.number}", str(len(own.seeds)), f"{own.searched:.3f}", str(own.val), str(own.test or "")]
        table.add_row(*row, style="bold green" if place == 0 else None)
    return table


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page; `report` within the sweep's by default.")
    ] = None,
    beside: Annotated[list[Path], typer.Option("--with", help="Another sweep to show beside it; repeatable.")] = [],  # noqa: B006
    reference: Annotated[int | None, typer.Option(help="Trial that choices are compared with.")] = None,
) -> None:
    """What is best, by how much, and which choice made the difference: a page, tables for a paper, pictures."""
    from sweep.analysis.report import page
    from sweep.tracking.report_artifacts import to_mlflow

    study = open_study_store(folder)
    others = {other.resolve(): other for other in beside if other.resolve() != folder.resolve()}
    opened = [open_study_store(other) for other in others.values()]
    with console.status("drawing"):
        verdict, written = page.write(study, folder, out or folder / "report", opened, reference)
    for line in verdict:
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    console.print(f"in MLflow: {to_mlflow(folder, written)}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"page: {written[0]}", soft_wrap=True, highlight=False, markup=False)
    console.print(f"beside it: {', '.join(path.name for path in written[1:])}", soft_wrap=True, highlight=False)
