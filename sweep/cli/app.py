"""The command line. Exit codes: 0 done, 1 infrastructure, 2 bad input or settings, 75 unfinished (rerun to resume)."""

import os
import sys
import traceback
import warnings

import typer

from data.errors import UserError, reason
from data.user_cache import use_writable_caches
from sweep.cli import cache
from sweep.cli.console import complain, quiet_libraries, replace_unprintable
from sweep.cli.export import export, predict
from sweep.cli.prepare import codebooks, formats, prepare
from sweep.cli.results import best, confirm, evaluate, report, status
from sweep.cli.run import run
from sweep.cli.submit import submit
from sweep.cli.trial import inspect, train
from sweep.execution.joined_cluster import ClusterError
from sweep.execution.signals import ExitCode
from sweep.execution.waiting import leave_hanging_calls

INTERRUPTED = 130  # exit code of Typer for Ctrl-C

app = typer.Typer(
    help="Hyperparameter sweeps for speech LLMs: run, resume, compare and reproduce trials.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    prepare,
    formats,
    codebooks,
    run,
    submit,
    status,
    best,
    report,
    confirm,
    evaluate,
    train,
    inspect,
    export,
    predict,
):
    app.command()(command)
app.add_typer(cache.app, name="cache")


def main() -> None:
    """Run the command line, and end the process."""
    try:
        _main()
    except SystemExit as ended:
        leave_hanging_calls(ended.code)
        raise


def _main() -> None:
    """Run the command line; report an error of the user in one message, without a traceback."""
    replace_unprintable()
    quiet_libraries()
    use_writable_caches()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    warnings.simplefilter("ignore")
    try:
        app()
    except UserError as error:
        complain(error)
        sys.exit(ExitCode.BAD_INPUT)
    except (ClusterError, OSError) as error:
        complain(error if isinstance(error, ClusterError) else f"{reason(error)}; fix this and rerun the same command")
        sys.exit(ExitCode.INFRASTRUCTURE)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            sys.stderr.write("stopped by Ctrl-C\n")
        raise
    except Exception as error:
        traceback.print_exc()
        complain(f"unexpected {type(error).__name__}: {reason(error)}; this is a fault of the program, see above")
        sys.exit(ExitCode.INFRASTRUCTURE)
