"""`sweep confirm`: train the best trials again under fresh seeds, compare them in pairs, and read the test split.

The best of many trials looks better than it is, because it was chosen for its luck as well (Cawley and Talbot, "On
Over-fitting in Model Selection", JMLR 11, 2010). The figure to report is that of trainings that were not selected.

best trials by seeds ─► a sweep of points, DIR-confirm ─► val and test of each ─► intervals, pairs ─► confirmed.json
              by folds ─► a sweep of points, DIR-folds ─► val and test, each pooled over the folds, as above

With folds, every session is once in val and once in test of a training that did not see it (k-fold cross-validation;
Stone, "Cross-Validatory Choice and Assessment of Statistical Predictions", JRSS B 36, 1974).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from data.atomic import write_file
from data.errors import MisfitError, UserError
from data.formats import format_count, format_number
from model.evaluation.bootstrap import Comparison, Interval, SummedMetric, compare, interval, summed_metric
from model.evaluation.metrics import Record
from sweep.analysis.predictions import read_predictions
from sweep.analysis.view import Column, TableView
from sweep.config.files import load
from sweep.config.loader import flat
from sweep.config.paths import shell_command, trial_folder
from sweep.config.schema import Config
from sweep.config.space import FOLD, SEED, Value, whole
from sweep.search.sampling.ties import fresh_seeds
from sweep.search.study import StudyStore, TrialRecord, best_first

if TYPE_CHECKING:
    from sweep.analysis.evaluate import SplitPredictions

FILE = "confirmed.json"  # in the folder of the sweep that confirms
TEST = "test.json"  # in a trial's folder: its predictions of the test split
BY_SEEDS, BY_FOLDS = "-confirm", "-folds"  # what the name of such a folder ends with
WARM_START_KEYS = ("model.init_from", "model.adapter.init_from", "model.lora.init_from")
Params = dict[str, Value]


@dataclass(frozen=True)
class ConfirmedTrial:
    """A trial of the search whose configuration was trained again."""

    number: int
    params: Params  # without seed and fold
    searched: float  # the objective in the search
    seeds: list[int]
    val: Interval
    test: Interval | None  # None where the corpus has no test split for the task


@dataclass(frozen=True)
class Pair:
    """The chosen configuration compared with another one."""

    other: int
    val: Comparison
    test: Comparison | None


@dataclass(frozen=True)
class Confirmation:
    """The results of trainings with fresh seeds."""

    metric: str
    folds: int | None  # pooled folds; None: the split of the search
    ranked: list[ConfirmedTrial]  # by the mean on the validation split, best first
    pairs: list[Pair]  # the first configuration against each other one

    @property
    def chosen(self) -> ConfirmedTrial:
        """Return the configuration to report."""
        return self.ranked[0]

    def lines(self) -> list[str]:
        """Return the sentences that a paper may quote."""
        best = self.chosen
        trained = f"{format_count(len(best.seeds), 'fresh seed')}{self._pooled()}"
        lines = [f"chosen: trial {best.number}, {self.metric} {best.val} on validation, mean of {trained}"]
        if best.test is not None:
            lines[0] += f"; {best.test} on test"
        for pair in self.pairs:
            names = f"#{best.number}", f"#{pair.other}"
            mcnemar = "" if pair.val.mcnemar is None else f"; McNemar p = {pair.val.mcnemar:.2g}"
            lines.append(f"validation: {pair.val.describe(*names)}{mcnemar}")
            lines += [f"test: {pair.test.describe(*names)}"] if pair.test is not None else []
        searched, confirmed = (" on one fold", f"on all {self.folds}") if self.folds else ("", "under fresh seeds")
        optimism = (
            f"optimism of the search: trial {best.number} reached {best.searched:.3f}{searched} in the search, and "
            f"{best.val.value:.3f} ({best.val.value - best.searched:+.3f}) {confirmed}"
        )
        return [*lines, optimism + (f", and {best.test.value:.3f} on test" if best.test is not None else "")]

    def table(self) -> TableView:
        """Return the confirmed trials, best first."""
        rows = [
            [
                f"#{trial.number}",
                str(len(trial.seeds)),
                format_number(trial.searched),
                str(trial.val),
                str(trial.test or ""),
            ]
            for trial in self.ranked
        ]
        return TableView(
            [Column(name) for name in ("trial", "seeds", "in the search", "validation", "test")],
            rows,
            title=f"confirmed by {self.metric}",
            note=f"means over fresh seeds{self._pooled()}; in brackets 95 % by session and seed",
            has_best=True,
        )

    def to_json(self) -> dict[str, object]:
        """Return the content of confirmed.json, which `sweep confirm --json` prints."""
        return {**asdict(self), "lines": self.lines()}

    def _pooled(self) -> str:
        return f", {self.folds} folds pooled" if self.folds else ""


def confirm_folder(folder: Path, folds: int | None = None) -> Path:
    """Return the folder of the sweep that confirms a search: beside it, so that they share cache and MLflow."""
    return folder.absolute().with_name(folder.absolute().name + (BY_FOLDS if folds else BY_SEEDS))


def search_of(config: Config, folder: Path) -> Path | None:
    """Return the folder of the search that a sweep confirms; None where it is a search itself."""
    folder, points = folder.absolute(), config.search.points
    for suffix in (BY_SEEDS, BY_FOLDS):
        search = folder.with_name(folder.name.removesuffix(suffix))
        if search != folder and (search / "config.yaml").exists() and points and all(SEED in point for point in points):
            return search
    return None


def without_seed(params: Mapping[str, Value]) -> Params:
    """Return what makes a configuration: its parameters without seed and fold."""
    return {key: value for key, value in params.items() if key not in (SEED, FOLD)}


def plan(study: StudyStore, folder: Path, top: int, seeds: int, folds: int | None = None) -> Config:
    """Return the sweep that trains each of the best configurations under each fresh seed, on each fold if asked.

    A plan with larger numbers contains the former plan. What the search has trained as further seeds is not in it, so
    there may be no points.

    Args:
        study: of the search.
        folder: of the search.
        top: number of its best configurations.
        seeds: number of fresh seeds.
        folds: of the corpus; None: the split of the search.

    Raises:
        UserError: no trial is complete, the corpus does not have this number of folds, or a trial started from weights
            that may have been trained on any of them.
    """
    config, suffix = study.config, BY_FOLDS if folds else BY_SEEDS
    best: list[Params] = []
    for trial in best_first(config, study.trials()):
        if without_seed(trial.params) not in best and len(best) < top:
            best.append(without_seed(trial.params))
    if not best:
        command = shell_command("sweep", "status", folder)
        raise UserError(f"{folder}: no trial is complete yet; `{command}` shows how far they are")
    if folds:
        _check_folds(config, best, folds)
    fresh = fresh_seeds(config, seeds)
    parts: list[Params] = [{FOLD: fold} for fold in range(folds or 0)] or [{}]
    done = [] if folds else [training.params for _, training in _repeats(study.trials(), folder)]
    wanted = [{**values, SEED: seed, **part} for seed in fresh for values in best for part in parts]
    wanted = [point for point in wanted if point not in done]
    path = confirm_folder(folder, folds) / "config.yaml"
    before = load(str(path)).search.points if path.exists() else []
    points = [*before, *(point for point in wanted if point not in before)]
    planned_seeds = {*fresh, *(seed for point in points if isinstance(seed := point[SEED], int))}
    space = {key: axis for key, axis in config.model_dump()["search"]["space"].items() if key not in (SEED, FOLD)}
    space |= {FOLD: list(range(folds))} if folds else {}
    return config.with_values(
        {
            "name": config.name + suffix,
            "search.space": space | {SEED: sorted(planned_seeds)},
            "search.points": points,
            "search.trials": max(1, len(points)),
            "search.pruning": None,
            "search.tie_share": 0.0,
            "search.fidelity": "epochs",
            "search.learn_from": None,
            "search.metrics": None,
            "search.budget": None,
            "search.stop_when": None,
            "storage.keep": None,
            "storage.mirror": config.storage.mirror and config.storage.mirror.rstrip("/") + suffix,
        }
    )


def _check_folds(config: Config, best: Sequence[Mapping[str, Value]], folds: int) -> None:
    from sweep.config.resolve import resolve
    from sweep.execution.trial import open_shards  # imports torch, which readers of results need not

    shards = open_shards(resolve(config))
    available = shards.manifest.config.split.folds
    if available is None:
        raise UserError(
            f"--folds {folds}: {shards.folder} has no folds; prepare the corpus with --set split.folds={folds} into "
            "another folder, and search there"
        )
    if available != folds:
        raise UserError(f"--folds {folds}: {shards.folder} has {available} folds; use --folds {available}")
    for key in WARM_START_KEYS:
        if any(values.get(key, flat(config).get(key)) for values in best):
            raise UserError(
                f"--folds {folds}: {key} names weights that may have been trained on any fold, so nothing would be "
                "held out; leave --folds out"
            )


def confirm(
    study: StudyStore,
    folder: Path,
    folds: int | None = None,
    say: Callable[[str], object] = lambda line: None,
    allow_other_base: bool = False,
) -> Confirmation:
    """Compare the configurations that were trained again, and write confirmed.json.

    Each training predicts the test split once.

    Args:
        study: of the search.
        folder: of the search.
        folds: see `plan`.
        say: prints a line of progress.
        allow_other_base: see `predict`.

    Raises:
        UserError: no training is complete, or a base model has changed since.
    """
    config, retrained = study.config, confirm_folder(folder, folds)
    trials = study.trials()
    trainings = [] if folds else _repeats(trials, folder)
    if (retrained / "config.yaml").exists():
        again = StudyStore.of(retrained).trials()
        trainings = [*((trial_folder(retrained, trial.number), trial) for trial in again), *trainings]
    groups = _groups(best_first(config, trials), trainings, folds or 1)
    if not groups:
        on_folds = " on every fold" if folds else ""
        command = shell_command("sweep", "status", retrained)
        raise UserError(f"{retrained}: no training is complete{on_folds} yet; `{command}` shows them")
    sums, task = objective(config, next(iter(groups[0][1].values()))[0])

    def predicted(read: Callable[[Path], list[Record]]) -> list[list[list[Record]]]:
        """Return the records of each configuration by seed, those of all folds together."""
        return [
            [[record for path in paths for record in read(path)] for paths in by_seed.values()] for _, by_seed in groups
        ]

    val = predicted(lambda path: read_predictions(path)[task][1])
    test = predicted(lambda path: _test_records(path, task, say, allow_other_base))
    confirmed = [
        ConfirmedTrial(
            number=trial.number,
            params=without_seed(trial.params),
            searched=trial.value or 0.0,
            seeds=list(by_seed),
            val=interval(val_records, sums),
            test=interval(test_records, sums) if all(test_records) else None,
        )
        for (trial, by_seed), val_records, test_records in zip(groups, val, test, strict=True)
    ]
    maximize = config.search.direction == "maximize"
    order = sorted(range(len(groups)), key=lambda index: (-1 if maximize else 1) * confirmed[index].val.value)
    best = order[0]
    pairs = [
        Pair(
            confirmed[index].number,
            compare(val[best], val[index], sums, maximize),
            compare(test[best], test[index], sums, maximize) if all(test[best]) and all(test[index]) else None,
        )
        for index in order[1:]
    ]
    confirmation = Confirmation(config.search.metric, folds, [confirmed[index] for index in order], pairs)
    retrained.mkdir(exist_ok=True)
    write_file(retrained / FILE, json.dumps(confirmation.to_json()))
    return confirmation


def _repeats(trials: Sequence[TrialRecord], folder: Path) -> list[tuple[Path, TrialRecord]]:
    """Return the further seeds that the search has trained, with their folders; those whose checkpoint was deleted
    cannot predict the test split any more."""
    paths = [(trial_folder(folder, trial.number), trial) for trial in trials if trial.repeats is not None]
    if not paths:
        return []
    from model.checkpoints.checkpoint import FILE as CHECKPOINT  # imports torch, which readers of results need not

    return [
        (path, trial)
        for path, trial in paths
        if trial.state == "COMPLETE" and ((path / CHECKPOINT).exists() or (path / TEST).exists())
    ]


def _groups(
    searched: Sequence[TrialRecord], retrained: Sequence[tuple[Path, TrialRecord]], parts: int
) -> list[tuple[TrialRecord, dict[int, list[Path]]]]:
    """Return the confirmed trials of the search, each with the folders of its trainings by seed: those that are
    complete on all parts of the data."""
    groups: list[tuple[TrialRecord, dict[int, list[Path]]]] = []
    for trial in searched:
        params = without_seed(trial.params)
        by_seed: dict[int, list[Path]] = {}
        for path, training in retrained:
            if training.state == "COMPLETE" and without_seed(training.params) == params:
                by_seed.setdefault(whole(training.params[SEED]), []).append(path)
        by_seed = {seed: by_seed[seed][:parts] for seed in sorted(by_seed) if len(by_seed[seed]) >= parts}
        if by_seed and params not in [without_seed(first.params) for first, _ in groups]:
            groups.append((trial, by_seed))
    return groups


def objective(config: Config, trial: Path) -> tuple[SummedMetric, str]:
    """Return the objective as something that can be resampled, and its task.

    Args:
        config: of the search.
        trial: folder of a trial with predictions.

    Raises:
        UserError: the objective has no interval.
    """
    task, _, metric = config.search.metric.rpartition("/")
    predictions = read_predictions(trial)
    task = task or next(iter(predictions), "")
    sums = summed_metric(metric, predictions[task][0], {}) if task in predictions else None
    if sums is None:
        raise UserError(
            f"search.metric: {config.search.metric} has no interval, so trials cannot be compared by it; search by "
            "macro_f1, accuracy, weighted_f1, loss, perplexity, bleu or rouge_l"
        )
    return sums, task


def predict(trial: Path, split: str, allow_other_base: bool = False) -> "SplitPredictions":
    """Predict a split with a trial; this imports torch, which readers of results need not."""
    from sweep.analysis import evaluate

    return evaluate.predict(trial, split, allow_other_base=allow_other_base)


def _test_records(folder: Path, task: str, say: Callable[[str], object], allow_other_base: bool) -> list[Record]:
    """Return a training's predictions of the test split, made once and kept in its folder; empty if it has no split."""
    path = folder / TEST
    if not path.exists():
        say(f"reading the test split: training {folder.name}")
        content: dict[str, object] = {"labels": {}, "records": []}
        try:
            predictions = predict(folder, "test", allow_other_base=allow_other_base)
            content = {"labels": predictions.labels, "records": [record.as_dict() for record in predictions.records]}
        except MisfitError:  # the corpus has no test split for the task
            pass
        write_file(path, json.dumps(content))
    return read_predictions(folder, TEST).get(task, ([], []))[1]


def read(folder: Path) -> Confirmation | None:
    """Return the results of the last `sweep confirm` of a search; None where it was not confirmed."""
    paths = [path for folds in (None, 1) if (path := confirm_folder(folder, folds) / FILE).exists()]
    return _read(max(paths, key=lambda path: path.stat().st_mtime_ns)) if paths else None


def _read(path: Path) -> Confirmation:
    try:
        return TypeAdapter(Confirmation).validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{path}: damaged ({error.errors()[0]['msg']}); remove it, and `sweep confirm` writes it again"
        ) from None


def training_lines(config: Config, folder: Path, search: Path, trials: Sequence[TrialRecord]) -> list[str]:
    """Return a line for each training of a sweep that confirms, by number, and the results once they were compared.

    Args:
        config: of the sweep that confirms.
        folder: of the sweep that confirms.
        search: folder of the search.
        trials: of the sweep that confirms.
    """
    study = StudyStore.of(search)
    numbers = [(without_seed(trial.params), trial.number) for trial in best_first(study.config, study.trials())]
    lines = []
    for trial in trials:
        params = without_seed(trial.params)
        number = next((str(number) for searched, number in numbers if searched == params), "unknown")
        fold = f", fold {trial.params[FOLD]}" if FOLD in trial.params else ""
        value = "" if trial.value is None else f", {config.search.metric} {trial.value:.3f}"
        why = "" if trial.state in ("COMPLETE", "RUNNING") else f": {trial.why}"
        lines.append(f"#{trial.number} trial {number}, seed {trial.params[SEED]}{fold}: {trial.state}{value}{why}")
    return [*lines, *(_read(folder / FILE).lines() if (folder / FILE).exists() else [])]
