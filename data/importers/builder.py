"""A corpus in the making: what all formats do alike with speakers, labels and annotators."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from data.corpus.config import CorpusConfig
from data.corpus.issues import Finding, failure
from data.corpus.schema import JOIN, Conversation, Corpus, Turn, flag, reject, split_label
from data.errors import ConfigError, DataError
from data.importers.tabular import Row

UNKNOWN = "unknown"  # the role of a speaker whom nobody knows
SPEAKERS = {  # usual names of the roles
    **dict.fromkeys(("t", "therapist", "counsellor", "counselor"), "therapist"),
    **dict.fromkeys(("c", "client", "patient"), "client"),
}


@dataclass(slots=True)
class TurnBuilder:
    """Makes turns of what a format says, by the format's habits and the settings, which come first.

    Raises:
        ConfigError: the settings name a role that looks like a misspelt one.
    """

    name: str
    config: CorpusConfig
    speakers: Mapping[str, str] = field(default_factory=lambda: SPEAKERS)  # as written, in lower case → role
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # role → labels; empty: those that occur
    qualities: tuple[str, ...] = ()  # empty: those that occur
    findings: list[Finding] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.speakers = {**self.speakers, **{name.lower(): role for name, role in self.config.roles.items()}}
        self.labels = {
            role: tuple(dict.fromkeys(label.strip().lower() for label in labels))
            for role, labels in (self.config.labels or self.labels).items()
        }
        self.qualities = tuple(quality.strip().lower() for quality in self.config.qualities) or self.qualities
        known = {"client", "therapist", *self.labels}
        for name, role in self.config.roles.items():
            near = get_close_matches(role, known, n=1, cutoff=0.8)
            if near and role not in known:
                raise ConfigError(f"roles.{name}: {role!r} is no role; did you mean {near[0]!r}?")

    def role(self, speaker: str, conversation: str) -> str:
        """The role of a speaker; "conversation/speaker" of the settings comes before "speaker"."""
        names = (f"{conversation}/{speaker}".lower(), speaker.lower())
        return next((self.speakers[name] for name in names if name in self.speakers), UNKNOWN)

    def turn(
        self, conversation: str, utterance: str, speaker: str, text: str, codes: Sequence[str], where: str
    ) -> Turn:
        """A turn without times and place yet.

        Args:
            conversation: id of the session.
            utterance: id in the session.
            speaker: as written; rejected (E_SPEAKER) if it has no role.
            text: as written.
            codes: the cell of every annotator; empty: none.
            where: "file:line".
        """
        role = self.role(speaker, conversation)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"{where}: the text holds half a character (a lone surrogate); mend it")
        turn = Turn(f"{conversation}/{utterance}", 0, role, " ".join(text.split()), where=where)
        self._vote(turn, [self._split(code) for code in codes])
        if role == UNKNOWN:
            message = f"speaker {speaker!r} has no role; add it in --config, e.g. roles: {{{speaker!r}: client}}"
            reject(turn, self.findings, "E_SPEAKER", message if speaker else "nobody is named as the speaker")
        return turn

    def _split(self, cell: str) -> list[str]:
        cell = cell.lower()
        if self.config.label_separator:
            cell = cell.replace(self.config.label_separator.lower(), JOIN)
        return list(dict.fromkeys(filter(None, (label.strip() for label in split_label(cell)))))

    def _vote(self, turn: Turn, ballots: Sequence[Sequence[str]]) -> None:
        """The labels that more than half of the annotators gave, else the one that most gave."""
        cast = [ballot for ballot in ballots if ballot]  # who gave nothing has no vote
        if not cast:
            return
        if len(ballots) == 1:
            turn.label = JOIN.join(cast[0])
            return
        votes = Counter(label for ballot in cast for label in ballot)
        order = {label: place for place, label in enumerate(label for own in self.labels.values() for label in own)}
        ranked = sorted(votes, key=lambda label: (-votes[label], order.get(label, len(order)), label))
        chosen = [label for label in ranked if votes[label] > len(cast) / 2]
        tied = [label for label in ranked if votes[label] == votes[ranked[0]]]
        if not chosen and len(tied) > 1:
            message = f"{len(cast)} annotators gave {', '.join(tied)} {votes[tied[0]]} x each"
            flag(turn, self.findings, "W_LABEL_TIE", message)
        turn.votes = {label: votes[label] for label in ranked}
        turn.label = JOIN.join(chosen or ranked[:1])

    def utterances(
        self, rows: Iterable[Row], identity: Callable[[Row], str], annotator: str | None, said: Sequence[str | None]
    ) -> list[tuple[str, list[Row]]]:
        """Rows of one utterance by several annotators together, in the order of the first ones.

        Args:
            rows: of the corpus or of a session.
            identity: of a row's utterance.
            annotator: column; None: every row is an utterance, and those of one id are for the validation to judge.
            said: columns in which all annotators must agree, because they heard the same.

        Raises:
            BuildError: F_DUPLICATE, an annotator contradicts himself, or rows of one id are about different things.
        """
        if annotator is None:
            return [(identity(row), [row]) for row in rows]
        known: dict[str, dict[str, Row]] = {}
        for row in rows:
            own = known.setdefault(identity(row), {})
            first = own.setdefault(row[annotator], row)
            if first is not row:
                self._judge_repeat(identity(row), row, first, annotator)
            one = next(iter(own.values()))
            differs = [name for name in said if name and row[name] != one[name]]
            if differs:
                message = f"its {differs[0]} is {row[differs[0]]!r}, and {one[differs[0]]!r} at {one.where}"
                finding = Finding("F_DUPLICATE", row.where, identity(row), message)
                raise failure([finding], "an utterance has one speaker, text and time, whoever codes it: mend the rows")
        return [(name, list(own.values())) for name, own in known.items()]

    def _judge_repeat(self, name: str, row: Row, first: Row, annotator: str) -> None:
        message = f"stands already at {first.where}, by the same annotator ({row[annotator] or 'no name'})"
        if row.cells == first.cells:
            self.findings.append(Finding("W_DUPLICATE", row.where, name, message))
            return
        finding = Finding("F_DUPLICATE", row.where, name, f"{message}, with other content")
        raise failure([finding], "an annotator codes an utterance once: remove the wrong row")

    def corpus(self, conversations: Iterable[Conversation]) -> Corpus:
        """All of it, with the labels and qualities that occur where neither the format nor the settings name them."""
        conversations = list(conversations)
        turns = [turn for one in conversations for turn in one.turns if turn.speaker != UNKNOWN]
        roles = dict(self.labels)
        if not roles:
            for role in sorted({turn.speaker for turn in turns}):
                own = (split_label(turn.label) for turn in turns if turn.speaker == role and turn.label)
                roles[role] = tuple(sorted({label for labels in own for label in labels}))
        labels = tuple(dict.fromkeys(label for own in roles.values() for label in own))
        qualities = self.qualities or tuple(sorted({one.quality for one in conversations if one.quality}))
        declared = bool(self.labels)
        return Corpus(self.name, labels, roles, conversations, self.findings, qualities, declared)
