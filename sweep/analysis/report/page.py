"""report.html of a sweep: one page without outside parts, for somebody who has ten minutes and writes a sentence."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pandas as pd

from data.atomic import write_file
from model.evaluation.bootstrap import compare
from sweep.analysis import confirm, leaderboard
from sweep.analysis.report import ablation
from sweep.analysis.report.figures import Figure
from sweep.analysis.results import progress, read_predictions
from sweep.analysis.status import train_command
from sweep.config.paths import near, trial_folder
from sweep.config.schema import Config
from sweep.preflight import eta as forecast
from sweep.search import pruning_audit
from sweep.search.study import StudyStore, TrialRecord, best_first

NEXT = 3  # trials behind the best one that are compared with it


@dataclass(frozen=True)
class Sweep:
    """A sweep in a table of several."""

    name: str
    metric: str
    best: str  # the objective of its best trial, with interval
    trial: str
    apart: str  # why it cannot be ranked with the others; empty: it can


def html(
    study: StudyStore,
    folder: Path,
    said: Sequence[str],
    found: Sequence[Figure],
    table: pd.DataFrame,
    reference: str,
    others: Sequence[Sweep],
) -> str:
    """The page.

    Args:
        ledger: of the sweep.
        folder: of the sweep.
        said: its verdict.
        found: its pictures.
        table: its ablation.
        reference: what its choices are compared with.
        others: sweeps to be shown beside it, itself among them; may be empty.
    """
    from jinja2 import Environment, StrictUndefined

    config, entries = study.config, study.trials()
    template = files("sweep.analysis.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(template)
    states = Counter(entry.state for entry in entries)
    return page.render(
        config=config,
        facts=_facts(study, entries),
        states=", ".join(f"{count} {state.lower()}" for state, count in states.items()) or "no trial yet",
        verdict=said,
        confirmed=confirm.read(folder),
        board=leaderboard.board(config, folder, entries, whole=True),
        notes=[*pruning_audit.format_lines(config, entries), *forecast.lines(config, folder, entries)],
        warning=pruning_audit.format_warning(config, entries),
        figures=[(own, _embedded(own, first=place == 0)) for place, own in enumerate(found)],
        ablation=table.to_dict("split"),
        reference=reference,
        others=others,
        health=_health(config, entries),
        commands=_commands(config, folder, entries),
    )


def _facts(study: StudyStore, entries: Sequence[TrialRecord]) -> dict[str, str]:
    config, codes = study.config, study.codes()
    best = next(iter(best_first(config, entries)), None)
    return {
        "best": "none yet" if best is None or best.value is None else f"{best.value:.3f} (#{best.number})",
        "trials": f"{len(entries)} of {max(config.search.trials, len(entries))}",
        "cost": progress(config, entries).hours_text(),
        "corpus": study.fingerprint() or "unknown",
        "code": codes[-1] if codes else "unknown",
        "seed": str(config.seed),
    }


def verdict(config: Config, folder: Path, entries: Sequence[TrialRecord]) -> list[str]:
    """What can be said about the best trial, in sentences."""
    done = best_first(config, entries)
    if not done:
        why = sorted({entry.why for entry in entries if entry.state == "FAIL"})
        return ["No trial is complete, so there is nothing to choose yet.", *why]
    confirmed = confirm.read(folder)
    if confirmed is not None:
        return [str(line) for line in confirmed["lines"]]
    metric, first = config.search.metric, done[0]
    interval = leaderboard.interval_of(folder, first, metric)
    told = [f"best in the search: trial {first.number}, {metric} {interval or f'{first.value:.3f}'} on validation"]
    told += _pairs(config, folder, done)
    where = near(folder)
    return [*told, f"this is the luckiest of {len(done)} trials; `sweep confirm {where}` says what stands of it"]


def _pairs(config: Config, folder: Path, done: Sequence[TrialRecord]) -> list[str]:
    """The best trial against those behind it, on the same items."""
    places = [trial_folder(folder, entry.number) for entry in done[: NEXT + 1]]
    said = [read_predictions(place) for place in places]
    if not all(said) or len(done) < 2:
        return []
    sums, task = confirm.objective(config, places[0])
    maximize, names = config.search.direction == "maximize", [f"#{entry.number}" for entry in done]
    return [
        compare([said[0][task][1]], [said[place][task][1]], sums, maximize).told(names[0], names[place])
        for place in range(1, len(said))
    ]


def _embedded(figure: Figure, first: bool) -> str:
    text: str = figure.content.to_html(
        full_html=False, include_plotlyjs=first, config={"displaylogo": False, "responsive": True}
    )
    return text


def _health(config: Config, entries: Sequence[TrialRecord]) -> list[list[str]]:
    """How each complete trial ends the texts that it generates; empty where nothing is generated."""
    rows = []
    for entry in best_first(config, entries):
        for name in entry.metrics:
            if name.rpartition("/")[2] == "eos_rate":
                prefix = name.removesuffix("eos_rate")
                shares = [f"{entry.metrics[prefix + own]:.1%}" for own in leaderboard.HEALTH]
                rows.append([f"#{entry.number}", prefix.strip("/") or "replies", *shares])
    return rows


def _commands(config: Config, folder: Path, entries: Sequence[TrialRecord]) -> list[tuple[str, str]]:
    """Where each figure of the page comes from."""
    where, best = near(folder), next(iter(best_first(config, entries)), None)
    found = [("this page", f"sweep report {where}"), ("leaderboard", f"sweep status {where}")]
    if best is not None:
        found.append(("the best trial again", f"sweep {train_command(folder, best.params)}"))
        found.append(("fresh seeds and the test split", f"sweep confirm {where}"))
    return found


def beside(studies: Sequence[StudyStore]) -> list[Sweep]:
    """Several sweeps, best first; those that cannot be compared with the first one stand behind, with the reason."""
    first, rows = studies[0], []
    for study in studies:
        best = study.best()
        found = best and leaderboard.interval_of(study.folder, best, study.config.search.metric)
        shown = "no complete trial" if best is None else str(found or f"{best.value:.3f}")
        name = "" if best is None else f"#{best.number}"
        own = Sweep(study.config.name, study.config.search.metric, shown, name, _apart(first, study))
        rows.append((own, best.value if best is not None and best.value is not None else None))
    sign = -1 if first.config.search.direction == "maximize" else 1
    rows.sort(key=lambda row: (bool(row[0].apart), row[1] is None, sign * (row[1] or 0.0)))
    return [own for own, _ in rows]


def _apart(one: StudyStore, other: StudyStore) -> str:
    """Why the trials of two sweeps are no rivals."""
    tasks = [study.config.tasks.active() for study in (one, other)]
    if one.fingerprint() != other.fingerprint():
        return f"another corpus or split: {other.fingerprint()}, not {one.fingerprint()}"
    if list(tasks[0]) != list(tasks[1]):
        return f"other tasks: {', '.join(tasks[1])}, not {', '.join(tasks[0])}"
    if one.config.search.metric != other.config.search.metric:
        return f"another objective: {other.config.search.metric}, not {one.config.search.metric}"
    if one.config.data.fold != other.config.data.fold:
        return f"another fold: {other.config.data.fold}, not {one.config.data.fold}"
    return ""


def write(
    study: StudyStore, folder: Path, out: Path, beside_: Sequence[StudyStore], reference: int | None
) -> tuple[list[str], list[Path]]:
    """The page, the ablation as a table of a paper, and the pictures as PNG.

    What was there stays until the new file is complete.

    Args:
        ledger: of the sweep.
        folder: of the sweep.
        out: folder that they are written into.
        beside_: other sweeps.
        reference: number of the trial that choices are compared with; see `ablation.reference_of`.

    Returns:
        The verdict and the files.

    Raises:
        UserError: the reference is not complete.
    """
    from sweep.analysis.report import figures

    entries, config = study.trials(), study.config
    chosen = ablation.reference_of(config, entries, reference)
    rivals = [other for other in beside_ if not _apart(study, other)]
    choices = ablation.choices(study, chosen, rivals)
    table = ablation.frame(config, chosen, choices)
    others = beside([study, *beside_]) if beside_ else []
    said = verdict(config, folder, entries)
    against = ablation.described(config, chosen) if chosen is not None else ""
    text = html(study, folder, said, figures.figures(study, folder, entries, choices), table, against, others)
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.html"
    write_file(page, text)
    metric = config.search.metric.replace("_", " ")
    caption = (
        f"{config.name}: what each choice changes of {metric}, on the validation split; 95 % intervals by session."
    )
    return said, [page, *ablation.write(table, out, caption), *figures.pngs(study, out)]
