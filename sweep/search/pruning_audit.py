"""The pruning audit: how many of the best trials the pruning rule would have kept at each rung.

Only a trial that trained to its end shows what it is worth. The end of a pruned trial is unknown, so the share of kept
winners among unpruned trials flatters the rule; among the audited trials, which are exempt from pruning, it is
unbiased. The numbers are small: "1 of 1" is one trial and proves little.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from data.formats import format_rank
from sweep.config.schema import Config
from sweep.search.cost import horizon
from sweep.search.pruning import Rung, continues
from sweep.search.study import TrialRecord, best_first

TOP = 4  # one in this many complete trials counts as a top trial, and at least one does
LOW = 0.8  # share of kept top trials below which the audit warns


@dataclass(frozen=True)
class RungAudit:
    """What the rule does to the top trials at one rung."""

    epoch: int
    values: int  # trials whose objective at this epoch is known
    top: tuple[int, ...]  # numbers of the top trials that can be judged here, best first
    lost: tuple[int, ...]  # those of them that the rule would have pruned here

    @property
    def kept(self) -> int:
        """Number of top trials that the rule keeps."""
        return len(self.top) - len(self.lost)

    @property
    def is_low(self) -> bool:
        """Whether the rule would have lost too many top trials, or the best one."""
        return self.kept < LOW * len(self.top) or self.top[0] in self.lost


class RungJson(TypedDict):
    """One rung of the audit in JSON output."""

    epoch: int
    values: int
    top: list[int]
    lost: list[int]


class AuditJson(TypedDict):
    """The audit in JSON output."""

    rungs: list[int]
    recall: list[RungJson]
    audited: list[int]
    spared: list[int]
    warning: str | None


def audit_rungs(config: Config, trials: Sequence[TrialRecord]) -> list[RungAudit]:
    """Return, for each rung that enough trials have reached, what the rule would do to the trials that ended best.

    The rule is applied in hindsight, with the values of all trials that reached the rung. A trial that passed early,
    among few peers, may be lost here: it would have been pruned had it come later. A trial whose exemption took effect
    at a rung is lost there whatever came afterwards, because pruning it was the decision.
    """
    rule, complete = config.search.rule, best_first(config, trials)
    if rule is None:
        return []
    trials = [trial for trial in trials if trial.repeats is None]  # further seeds are never pruned
    top, audits = complete[: max(1, len(complete) // TOP)], list[RungAudit]()
    for epoch in config.search.rungs(config.train.epochs):
        judged = [trial for trial in top if epoch in trial.curve and epoch < horizon(config, trial.params)]
        rungs = {trial.number: _rung(config, trial, trials, epoch) for trial in judged}
        lost = [
            trial.number
            for trial in judged
            if trial.exempted_at == epoch or not continues(trial.number, rungs[trial.number], rule)
        ]
        peers = sum(epoch in trial.curve for trial in trials)
        if judged and peers >= rule.after_trials:
            audits.append(RungAudit(epoch, peers, tuple(trial.number for trial in judged), tuple(lost)))
    return audits


def _rung(config: Config, judged: TrialRecord, trials: Sequence[TrialRecord], epoch: int) -> Rung:
    """Return the rung of a trial's branch with the values of all trials that reached it."""
    search = config.search
    sign, by_objective = (1 if search.direction == "maximize" else -1), search.compared == search.metric
    sign_compared = sign if by_objective else -1
    curves = {trial.number: trial.curve if by_objective else trial.compared for trial in trials}
    peers = [
        trial
        for trial in trials
        if epoch in curves[trial.number]
        and all(trial.params.get(key) == judged.params.get(key) for key in search.branching)
    ]
    return Rung(
        {trial.number: sign_compared * curves[trial.number][epoch] for trial in peers},
        {trial.number: trial.errors.get(epoch, 0.0) for trial in peers},
        {t.number: sign * t.value for t in peers if t.state == "COMPLETE" and t.value is not None},
    )


def format_lines(config: Config, trials: Sequence[TrialRecord]) -> list[str]:
    """Format the kept top trials by rung, and the fate of the audited trials; empty while nothing is known."""
    audits, complete, lines = audit_rungs(config, trials), best_first(config, trials), list[str]()
    if audits:
        top = max(len(audit.top) for audit in audits)
        kept = ", ".join(f"{audit.kept} of {len(audit.top)} after epoch {audit.epoch}" for audit in audits)
        lines.append(f"pruning audit: of the top {top} of {len(complete)} complete trials, the rule keeps {kept}")
    if audited := sorted(trial.number for trial in complete if trial.audited):
        ranks = {trial.number: rank for rank, trial in enumerate(complete, start=1)}
        exempted = [
            f"#{trial.number} after epoch {trial.exempted_at}, which finished {format_rank(ranks[trial.number])} "
            f"of {len(complete)}"
            for trial in sorted(complete, key=lambda trial: trial.number)
            if trial.audited and trial.exempted_at
        ]
        count = f"{len(audited)} trial{'s' if len(audited) > 1 else ''}"
        lines.append(f"exempt from pruning: {count}; the rule would have pruned {'; '.join(exempted) or 'none'}")
    return lines


def format_warning(config: Config, trials: Sequence[TrialRecord]) -> str | None:
    """Return a line that says that the rule loses winners and what to do; None where there is no sign of it."""
    low = [audit for audit in audit_rungs(config, trials) if audit.is_low]
    if not low:
        return None
    worst = min(low, key=lambda audit: audit.kept / len(audit.top))
    lost, first = ", ".join(f"#{number}" for number in worst.lost), config.search.first_rung(config.train.epochs)
    return (
        f"pruning loses winners: the rule would have pruned {lost} after epoch {worst.epoch}; in a new sweep (--out) "
        f"raise search.pruning.first_epoch (now {first}) or search.pruning.keep"
    )


def audit_json(config: Config, trials: Sequence[TrialRecord]) -> AuditJson | None:
    """Return the audit for JSON output; None where the search does not prune."""
    if config.search.rule is None:
        return None
    return {
        "rungs": config.search.rungs(config.train.epochs),
        "recall": [
            {"epoch": audit.epoch, "values": audit.values, "top": list(audit.top), "lost": list(audit.lost)}
            for audit in audit_rungs(config, trials)
        ],
        "audited": [trial.number for trial in trials if trial.audited],
        "spared": [trial.number for trial in trials if trial.exempted_at is not None],
        "warning": format_warning(config, trials),
    }
