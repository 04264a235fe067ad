"""What the search is compared with, each by the code that its users run: Optuna's samplers and pruner, Ray's ASHA."""

import os
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")

import numpy as np
import optuna
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from sweep.config.loader import flat
from sweep.config.schema import Config
from sweep.search.sampling.surrogate import NOISE, Surrogate
from tests.bench.tables.simulate import Search
from tests.bench.tables.table import Table


class Optuna:
    """A sampler and a pruner of Optuna."""

    def __init__(
        self, config: Config, sampler: optuna.samplers.BaseSampler, pruner: optuna.pruners.BasePruner | None = None
    ) -> None:
        self.config, direction = config, config.search.direction
        pruner = pruner or optuna.pruners.NopPruner()
        self.study = optuna.create_study(direction=direction, sampler=sampler, pruner=pruner)
        self.trials: list[optuna.Trial] = []

    def ask(self, _: Sequence[int]) -> tuple[int, Mapping[str, Any]]:
        """Draw a trial."""
        self.trials.append(trial := self.study.ask())
        return trial.number, self.config.search.suggest(trial, flat(self.config))

    def report(self, number: int, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Report an epoch, and ask the pruner."""
        self.trials[number].report(metrics[self.config.search.metric], epoch)
        if epoch < self.config.train.epochs and self.trials[number].should_prune():
            self.study.tell(number, state=optuna.trial.TrialState.PRUNED)
            return True
        return False

    def complete(self, number: int) -> None:
        """Tell the last value."""
        values = self.study.get_trials(deepcopy=False)[number].intermediate_values
        self.study.tell(number, values[max(values)])


class RayAsha:
    """Ray's AsyncHyperBandScheduler and OptunaSearch, with their defaults; rungs begin at the first epoch."""

    def __init__(self, config: Config, seed: int) -> None:
        self.config, metric = config, config.search.metric
        mode = "max" if config.search.direction == "maximize" else "min"

        def space(trial: optuna.Trial) -> None:
            config.search.suggest(trial, flat(config))

        self.searcher = OptunaSearch(space=space, metric=metric, mode=mode, seed=seed)
        self.scheduler = AsyncHyperBandScheduler(
            time_attr="training_iteration", metric=metric, mode=mode, max_t=config.train.epochs, grace_period=1
        )
        self.trials: list[SimpleNamespace] = []

    def ask(self, _: Sequence[int]) -> tuple[int, Mapping[str, Any]]:
        """Draw a trial."""
        number = len(self.trials)
        values = self.searcher.suggest(str(number))
        assert values is not None
        self.trials.append(SimpleNamespace(trial_id=str(number), status="RUNNING"))
        self.scheduler.on_trial_add(None, self.trials[number])
        return number, values

    def report(self, number: int, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Report an epoch, and ask the scheduler."""
        result = {"training_iteration": epoch, **metrics}
        self.searcher.on_trial_result(str(number), result)
        if epoch == self.config.train.epochs:
            self.last = result
            return False
        if self.scheduler.on_trial_result(None, self.trials[number], result) == TrialScheduler.STOP:
            self.searcher.on_trial_complete(str(number), result)
            return True
        return False

    def complete(self, number: int) -> None:
        """Tell the last value."""
        self.scheduler.on_trial_complete(None, self.trials[number], self.last)
        self.searcher.on_trial_complete(str(number), self.last)


class Known:
    """A search that knows the table: it trains configurations in the order of what all others let expect.

    Where the table has several seeds, that is the mean of the other seeds. Where it has one, a Gaussian process
    predicts each configuration from all others. No search can be expected to learn more from its trials.

    Args:
        table: to read from.
        seed: index of the trainings' seed.
    """

    def __init__(self, table: Table, seed: int) -> None:
        others = [table.quality(other) for other in range(len(table.seeds)) if other != seed]
        expected = np.mean(others, axis=0) if others else self._predicted(table, seed)
        self.table, self.order, self.asked = table, np.argsort(-expected, kind="stable").tolist(), 0

    def _predicted(self, table: Table, seed: int) -> np.ndarray:
        """Return what each point is expected to be worth, by the others, [P]."""
        quality = table.quality(seed)
        standard = (quality - quality.mean()) / quality.std()
        model = Surrogate(table.config, table.points, standard.tolist(), [NOISE] * len(standard))
        return standard - model.residuals()

    def ask(self, _: Sequence[int]) -> tuple[int, Mapping[str, Any]] | None:
        """Return the next best configuration."""
        self.asked += 1
        number = self.asked - 1
        return (number, self.table.points[self.order[number]]) if number < len(self.order) else None

    def report(self, number: int, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Train to the end."""
        return False

    def complete(self, number: int) -> None:
        """Learn nothing."""


Make = Callable[[Config, int], Search]


def hyperband(config: Config, seed: int) -> Search:
    """Return Optuna's TPE with its Hyperband, which prunes by the median of nothing: successive halving in brackets."""
    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=config.train.epochs)
    return Optuna(config, optuna.samplers.TPESampler(seed=seed), pruner)


RIVALS: dict[str, Make] = {
    "random, full length": lambda config, seed: Optuna(config, optuna.samplers.RandomSampler(seed)),
    "Optuna TPE, full length": lambda config, seed: Optuna(config, optuna.samplers.TPESampler(seed=seed)),
    "Ray ASHA + OptunaSearch": RayAsha,
    "Hyperband": hyperband,
}
