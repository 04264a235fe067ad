"""Commands about one trial: train and inspect."""

from pathlib import Path
from typing import Annotated, Any

import typer

from data.errors import UserError
from sweep.cli.console import console
from sweep.cli.prepare import show_shards
from sweep.cli.run import ConfigArgument, SetOption, check_inputs
from sweep.cli.show import show_model


def train(
    config: ConfigArgument,
    set_: SetOption = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Folder of the trial; runs/<name>-train by default.")] = None,
) -> None:
    """One trial in this process, without Ray: the same training, bit for bit."""
    from sweep.config.diff import claim_folder
    from sweep.config.files import load
    from sweep.execution.trial import as_run, available_device, open_shards, run_trial

    loaded = load(config, set_).for_trial({})
    folder = out or Path("runs") / f"{loaded.name}-train"
    resolved = check_inputs(loaded)
    shards = open_shards(resolved)
    loaded = as_run(loaded, shards)
    claim_folder(loaded, folder)

    def report(epoch: int, metrics: dict[str, Any]) -> None:
        shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if isinstance(value, float))
        console.print(f"epoch {epoch}/{loaded.train.epochs}  {shown}", soft_wrap=True, highlight=False)

    run_trial(as_run(resolved, shards), folder, report, "local", available_device())
    console.print(f"checkpoint: {folder / 'checkpoint.pt'}", highlight=False)


def inspect(
    source: Annotated[str, typer.Argument(help="A preset's name, a YAML file, or the folder (URL) of shards.")],
    set_: SetOption = [],  # noqa: B006
    split: Annotated[str | None, typer.Option(help="train, val or test; by default the example's, or train.")] = None,
    example: Annotated[str | None, typer.Option(help="Id of an utterance or session; by default the first.")] = None,
) -> None:
    """What is in a corpus and what is wrong with it; the parts of the model and what trains; examples exactly as the
    model reads them. Loads no weights."""
    from data.corpus.schema import SPLITS
    from data.loading.tasks import has_sound
    from data.shards.dataset import Shards, is_shards
    from sweep.analysis.inspection import lines, settings_for
    from sweep.config.files import load
    from sweep.config.loader import read_tree
    from sweep.config.resolve import resolve
    from sweep.config.schema import parse
    from sweep.execution.trial import open_shards
    from sweep.preflight.checks import check_sound

    if split not in (*SPLITS, None):
        raise UserError(f"--split {split}: unknown; use one of {', '.join(SPLITS)}")
    if is_shards(source):
        shards = Shards(source)
        show_shards(shards)
        loaded = parse(read_tree(None, [*settings_for(shards), *set_]), "--set")
    else:
        loaded = load(source, set_)
    resolved = resolve(loaded)
    check_sound(resolved, has_sound(open_shards(resolved)))
    for line in lines(*show_model(resolved), split, example):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
