"""The leaderboard: trials by the objective with its 95 % interval, their parameters, what they cost, how they ended.

The terminal, MLflow's note and the report draw the same `Leaderboard`; the report also shows the columns for details.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.formats import format_duration, format_list, format_narrow_interval, format_number, format_value
from sweep.analysis.predictions import interval_around
from sweep.analysis.results import progress, ranked, short_names
from sweep.analysis.view import Column, TableView
from sweep.config.schema import Config
from sweep.config.space import SEED
from sweep.search import pruning_audit
from sweep.search.corpus_notes import read_ceilings, read_corpus_notes
from sweep.search.cost import format_device_hours
from sweep.search.sampling.objectives import front_line, objective_values, pareto_front
from sweep.search.sampling.ties import Trained, by_mean
from sweep.search.study import TrialRecord, best_first, keeps_best

METRICS = ("macro_f1", "accuracy", "bleu", "rouge_l", "perplexity")  # beside the objective, where a task has them
GENERATION = ("eos_rate", "run_on", "empty")  # how generated texts end
EQUAL = 1e-9  # difference of the objective that is only a matter of rounding
RETRIED = "outside its configuration: the same `sweep run` runs it again"
DETAILED = ("weighted_f1", "loss", "ece", *GENERATION)  # metrics that only the report shows


@dataclass(frozen=True)
class Leaderboard:
    """The trials of a sweep, best first, with the lines that explain them."""

    doubts: list[str]  # why the order of the trials means little, for a place above the table
    table: TableView  # groups of columns: trial, metrics, subsets, parameters, details, reason
    note: str  # what the figures are
    ceilings: list[str]  # how well annotators predict each other, on the split of the figures
    audit: list[str]  # what pruning may have cost
    warning: str | None  # pruning loses winners
    reasons: list[str]  # how each trial ended that did not simply train to its end

    def compact(self) -> TableView:
        """Return the table without details and reasons, for places that have little room."""
        return self.table.select(lambda column: column.group not in ("details", "reason"))


def leaderboard(config: Config, folder: Path, trials: Sequence[TrialRecord]) -> Leaderboard:
    """Rank the trials of a sweep.

    Args:
        config: of the sweep.
        folder: of the sweep; intervals are computed from the predictions in it.
        trials: of its study.
    """
    axes, objective = short_names(list(config.search.space)), config.search.metric
    reported = {name for trial in trials for name in trial.metrics}
    subsets = sorted(name for name in reported if _is_subset(name, reported))
    roles = sorted(name for name in reported if name.startswith(("accuracy_", "macro_f1_")) and name not in subsets)
    metrics = [name for name in (*METRICS, *DETAILED, *roles) if name != objective and name in reported]
    shown = [name for name in METRICS if not (subsets and name == "accuracy")]

    columns = [Column("#", group="trial"), Column("state", is_text=True, group="trial")]
    columns += [Column(objective, group="trial")]
    trained = {configuration.number: configuration for configuration in by_mean(config, trials)}
    has_seeds = any(trial.repeats is not None for trial in trials)
    columns += [Column(name, group="trial") for name in (("seed", "mean of seeds") if has_seeds else ())]
    has_shares = config.search.fidelity == "data"
    columns += [Column("data", group="trial")] if has_shares else []
    others = config.search.objectives[1:]
    front = {trial.number for trial in pareto_front(config, trials)}
    metrics = [name for name in metrics if name not in others]
    columns += [Column(name, group="trial") for name in [*others, *(["front"] if others else [])]]
    columns += [Column(name, group="metrics" if name in shown else "details") for name in metrics]
    columns += [Column(name.removeprefix("accuracy_"), group="subsets") for name in subsets]
    columns += [Column(name, group="details") for name in ("epochs", "steps", "time", "cost")]
    columns += [Column(name, group="parameters") for name in axes.values()]
    columns += [Column("why", is_text=True, group="reason")]
    kept = {"best" if keeps_best(config, trial.params) else "last" for trial in trials}
    if "best" in kept:
        columns.insert(3, Column("epoch", group="metrics"))
    rows = []
    for trial in ranked(config, trials):
        seconds = float(trial.metrics.get("seconds", 0.0))
        cost = [str(len(trial.curve)), str(trial.steps), format_duration(seconds), format_device_hours(config, seconds)]
        rows.append(
            [
                str(trial.number),
                format_state(config, trial),
                _with_interval(folder, trial, objective, trial.value, 3),
                *([str(trial.epoch)] if "best" in kept else []),
                *(_seeds(config, trial, trained.get(trial.number)) if has_seeds else ()),
                *([f"{trial.share:.0%}"] if has_shares else []),
                *(
                    "" if math.isnan(value) else f"{value:.4g}"
                    for value in objective_values(config, 0.0, trial.metrics)[1:]
                ),
                *(["*" if trial.number in front else ""] if others else []),
                *(format_number(trial.metrics.get(name)) for name in metrics),
                *(_with_interval(folder, trial, name, trial.metrics.get(name), 2) for name in subsets),
                *cost,
                *(format_value(trial.params.get(key, "")) for key in axes),
                trial.why,
            ]
        )
    has_intervals = any("[" in cell for row in rows for cell in row[:-1])
    epochs = " or ".join(sorted(kept, reverse=True)) or "last"
    note = f"validation split, after the {epochs} epoch" + ("; in brackets 95 % by session" if has_intervals else "")
    note = "; ".join(filter(None, (note, front_line(config, trials))))
    return Leaderboard(
        doubts=find_doubts(config, folder, trials),
        table=TableView(
            _with_priorities(columns, rows),
            rows,
            title=f"{config.name}: trials by {objective}",
            has_best=bool(rows) and rows[0][1] == "COMPLETE" and equal_value(config, trials) is None,
        ),
        note=f"{note}; {progress(config, trials).format_hours()} used",
        ceilings=[line for ceiling in read_ceilings(folder) for line in ceiling.lines()],
        audit=pruning_audit.format_lines(config, trials),
        warning=pruning_audit.format_warning(config, trials),
        reasons=[
            f"#{trial.number} {trial.why}" + (f" ({RETRIED})" if trial.outside else "")
            for trial in trials
            if _is_remarkable(trial)
        ],
    )


def _seeds(config: Config, trial: TrialRecord, trained: Trained | None) -> tuple[str, str]:
    """Return the seed of a trial, and the mean of all seeds of its configuration, or which trial has that."""
    seed = str(trial.params.get(SEED, config.seed))
    if trial.repeats is not None:
        return seed, f"of #{trial.repeats}"
    several = trained is not None and len(trained.values) > 1
    return seed, f"{format_number(trained.mean)} ({len(trained.values)})" if trained and several else ""


def store_intervals(config: Config, folder: Path, trial: TrialRecord) -> None:
    """Store the intervals of an ended trial that a leaderboard shows beside its predictions.

    The driver calls it, which has imported SciPy anyway: `sweep status` then reads them and answers at once.
    """
    leaderboard(config, folder, [trial])


def find_doubts(config: Config, folder: Path, trials: Sequence[TrialRecord]) -> list[str]:
    """Return why the order of a sweep's trials means little; nothing where it means something."""
    doubts, value = read_corpus_notes(folder), equal_value(config, trials)
    if value is not None:
        count = sum(trial.state == "COMPLETE" for trial in trials)
        metric = config.search.metric
        doubts.append(f"all {count} complete trials have the same {metric} ({value:.3f}), so their order means nothing")
    return [*doubts, *_other_bases(trials)]


def _other_bases(trials: Sequence[TrialRecord]) -> list[str]:
    """Return a line for each base model that differs between trials although its path is the same."""
    by_model: dict[tuple[str, str], dict[str, list[int]]] = {}
    for trial in trials:
        for setting, base in trial.bases.items():
            by_model.setdefault((setting, base.path), {}).setdefault(base.digest, []).append(trial.number)
    lines = []
    for (setting, path), by_digest in by_model.items():
        digests = (f"{digest} in trials {format_list([*map(str, numbers)])}" for digest, numbers in by_digest.items())
        if len(by_digest) > 1:
            lines.append(f"{setting}: {path} changed, so trials are not comparable: {'; '.join(digests)}")
    return lines


def equal_value(config: Config, trials: Sequence[TrialRecord]) -> float | None:
    """Return the value that all complete trials have; None where they differ, or have the same parameters."""
    done = best_first(config, trials)
    values = [trial.value for trial in done if trial.value is not None]
    if any(trial.params != done[0].params for trial in done) and max(values) - min(values) <= EQUAL:
        return values[0]
    return None


def format_state(config: Config, trial: TrialRecord) -> str:
    """Return a trial's state, with the epochs that it reached where it is not complete: "PRUNED 3/4"."""
    last = config.train.epochs * len(config.search.shares)
    return trial.state if trial.state == "COMPLETE" else f"{trial.state} {len(trial.curve)}/{last}"


def _is_subset(name: str, reported: set[str]) -> bool:
    """Return whether a metric is the accuracy on a named subset, not that of a role, which has an F1 as well."""
    return name.startswith("accuracy_") and f"macro_f1_{name.removeprefix('accuracy_')}" not in reported


def _is_remarkable(trial: TrialRecord) -> bool:
    return trial.state in ("PRUNED", "PAUSED", "FAIL") or trial.exempted_at is not None


def _with_interval(folder: Path, trial: TrialRecord, name: str, value: float | None, digits: int) -> str:
    if value is None:
        return ""
    limits = interval_around(folder, trial, name, value)
    if limits is None:
        return format_number(value, digits)
    return format_narrow_interval(value, limits.low, limits.high, digits)


def _with_priorities(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[Column]:
    """Number the columns that a narrow terminal may leave out: parameters from the left, then metrics, and last what is
    the same in all trials."""

    def importance(index: int) -> tuple[int, int]:
        is_constant = len({row[index] for row in rows}) == 1 and len(rows) > 1
        return 2 if is_constant else 1 if columns[index].group in ("metrics", "subsets") else 0, index

    optional = [index for index, column in enumerate(columns) if column.group != "trial"]
    priorities = {index: number for number, index in enumerate(sorted(optional, key=importance), start=1)}
    return [replace(column, priority=priorities.get(index, 0)) for index, column in enumerate(columns)]
