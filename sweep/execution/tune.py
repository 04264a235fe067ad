"""The ledger as Ray Tune sees it: a searcher that hands out its trials and a scheduler that reports back to it."""

import json
import threading
from collections.abc import Callable
from typing import Any

from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from data.errors import UserError
from sweep.execution.cluster import ClusterError
from sweep.search.study import Reason, StudyStore, common_fault

MakeJob = Callable[[int, dict[str, Any]], dict[str, Any]]


class StudySearcher(Searcher):
    """First the trials that a former attempt left running, under their numbers, then new ones, until the target.

    Args:
        ledger: of the sweep.
        make_job: what a trial's workers are given.
        check: raises where another driver has taken the sweep over.
        stop: asks all slots to end.
        ended: called after a trial has ended.
    """

    def __init__(
        self,
        study: StudyStore,
        make_job: MakeJob,
        check: Callable[[], object],
        stop: Callable[[], object],
        ended: Callable[[], object],
    ) -> None:
        super().__init__(metric=study.config.search.metric, mode="max")
        self.study, self.make_job = study, make_job
        self.check, self.stop, self.ended = check, stop, ended
        self.numbers: dict[str, int] = {}  # Tune's trial id → number in the ledger, of trials that run now
        self.stopping = False
        self.fault: tuple[str, str] | None = None  # why and reason of what hits every trial

    def __getstate__(self) -> dict[str, Any]:
        """Tune snapshots its searcher; this one has nothing to keep, and its ledger is not to be copied."""
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        self.check()
        target = self.study.config.search.trials
        while not self.stopping and (asked := self._ask(target)) is not None:
            number, values = asked
            try:
                job = self.make_job(number, values)
            except UserError as error:  # values that are allowed one by one and not together
                self._fail(number, str(error), "error")
                continue
            self.numbers[trial_id] = number
            return {"job": job}
        return Searcher.FINISHED

    def _ask(self, target: int) -> tuple[int, dict[str, Any]] | None:
        try:
            return self.study.ask(list(self.numbers.values()), target)
        except UserError as error:  # nothing that is drawn fits into memory
            self._stop_for(str(error), "out of memory")
            return None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self.numbers.pop(trial_id, None)
        if number is None:
            return
        self.check()
        self._tell(number, result or {}, error)
        try:
            self.ended()
        except UserError as fault:  # a checkpoint that cannot be deleted
            self._stop_for(str(fault), fault.reason)

    def _tell(self, number: int, result: dict[str, Any], error: bool) -> None:
        if result.get("finished"):
            self.study.complete(number)
        elif result.get("interrupted"):
            return  # goes on when the command is given again
        elif result.get("common"):
            self._stop_for(result["failed"], result["reason"])
        elif "failed" in result:
            self._fail(number, result["failed"], result["reason"])
        elif error and not self.stopping:
            self._fail(number, "its workers were lost too often", "workers lost")

    def _fail(self, number: int, why: str, reason: Reason) -> None:
        self.study.fail(number, why, reason=reason)
        if (fault := common_fault(self.study.trials())) is not None:
            self._stop_for(fault, reason)

    def _stop_for(self, why: str, reason: str) -> None:
        self.fault = self.fault or (why, reason)
        self.end()

    def end(self) -> None:
        """Start nothing more, and ask what runs to write its checkpoint."""
        if not self.stopping:
            self.stopping = True
            self.stop()

    def report(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Tell the ledger about an epoch; True when the trial ends here."""
        self.check()
        return self.study.report(self.numbers[trial_id], result["epoch"], json.loads(result["metrics"]))

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the ledger is persistent."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class StudyScheduler(FIFOScheduler):
    """Asks the ledger after every report whether the trial goes on."""

    def __init__(self, searcher: StudySearcher) -> None:
        super().__init__()
        self.searcher = searcher

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        ended = self.searcher.report(trial.trial_id, result)
        decision: str = TrialScheduler.STOP if ended else TrialScheduler.CONTINUE
        return decision


TRIAL_RETRIES = 5  # times Tune starts a trial again in a new slot after its slot was lost
GRACE = 60.0  # seconds that trials have for their last checkpoint when the sweep is to stop
AWS_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")


class SweepAbortedError(Exception):
    """Something hits every trial, so the sweep was stopped; those that were running go on when it is mended.

    Args:
        why: in one line.
        reason: in a word, see `StudyStore.fail`.
    """

    def __init__(self, why: str, reason: str) -> None:
        super().__init__(why)
        self.reason = reason


class _Work(threading.Thread):
    """A thread that keeps what was raised in it."""

    def __init__(self, work: Callable[[], Any], name: str) -> None:
        super().__init__(daemon=True, name=name)
        self.work = work
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:  # for the thread that waits
            self.error = error

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error


def _look_after(thread: threading.Thread, is_up: Callable[[], bool]) -> None:
    """Wait a moment; raise a ClusterError where the node has died: Ray would wait for ever."""
    thread.join(0.2)
    if not is_up():
        raise ClusterError("Ray's node on this machine has died; the same command goes on")
