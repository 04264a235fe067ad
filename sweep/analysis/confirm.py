"""`sweep confirm`: the best trials are trained again under fresh seeds, compared in pairs, and read the test split.

The best of many trials looks better than it is: it was chosen for its luck as well (Cawley and Talbot, "On Over-fitting
in Model Selection", JMLR 11, 2010). So the number that counts is that of trainings which nobody chose.

best trials by seeds ─► a sweep of points, DIR-confirm ─► val and test of each ─► intervals, pairs ─► confirmed.json
              by folds ─► a sweep of points, DIR-folds ─► val and test, each pooled over the folds, as above

With folds, every session is once in val and once in test, of a training that did not learn it (k-fold cross-validation;
Stone, "Cross-Validatory Choice and Assessment of Statistical Predictions", JRSS B 36, 1974).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.atomic import write_file
from data.errors import MisfitError, UserError
from model.evaluation.bootstrap import Comparison, Interval, Sums, compare, interval, sums_of
from model.evaluation.metrics import Record
from sweep.analysis.evaluate import predict
from sweep.analysis.results import read_predictions
from sweep.config.files import load
from sweep.config.loader import flat
from sweep.config.paths import trial_folder
from sweep.config.resolve import resolve
from sweep.config.schema import Config
from sweep.config.space import FOLD
from sweep.execution.trial import open_shards
from sweep.search.study import StudyStore, TrialRecord, best_first

TEST = "test.json"
FORMER = ("model.init_from", "model.adapter.init_from")
FIRST_SEED = 1000  # of the fresh ones, unless the search drew them


@dataclass(frozen=True)
class Confirmed:
    """A configuration that was trained again."""

    number: int  # of the trial that the search found
    params: dict[str, Any]
    searched: float  # its value in the search
    seeds: list[int]
    val: Interval
    test: Interval | None  # None where the corpus has no test split for this


@dataclass(frozen=True)
class Pair:
    """The chosen configuration against another one."""

    other: int
    val: Comparison
    test: Comparison | None


@dataclass(frozen=True)
class Confirmation:
    """What the trainings with fresh seeds say."""

    metric: str
    ranked: list[Confirmed]  # by the mean on the validation split, best first
    pairs: list[Pair]  # the first one against each other
    folds: int | None  # that are pooled; None: the split of the search

    @property
    def chosen(self) -> Confirmed:
        """The one to report."""
        return self.ranked[0]

    def lines(self) -> list[str]:
        """What a paper may say."""
        best = self.chosen
        trained = f"{len(best.seeds)} fresh seed{'s' if len(best.seeds) > 1 else ''}"
        trained += f", {self.folds} folds pooled" if self.folds else ""
        found = [f"chosen: trial {best.number}, {self.metric} {best.val} on validation, mean of {trained}"]
        if best.test is not None:
            found[0] += f"; {best.test} on test"
        for pair in self.pairs:
            names = f"#{best.number}", f"#{pair.other}"
            p = "" if pair.val.mcnemar is None else f"; McNemar p = {pair.val.mcnemar:.2g}"
            found.append(f"validation: {pair.val.told(*names)}{p}")
            found += [f"test: {pair.test.told(*names)}"] if pair.test is not None else []
        return [*found, self._optimism()]

    def _optimism(self) -> str:
        best = self.chosen
        one, several = (" on one fold", f"on all {self.folds}") if self.folds else ("", "under fresh seeds")
        told = f"optimism of the search: trial {best.number} had {best.searched:.3f}{one}, of which "
        told += f"{best.val.value:.3f} ({best.val.value - best.searched:+.3f}) stood {several}"
        return told + (f", and {best.test.value:.3f} on test" if best.test is not None else "")


def place_of(folder: Path, folds: int | None = None) -> Path:
    """The folder of the sweep that confirms: beside the search, so that both share cache and MLflow."""
    return folder.absolute().with_name(folder.absolute().name + (FOLDED if folds else SUFFIX))


def plan(study: StudyStore, folder: Path, top: int, seeds: int, folds: int | None = None) -> Config:
    """The sweep that confirms: each of the best configurations under each of the fresh seeds, on each fold if asked.

    Given again with larger numbers, it holds what it held before, and more.

    Args:
        ledger: of the search.
        folder: of the search.
        top: how many of its best trials.
        seeds: how many fresh ones.
        folds: of the corpus; None: the split of the search.

    Raises:
        UserError: no trial is complete, the corpus has not so many folds, or a trial began with weights that may have
            learnt from any of them.
    """
    config, suffix = study.config, FOLDED if folds else SUFFIX
    best = list(distinct(best_first(config, study.trials()), top))
    if not best:
        raise UserError(f"{folder}: no trial is complete yet; `sweep status {folder}` shows how far they are")
    if folds:
        _refuse_misfit(config, best, folds)
    fresh, parts = fresh_seeds(config, seeds), [{FOLD: fold} for fold in range(folds or 0)] or [{}]
    wanted = [values | {SEED: seed} | part for seed in fresh for values in best for part in parts]
    path = place_of(folder, folds) / "config.yaml"
    before = load(str(path)).search.points if path.exists() else []
    points = [*before, *(point for point in wanted if point not in before)]
    known = list(dict.fromkeys([*fresh, *(point[SEED] for point in points)]))
    space = {key: axis for key, axis in config.model_dump()["search"]["space"].items() if key not in (SEED, FOLD)}
    space |= {FOLD: list(range(folds))} if folds else {}
    changed = {
        "name": config.name + suffix,
        "search.space": space | {SEED: sorted(known)},
        "search.points": points,
        "search.trials": len(points),
        "search.pruning": None,
        "storage.keep": None,
        "storage.mirror": config.storage.mirror and config.storage.mirror.rstrip("/") + suffix,
    }
    return config.with_values(changed)


def _refuse_misfit(config: Config, best: Sequence[Mapping[str, Any]], folds: int) -> None:
    shards = open_shards(resolve(config))
    has = shards.manifest.config.split.folds
    if has is None:
        raise UserError(
            f"--folds {folds}: {shards.folder} has no folds; prepare the corpus with --set split.folds={folds} into "
            "another folder, and search there"
        )
    if has != folds:
        raise UserError(f"--folds {folds}: {shards.folder} has {has} folds; use --folds {has}")
    for key in FORMER:
        if any(values.get(key, flat(config).get(key)) for values in best):
            raise UserError(
                f"--folds {folds}: {key} names weights that may have learnt from any fold, so nothing would be held "
                "out; leave --folds out"
            )


def distinct(entries: Sequence[TrialRecord], top: int) -> list[dict[str, Any]]:
    """The values of the first trials that differ in more than seed and fold."""
    found: list[dict[str, Any]] = []
    for entry in entries:
        if without_luck(entry.params) not in found and len(found) < top:
            found.append(without_luck(entry.params))
    return found


def fresh_seeds(config: Config, count: int) -> list[int]:
    """Seeds that no trial of the search had."""
    axis = config.search.space.get(SEED)
    candidates = range(FIRST_SEED, FIRST_SEED + count + len((axis and axis.choices) or []) + 1)
    taken = {seed for seed in candidates if seed == config.seed or (axis is not None and axis.contains(seed))}
    found = [seed for seed in candidates if seed not in taken][:count]
    if len(found) < count:
        raise UserError(
            f"search.space.{SEED}: holds the seeds from {FIRST_SEED} on, which are kept to confirm; use lower"
        )
    return found


def confirmation(
    study: StudyStore, folder: Path, folds: int | None = None, say: Callable[[str], object] = lambda line: None
) -> Confirmation:
    """Compare what was trained again; test splits that were not read yet are read now.

    Args:
        ledger: of the search.
        folder: of the search.
        folds: as of `plan`.
        say: shows a line to people.

    Raises:
        UserError: nothing was confirmed yet.
    """
    own, config = place_of(folder, folds), study.config
    again = StudyStore.of(own)
    groups = _groups(best_first(config, study.trials()), again.trials(), folds or 1)
    if not groups:
        whole = " on every fold" if folds else ""
        raise UserError(f"{own}: no training is complete{whole} yet; `sweep status {own}` shows what became of each")
    sums, task = objective(config, trial_folder(own, next(iter(groups[0][1].values()))[0].number))
    val = [_runs(own, rounds, lambda place: read_predictions(place)[task][1]) for _, rounds in groups]
    test = [_runs(own, rounds, lambda place: _tested(place, task, say)) for _, rounds in groups]
    measured = [
        _measured(first, rounds, heard, read, sums)
        for (first, rounds), heard, read in zip(groups, val, test, strict=True)
    ]
    maximize = config.search.direction == "maximize"
    sign = -1 if maximize else 1
    order = sorted(range(len(groups)), key=lambda place: sign * measured[place].val.value)
    best = order[0]
    pairs = [
        Pair(
            measured[place].number,
            compare(val[best], val[place], sums, maximize),
            compare(test[best], test[place], sums, maximize) if all(test[best]) and all(test[place]) else None,
        )
        for place in order[1:]
    ]
    found = Confirmation(config.search.metric, [measured[place] for place in order], pairs, folds)
    _write(own / FILE, found)
    return found


def _measured(
    first: TrialRecord, rounds: Mapping[int, Any], val: list[list[Record]], test: list[list[Record]], sums: Sums
) -> Confirmed:
    assert first.value is not None
    tested = interval(test, sums) if all(test) else None
    return Confirmed(first.number, without_luck(first.params), first.value, list(rounds), interval(val, sums), tested)


def _groups(
    best: Sequence[TrialRecord], again: Sequence[TrialRecord], parts: int
) -> list[tuple[TrialRecord, dict[int, list[TrialRecord]]]]:
    """Each confirmed trial of the search, with its complete trainings by seed: as many as the data have parts."""
    found: list[tuple[TrialRecord, dict[int, list[TrialRecord]]]] = []
    for first in best:
        rounds: dict[int, list[TrialRecord]] = {}
        for entry in again:
            if entry.state == "COMPLETE" and without_luck(entry.params) == without_luck(first.params):
                rounds.setdefault(int(entry.params[SEED] or 0), []).append(entry)
        rounds = {seed: entries for seed, entries in rounds.items() if len(entries) == parts}
        if rounds and without_luck(first.params) not in [without_luck(known.params) for known, _ in found]:
            found.append((first, rounds))
    return found


def _runs(
    folder: Path, rounds: Mapping[int, Sequence[TrialRecord]], read: Callable[[Path], list[Record]]
) -> list[list[Record]]:
    """By seed, the records of its trainings: those of all folds together."""
    return [
        [record for entry in entries for record in read(trial_folder(folder, entry.number))]
        for entries in rounds.values()
    ]


def objective(config: Config, trial: Path) -> tuple[Sums, str]:
    """The objective as something that can be resampled, and its task.

    Args:
        config: of the search.
        trial: folder of a trial with predictions.

    Raises:
        UserError: it has no interval.
    """
    task, _, metric = config.search.metric.rpartition("/")
    said = read_predictions(trial)
    task = task or next(iter(said), "")
    sums = sums_of(metric, said[task][0], {}) if task in said else None
    if sums is None:
        raise UserError(
            f"search.metric: {config.search.metric} has no interval, so trials cannot be compared by it; search by "
            "macro_f1, accuracy, weighted_f1, loss, perplexity, bleu or rouge_l"
        )
    return sums, task


def _tested(folder: Path, task: str, say: Callable[[str], object]) -> list[Record]:
    """A training on the test split, read once and kept beside its predictions; empty where there is none."""
    path = folder / TEST
    if not path.exists():
        say(f"reading the test split: training {folder.name}")
        try:
            said = predict(folder, "test")
            content = {"labels": said.labels, "records": [record.as_dict() for record in said.records]}
        except MisfitError:
            content = {"labels": {}, "records": []}
        write_file(path, json.dumps(content))
    return read_predictions(folder, TEST).get(task, ([], []))[1]


def _write(path: Path, found: Confirmation) -> None:
    def plain(value: Interval | None) -> Any:
        return None if value is None else {"value": value.value, "low": value.low, "high": value.high}

    def against(value: Comparison | None) -> Any:
        return value and {"difference": plain(value.difference), "better": value.better, "mcnemar": value.mcnemar}

    rows = [{**vars(own), "val": plain(own.val), "test": plain(own.test)} for own in found.ranked]
    pairs = [{"other": own.other, "val": against(own.val), "test": against(own.test)} for own in found.pairs]
    content = {"metric": found.metric, "folds": found.folds, "ranked": rows, "pairs": pairs, "lines": found.lines()}
    write_file(path, json.dumps(content))


def read(folder: Path) -> dict[str, Any] | None:
    """What the last `sweep confirm` of a sweep said; None where nothing was confirmed."""
    paths = [place_of(folder, folds) / FILE for folds in (None, 1)]
    written = [path for path in paths if path.exists()]
    if not written:
        return None
    newest = max(written, key=lambda path: path.stat().st_mtime_ns)
    content: dict[str, Any] = json.loads(newest.read_text(encoding="utf-8"))
    return content


SUFFIX, FOLDED, FILE = "-confirm", "-folds", "confirmed.json"
SEED = "seed"


def search_of(config: Config, folder: Path) -> Path | None:
    """The folder of the search that a sweep confirms; None where it is a search itself."""
    folder, points = folder.absolute(), config.search.points
    for suffix in (SUFFIX, FOLDED):
        search = folder.with_name(folder.name.removesuffix(suffix))
        if search != folder and (search / "config.yaml").exists() and points and all(SEED in one for one in points):
            return search
    return None


def without_luck(params: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration is, under whatever seed and on whatever fold."""
    return {key: value for key, value in params.items() if key not in (SEED, FOLD)}


def lines(config: Config, folder: Path, search: Path, entries: Sequence[TrialRecord]) -> list[str]:
    """A line for each training, in their order; then what came out, once they were compared.

    Args:
        config: of the sweep that confirms.
        folder: of it.
        search: folder of the search.
        entries: of the ledger of the sweep that confirms.
    """
    study = StudyStore.of(search)
    best, path = best_first(study.config, study.trials()), folder / FILE
    said = json.loads(path.read_text(encoding="utf-8"))["lines"] if path.exists() else []
    return [*(_line(config, entry, best) for entry in entries), *said]


def _line(config: Config, entry: TrialRecord, best: Sequence[TrialRecord]) -> str:
    own = without_luck(entry.params)
    number = next((str(first.number) for first in best if without_luck(first.params) == own), "unknown")
    which = f"trial {number}, seed {entry.params[SEED]}"
    which += f", fold {entry.params[FOLD]}" if FOLD in entry.params else ""
    value = "" if entry.value is None else f", {config.search.metric} {entry.value:.3f}"
    why = "" if entry.state in ("COMPLETE", "RUNNING") else f": {entry.why}"
    return f"#{entry.number} {which}: {entry.state}{value}{why}"
