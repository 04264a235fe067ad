"""Hyperparameter sweeps for speech LLMs: configuration, search, execution under Ray, MLflow tracking, command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sweep.runner import Outcome


def run_sweep(
    config: str | Path,
    overrides: Mapping[str, object] | None = None,
    *,
    trials: int | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    allow_other_base: bool = False,
) -> "Outcome":
    """Start, resume or extend a sweep, as `sweep run` does, from a script or a notebook.

    >>> outcome = run_sweep("demo", overrides={"search.trials": 2}, out="runs/x")
    >>> outcome.state, outcome.best.params

    Args:
        config: a preset's name, or the path of a YAML file.
        overrides: values by dotted key.
        trials: total number of trials; a larger number extends a finished sweep.
        out: folder of the sweep; runs/<name> by default.
        progress: whether to print the progress.
        allow_other_base: resume a sweep although a base model has changed since it was started.

    Raises:
        UserError: the settings, the corpus or a model cannot be used. How else a sweep ends, the outcome says.
    """
    import json

    from sweep.cli.console import quiet_libraries
    from sweep.cli.progress import ConsoleListener
    from sweep.config.files import load

    quiet_libraries()
    values = {**(overrides or {}), **({} if trials is None else {"search.trials": trials})}
    loaded = load(
        str(config), [f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in values.items()]
    )
    from sweep.runner import run  # imports torch, Ray and MLflow

    folder, listener = Path(out or f"runs/{loaded.name}"), ConsoleListener() if progress else None
    return run(loaded, folder, listener, allow_other_base=allow_other_base)
