"""Trials that failed for a cause outside their configuration run again, under their number, once in every `sweep run`.

Optuna never changes a trial that has ended. As with Optuna's own `RetryFailedTrialCallback`, the next run of such a
trial is another trial of the study, with the same values and reports; its attribute `retry_of` is the number of the
trial. `latest` hides this: for all other code, a sweep has one trial for each number.
"""

from collections.abc import Collection, Sequence

from optuna.trial import FrozenTrial, TrialState, create_trial

RETRY_OF = "retry_of"  # user attribute of a trial: the number under which it runs again
COMMON_FAULTS = "common_faults"  # user attribute of a study: Optuna's numbers of trials that failed as all others did
OUTSIDE = ("bad data", "workers lost")  # reasons of failures outside the configuration, where nothing else is stored
ENDING = ("why", "reason", "outside")  # user attributes of how a trial ended


def latest(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the latest run of each trial; the index is the trial's number, which may differ from Optuna's."""
    runs = list[FrozenTrial]()
    for trial in trials:
        number = trial.user_attrs.get(RETRY_OF)
        if number is None:
            runs.append(trial)
        else:
            runs[number] = trial
    return runs


def failed_outside(trial: FrozenTrial, common_faults: Collection[int]) -> bool:
    """Return whether a trial failed for a cause that may be repaired without another configuration.

    Args:
        trial: of the study; trials of earlier versions have only a reason.
        common_faults: Optuna's numbers of trials that failed as all others did.
    """
    if trial.state != TrialState.FAIL:
        return False
    attributes = trial.user_attrs
    return bool(attributes.get("outside", attributes.get("reason") in OUTSIDE)) or trial.number in common_faults


def next_run(trial: FrozenTrial, number: int) -> FrozenTrial:
    """Return the next run of a failed trial, which continues from its checkpoint: it keeps the reported epochs."""
    kept = {name: value for name, value in trial.user_attrs.items() if name not in ENDING}
    return create_trial(
        state=TrialState.RUNNING,
        params=trial.params,
        distributions=trial.distributions,
        intermediate_values=trial.intermediate_values,
        user_attrs=kept | {RETRY_OF: number},
        system_attrs=trial.system_attrs,
    )
