"""The ledger as Ray Tune sees it: a searcher that hands out its trials and a scheduler that reports back to it."""

import json
from collections.abc import Callable
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from data.errors import UserError
from sweep.ledger import Ledger

MakeJob = Callable[[int, dict[str, Any]], dict[str, Any]]


class LedgerSearcher(Searcher):
    """First the trials that a former attempt left running, under their numbers, then new ones, until the target."""

    def __init__(self, ledger: Ledger, make_job: MakeJob) -> None:
        super().__init__(metric=ledger.config.search.metric, mode="max")
        self.ledger = ledger
        self.make_job = make_job
        self.numbers: dict[str, int] = {}  # Tune's trial id → number in the ledger, of trials that run now

    def __getstate__(self) -> dict[str, Any]:
        """Tune snapshots its searcher; this one has nothing to keep, and its ledger is not to be copied."""
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        while (asked := self.ledger.ask(list(self.numbers.values()), self.ledger.config.search.trials)) is not None:
            number, values = asked
            try:
                job = self.make_job(number, values)
            except UserError as error:  # values that are allowed one by one and not together
                self.ledger.fail(number, str(error))
                continue
            self.numbers[trial_id] = number
            return {"job": job}
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self.numbers.pop(trial_id, None)
        if number is None:
            return
        result = result or {}
        if result.get("finished"):
            self.ledger.complete(number)
        elif "failed" in result:
            self.ledger.fail(number, result["failed"])
        elif error:
            self.ledger.fail(number, "its workers were lost too often")

    def report(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Tell the ledger about an epoch; True when the trial ends here."""
        return self.ledger.report(self.numbers[trial_id], result["epoch"], json.loads(result["metrics"]))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger is persistent."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class LedgerScheduler(FIFOScheduler):
    """Asks the ledger after every report whether the trial goes on."""

    def __init__(self, searcher: LedgerSearcher) -> None:
        super().__init__()
        self.searcher = searcher

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        ended = self.searcher.report(trial.trial_id, result)
        decision: str = TrialScheduler.STOP if ended else TrialScheduler.CONTINUE
        return decision
