"""From tiers to turns: a tier has what a speaker says, and another one may have the codes of it.

Annotation tools know only names of tiers and times. Which tiers have codes is taken from `CorpusConfig.tiers`, or from
the names: "therapist" and "therapist code" belong together. A code belongs to the turn in which most of it lies.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from data.corpus.config import TierConfig
from data.corpus.schema import JOIN
from data.errors import DataError, listed
from data.importers.base.cells import speaker_key
from data.importers.base.sessions import Segment

CODE_WORDS = {"code", "codes", "coding", "label", "labels", "behaviour", "behavior", "misc", "miti"}


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
    words: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", frozenset(re.split(r"[\W_]+", speaker_key(self.name))))


def tier_segments(tiers: Sequence[Tier], config: TierConfig, file: str) -> list[Segment]:
    """Return what is said on the tiers of a session, with its codes, in the order of time.

    Args:
        tiers: of the session.
        config: which of them have text and codes.
        file: for messages.

    Raises:
        DataError: a tier that the settings name does not exist, or it cannot be said whose codes a tier has.
    """
    names = [tier.name for tier in tiers]
    missing = [name for name in config.text if name not in names]
    if missing:
        raise DataError(f"tiers.text: {file} has no tier {missing[0]!r}; it has {listed(names)}")
    spoken = [tier for tier in tiers if tier.name in config.text]
    if not config.text:
        spoken = [tier for tier in tiers if not _has_codes(tier, tiers, config)]
    segments: list[Segment] = []
    for tier in spoken:
        codes = [code for other in _code_tiers(tier, spoken, tiers, config, file) for code in other.annotations]
        for annotation in tier.annotations:
            if annotation.value.strip():
                own = [code.value.strip() for code in codes if _belongs(code, annotation, tier)]
                start, end, value, where = annotation
                speaker = tier.speaker or tier.name
                segments.append(Segment(where, speaker, value, start, end, JOIN.join(dict.fromkeys(own))))
    return sorted(segments, key=lambda segment: float(segment.start))


def _has_codes(tier: Tier, tiers: Sequence[Tier], config: TierConfig) -> bool:
    """Return whether a tier has codes by its name: by the settings, or by a word in it."""
    if config.code is not None:
        return any(tier.name == config.code.replace("{tier}", other.name) for other in tiers if other is not tier)
    return bool(tier.words & CODE_WORDS) and len(tiers) > 1


def _code_tiers(tier: Tier, spoken: Sequence[Tier], tiers: Sequence[Tier], config: TierConfig, file: str) -> list[Tier]:
    """Return the tiers with the codes of a tier with text."""
    coded = [other for other in tiers if other not in spoken and _has_codes(other, tiers, config)]
    if config.code is not None:
        return [other for other in coded if other.name == config.code.replace("{tier}", tier.name)]
    own = [other for other in coded if _is_of(other, tier)]
    if not own:  # one tier for all speakers
        own = [other for other in coded if not any(_is_of(other, text) for text in spoken)]
    if len(own) > 1:
        raise DataError(
            f"{file}: tier {tier.name!r} has several tiers with codes ({listed(other.name for other in own)}); choose "
            "one, e.g. --set 'tiers.code=\"{tier} code\"'"
        )
    return own


def _is_of(codes: Tier, text: Tier) -> bool:
    """Return whether a tier with codes names the tier with the text, as its parent, in its name or by the speaker."""
    if codes.parent:
        return codes.parent == text.name
    return text.words <= codes.words or bool(codes.speaker and codes.speaker == text.speaker)


def _belongs(code: Annotation, turn: Annotation, tier: Tier) -> bool:
    """Return whether a code belongs to a turn: most of it lies in it, or its point does."""
    if not code.value.strip():
        return False
    if code.start == code.end:
        return turn.start <= code.start < turn.end
    overlap = [min(code.end, other.end) - max(code.start, other.start) for other in tier.annotations]
    most = max(overlap, default=0.0)
    return most > 0 and tier.annotations[overlap.index(most)] is turn
