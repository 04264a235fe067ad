"""The samplers by name: Optuna's, each made again for every draw, so that only the history has a state."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, NamedTuple

import optuna
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from data.errors import UserError
from sweep.compat import quasi_random_sampler
from sweep.config.schema import Config
from sweep.search.candidates import untrained
from sweep.search.sampling.history import distributions, flattened, history

Name = Literal["tpe", "gp", "cmaes", "qmc", "random", "grid"]


class Choice(NamedTuple):
    """A sampler, and why it was chosen."""

    name: Name
    why: str

    def __str__(self) -> str:
        return f"{self.name} ({self.why})"


def choose(config: Config) -> Choice:
    """Return the sampler of a sweep, and why: what `search.sampler: auto` stands for."""
    search = config.search
    if search.sampler != "auto":
        return Choice(search.sampler, "set by search.sampler")
    space = untrained(config, (), search.trials + 1)
    if space is not None and len(space) <= search.trials:
        runs = f"search.trials is {search.trials}, so all {len(space)} combinations run"
        return Choice("grid", f"auto: {runs}" if len(space) > 1 else "auto: there is one configuration")
    return Choice("tpe", "auto: it learns lists, ranges and conditions alike")


def check_sampler(config: Config) -> None:
    """Raise a UserError where the sampler needs a package that is not installed."""
    if config.search.sampler == "cmaes" and find_spec("cmaes") is None:
        raise UserError(
            "search.sampler: cmaes needs a package that is not installed; install it with: "
            "pip install 'speech-llm-sweep[cmaes]'"
        )


def study_to_draw_from(config: Config, name: Name, trials: Sequence[FrozenTrial], seed: int) -> optuna.Study:
    """Return a study in memory whose `ask` draws the next trial.

    Args:
        config: of the sweep.
        name: of the sampler; grid draws only what points leave open.
        trials: all trials of the sweep.
        seed: of this draw.
    """
    startup, seen, rule = config.search.startup_trials, history(config, trials), config.search.rule
    complete = sum(trial.state == TrialState.COMPLETE for trial in trials)
    if rule is not None and rule.kind == "promote" and complete < startup:
        startup = len(trials) + 1  # a trial that paused early says little
    if name in ("gp", "cmaes"):
        seen = flattened(config, seen)
    if name == "tpe":
        sampler: BaseSampler = TPESampler(
            seed=seed, n_startup_trials=startup, constant_liar=True, multivariate=True, group=True
        )
    elif name == "gp":
        sampler = GPSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
    elif name == "cmaes":
        sampler = CmaEsSampler(seed=seed, n_startup_trials=startup, warn_independent_sampling=False)
    elif name == "qmc":
        sampler = quasi_random_sampler(distributions(config, config.search.space), config.seed, len(trials))
    else:
        sampler = RandomSampler(seed)
    study = optuna.create_study(directions=list(config.search.directions), sampler=sampler)
    if name == "cmaes":
        _replay(study, seen)
    else:
        study.add_trials(seen)
    return study


def _replay(study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
    """Add trials to a study one by one, each with the state that CMA-ES has when it would draw it.

    Optuna keeps that state with the trials, as a pickle. It is computed again for each draw, because the study of a
    sweep is a file that others may write, and must hold no pickle.
    """
    for trial in trials:
        asked = study.ask(trial.distributions)  # which computes the state
        study.tell(asked, state=TrialState.FAIL)
        study.add_trial(
            create_trial(
                state=trial.state,
                values=trial.values if trial.state == TrialState.COMPLETE else None,
                params=trial.params,
                distributions=trial.distributions,
                system_attrs=study.get_trials(deepcopy=False)[-1].system_attrs,
            )
        )
