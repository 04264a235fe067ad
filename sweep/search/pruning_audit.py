"""What pruning may have cost: of the trials that proved best, how many the rule would have kept at each rung.

Only a trial that trained to its end shows what it is worth. Of one that was pruned nothing can be said, neither that it
was a loser nor that it was a winner, so recall among those that were left alone says too much good of the rule; of the
audited ones, which nothing ends, it is fair. Numbers are small: "1 of 1" is one trial, and proves little.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sweep.config.schema import Config
from sweep.search.pruning import prune
from sweep.search.study import TrialRecord, best_first, horizon

TOP = 4  # of so many complete trials one counts as top, and at least one does
LOW = 0.8  # recall below which something is said


@dataclass(frozen=True)
class Rung:
    """What the rule does to the top trials at an epoch."""

    epoch: int
    values: int  # trials whose value at this epoch is known
    top: tuple[int, ...]  # numbers of the top trials that can be judged here, best first
    lost: tuple[int, ...]  # those of them that the rule would have ended here

    @property
    def kept(self) -> int:
        """How many of the top ones go on."""
        return len(self.top) - len(self.lost)

    @property
    def is_low(self) -> bool:
        """Whether the rule would have lost too many of them, or the best one."""
        return self.kept < LOW * len(self.top) or self.top[0] in self.lost


def recall(config: Config, entries: Sequence[TrialRecord]) -> list[Rung]:
    """For each rung at which enough trials have been, what the rule would do to the trials that ended best.

    It is asked afterwards, with the values of all trials that have been there. A trial that came early, among few, may
    have passed and be lost here: it would have been, had it come later. One that was spared at a rung is lost there
    whatever came afterwards, since that was the decision.
    """
    rule, done = config.search.pruning, best_first(config, entries)
    if rule is None:
        return []
    top, found = done[: max(1, len(done) // TOP)], list[Rung]()
    for epoch in config.search.rungs(config.train.epochs):
        peers = [entry.curve[epoch] for entry in entries if epoch in entry.curve]
        judged = [entry for entry in top if epoch in entry.curve and epoch < horizon(config, entry.params)]
        lost = [
            entry.number
            for entry in judged
            if entry.spared == epoch or prune(entry.curve[epoch], peers, config.search.direction, rule)
        ]
        if judged and len(peers) >= rule.after_trials:
            found.append(Rung(epoch, len(peers), tuple(entry.number for entry in judged), tuple(lost)))
    return found


def lines(config: Config, entries: Sequence[TrialRecord]) -> list[str]:
    """The recall at each rung, and what the audit showed, for people; nothing as long as there is nothing to say."""
    found, done = recall(config, entries), best_first(config, entries)
    top = max((len(rung.top) for rung in found), default=0)
    kept = ", ".join(f"{rung.kept} of {len(rung.top)} after epoch {rung.epoch}" for rung in found)
    of = f"of the best {top} of {len(done)} trials that trained to the end"
    return [*([f"pruning: {of}, the rule keeps {kept}"] if found else []), *_audit(entries, done)]


def _audit(entries: Sequence[TrialRecord], done: Sequence[TrialRecord]) -> list[str]:
    """Which audited trials ended, and what became of those that would have been pruned."""
    audited = [entry for entry in done if entry.audited]
    if not audited:
        return []
    places = {entry.number: place for place, entry in enumerate(done, start=1)}
    spared = [
        f"#{entry.number} after epoch {entry.spared}, which came in {places[entry.number]}. of {len(done)}"
        for entry in sorted(audited, key=lambda entry: entry.number)
        if entry.spared
    ]
    count = f"{len(audited)} trial{'s' if len(audited) > 1 else ''} could not be pruned"
    return [f"audit: {count}; the rule would have ended {'; '.join(spared) or 'none'}"]


def warning(config: Config, entries: Sequence[TrialRecord]) -> str | None:
    """That the rule loses winners, and what to do about it, in a line; None where there is no sign of it."""
    low = [rung for rung in recall(config, entries) if rung.is_low]
    if not low:
        return None
    worst = min(low, key=lambda rung: rung.kept / len(rung.top))
    lost, first = ", ".join(f"#{number}" for number in worst.lost), config.search.first_rung(config.train.epochs)
    return (
        f"pruning loses winners: the rule would have ended {lost} after epoch {worst.epoch}; in a new sweep (--out) "
        f"raise search.pruning.first_epoch, here {first}, or search.pruning.keep"
    )


def recall_json(config: Config, entries: Sequence[TrialRecord]) -> dict[str, Any] | None:
    """The same in the form that scripts rely on; None where nothing is pruned."""
    if config.search.pruning is None:
        return None
    return {
        "rungs": config.search.rungs(config.train.epochs),
        "recall": [
            {"epoch": rung.epoch, "values": rung.values, "top": list(rung.top), "lost": list(rung.lost)}
            for rung in recall(config, entries)
        ],
        "audited": [entry.number for entry in entries if entry.audited],
        "spared": [entry.number for entry in entries if entry.spared is not None],
        "warning": warning(config, entries),
    }
