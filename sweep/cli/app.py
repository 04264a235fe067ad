"""The command line. Exit codes: 0 done, 1 infrastructure, 2 bad input or settings, 75 unfinished (run it again)."""

import os
import sys
import warnings

import typer

from data.errors import UserError
from sweep.cli import cache as cli_cache
from sweep.cli.console import complain
from sweep.cli.export import export, predict
from sweep.cli.prepare import prepare
from sweep.cli.results import best, confirm, evaluate, report, status
from sweep.cli.run import BAD_INPUT, run, submit
from sweep.cli.trial import inspect, train

app = typer.Typer(
    help="Hyperparameter sweeps for speech LLMs: start, resume, look, reproduce.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (prepare, run, submit, status, best, report, confirm, evaluate, train, inspect, export, predict):
    app.command()(verb)

app.add_typer(cli_cache.app, name="cache")


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
