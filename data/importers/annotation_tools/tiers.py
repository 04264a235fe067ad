"""From tiers to turns: a tier has what a speaker says, and another one may have the codes of it.

Annotation tools know only names of tiers and times. Which tiers have codes is taken from `CorpusConfig.tiers`, or from
the names ("therapist" or "therapist text" belongs with "therapist code"), or from a controlled vocabulary in ELAN. A
code belongs to the turn in which most of it lies. What is neither text nor code is left out with a finding.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.corpus.issues import Finding
from data.corpus.schema import JOIN
from data.errors import DataError, listed
from data.importers.base.builder import TurnBuilder
from data.importers.base.cells import speaker_key
from data.importers.base.sessions import Segment

CODE_WORDS = {"code", "codes", "coding", "label", "labels", "behaviour", "behaviours", "behavior", "behaviors"}
CODE_WORDS |= {"misc", "miti"}
TEXT_WORDS = {"text", "transcript", "transcription", "utterance", "utterances", "utt", "speech", "words", "orthography"}
SPEAKER, TIER = "{speaker}", "{tier}"  # what stands for a name in `CorpusConfig.tiers`


class Annotation(NamedTuple):
    """An interval of a tier, or a point (start and end are equal)."""

    start: float  # s
    end: float
    value: str
    where: str


@dataclass(frozen=True)
class Tier:
    """A row of annotations."""

    name: str
    annotations: list[Annotation]
    speaker: str = ""  # the participant, if the tier names one besides its own name
    parent: str = ""  # the tier that it depends on
    vocabulary: bool = False  # whether its values are those of a controlled vocabulary
    words: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", frozenset(speaker_key(word) for word in _words(self.name)))


def tier_segments(tiers: Sequence[Tier], builder: TurnBuilder, file: str) -> list[Segment]:
    """Return what is said on the tiers of a session, with its codes, in the order of time.

    Args:
        tiers: of the session.
        builder: its settings say which of the tiers have text and codes; codes that belong to no turn, and tiers that
            are neither, become findings.
        file: for messages.

    Raises:
        DataError: a tier that the settings name does not exist, or it cannot be said which codes a tier has.
    """
    spoken = _spoken(tiers, builder, file)
    rest = [tier for tier in tiers if tier not in [text for text, _ in spoken] and tier.annotations]
    owners = {
        id(tier): _owners(tier, tiers, spoken, builder)
        for tier in rest
        if builder.config.tiers.code or _may_have_codes(tier)
    }
    for index, (text, speaker) in enumerate(spoken):
        own = [tier.name for tier in rest if index in (owners.get(id(tier)) or ())]
        if len(own) > 1:
            raise DataError(
                f"{file}: tier {text.name!r} has several tiers with codes ({listed(own)}); choose one, e.g. --set "
                f"'tiers.code=\"{own[0].replace(speaker, SPEAKER)}\"'"
            )
    taken = {index for found in owners.values() for index in found or ()}
    codes: dict[tuple[int, int], list[str]] = {}
    for tier in rest:
        found = owners.get(id(tier))
        if found == []:  # it names no speaker: one tier for all that have none of their own
            found = [index for index in range(len(spoken)) if index not in taken]
        if not found:
            message = f"tier {tier.name!r} has neither text nor codes by the settings tiers.text and tiers.code"
            builder.findings.append(Finding("W_TIER_OTHER", file, Path(file).stem, message))
            continue
        for code in tier.annotations:
            turn = _turn_of(code, [(index, spoken[index][0]) for index in found])
            if turn is not None:
                codes.setdefault(turn, []).append(code.value.strip())
            elif code.value.strip():
                message = f"{code.value.strip()!r} at {code.start:.2f} s on tier {tier.name!r} lies in no turn"
                builder.findings.append(Finding("W_CODE_ALONE", code.where, Path(file).stem, message))
    segments = [
        Segment(where, speaker, value, start, end, JOIN.join(dict.fromkeys(codes.get((index, number), ()))))
        for index, (tier, speaker) in enumerate(spoken)
        for number, (start, end, value, where) in enumerate(tier.annotations)
        if value.strip()
    ]
    return sorted(segments, key=lambda segment: float(segment.start))


def _spoken(tiers: Sequence[Tier], builder: TurnBuilder, file: str) -> list[tuple[Tier, str]]:
    """Return the tiers with text, and whose they are."""
    names = [tier.name for tier in tiers]
    templates = builder.config.tiers.text
    for template in templates:
        if not any(_matches(template, name) for name in names):
            raise DataError(f"tiers.text: {file} has no tier {template!r}; it has {listed(names)}")
    if templates:
        found = [(tier, next((t for t in templates if _matches(t, tier.name)), None)) for tier in tiers]
        return [(tier, _speaker(tier, builder, template)) for tier, template in found if template is not None]
    independent = [tier for tier in tiers if tier.parent not in names]
    free = [tier for tier in independent if not _may_have_codes(tier)]
    spoken = [(tier, _speaker(tier, builder)) for tier in free or independent]
    if builder.config.tiers.code is None:
        return spoken
    coded = {_code_name(tier, speaker, builder) for tier, speaker in spoken}
    return [(tier, speaker) for tier, speaker in spoken if tier.name not in coded]


def _speaker(tier: Tier, builder: TurnBuilder, template: str = "") -> str:
    """Return the participant of a tier with text, or the name of the tier without words such as "text"."""
    if tier.speaker or speaker_key(tier.name) in builder.speakers:
        return tier.speaker or tier.name
    if SPEAKER in template:
        return _matches(template, tier.name) or tier.name
    return " ".join(word for word in _words(tier.name) if speaker_key(word) not in TEXT_WORDS) or tier.name


def _matches(template: str, name: str) -> str | None:
    """Return the speaker in the name of a tier, or the name; None if it does not match the template."""
    found = re.fullmatch(re.escape(template).replace(re.escape(SPEAKER), "(.+?)"), name)
    return None if found is None else next(iter(found.groups()), name)


def _code_name(tier: Tier, speaker: str, builder: TurnBuilder) -> str:
    return (builder.config.tiers.code or "").replace(TIER, tier.name).replace(SPEAKER, speaker)


def _may_have_codes(tier: Tier) -> bool:
    """Return whether a tier has codes by its name or its controlled vocabulary."""
    return tier.vocabulary or bool(tier.words & CODE_WORDS)


def _owners(
    tier: Tier, tiers: Sequence[Tier], spoken: Sequence[tuple[Tier, str]], builder: TurnBuilder
) -> list[int] | None:
    """Return which tiers with text a tier has the codes of: [] if it names none; None if the settings exclude it."""
    if builder.config.tiers.code is not None:
        named = [index for index, (text, who) in enumerate(spoken) if _code_name(text, who, builder) == tier.name]
        return named or None
    parents, name = {other.name: other.parent for other in tiers}, tier.parent
    for _ in tiers:  # a parent may depend on another tier
        above = [index for index, (text, _who) in enumerate(spoken) if text.name == name]
        if above or not name:
            break
        name = parents.get(name, "")
    if tier.parent:
        return above or None
    words = [text.words - TEXT_WORDS for text, _ in spoken]
    most = max((len(found) for found in words if found <= tier.words), default=0)
    if most:
        return [index for index, found in enumerate(words) if found <= tier.words and len(found) == most]
    return [index for index, (text, _) in enumerate(spoken) if tier.speaker and tier.speaker == text.speaker]


def _turn_of(code: Annotation, spoken: Sequence[tuple[int, Tier]]) -> tuple[int, int] | None:
    """Return the tier and the number of the turn in which most of a code lies, or its point does; None: in none."""
    best, found = (0.0, 0.0), None
    for index, tier in spoken if code.value.strip() else ():
        for number, turn in enumerate(tier.annotations):
            overlap = min(code.end, turn.end) - max(code.start, turn.start)
            if code.start == code.end and turn.start <= code.start < turn.end:
                overlap = 1.0
            if overlap > 0 and turn.value.strip() and (found is None or (overlap, turn.start - turn.end) > best):
                best, found = (overlap, turn.start - turn.end), (index, number)
    return found


def _words(name: str) -> list[str]:
    """Return the words of a name; "TherapistCode" has two."""
    return re.findall(r"[^\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
