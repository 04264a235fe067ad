"""The human ceiling of a task: how well one annotator predicts the others, and a model's figures on these turns."""

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from data.corpus.votes import AgreementSums, Judgement, judgements, label_order
from data.errors import MisfitError
from data.formats import format_count
from data.loading.tasks import TASKS, item_votes, items
from data.shards.dataset import Shards
from model.evaluation.bootstrap import Interval, sums_interval
from model.evaluation.metrics import Record


class Ceiling(BaseModel):
    """The agreement of annotators on the items of a task in a split that several of them coded."""

    model_config = ConfigDict(frozen=True)
    task: str
    split: str
    turns: tuple[str, ...]  # ids
    sessions: int
    annotators: tuple[int, int]  # fewest and most for a turn
    figures: dict[str, Interval | None]  # see `AgreementSums.figures`; None: undefined, since all answers are equal

    def lines(self, records: Sequence[Record] = (), model: str = "the model") -> list[str]:
        """Return the figures of annotators, and those of a model on the same turns if there are its predictions."""
        low, high = self.annotators
        where = f"{format_count(len(self.turns), 'turn')} of {format_count(self.sessions, 'session')}"
        who = f"{low} annotators" if low == high else f"{low} to {high} annotators"
        *against, together = (f"{name} {value or 'undefined'}" for name, value in self.figures.items())
        lines = [
            f"human ceiling of {self.task} ({self.split}, {where} with {who}): one annotator against the majority of "
            f"the others {', '.join(against)}; all of them {together}"
        ]
        if reached := self.model_figures(records):
            figures = ", ".join(f"{name} {value or 'undefined'}" for name, value in reached.items())
            lines.append(f"{model} on the same turns: {figures}")
        return lines

    def model_figures(self, records: Sequence[Record]) -> dict[str, Interval | None]:
        """Return the figures of a model on the same turns, against the label of all annotators; empty without them."""
        turns = set(self.turns)
        of_turns = [record for record in records if record.task == self.task and record.id in turns]
        return _figures([Judgement(record.conversation, record.prediction, record.label) for record in of_turns])

    def to_json(self, records: Sequence[Record] = ()) -> dict[str, object]:
        """Return the number of turns, sessions and annotators, and the figures of annotators and of a model."""
        return {
            "turns": len(self.turns),
            "sessions": self.sessions,
            "annotators": list(self.annotators),
            "annotator": {name: _limits(value) for name, value in self.figures.items()},
            "model": {name: _limits(value) for name, value in self.model_figures(records).items()},
        }


def ceilings(shards: Shards, tasks: Sequence[str], splits: Sequence[str]) -> list[Ceiling]:
    """Return the ceiling of every task in every split in which several annotators coded some of its items.

    A task that predicts a code before its turn has none: the annotators knew the turn.
    """
    found = []
    for task in tasks:
        if TASKS[task].answer == "label" and TASKS[task].reads == "turn":
            found += [_ceiling(shards, task, split) for split in splits]
    return [ceiling for ceiling in found if ceiling is not None]


def _ceiling(shards: Shards, task: str, split: str) -> Ceiling | None:
    columns, order = shards.columns, label_order(shards.manifest.labels)
    try:
        voted = {row: votes for name, row in items(shards, task, split) if (votes := item_votes(shards, (name, row)))}
    except MisfitError:  # the split has no items
        return None
    if not voted:
        return None
    compared = [one for row, votes in voted.items() for one in judgements(columns["conversation"][row], votes, order)]
    annotators = [sum(votes.values()) for votes in voted.values()]
    return Ceiling(
        task=task,
        split=split,
        turns=tuple(columns["id"][row] for row in voted),
        sessions=len({columns["conversation"][row] for row in voted}),
        annotators=(min(annotators), max(annotators)),
        figures=_figures(compared, equal=min(annotators) == max(annotators)),
    )


def _figures(compared: Sequence[Judgement], equal: bool | None = None) -> dict[str, Interval | None]:
    """Return figures with intervals by session; without `equal` those against the reference alone."""
    if not compared:
        return {}
    sums = AgreementSums.of(compared)
    sums_IN, sessions = sums.rows(compared), [one.session for one in compared]
    functions = sums.against_reference() if equal is None else sums.figures(equal)
    values = {name: sums_interval(sessions, sums_IN, function) for name, function in functions.items()}
    return {name: value if math.isfinite(value.value) else None for name, value in values.items()}


def _limits(value: Interval | None) -> dict[str, float | None] | None:
    return None if value is None else {"value": value.value, "low": value.low, "high": value.high}
