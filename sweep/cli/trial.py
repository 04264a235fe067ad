"""Commands about one trial: train and inspect."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from data.errors import UserError
from sweep.cli.console import console, print_line
from sweep.cli.options import ConfigArgument, OtherBaseOption, SetOption
from sweep.cli.prepare import show_shards
from sweep.cli.show import show_model


def train(
    config: ConfigArgument,
    set_: SetOption = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Folder of the trial; runs/<name>-train by default.")] = None,
    allow_other_base: OtherBaseOption = False,
) -> None:
    """Train one trial in this process, without Ray; the result is the same, bit for bit."""
    from sweep.config.diff import claim_folder, continued
    from sweep.config.files import load
    from sweep.config.resolve import missing
    from sweep.search.base_models import check_bases

    loaded = load(config, set_).for_trial({})
    folder = out or Path("runs") / f"{loaded.name}-train"
    loaded = continued(loaded, folder)
    check_bases(loaded)

    from sweep.execution.trial import available_device, open_shards, run_trial, with_class_weights  # import torch
    from sweep.preflight.checks import resolve_inputs

    if new := missing(loaded):
        print_line(f"creating {', '.join(new)}: once, then cached")
    with console.status("checking corpus and models"):
        resolved = resolve_inputs(loaded, allow_other_base)
        show_model(resolved)
    shards = open_shards(resolved)
    claim_folder(with_class_weights(loaded, shards), folder)

    def report(epoch: int, metrics: Mapping[str, object]) -> None:
        numbers = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if isinstance(value, float))
        print_line(f"epoch {epoch}/{loaded.train.epochs}  {numbers}")

    trial = with_class_weights(resolved, shards)
    run_trial(trial, folder, report, "local", available_device(), allow_other_base=allow_other_base)
    print_line(f"checkpoint: {folder / 'checkpoint.pt'}")


def inspect(
    source: Annotated[str, typer.Argument(help="Name of a preset, a YAML file, or folder (URL) of shards.")],
    set_: SetOption = [],  # noqa: B006
    split: Annotated[
        str | None, typer.Option(help="train, val or test; by default the split of the example, or train.")
    ] = None,
    example: Annotated[
        str | None, typer.Option(help="Id of an utterance or session; by default the first one.")
    ] = None,
) -> None:
    """Show the corpus, the parts of the model and what trains, and examples as the model reads them.

    No weights are loaded.
    """
    from data.corpus.schema import SPLITS
    from data.loading.tasks import has_audio
    from data.shards.dataset import Shards, is_corpus
    from sweep.config.files import load, override_sweep
    from sweep.config.resolve import resolve
    from sweep.config.schema import parse
    from sweep.search.base_models import check_bases

    if split not in (*SPLITS, None):
        raise UserError(f"--split {split}: unknown; use one of {', '.join(SPLITS)}")
    if is_corpus(source):
        shards = Shards(source)
        show_shards(shards)
        from sweep.analysis.inspection import settings_for

        loaded = parse(override_sweep({}, [*settings_for(shards), *set_]), "--set")
    else:
        loaded = load(source, set_)
    check_bases(loaded)

    from sweep.analysis.inspection import lines  # these import torch
    from sweep.execution.trial import open_shards
    from sweep.preflight.checks import check_audio

    resolved = resolve(loaded)
    check_audio(resolved, has_audio(open_shards(resolved)))
    for line in lines(*show_model(resolved), split, example):
        print_line(line)
