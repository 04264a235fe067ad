"""The command line. Exit codes: 0 done, 1 infrastructure, 2 bad input or settings, 75 unfinished (run it again)."""

import json
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from data.errors import UserError
from sweep.cli_prepare import console, prepare, show_shards

if TYPE_CHECKING:
    from model.speech_llm import SpeechLLM
    from sweep.config import Config
    from sweep.ledger import Ledger

DONE, INFRASTRUCTURE, BAD_INPUT, UNFINISHED = 0, 1, 2, 75

app = typer.Typer(
    help="Hyperparameter sweeps for speech LLMs: start, resume, look, reproduce.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(prepare)

SetOption = Annotated[list[str], typer.Option("--set", help="Override a setting: key=value, dotted; repeatable.")]
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
        print(f"error: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="A preset's name, or a YAML file.")],
    set_: SetOption = [],  # noqa: B006 — Typer's way
    trials: Annotated[int | None, typer.Option(min=1, help="Trials in all; larger than before extends.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep; runs/<name> by default.")] = None,
) -> None:
    """Start a sweep, or go on where it was: the same command for both."""
    from sweep import config as configuration

    overrides = [*set_, *([f"search.trials={trials}"] if trials is not None else [])]
    loaded = configuration.load(config, overrides)
    sys.exit(_run(loaded, out or Path("runs") / loaded.name))


def _run(config: "Config", folder: Path) -> int:
    from sweep.config import claim_folder
    from sweep.display import Display
    from sweep.run import Busy, Driver, locked
    from sweep.tracking import is_shipped

    # A batch system ends jobs with SIGTERM; Tune and this program end in an orderly way on SIGINT.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    shipped = True
    try:
        # A new sweep leaves nothing behind if its inputs are no good; one that is there is not looked into for them
        # unless there is something left to do.
        resolved = None if (folder / "config.yaml").exists() else _resolve(config)
        with locked(folder):
            claim_folder(config, folder)
            driver = Driver(config, folder, console.print)
            if driver.left() or not is_shipped(folder):
                resolved = resolved or _resolve(config)
                with Display(console, config, folder) as display:
                    driver.say = display.say
                    shipped = _attempt(driver, resolved)
            return _conclude(driver, shipped)
    except Busy as error:
        print(f"error: {error}", file=sys.stderr)
        return INFRASTRUCTURE
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on where it was ({folder})")
        return UNFINISHED


def _resolve(config: "Config") -> "Config":
    from sweep.builtin import missing
    from sweep.inputs import resolve_inputs

    new = missing(config)
    if new:
        console.print(f"making {', '.join(new)}: once, then cached")
    with console.status("checking corpus and models"):
        resolved = resolve_inputs(config)
        _show_model(resolved)
    return resolved


def _show_model(resolved: "Config") -> "tuple[SpeechLLM, Config]":
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


def _attempt(driver: Any, resolved: "Config") -> bool:
    """Run what is left; whether MLflow took everything."""
    from sweep.tracking import Tracker

    say = driver.say
    driver.bind(resolved)
    tracker = Tracker(driver.config, driver.folder, driver.data_tags(resolved))
    tracker.start()
    try:
        if driver.left():
            say("starting Ray")
            driver.execute(resolved)
    finally:
        say("sending the last results to MLflow")
        shipped = tracker.finish()
        if not shipped:
            say(f"[red]MLflow lacks some results[/red] ({escape(str(tracker.error))}); give the same command again")
    return shipped


def _conclude(driver: Any, shipped: bool) -> int:
    """Show what came out and choose the exit code."""
    from sweep.results import leaderboard_table
    from sweep.tracking import ui_command

    entries = driver.ledger.entries()
    console.print(leaderboard_table(driver.config, driver.folder, entries))
    for entry in entries:
        if entry.state == "FAIL":
            console.print(f"trial {entry.number} failed: {entry.why}", soft_wrap=True, markup=False)
    if driver.left():
        console.print(f"unfinished: {driver.left()} trials are left; the same command goes on")
        return UNFINISHED
    best = driver.ledger.best()
    if best is None:
        reasons = "; ".join(sorted({entry.why for entry in entries}))
        print(f"error: no trial was completed ({reasons})", file=sys.stderr)
        return INFRASTRUCTURE
    _print_best(driver.ledger, driver.folder)
    console.print(f"MLflow UI:  {ui_command(driver.folder, _program('mlflow'))}", soft_wrap=True, highlight=False)
    return DONE if shipped else UNFINISHED


def _print_best(ledger: "Ledger", folder: Path) -> None:
    best = ledger.best()
    assert best is not None
    sets = " ".join(f"--set {key}={json.dumps(value)}" for key, value in best.params.items())
    console.print(f"\nbest: trial {best.number}, {ledger.config.search.metric} {best.value:.3f}", style="bold")
    for key, value in best.params.items():
        console.print(f"  {key}: {value}", highlight=False)
    where = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    console.print(
        f"again:      {_program('sweep')} train {where / 'config.yaml'} {sets}", soft_wrap=True, highlight=False
    )
    console.print(f"on test:    {_program('sweep')} evaluate {where} --split test", soft_wrap=True, highlight=False)


def _program(name: str) -> str:
    """How a program of this environment is called from here."""
    path = Path(sys.executable).parent / name
    if shutil.which(name) == str(path):
        return name
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _open(folder: Path) -> "Ledger":
    from sweep import config as configuration
    from sweep.ledger import Ledger

    path = folder / "config.yaml"
    if not path.exists():
        raise UserError(f"{folder}: not the folder of a sweep (no config.yaml); `sweep run` makes one under runs/")
    return Ledger.read(folder, configuration.load(str(path)))


@app.command()
def status(folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")], as_json: JsonOption = False) -> None:
    """Every trial and its state, also while the sweep runs."""
    from sweep.results import entry_json, leaderboard_table
    from sweep.tracking import mlflow_run_id

    ledger = _open(folder)
    config, entries = ledger.config, ledger.entries()
    if not as_json:
        console.print(leaderboard_table(config, folder, entries))
        return
    content = {
        "sweep": config.name,
        "objective": config.search.metric,
        "direction": config.search.direction,
        "target_trials": config.search.trials,
        "trials": [entry_json(entry, mlflow_run_id(folder, entry.number)) for entry in entries],
    }
    print(json.dumps(content, indent=1))


@app.command()
def best(folder: Annotated[Path, typer.Argument(help="Folder of a sweep.")], as_json: JsonOption = False) -> None:
    """The best complete trial, and how to have it again."""
    from sweep.results import entry_json
    from sweep.tracking import mlflow_run_id

    ledger = _open(folder)
    entry = ledger.best()
    if entry is None:
        raise UserError(f"{folder}: no trial is complete yet; `sweep status {folder}` shows how far they are")
    if as_json:
        config = ledger.trial_config(entry).model_dump(mode="json")
        print(json.dumps({**entry_json(entry, mlflow_run_id(folder, entry.number)), "config": config}, indent=1))
    else:
        _print_best(ledger, folder)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A preset's name, or a YAML file.")],
    set_: SetOption = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Folder of the trial; runs/<name>-train by default.")] = None,
) -> None:
    """One trial in this process, without Ray: the same training, bit for bit."""
    from sweep import config as configuration
    from sweep.builtin import resolve
    from sweep.trial import as_run, available_device, open_shards, run_trial

    loaded = configuration.load(config, set_).with_values({"search.space": {}, "search.points": []})
    folder = out or Path("runs") / f"{loaded.name}-train"
    loaded = as_run(loaded, open_shards(_resolve(loaded).data))
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
    for line in lines(*_show_model(resolved), split, example):
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
