"""Earlier sweeps that a search learns from: which ones there are, what differs, and what is taken from them.

`search.learn_from` names folders, or `auto` for all sweeps beside this one. What is taken is stored in the sweep's
folder when it starts (`sweep.search.sampling.advice`).
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.errors import UserError, reason
from data.formats import format_count
from sweep.config.files import load
from sweep.config.loader import flat
from sweep.config.schema import Config
from sweep.config.space import FOLD, Values, plain
from sweep.search.sampling.advice import Earlier, EarlierSweep, EarlierTrial, read_earlier
from sweep.search.study import StudyStore, TrialRecord, best_first

AUTO = "auto"
LEAST, MOST = 4, 100  # complete trials that a sweep must have, and of which the best ones are taken
HALF = 0.5  # factor of the weight for each thing in which a sweep differs
CLIP = 3.0  # standard deviations beyond which a value says no more
MODELS = ("model.llm.path", "model.encoder.path")


class UnusableError(Exception):
    """Nothing can be learned from a sweep; the message says why."""


def learn(config: Config, folder: Path, fingerprint: str | None) -> Earlier | None:
    """Return what the sweep in a folder learns from others: as it was stored, or else as it is now.

    Args:
        config: of the sweep.
        folder: of the sweep.
        fingerprint: of its corpus; None: not known yet.

    Raises:
        UserError: a folder that `search.learn_from` names is no sweep, has other tasks, or too few trials.
    """
    if not config.search.learn_from:
        return None
    if (stored := read_earlier(folder)) is not None:
        return stored
    earlier, seen = Earlier(), {folder.absolute()}
    for name in config.search.learn_from:
        paths = _beside(folder) if name == AUTO else [Path(name).absolute()]
        for path in paths:
            if path in seen:
                continue
            seen.add(path)
            try:
                earlier.sweeps.append(_taken(config, path, fingerprint))
            except UnusableError as error:
                if name != AUTO:
                    raise UserError(f"search.learn_from: {name}: {error}; remove it") from None
                earlier.left_out.append(f"{path.name}: {error}")
    return earlier


def _beside(folder: Path) -> Iterator[Path]:
    """Yield the folders of other searches beside the one of a sweep, by name."""
    for path in sorted(folder.absolute().parent.glob("*/config.yaml")):
        yield path.parent


def _taken(config: Config, folder: Path, fingerprint: str | None) -> EarlierSweep:
    """Return what is taken from the sweep in a folder.

    Raises:
        UnusableError: nothing can be taken.
    """
    if not (folder / "config.yaml").exists():
        raise UnusableError("not the folder of a sweep (no config.yaml)")
    try:
        study = StudyStore.read(folder, load(str(folder / "config.yaml")))
    except (UserError, OSError) as error:
        raise UnusableError(f"cannot be read ({reason(error)})") from None
    theirs = study.config
    if list(theirs.tasks.active()) != list(config.tasks.active()):
        ours = ", ".join(config.tasks.active())
        raise UnusableError(f"other tasks: {', '.join(theirs.tasks.active())}, not {ours}")
    if "seed" in theirs.search.space or FOLD in theirs.search.space:
        raise UnusableError("repeats trainings under other seeds or folds, and searches nothing")
    shared = [key for key in config.search.space if key in theirs.search.space]
    if not shared:
        raise UnusableError("no axis of search.space is varied in it")
    trials = best_first(theirs, study.trials())
    if len(trials) < LEAST:
        raise UnusableError(f"{format_count(len(trials), 'complete trial')}, fewer than {LEAST}")
    return standardised(config, theirs, trials, str(folder), list(_differences(config, study, fingerprint)))


def standardised(
    config: Config, theirs: Config, trials: Sequence[TrialRecord], source: str, differs: Sequence[str]
) -> EarlierSweep:
    """Return the trials of an earlier sweep as this one learns from them.

    Args:
        config: of this sweep.
        theirs: configuration of the earlier sweep.
        trials: its complete trials, best first.
        source: its name for people.
        differs: in what it differs from this sweep.
    """
    sign = 1 if theirs.search.direction == "maximize" else -1
    values = np.array([sign * float(trial.value or 0.0) for trial in trials])
    low, high = np.percentile(values, [25, 75])
    spread = float((high - low) / 1.349 or values.std() or 1.0)  # of a normal distribution with these quartiles
    standard = np.clip((values - np.median(values)) / spread, -CLIP, CLIP)
    taken = [
        EarlierTrial(values=_values(config, theirs, trial), value=round(float(value), 4))
        for trial, value in zip(trials[:MOST], standard[:MOST], strict=True)
    ]
    same_objective = theirs.search.metric == config.search.metric
    return EarlierSweep(
        source=source,
        differs=list(differs),
        weight=HALF ** len(differs),
        spread=spread if same_objective and math.isfinite(spread) else None,
        trials=taken,
    )


def _differences(config: Config, study: StudyStore, fingerprint: str | None) -> Iterator[str]:
    """Yield what halves the weight of a sweep: another corpus, base model, objective or number of epochs."""
    theirs, ours = flat(study.config), flat(config)
    same_corpus = study.fingerprint() == fingerprint if fingerprint else theirs["data.shards"] == ours["data.shards"]
    if not same_corpus:
        yield "another corpus"
    if any(theirs[key] != ours[key] for key in MODELS if key not in config.search.space):
        yield "another base model"
    if study.config.search.metric != config.search.metric:
        yield "another objective"
    if study.config.train.epochs != config.train.epochs and "train.epochs" not in config.search.space:
        yield "other epochs"


def _values(config: Config, theirs: Config, trial: TrialRecord) -> Values:
    """Return a trial's values on the axes of this search that apply to it; where it did not vary one, its setting."""
    settings: Values = {key: plain(value) for key, value in flat(theirs).items()}  # type: ignore[misc]
    settings |= trial.params
    values, base = Values(), flat(config)
    for key in config.search.order():
        if key in settings and config.search.is_varied(key, values, base):
            values[key] = settings[key]
    return values
