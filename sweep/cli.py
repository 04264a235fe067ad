"""The command line. Exit codes: 0 done, 1 infrastructure, 2 bad input or settings, 75 unfinished (run it again)."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from data.errors import UserError
from sweep import cli_cache
from sweep.cli_confirm import confirm
from sweep.cli_export import export, predict
from sweep.cli_prepare import prepare, show_shards
from sweep.cli_report import report
from sweep.cli_run import (
    BAD_INPUT,
    ConfigArgument,
    SetOption,
    check_inputs,
    open_ledger,
    run,
    submit,
)
from sweep.cli_show import print_best, show_model, show_trials
from sweep.terminal import complain, console

if TYPE_CHECKING:
    from sweep.ledger import Entry

app = typer.Typer(
    help="Hyperparameter sweeps for speech LLMs: start, resume, look, reproduce.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (prepare, run, submit, confirm, report, export, predict):
    app.command()(verb)

app.add_typer(cli_cache.app, name="cache")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of a table.")]


def main() -> None:
    """Run the command line; problems of the user's are one message, without a traceback."""
    # Libraries talk on import and load; what matters to a user is said by this program.
    for name, value in {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.simplefilter("ignore")
    try:
        app()
    except UserError as error:
        complain(error)
        sys.exit(BAD_INPUT)


def _trial_json(folder: Path, entry: "Entry") -> dict[str, Any]:
    from sweep.curves import attempts
    from sweep.ledger import trial_folder
    from sweep.results import entry_json
    from sweep.tracking import mlflow_run_id

    return entry_json(entry, mlflow_run_id(folder, entry.number), attempts(trial_folder(folder, entry.number)))


@app.command()
def status(folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")], as_json: JsonOption = False) -> None:
    """Every trial and its state, also while the sweep runs."""
    from sweep.watch import progress_json, status_lines

    ledger = open_ledger(folder)
    config, entries = ledger.config, ledger.entries()
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


@app.command()
def best(
    folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")],
    as_json: JsonOption = False,
    as_config: Annotated[bool, typer.Option("--config", help="Print its configuration, for `sweep train`.")] = False,
) -> None:
    """The best complete trial, and how to have it again; what `sweep confirm` said about it, if it was asked."""
    from sweep.confirm import read as confirmed

    ledger = open_ledger(folder)
    entry = ledger.best()
    if entry is None:
        raise UserError(f"{folder}: no trial is complete yet; `sweep status {folder}` shows how far they are")
    if as_config:
        from sweep.config import dump

        print(dump(ledger.trial_config(entry)), end="")
    elif as_json:
        config = ledger.trial_config(entry).model_dump(mode="json")
        print(json.dumps({**_trial_json(folder, entry), "config": config}, indent=1))
    else:
        print_best(ledger, folder)
        for line in (confirmed(folder) or {"lines": []})["lines"]:
            console.print(line, soft_wrap=True, markup=False, highlight=False)


@app.command()
def train(
    config: ConfigArgument,
    set_: SetOption = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Folder of the trial; runs/<name>-train by default.")] = None,
) -> None:
    """One trial in this process, without Ray: the same training, bit for bit."""
    from sweep import config as configuration
    from sweep.builtin import resolve
    from sweep.trial import as_run, available_device, open_shards, run_trial

    loaded = configuration.load(config, set_).with_values({"search.space": {}, "search.points": []})
    folder = out or Path("runs") / f"{loaded.name}-train"
    loaded = as_run(loaded, open_shards(check_inputs(loaded).data))
    configuration.claim_folder(loaded, folder)

    def report(epoch: int, metrics: dict[str, Any]) -> None:
        shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if isinstance(value, float))
        console.print(f"epoch {epoch}/{loaded.train.epochs}  {shown}", soft_wrap=True, highlight=False)

    run_trial(resolve(loaded), folder, report, "local", available_device())
    console.print(f"checkpoint: {folder / 'checkpoint.pt'}", highlight=False)


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="A preset's name, a YAML file, or the folder (URL) of shards.")],
    set_: SetOption = [],  # noqa: B006
    split: Annotated[str | None, typer.Option(help="train, val or test; by default the example's, or train.")] = None,
    example: Annotated[str | None, typer.Option(help="Id of an utterance or session; by default the first.")] = None,
) -> None:
    """What is in a corpus and what is wrong with it; the parts of the model and what trains; examples exactly as the
    model reads them. Loads no weights."""
    from data.schema import SPLITS
    from data.shards import Shards, is_shards
    from data.tasks import has_sound
    from sweep import builtin
    from sweep import config as configuration
    from sweep.inputs import check_sound
    from sweep.inspect import lines, settings_for
    from sweep.settings import read_tree
    from sweep.trial import open_shards

    if split not in (*SPLITS, None):
        raise UserError(f"--split {split}: unknown; use one of {', '.join(SPLITS)}")
    if is_shards(source):
        shards = Shards(source)
        show_shards(shards)
        loaded = configuration.parse(read_tree(None, [*settings_for(shards), *set_]), "--set")
    else:
        loaded = configuration.load(source, set_)
    resolved = builtin.resolve(loaded)
    check_sound(resolved, has_sound(open_shards(resolved.data)))
    for line in lines(*show_model(resolved), split, example):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
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
    from sweep.evaluate import evaluate_checkpoint

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
