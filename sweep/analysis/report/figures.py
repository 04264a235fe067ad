"""The pictures of a sweep: interactive ones by optuna.visualization and plotly, and the same as PNG by matplotlib."""

import functools
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
import plotly.graph_objects as go

from data.atomic import write_file
from data.formats import format_value
from model.evaluation.bootstrap import Interval
from sweep.analysis.leaderboard import EQUAL
from sweep.analysis.predictions import trial_interval
from sweep.analysis.report.ablation import Choice, choice_name
from sweep.analysis.report.fonts import font_families
from sweep.analysis.report.search_quality import SearchQuality, search_quality
from sweep.analysis.results import short_names
from sweep.config.schema import Config
from sweep.search.sampling.history import history
from sweep.search.sampling.objectives import front_line, objective_values, pareto_front
from sweep.search.study import StudyStore, TrialRecord, best_first

ENOUGH = 4  # different complete configurations, below which importances mean nothing
RATE, RANK, TRAINABLE = "train.learning_rate", "model.lora.rank", "model.trainable"
INTERACTIONS = ((TRAINABLE, RATE), (RANK, RATE))
CONTROLS = ("data.sound", "data.last_text", "model.modality")
LAYOUT = {
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


def in_memory_study(store: StudyStore) -> optuna.Study:
    """Return the finished trials as a study in memory, with short names, in the present search space."""
    config = store.config
    names = short_names(list(config.search.space))
    study = optuna.create_study(direction=config.search.direction, study_name=config.name)
    for trial in history(config, store.runs(), first_only=True):
        trial.params = {names[key]: value for key, value in trial.params.items()}
        trial.distributions = {names[key]: distribution for key, distribution in trial.distributions.items()}
        if trial.state.is_finished():
            study.add_trial(trial)
    return study


def draw_figures(
    store: StudyStore, folder: Path, trials: Sequence[TrialRecord], choices: Sequence[Choice]
) -> list[Figure]:
    """Draw the figures for which a sweep has enough trials."""
    study, config = in_memory_study(store), store.config
    done = best_first(config, trials)
    figures = [_ablation(config, choices)] if choices else []
    figures += [_intervals(config, folder, done)] if done else []
    figures += [_search(config, quality)] if (quality := search_quality(config, trials)) is not None else []
    figures += [_front(config, done)] if len(config.search.objectives) > 1 and done else []
    controls = _controls(config, folder, done)
    figures += [controls] if controls else []
    for name, title, note, draw in _optuna_figures(config, study, len(done)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                content = draw()
            except (ValueError, RuntimeError):  # the trials do not differ in what the picture is about
                continue
        figures.append(Figure(name, title, note, content.update_layout(title=None, **LAYOUT)))
    return figures


def common_params(study: optuna.Study) -> list[str]:
    """Return the parameters that every complete trial has.

    With others, optuna would leave out the trials that lack one, such as text trials where only speech trials have an
    end-of-audio vector, and with them the effect of the modality.
    """
    done = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    return sorted(set.intersection(*(set(trial.params) for trial in done)) if done else set())


def importance_params(study: optuna.Study) -> list[str]:
    """Return the parameters whose importance can be estimated: those that every complete trial has and that vary.

    Raises:
        ValueError: there are none, too few different configurations, or all values are equal; fANOVA would then split
            the importance evenly among the parameters.
    """
    done = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    if len({repr(sorted(trial.params.items())) for trial in done}) < ENOUGH:
        raise ValueError("too few different configurations")
    values = [trial.value for trial in done if trial.value is not None]
    if max(values) - min(values) <= EQUAL:
        raise ValueError("all values are equal")
    varying = [name for name in common_params(study) if len({repr(trial.params[name]) for trial in done}) > 1]
    if not varying:
        raise ValueError("no parameter varies")
    return varying


def _optuna_figures(
    config: Config, study: optuna.Study, done: int
) -> Iterator[tuple[str, str, str, Callable[[], go.Figure]]]:
    """Yield name, title and note of each figure, and the function that draws it."""
    import optuna.visualization as plots

    names, metric = short_names(list(config.search.space)), config.search.metric
    if not done:
        return
    yield "history", "All trials in order", "", lambda: plots.plot_optimization_history(study, target_name=metric)
    rungs = config.search.rungs(config.train.epochs) if config.search.rule else []
    note = f"rungs after epoch {', '.join(map(str, rungs))}" if rungs else ""
    yield "rungs", "Learning curves", note, lambda: _with_rungs(plots.plot_intermediate_values(study), rungs)
    if done < ENOUGH or not names:
        return
    note = (
        "fANOVA (Hutter et al., 2014): the share of the variance in these trials that each parameter explains; of "
        "parameters that every trial has"
    )
    yield (
        "importance",
        "What mattered",
        note,
        lambda: plots.plot_param_importances(study, params=importance_params(study)),
    )
    yield "slices", "One choice at a time", "", lambda: plots.plot_slice(study, target_name=metric)
    for pair in INTERACTIONS:
        if all(key in names for key in pair):
            first, second = (names[key] for key in pair)
            name = f"{first}-{second}".replace(".", "-")
            draw = functools.partial(plots.plot_rank, study, [first, second], target_name=metric)
            yield name, f"{first} with {second}", "", draw
    yield "parallel", "All choices", "", lambda: plots.plot_parallel_coordinate(study, target_name=metric)


def _with_rungs(figure: go.Figure, rungs: Sequence[int]) -> go.Figure:
    for epoch in rungs:
        figure.add_vline(x=epoch, line_dash="dot", line_color="grey")
    return figure.update_layout(xaxis_title="epoch")


def _intervals(config: Config, folder: Path, done: Sequence[TrialRecord]) -> Figure:
    """Draw the objective of each complete trial with its limits."""
    metric, labels = config.search.metric, [f"#{trial.number}" for trial in done]
    content = _bars(labels, [(trial.value or 0.0, trial_interval(folder, trial, metric)) for trial in done])
    content.update_layout(yaxis_title=metric, **LAYOUT)
    return Figure("objective", "How sure the order is", "95 % intervals, bootstrapped by session", content)


def _search(config: Config, quality: SearchQuality) -> Figure:
    """Draw the best value so far by cost, of the search and of random search."""
    content = go.Figure()
    content.add_scatter(x=quality.cost, y=quality.best, mode="lines+markers", line_shape="hv", name="this search")
    content.add_scatter(x=quality.cost, y=quality.random, mode="lines", line_dash="dot", name="random search (model)")
    content.update_layout(xaxis_title="trainings at full length", yaxis_title=config.search.metric, **LAYOUT)
    return Figure("search", "How good was this search", quality.describe(config.search.metric), content)


def _front(config: Config, done: Sequence[TrialRecord]) -> Figure:
    """Draw the first two objectives of all complete trials, and their Pareto front."""
    first, second = config.search.objectives[:2]
    front, content = pareto_front(config, done), go.Figure()
    others = [trial for trial in done if trial not in front]
    for name, trials, mode in (("other trials", others, "markers"), ("Pareto front", front, "lines+markers")):
        points = [objective_values(config, trial.value or 0.0, trial.metrics) for trial in trials]
        content.add_scatter(
            x=[point[1] for point in points],
            y=[point[0] for point in points],
            text=[f"#{trial.number}" for trial in trials],
            mode=mode,
            name=name,
        )
    content.update_layout(xaxis_title=second, yaxis_title=first, **LAYOUT)
    return Figure("front", f"{first} against {second}", front_line(config, done) or "", content)


def _ablation(config: Config, choices: Sequence[Choice]) -> Figure:
    """Draw the paired difference of each choice; one whose limits exclude 0 is more than noise."""
    names = [f"{choice_name(config, choice)} ({choice.trial})" for choice in choices]
    differences = [choice.comparison.difference for choice in choices]
    content = _bars(names, [(difference.value, difference) for difference in differences], horizontal=True)
    content.add_vline(x=0, line_color="grey", line_dash="dot")
    layout = {**LAYOUT, "height": 140 + 34 * len(choices)}
    content.update_layout(xaxis_title=f"difference in {config.search.metric}", **layout)
    note = "paired differences to the reference, with 95 % intervals by session"
    return Figure("ablation", "What each choice is worth", note, content)


def _controls(config: Config, folder: Path, done: Sequence[TrialRecord]) -> Figure | None:
    """Compare speech with text, and the same model without what it should listen to."""
    axes = [key for key in CONTROLS if key in config.search.space]
    best: dict[str, TrialRecord] = {}
    for trial in done:
        best.setdefault(", ".join(format_value(trial.params[key]) for key in axes if key in trial.params), trial)
    if not axes or len(best) < 2:
        return None
    bars = [(trial.value or 0.0, trial_interval(folder, trial, config.search.metric)) for trial in best.values()]
    content = _bars([f"{name} (#{trial.number})" for name, trial in best.items()], bars)
    content.update_layout(yaxis_title=config.search.metric, **LAYOUT)
    note = "the best complete trial of each; a model that listens gets worse with silence, noise or swapped audio"
    return Figure("controls", "Does it listen?", note, content)


def _bars(labels: list[str], bars: Sequence[tuple[float, Interval | None]], horizontal: bool = False) -> go.Figure:
    """Draw values with error bars."""
    values, above, below = [], [], []
    for value, limits in bars:
        low, high = (None, None) if limits is None else (limits.low, limits.high)
        values.append(value)
        above.append(0.0 if high is None else high - value)
        below.append(0.0 if low is None else value - low)
    error = {"type": "data", "symmetric": False, "array": above, "arrayminus": below}
    marks = {"mode": "markers", "marker": {"size": 9}}
    if horizontal:
        return go.Figure(go.Scatter(y=labels, x=values, error_x=error, **marks)).update_yaxes(autorange="reversed")
    return go.Figure(go.Scatter(x=labels, y=values, error_y=error, **marks))


def write_pngs(store: StudyStore, folder: Path) -> list[Path]:
    """Write the pictures as files, for places that show no HTML."""
    import matplotlib as mpl

    mpl.use("Agg")
    import optuna.visualization.matplotlib as plots
    from matplotlib import pyplot

    study, metric = in_memory_study(store), store.config.search.metric
    drawings: dict[str, Callable[[], object]] = {
        "history": lambda: plots.plot_optimization_history(study, target_name=metric),
        "rungs": lambda: plots.plot_intermediate_values(study),
        "importance": lambda: plots.plot_param_importances(study, params=importance_params(study)),
        "slices": lambda: plots.plot_slice(study, target_name=metric),
        "parallel": lambda: plots.plot_parallel_coordinate(study, target_name=metric),
    }
    written = []
    texts = [str(text) for trial in study.get_trials(deepcopy=False) for text in trial.params.values()]
    families = font_families(texts) or mpl.rcParams["font.family"]
    for name, draw in drawings.items():
        with warnings.catch_warnings(), mpl.rc_context({"font.family": families}):
            warnings.simplefilter("ignore")
            try:
                draw()
                pyplot.savefig(image := io.BytesIO(), dpi=110, bbox_inches="tight")
                write_file(path := folder / f"{name}.png", image.getvalue())
                written.append(path)
            except (ValueError, RuntimeError, IndexError):
                continue
            finally:
                pyplot.close("all")
    return written
