"""Commands that read the results of a sweep: status, best, evaluate, report, confirm."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data.errors import UserError
from sweep.cli.console import console, print_line
from sweep.cli.options import JsonOption, OtherBaseOption, SweepArgument
from sweep.cli.run import run_and_show
from sweep.cli.show import print_best, print_mlflow, show_table, show_trials
from sweep.execution.signals import ExitCode

if TYPE_CHECKING:
    from sweep.analysis.results import TrialJson
    from sweep.search.study import StudyStore, TrialRecord


def open_study_store(folder: Path) -> "StudyStore":
    """Open the trials of the sweep in a folder.

    Raises:
        UserError: it is not the folder of a sweep.
    """
    from sweep.search.study import StudyStore

    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder}: not the folder of a sweep (no config.yaml); `sweep run` creates one under runs/")
    return StudyStore.of(folder)


def _trial_json(folder: Path, trial: "TrialRecord") -> "TrialJson":
    from model.training.metrics_log import MetricsLog
    from sweep.analysis.results import trial_json
    from sweep.config.paths import trial_folder
    from sweep.tracking.tracker import mlflow_run_id

    attempts = MetricsLog(trial_folder(folder, trial.number)).last_attempt()
    return trial_json(trial, mlflow_run_id(folder, trial.number), attempts)


def status(folder: SweepArgument, as_json: JsonOption = False) -> None:
    """Show every trial and its state, also while the sweep runs."""
    from sweep.analysis.status import progress_json, status_lines
    from sweep.search.corpus_notes import read_ceilings
    from sweep.search.study import has_started
    from sweep.tracking.tracker import parent_run_id

    study = open_study_store(folder)
    config, trials = study.config, [trial for trial in study.trials() if has_started(folder, trial)]
    if not as_json:
        for line in status_lines(config, folder, trials):
            print_line(line)
        show_trials(config, folder, trials)
        if parent_run_id(folder) is not None:
            print_mlflow(folder)
        return
    content = {
        "sweep": config.name,
        "objective": config.search.metric,
        "direction": config.search.direction,
        "target_trials": config.search.trials,
        "progress": progress_json(config, folder, trials),
        "human_ceiling": {ceiling.task: ceiling.to_json() for ceiling in read_ceilings(folder)},
        "trials": [_trial_json(folder, trial) for trial in trials],
    }
    print(json.dumps(content, indent=1))


def best(
    folder: SweepArgument,
    as_json: JsonOption = False,
    as_config: Annotated[bool, typer.Option("--config", help="Print its configuration, for `sweep train`.")] = False,
) -> None:
    """Show the best trial and how to reproduce it.

    If `sweep confirm` has trained it again, its findings are shown, too.
    """
    from sweep.analysis.confirm import read as read_confirmation
    from sweep.analysis.recommendation import recommend
    from sweep.config.paths import shell_command

    study = open_study_store(folder)
    trial = study.best()
    if trial is None:
        command = shell_command("sweep", "status", folder)
        raise UserError(f"{folder}: no trial is complete yet; `{command}` shows the progress")
    if as_config:
        from sweep.config.files import dump

        print(dump(study.trial_config(trial)), end="")
    elif as_json:
        config = study.trial_config(trial).model_dump(mode="json")
        cheaper = recommend(study.config, folder, study.trials())
        recommended = trial.number if cheaper is None else cheaper.trial.number
        print(json.dumps({**_trial_json(folder, trial), "recommended": recommended, "config": config}, indent=1))
    else:
        print_best(study.config, folder, trial, study.trials())
        confirmation = read_confirmation(folder)
        for line in [] if confirmation is None else confirmation.lines():
            print_line(line)


def evaluate(
    source: Annotated[Path, typer.Argument(help="Folder of a sweep (its best trial), of a trial, or a checkpoint.pt.")],
    split: Annotated[str, typer.Option(help="train, val or test")] = "test",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Utterances in a batch; the results do not depend on it.")
    ] = None,
    set_: Annotated[
        list[str], typer.Option("--set", help="data.key=value: the same model under a control, e.g. data.sound=zeroed.")
    ] = [],  # noqa: B006
    allow_other_base: OtherBaseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a trained model on a split."""
    from sweep.analysis.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(source, split, batch_size, set_, allow_other_base)
    if as_json:
        print(json.dumps(result.to_json(), indent=1))
        return
    for view in [*result.tables(), *result.code_tables()]:
        show_table(view)
    print_line(result.line())
    for line in result.ceiling_lines():
        print_line(line)


def confirm(
    folder: SweepArgument,
    top: Annotated[int, typer.Option(min=1, help="Number of best configurations to train again.")] = 3,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Trainings of each, with seeds that the search did not use; 5, or 1 with --folds."),
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=3, help="Train on each fold of a corpus with this many folds, and pool them.")
    ] = None,
    allow_other_base: OtherBaseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the best configurations again with fresh seeds, and compare them.

    They are compared in pairs, and evaluated on the test split. Rerun the same command to resume.
    """
    from sweep.analysis import confirm as analysis
    from sweep.search.base_models import study_bases

    study = open_study_store(folder)
    seeds = seeds or (1 if folds else 5)
    planned, target = analysis.plan(study, folder, top, seeds, folds), analysis.confirm_folder(folder, folds)
    if not allow_other_base and (changes := study.other_bases(study_bases(planned))):
        raise UserError(study.other_bases_message(changes))
    conditions = f"{seeds} fresh seed{'s' if seeds > 1 else ''}" + (f" on {folds} folds" if folds else "")
    console.print(f"{len(planned.search.points)} trainings of the best {top} with {conditions}, in {target.name}")
    code = run_and_show(planned, target, allow_other_base) if planned.search.points else ExitCode.DONE
    if code != ExitCode.DONE:
        sys.exit(code)
    confirmation = analysis.confirm(study, folder, folds, console.print, allow_other_base)
    if as_json:
        print(json.dumps(confirmation.to_json(), indent=1))
        return
    show_table(confirmation.table())
    for line in confirmation.lines():
        print_line(line)


def report(
    folder: SweepArgument,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; `report` in the sweep's folder by default.")
    ] = None,
    beside: Annotated[list[Path], typer.Option("--with", help="Another sweep to show beside it; repeatable.")] = [],  # noqa: B006
    reference: Annotated[int | None, typer.Option(help="Trial that the choices are compared with.")] = None,
) -> None:
    """Write a report: the best configuration, its margin, and the effect of each choice.

    It consists of a page, tables for a paper, and figures.
    """
    from sweep.analysis.report import page
    from sweep.tracking.report_artifacts import to_mlflow

    study = open_study_store(folder)
    folders = {path.resolve(): path for path in beside if path.resolve() != folder.resolve()}
    opened = [open_study_store(path) for path in folders.values()]
    with console.status("drawing"):
        verdict, written = page.write(study, folder, out or folder / "report", opened, reference)
    for line in verdict:
        print_line(line)
    print_line(f"in MLflow: {to_mlflow(folder, written)}")
    print_line(f"page: {written[0]}")
    print_line(f"beside it: {', '.join(path.name for path in written[1:])}")
