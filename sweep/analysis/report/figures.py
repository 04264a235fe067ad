"""The pictures of a sweep, by optuna.visualization and plotly; the same as PNG, by matplotlib."""

import functools
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import plotly.graph_objects as go

from data.atomic import write_file
from model.evaluation.bootstrap import Interval
from sweep.analysis.leaderboard import interval_of
from sweep.analysis.report.ablation import Choice, name_of
from sweep.analysis.results import short_names
from sweep.config.schema import Config
from sweep.search.sampler import history
from sweep.search.study import StudyStore, TrialRecord, best_first

ENOUGH = 4  # complete trials that differ, below which importances mean nothing
RATE, RANK, TRAINABLE = "train.learning_rate", "model.lora.rank", "model.trainable"
INTERACTIONS = ((TRAINABLE, RATE), (RANK, RATE))
CONTROLS = ("data.sound", "data.last_text", "model.modality")
SIZE = {
    "height": 420,
    "width": None,
    "autosize": True,
    "margin": {"l": 60, "r": 20, "t": 30, "b": 60},
    "template": "plotly_white",
}


@dataclass(frozen=True)
class Figure:
    """A picture with its title."""

    name: str  # of its file
    title: str
    note: str
    content: go.Figure


def study_of(store: StudyStore) -> optuna.Study:
    """The trials in the space as it is now, with short names, in memory."""
    config = store.config
    names = short_names(list(config.search.space))
    study = optuna.create_study(direction=config.search.direction, study_name=config.name)
    for trial in history(config, store.study.get_trials(deepcopy=False)):
        trial.params = {names[key]: value for key, value in trial.params.items()}
        trial.distributions = {names[key]: own for key, own in trial.distributions.items()}
        if trial.state.is_finished():
            study.add_trial(trial)
    return study


def figures(store: StudyStore, folder: Path, entries: Sequence[TrialRecord], choices: Sequence[Choice]) -> list[Figure]:
    """Those for which a sweep has enough trials, and that of its ablation."""
    study, config = study_of(store), store.config
    done = best_first(config, entries)
    found = [_ablation(config, choices)] if choices else []
    found += [_intervals(config, folder, done)] if done else []
    controls = _controls(config, folder, done)
    found += [controls] if controls else []
    found += [figure for draw in _drawings(config, study, len(done)) if (figure := _drawn(draw)) is not None]
    return found


def always(study: optuna.Study) -> list[str]:
    """Choices that every complete trial has. With others, optuna would leave out the trials that lack one: those of
    text where only speech has an end-of-audio vector, and with them what the modality does."""
    done = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    return sorted(set.intersection(*(set(trial.params) for trial in done)) if done else set())


Drawing = tuple[str, str, str, Callable[[], go.Figure]]


def _drawings(config: Config, study: optuna.Study, done: int) -> Iterator[Drawing]:
    import optuna.visualization as plots

    names, metric = short_names(list(config.search.space)), config.search.metric
    if not done:
        return
    yield "history", "Every trial in its order", "", lambda: plots.plot_optimization_history(study, target_name=metric)
    rungs = config.search.rungs(config.train.epochs) if config.search.pruning else []
    note = f"rungs after epoch {', '.join(map(str, rungs))}" if rungs else ""
    yield "rungs", "Learning curves", note, lambda: _with_rungs(plots.plot_intermediate_values(study), rungs)
    if done < ENOUGH or not names:
        return
    note = "fANOVA (Hutter et al., 2014): the share of the variance that each choice explains, in these trials"
    note += "; of choices that every trial has"
    common = always(study)
    yield "importance", "What mattered", note, lambda: plots.plot_param_importances(study, params=common)
    yield "slices", "One choice at a time", "", lambda: plots.plot_slice(study, target_name=metric)
    for pair in INTERACTIONS:
        if all(key in names for key in pair):
            one, other = (names[key] for key in pair)
            title, name = f"{one} with {other}", f"{one}-{other}".replace(".", "-")
            yield name, title, "", functools.partial(plots.plot_rank, study, [one, other], target_name=metric)
    yield "parallel", "All choices", "", lambda: plots.plot_parallel_coordinate(study, target_name=metric)


def _drawn(drawing: Drawing) -> Figure | None:
    """None where the trials do not differ in what the picture is about: optuna raises then."""
    name, title, note, draw = drawing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            content = draw()
        except (ValueError, RuntimeError):
            return None
    return Figure(name, title, note, content.update_layout(title=None, **SIZE))


def _with_rungs(figure: go.Figure, rungs: Sequence[int]) -> go.Figure:
    for epoch in rungs:
        figure.add_vline(x=epoch, line_dash="dot", line_color="grey")
    return figure.update_layout(xaxis_title="epoch")


def _intervals(config: Config, folder: Path, done: Sequence[TrialRecord]) -> Figure:
    """The objective of each complete trial, with its limits."""
    labels = [f"#{entry.number}" for entry in done]
    content = _bars(labels, [(entry.value or 0.0, interval_of(folder, entry, config.search.metric)) for entry in done])
    content.update_layout(yaxis_title=config.search.metric, **SIZE)
    return Figure("objective", "How sure the order is", "95 % intervals, bootstrapped by session", content)


def _ablation(config: Config, choices: Sequence[Choice]) -> Figure:
    """What each choice adds or takes away; left or right of 0 by more than its limits, it is no noise."""
    names = [f"{name_of(config, own)} ({own.trial})" for own in choices]
    content = _bars(names, [(own.comparison.difference.value, own.comparison.difference) for own in choices], flat=True)
    content.add_vline(x=0, line_color="grey", line_dash="dot")
    height = 140 + 34 * len(choices)
    content.update_layout(xaxis_title=f"difference in {config.search.metric}", **{**SIZE, "height": height})
    note = "paired differences to the reference, with 95 % intervals by session"
    return Figure("ablation", "What each choice is worth", note, content)


def _controls(config: Config, folder: Path, done: Sequence[TrialRecord]) -> Figure | None:
    """Speech against text, and the same model without what it should listen to."""
    axes = [key for key in CONTROLS if key in config.search.space]
    best: dict[str, TrialRecord] = {}
    for entry in done:
        best.setdefault(", ".join(str(entry.params[key]) for key in axes if key in entry.params), entry)
    if not axes or len(best) < 2:
        return None
    shown = [(entry.value or 0.0, interval_of(folder, entry, config.search.metric)) for entry in best.values()]
    content = _bars([f"{name} (#{entry.number})" for name, entry in best.items()], shown)
    content.update_layout(yaxis_title=config.search.metric, **SIZE)
    note = "the best complete trial of each; a model that listens gets worse with silence, noise or others' sound"
    return Figure("controls", "Does it listen?", note, content)


def _bars(labels: list[str], shown: Sequence[tuple[float, Interval | None]], flat: bool = False) -> go.Figure:
    values, above, below = [], [], []
    for value, found in shown:
        low, high = (None, None) if found is None else (found.low, found.high)
        values.append(value)
        above.append(0.0 if high is None else high - value)
        below.append(0.0 if low is None else value - low)
    error = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    marks = {"mode": "markers", "marker": {"size": 9}}
    if flat:
        return go.Figure(go.Scatter(y=labels, x=values, error_x=error, **marks)).update_yaxes(autorange="reversed")
    return go.Figure(go.Scatter(x=labels, y=values, error_y=error, **marks))


def pngs(store: StudyStore, folder: Path) -> list[Path]:
    """The pictures as files, for places that show no HTML."""
    import matplotlib as mpl

    mpl.use("Agg")
    import optuna.visualization.matplotlib as plots
    from matplotlib import pyplot

    study, metric = study_of(store), store.config.search.metric
    wanted: dict[str, Callable[[], Any]] = {
        "history": lambda: plots.plot_optimization_history(study, target_name=metric),
        "rungs": lambda: plots.plot_intermediate_values(study),
        "importance": lambda: plots.plot_param_importances(study, params=always(study)),
        "slices": lambda: plots.plot_slice(study, target_name=metric),
        "parallel": lambda: plots.plot_parallel_coordinate(study, target_name=metric),
    }
    found = []
    for name, draw in wanted.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                draw()
                pyplot.savefig(drawn := io.BytesIO(), dpi=110, bbox_inches="tight")
                write_file(path := folder / f"{name}.png", drawn.getvalue())
                found.append(path)
            except (ValueError, RuntimeError, IndexError):
                continue
            finally:
                pyplot.close("all")
    return found
