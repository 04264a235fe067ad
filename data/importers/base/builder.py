"""Build turns and corpora: the handling of speakers, labels and annotators that all formats share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.issues import Finding, build_error
from data.corpus.schema import JOIN, Conversation, Corpus, Turn, flag, reject, split_label
from data.corpus.votes import count_votes, label_order, majority
from data.errors import ConfigError, DataError
from data.importers.base.cells import MISSING_TEXT, CodeReader, clean_code, speaker_key
from data.importers.base.tabular import Row

UNKNOWN = "unknown"  # role of a speaker that is not mapped to a role
SPEAKERS = {  # usual names of the roles
    **dict.fromkeys(("t", "th", "therapist", "counsellor", "counselor", "clinician", "interviewer"), "therapist"),
    **dict.fromkeys(("c", "cl", "client", "p", "patient", "participant", "interviewee"), "client"),
}


@dataclass(slots=True)
class TurnBuilder:
    """Builds turns from the cells of a format. The settings override the defaults of the format.

    Raises:
        ConfigError: the settings contain a role that looks like a misspelled one.
    """

    name: str
    config: CorpusConfig
    speakers: Mapping[str, str] = field(default_factory=lambda: SPEAKERS)  # as written, in lower case → role
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # role → labels; empty: all that occur
    qualities: tuple[str, ...] = ()  # empty: all that occur
    findings: list[Finding] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # id of a turn → its speaker as written
    codes: CodeReader = field(init=False)

    def __post_init__(self) -> None:
        self.speakers = {**self.speakers, **{speaker_key(name): role for name, role in self.config.roles.items()}}
        self.labels = {
            role: tuple(dict.fromkeys(clean_code(label) for label in labels))
            for role, labels in (self.config.labels or self.labels).items()
        }
        declared = frozenset(label for labels in self.labels.values() for label in labels)
        separator = self.config.label_separator
        if (book := self.config.codebook) is not None:
            self.labels = dict(book.labels)
            declared = book.words
            separator = separator or book.separator
        self.qualities = tuple(quality.strip().lower() for quality in self.config.qualities) or self.qualities
        self.codes = CodeReader(separator, declared)
        roles = {"client", "therapist", *self.labels}
        for name, role in self.config.roles.items():
            near = get_close_matches(role, roles, n=1, cutoff=0.8)
            if near and role not in roles:
                raise ConfigError(f"roles.{name}: {role!r} is not a role; did you mean {near[0]!r}?")

    def role(self, speaker: str, conversation: str) -> str:
        """Return the role of a speaker; in the settings "conversation/speaker" overrides "speaker"."""
        names = (speaker_key(f"{conversation}/{speaker}"), speaker_key(speaker))
        return next((self.speakers[name] for name in names if name in self.speakers), UNKNOWN)

    def turn(
        self, conversation: str, utterance: str, speaker: str, text: str, codes: Sequence[str], where: str
    ) -> Turn:
        """Return a turn; its times and index are not set yet.

        Args:
            conversation: id of the session.
            utterance: id in the session.
            speaker: as written; the turn is rejected (E_SPEAKER) if the speaker has no role.
            text: as written.
            codes: one cell per annotator; empty: no label.
            where: "file:line".

        Raises:
            DataError: the text is not valid Unicode.
        """
        role = self.role(speaker, conversation)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"{where}: the text contains half a character (a lone surrogate); fix it")
        turn = Turn(f"{conversation}/{utterance}", 0, role, " ".join(text.split()), where=where)
        self.names[turn.id] = speaker
        if turn.text in MISSING_TEXT:
            flag(turn, self.findings, "W_TEXT_MISSING", f"the text is {turn.text!r}")
            turn.text = ""
        if self.config.coded:
            self._vote(turn, self._ballots(turn, codes))
        if role == UNKNOWN:
            message = f"speaker {speaker!r} has no role; add it in --config, e.g. roles: {{{speaker!r}: client}}"
            reject(turn, self.findings, "E_SPEAKER", message if speaker else "the turn has no speaker")
        return turn

    def _ballots(self, turn: Turn, cells: Sequence[str]) -> list[tuple[str, ...]]:
        """Return the codes of every annotator, and add findings about cells that need a decision."""
        read = [(cell, self.codes.read(cell, turn.text)) for cell in cells]
        for cell, codes in read:
            if codes.refused:
                reject(turn, self.findings, "E_LABEL_CELL", f"{_shortened(cell)} {codes.refused}")
                return []
        if not any(codes.labels for _, codes in read):
            words = [codes.missing for _, codes in read if codes.missing]
            if words:
                flag(turn, self.findings, "W_LABEL_MISSING", f"{words[0]!r} is read as a missing code")
        for cell, codes in read:
            if codes.changed:
                message = f"{cell!a} is read as {', '.join(map(repr, codes.labels))}"
                flag(turn, self.findings, "W_LABEL_UNICODE", message)
            if codes.guessed:
                flag(turn, self.findings, "W_LABEL_SEVERAL", f"{cell!r} is read as {' and '.join(codes.labels)}")
        return [self._looked_up(turn, cell, codes.labels) for cell, codes in read]

    def _looked_up(self, turn: Turn, cell: str, labels: Sequence[str]) -> tuple[str, ...]:
        """Return the codes of the codebook for the texts in a cell, and add a finding about modifiers."""
        if (book := self.config.codebook) is None:
            return tuple(labels)
        codes: dict[str, None] = {}
        for label in labels:
            code, marks = book.read(turn.speaker, label)
            codes[code] = None
            if marks:
                message = f"{_shortened(cell)} is read as {code!r}; {marks!r} is a modifier of {book.name}"
                flag(turn, self.findings, "W_LABEL_MODIFIER", message)
        return tuple(codes)

    def _vote(self, turn: Turn, ballots: Sequence[Sequence[str]]) -> None:
        """Set the labels that more than half of the annotators gave, or else the most frequent one."""
        cast = [ballot for ballot in ballots if ballot]  # an empty cell is not a vote
        if not cast:
            return
        if len(ballots) == 1:
            turn.label = JOIN.join(cast[0])
            return
        order = label_order(label for labels in self.labels.values() for label in labels)
        turn.votes = count_votes(cast, order)
        chosen, tied = majority(turn.votes, order)
        if tied:
            times = sum(tied[0] in split_label(given) and annotators for given, annotators in turn.votes.items())
            flag(turn, self.findings, "W_LABEL_TIE", f"{len(cast)} annotators gave {', '.join(tied)} {times} x each")
        turn.label = JOIN.join(chosen)

    def utterances(
        self, rows: Iterable[Row], identity: Callable[[Row], str], annotator: str | None, shared: Sequence[str | None]
    ) -> list[list[Row]]:
        """Group the rows of each utterance, one row per annotator; utterances keep the order of their first row.

        Args:
            rows: rows of the corpus or of a session.
            identity: returns the utterance id of a row.
            annotator: column; None: every row is an utterance, and the validation handles duplicate ids.
            shared: columns that must be equal in all rows of an utterance.

        Raises:
            BuildError: F_DUPLICATE, an annotator has two different rows, or rows of one id differ in a shared column.
        """
        if annotator is None:
            return [[row] for row in rows]
        utterances: dict[str, dict[str, Row]] = {}  # id → annotator → row
        for row in rows:
            by_annotator = utterances.setdefault(identity(row), {})
            earlier = by_annotator.setdefault(row[annotator], row)
            if earlier is not row:
                self._check_repeated(identity(row), row, earlier, annotator)
            first = next(iter(by_annotator.values()))
            differs = [name for name in shared if name and row[name] != first[name]]
            if differs:
                message = f"its {differs[0]} is {row[differs[0]]!r}, but {first[differs[0]]!r} at {first.where}"
                finding = Finding("F_DUPLICATE", row.where, identity(row), message)
                raise build_error(
                    [finding], "all rows of an utterance must have the same speaker and text; fix the rows"
                )
        return [list(by_annotator.values()) for by_annotator in utterances.values()]

    def _check_repeated(self, utterance: str, row: Row, earlier: Row, annotator: str) -> None:
        """Add a finding about an equal second row of an annotator; raise a BuildError if it is different."""
        message = f"is already at {earlier.where}, by the same annotator ({row[annotator] or 'no name'})"
        if row.cells == earlier.cells:
            self.findings.append(Finding("W_DUPLICATE", row.where, utterance, message))
            return
        finding = Finding("F_DUPLICATE", row.where, utterance, f"{message}, with different content")
        raise build_error([finding], "an annotator codes an utterance only once; remove the wrong row")

    def corpus(self, conversations: Iterable[Conversation]) -> Corpus:
        """Return the corpus; labels and qualities that are not declared are those that occur."""
        conversations = list(conversations)
        turns = [turn for conversation in conversations for turn in conversation.turns if turn.speaker != UNKNOWN]
        roles = dict(self.labels)
        if not roles:
            for role in sorted({turn.speaker for turn in turns}):
                spoken = [turn.label for turn in turns if turn.speaker == role and turn.label]
                roles[role] = tuple(sorted({label for joined in spoken for label in split_label(joined)}))
        labels = tuple(dict.fromkeys(label for allowed in roles.values() for label in allowed))
        if labels and not self.labels and all(label.isdecimal() for label in labels):
            first = next(turn for turn in turns if turn.label)
            message = f"the codes are {', '.join(labels[:5])}; name them in the source, or declare them in labels"
            self.findings.append(Finding("W_LABEL_NUMBER", first.where, first.id, message))
        rated = {conversation.quality for conversation in conversations if conversation.quality}
        qualities = self.qualities or tuple(sorted(rated))
        declared = bool(self.labels)
        return Corpus(self.name, labels, roles, conversations, self.findings, qualities, declared)

    def skip_session(self, name: str, where: str) -> None:
        """Add a finding about a session without turns, which is left out."""
        self.findings.append(Finding("W_SESSION_EMPTY", where, name, "the session has no turns"))


def _shortened(cell: str) -> str:
    return repr(cell if len(cell) <= 60 else f"{cell[:57]}…")


def refuse_no_turns(conversations: Sequence[Conversation], source: Path) -> None:
    """Raise a DataError if no session of the source has turns."""
    if not conversations:
        raise DataError(f"{source}: no rows; check the path of the source")
