"""The report of a sweep as one HTML page without outside parts: verdict, leaderboard, ablation, pictures, commands."""

import re
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from data.atomic import write_file
from model.evaluation.bootstrap import compare
from sweep.analysis import confirm
from sweep.analysis.leaderboard import GENERATION, Leaderboard, equal_value, find_doubts, leaderboard
from sweep.analysis.predictions import read_predictions, trial_interval
from sweep.analysis.recommendation import recommend, tie_line
from sweep.analysis.report import ablation
from sweep.analysis.report.figures import Figure
from sweep.analysis.results import progress
from sweep.analysis.status import train_command
from sweep.analysis.view import Column, TableView
from sweep.config.paths import shell_command, trial_folder
from sweep.config.schema import Config
from sweep.preflight.plan_file import plan_lines
from sweep.search.corpus_notes import read_ceilings, read_classes
from sweep.search.sampling.advice import read_earlier
from sweep.search.study import StudyStore, TrialRecord, best_first

RIVALS = 3  # trials behind the best one that are compared with it


def render(
    study: StudyStore,
    folder: Path,
    verdict: Sequence[str],
    figures: Sequence[Figure],
    ablations: TableView,
    reference: str,
    others: TableView | None,
) -> str:
    """Return the page.

    Args:
        study: of the sweep.
        folder: of the sweep.
        verdict: see `find_verdict`.
        figures: the pictures.
        ablations: what each choice is worth.
        reference: what the choices are compared with.
        others: this sweep beside others; None: there are none.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    def breakable(text: str) -> Markup:
        """Let the browser break long names, not numbers, behind dots, slashes, pluses and underscores."""
        return Markup("<wbr>").join(map(escape, re.split(r"(?<=[_/.+])(?=[A-Za-z])", text)))

    config, trials = study.config, study.trials()
    template = files("sweep.analysis.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["breakable"] = breakable
    states = Counter(trial.state for trial in trials)
    confirmation, board = confirm.read(folder), leaderboard(config, folder, trials)
    ranking, details = _split(board)
    return environment.from_string(template).render(
        config=config,
        facts=_facts(study, trials),
        states=", ".join(f"{count} {state.lower()}" for state, count in states.items()) or "no trial yet",
        verdict=verdict,
        confirmation=confirmation,
        ranking=ranking,
        details=details,
        notes=[
            *_ceilings(config, folder, trials),
            *board.audit,
            *plan_lines(config, folder, trials),
            *_classes(config, folder),
            *(earlier.lines() if (earlier := read_earlier(folder)) else []),
        ],
        doubts=board.doubts,
        warning=board.warning,
        figures=[(figure, _embedded(figure, first=index == 0)) for index, figure in enumerate(figures)],
        ablations=ablations,
        reference=reference,
        others=others,
        generation=_generation(config, trials),
        commands=_commands(config, folder, trials),
    )


def _split(board: Leaderboard) -> tuple[TableView, TableView]:
    """Return the leaderboard as two tables that fit a page: how trials differ, and all of their metrics and costs."""
    number = board.table.columns[0]
    ranking = board.table.select(lambda column: column.group not in ("metrics", "details"))
    details = board.table.select(lambda column: column is number or column.group in ("metrics", "details"))
    return ranking, details


def _ceilings(config: Config, folder: Path, trials: Sequence[TrialRecord]) -> list[str]:
    """Return how well annotators predict each other on validation, and the best trial's figures on the same turns."""
    best = next(iter(best_first(config, trials)), None)
    predictions = {} if best is None else read_predictions(trial_folder(folder, best.number))
    records = [record for _, of_task in predictions.values() for record in of_task]
    return [line for ceiling in read_ceilings(folder) for line in ceiling.lines(records, "the best trial")]


def _classes(config: Config, folder: Path) -> list[str]:
    """Return the codes that each class merges, if the sweep has a level of a codebook."""
    classes = read_classes(folder)
    return [f"classes (data.codes {config.data.codes}): {classes}"] if classes else []


def _facts(study: StudyStore, trials: Sequence[TrialRecord]) -> dict[str, str]:
    config, codes = study.config, study.codes()
    best = next(iter(best_first(config, trials)), None)
    return {
        "best": "none yet" if best is None or best.value is None else f"{best.value:.3f} (#{best.number})",
        "trials": f"{len(trials)} of {progress(config, trials).target}",
        "cost": progress(config, trials).format_hours(),
        "corpus": study.fingerprint() or "unknown",
        "code": codes[-1] if codes else "unknown",
        "seed": str(config.seed),
    }


def find_verdict(config: Config, folder: Path, trials: Sequence[TrialRecord]) -> list[str]:
    """Return what can be concluded about the best trial, in sentences."""
    done = best_first(config, trials)
    if not done:
        reasons = sorted({trial.why for trial in trials if trial.state == "FAIL"})
        return ["No trial is complete, so there is nothing to choose yet.", *reasons]
    confirmation = confirm.read(folder)
    if confirmation is not None:
        return confirmation.lines()
    if equal_value(config, trials) is not None:
        return find_doubts(config, folder, trials)
    metric, first = config.search.metric, done[0]
    value = trial_interval(folder, first, metric) or f"{first.value:.3f}"
    lines = [f"best in the search: trial {first.number}, {metric} {value} on validation"]
    paths = [trial_folder(folder, trial.number) for trial in done[: RIVALS + 1]]
    predictions = [read_predictions(path) for path in paths]
    if len(done) > 1 and all(predictions):
        sums, task = confirm.objective(config, paths[0])
        best, maximize = [predictions[0][task][1]], config.search.direction == "maximize"
        for trial, rival in zip(done[1:], predictions[1:], strict=False):
            comparison = compare(best, [rival[task][1]], sums, maximize)
            lines.append(comparison.describe(f"#{first.number}", f"#{trial.number}"))
    if line := tie_line(config, trials):
        lines.append(line)
    if (cheaper := recommend(config, folder, trials)) is not None:
        lines.append(cheaper.line)
    lines.append(
        f"this is the luckiest of {len(done)} trials; `{shell_command('sweep', 'confirm', folder)}` shows how much of "
        "it is luck"
    )
    return lines


def _embedded(figure: Figure, first: bool) -> str:
    text: str = figure.content.to_html(
        full_html=False, include_plotlyjs=first, config={"displaylogo": False, "responsive": True}
    )
    return text


def _generation(config: Config, trials: Sequence[TrialRecord]) -> TableView:
    """Return how each complete trial ends the texts that it generates; without rows where nothing is generated."""
    rows = []
    for trial in best_first(config, trials):
        for name in trial.metrics:
            if name.rpartition("/")[2] == "eos_rate":
                prefix = name.removesuffix("eos_rate")
                shares = [f"{trial.metrics[prefix + metric]:.1%}" for metric in GENERATION]
                rows.append([f"#{trial.number}", prefix.strip("/") or "replies", *shares])
    columns = [Column("trial"), Column("task", is_text=True), *map(Column, ("ended by EOS", "run-on", "empty"))]
    return TableView(columns, rows)


def _commands(config: Config, folder: Path, trials: Sequence[TrialRecord]) -> list[tuple[str, str]]:
    """Return the commands that make each part of the page again."""
    best = next(iter(best_first(config, trials)), None)
    commands = [("this page", "report"), ("leaderboard", "status")]
    commands = [(what, shell_command("sweep", verb, folder)) for what, verb in commands]
    if best is not None:
        commands.append(("train the best trial again", train_command(folder, best.params)))
        commands.append(("fresh seeds and the test split", shell_command("sweep", "confirm", folder)))
    return commands


def compare_sweeps(studies: Sequence[StudyStore]) -> TableView:
    """Rank several sweeps by their best trials; behind them, those that cannot be compared with the first one."""
    first, rows = studies[0], []
    sign = -1 if first.config.search.direction == "maximize" else 1
    for study in studies:
        config, best, obstacle = study.config, study.best(), _why_incomparable(first, study)
        cells = [
            config.name,
            "no complete trial",
            config.search.metric,
            "",
            f"not ranked: {obstacle}" if obstacle else "",
        ]
        if best is not None:
            interval = trial_interval(study.folder, best, config.search.metric)
            cells[1], cells[3] = str(interval or f"{best.value:.3f}"), f"#{best.number}"
        value = None if best is None else best.value
        rows.append(((bool(obstacle), value is None, sign * (value or 0.0)), cells))
    columns = [Column("sweep", is_text=True), Column("best"), Column("objective", is_text=True), Column("trial")]
    rows.sort(key=lambda row: row[0])
    return TableView([*columns, Column("remark", is_text=True)], [cells for _, cells in rows])


def _why_incomparable(first: StudyStore, second: StudyStore) -> str:
    """Return why the trials of two sweeps cannot be ranked together; empty where they can."""
    before, after = first.config, second.config
    if first.fingerprint() != second.fingerprint():
        return f"another corpus or split: {second.fingerprint()}, not {first.fingerprint()}"
    if list(before.tasks.active()) != list(after.tasks.active()):
        return f"other tasks: {', '.join(after.tasks.active())}, not {', '.join(before.tasks.active())}"
    if before.search.metric != after.search.metric:
        return f"another objective: {after.search.metric}, not {before.search.metric}"
    if before.data.fold != after.data.fold:
        return f"another fold: {after.data.fold}, not {before.data.fold}"
    return ""


def write(
    study: StudyStore, folder: Path, out: Path, others: Sequence[StudyStore], reference: int | None
) -> tuple[list[str], list[Path]]:
    """Write the page, the ablation as tables for a paper, and the pictures as PNG.

    Args:
        study: of the sweep.
        folder: of the sweep.
        out: folder to write into; existing files are replaced atomically.
        others: other sweeps to show beside it.
        reference: number of the trial that choices are compared with; see `ablation.find_reference`.

    Returns:
        The verdict and the files.

    Raises:
        UserError: the reference is not complete.
    """
    from sweep.analysis.report import figures

    trials, config = study.trials(), study.config
    chosen = ablation.find_reference(config, trials, reference)
    comparable = [other for other in others if not _why_incomparable(study, other)]
    choices = ablation.find_choices(study, chosen, comparable)
    table = ablation.ablation_table(config, chosen, choices)
    verdict = find_verdict(config, folder, trials)
    against = ablation.describe_trial(config, chosen) if chosen is not None else ""
    pictures = figures.draw_figures(study, folder, trials, choices)
    ranking = compare_sweeps([study, *others]) if others else None
    text = render(study, folder, verdict, pictures, table, against, ranking)
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.html"
    write_file(page, text)
    metric = config.search.metric.replace("_", " ")
    caption = (
        f"{config.name}: what each choice changes of {metric}, on the validation split; 95 % intervals by session."
    )
    return verdict, [page, *ablation.write(table, out, caption), *figures.write_pngs(study, out)]
