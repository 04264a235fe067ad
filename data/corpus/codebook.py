"""Codebooks: what the codes of a corpus are called, how they are written, and which of them form a class.

A corpus keeps the codes of its codebook, the finest ones. A level merges them into classes when the corpus is opened
(`data.codes`), so another level needs no other preparation, and predictions can be traced back to the codes.
"""

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib.resources import files
from importlib.resources.abc import Traversable

from pydantic import Field, field_validator, model_validator

from data.config import Section
from data.corpus.schema import JOIN, split_label
from data.corpus.votes import label_order, majority
from data.errors import DataError

NAMES = "names"  # the level that every codebook has: each code under its name
ROLE_WORDS = {"counsellor": "therapist", "counselor": "therapist", "patient": "client"}
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u061c\u200b\u200e\u200f\u2060\u2061\u2062\u2063\u2064\ufeff"), None)
INVISIBLE = _INVISIBLE | dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), None)
JOINERS = dict.fromkeys((0x200C, 0x200D), None)  # they shape letters of some scripts, so names keep them
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d"), "-")
_MOST_MARKS = 3  # modifiers of one code, such as a direction and a strength


def clean_code(text: str) -> str:
    """Return a code as it is compared: NFKC, lower case, without invisible characters, with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text.translate(INVISIBLE | JOINERS)).lower().split())


def spelling(text: str) -> str:
    """Return a code as a codebook looks it up: also with a hyphen for every dash, because of signs as in R-."""
    return clean_code(text).translate(_DASHES)


def _refuse_yaml_words(value: object) -> object:
    """Refuse codes that YAML reads as true, false or null, such as NO and ON, at any depth."""
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    for part in parts:
        if part is None or isinstance(part, bool):
            raise ValueError("YAML reads yes, no, on, off and ~ as true, false or null; write such a code in quotes")
        _refuse_yaml_words(part)
    return value


class Code(Section, coerce_numbers_to_str=True):
    """A code. A plain text in place of a section is its name."""

    name: str = Field(description="Readable name; a cell with the name is read as the code.")
    about: str = Field("", description="When coders give this code, in a sentence.")
    also: tuple[str, ...] = Field((), description="Other spellings of the code in corpora.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class Level(Section, coerce_numbers_to_str=True):
    """Classes that merge codes. Every code belongs to one class of its role, or is unused."""

    classes: dict[str, dict[str, tuple[str, ...]]] = Field(description="Role → class → its codes, in order.")
    unused: tuple[str, ...] = Field((), description="Codes without a class; their turns are context only.")

    _words = field_validator("classes", "unused", mode="before")(_refuse_yaml_words)


class Codebook(Section, coerce_numbers_to_str=True):
    """The codes of a corpus by role, and levels that merge them into fewer classes."""

    name: str = Field(description="Name and version of the codebook, e.g. MISC 2.5.")
    source: str = Field("", description="Manual or publication that defines the codes.")
    separator: str | None = Field(None, description="Separator of several codes in a cell; label_separator overrides.")
    modifiers: dict[str, tuple[str, ...]] = Field(
        {},
        description="Kind → marks that may follow a code and do not belong to it, e.g. strength: ['1', '2']; a code "
        "that is listed with its mark, such as C+, keeps it.",
    )
    codes: dict[str, dict[str, Code]] = Field(description="Role → code as in the manual → its name, in order.")
    levels: dict[str, Level] = Field({}, description="Name → classes; the level `names` always exists.")

    _words = field_validator("codes", mode="before")(_refuse_yaml_words)

    @cached_property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Return the codes of each role as a corpus stores them."""
        return {role: tuple(dict.fromkeys(map(spelling, codes))) for role, codes in self.codes.items()}

    @cached_property
    def spellings(self) -> dict[str, dict[str, str]]:
        """Return, for each role, every spelling of a code and the code."""
        return {
            role: {
                spelling(text): spelling(code)
                for code, entry in codes.items()
                for text in (entry.name, *entry.also, code)
            }
            for role, codes in self.codes.items()
        }

    @cached_property
    def words(self) -> frozenset[str]:
        """Return what a cell may hold: every spelling, alone and with one modifier."""
        texts = [clean_code(text) for spellings in self.spellings.values() for text in spellings]
        return frozenset((*texts, *(text + mark for text in texts for mark in self._marks)))

    @cached_property
    def _marks(self) -> list[str]:
        marks = {spelling(mark) for marks in self.modifiers.values() for mark in marks}
        return sorted(marks, key=lambda mark: (-len(mark), mark))

    def read(self, role: str, text: str) -> tuple[str, str]:
        """Return the code of a text, and the modifiers that were left out.

        A text that is no code of the role is looked for among those of the other roles, and otherwise returned as it
        is: the validation rejects it.
        """
        own = self.spellings.get(role, {})
        others = {text: code for spellings in self.spellings.values() for text, code in spellings.items()}
        for spellings in (own, others):
            code = spelling(text)
            for _ in range(_MOST_MARKS + 1):
                if code in spellings:
                    return spellings[code], spelling(text)[len(code) :]
                mark = next((mark for mark in self._marks if code.endswith(mark) and code != mark), "")
                if not mark:
                    break
                code = code.removesuffix(mark).rstrip()
        return clean_code(text), ""

    def merge(self, level: str) -> "Merge":
        """Return the classes of a level.

        Raises:
            DataError: there is no such level.
        """
        if level == NAMES:
            named = {role: {code: clean_code(codes[code].name) for code in codes} for role, codes in self.codes.items()}
            roles = {role: tuple(names.values()) for role, names in named.items()}
            pairs = {(role, spelling(code)): name for role, names in named.items() for code, name in names.items()}
            return Merge(level, roles, pairs)
        if level not in self.levels:
            near = get_close_matches(level, [NAMES, *self.levels], n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            known = ", ".join([NAMES, *self.levels])
            raise DataError(f"data.codes: {level!r} is no level of {self.name}; {hint}use one of {known}, or null")
        classes = self.levels[level].classes
        roles = {role: tuple(map(clean_code, classes.get(role, {}))) for role in self.codes}
        pairs = {
            (role, spelling(code)): clean_code(name)
            for role, named in classes.items()
            for name, codes in named.items()
            for code in codes
        }
        return Merge(level, roles, pairs)

    def problems(self) -> list[str]:
        """Return what is wrong, each with key, value, rule and fix."""
        return [*self._code_problems(), *self._spelling_problems(), *self._level_problems()]

    def _code_problems(self) -> Iterator[str]:
        if not any(self.codes.values()):
            yield "codes: {}: a codebook needs codes; write them as codes: {client: {C: change}}"
        for role, codes in self.codes.items():
            word = ROLE_WORDS.get(clean_code(role)) or next(
                iter(get_close_matches(clean_code(role), ("client", "therapist"), n=1, cutoff=0.75)), None
            )
            if word is not None and word != role:
                yield f"codes.{role}: {role!r} is not a role; did you mean {word!r}?"
            if not codes:
                yield f"codes.{role}: {{}}: the role has no codes; add some, or leave the role out"
            for code, entry in codes.items():
                for key, text in ((f"codes.{role}.{code}", code), (f"codes.{role}.{code}.name", entry.name)):
                    if not clean_code(text):
                        yield f"{key}: {text!r}: is empty; write a name"
                    elif JOIN in text or (self.separator and self.separator in text):
                        mark = JOIN if JOIN in text else self.separator
                        yield f"{key}: {text!r}: contains {mark!r}, which separates codes; rename it"
        for kind, marks in self.modifiers.items():
            if not marks or not all(map(clean_code, marks)):
                yield f"modifiers.{kind}: {list(marks)!r}: needs marks that are not empty; add them, or leave it out"

    def _spelling_problems(self) -> Iterator[str]:
        """Yield spellings that belong to two codes of a role: twins in case and Unicode form included."""
        for role, codes in self.codes.items():
            owners: dict[str, tuple[str, str]] = {}
            for code, entry in codes.items():
                texts = {f"codes.{role}.{code}": code, f"codes.{role}.{code}.name": entry.name}
                texts |= {f"codes.{role}.{code}.also.{index}": text for index, text in enumerate(entry.also)}
                for key, text in texts.items():
                    owner, as_written = owners.setdefault(spelling(text), (code, text))
                    if owner != code:
                        same = "" if as_written == text else f", written {as_written!r} there"
                        yield (
                            f"{key}: {text!r}: is also a spelling of {owner!r}{same}; upper and lower case and Unicode "
                            "forms do not count, so rename or remove one"
                        )

    def _level_problems(self) -> Iterator[str]:
        for name, level in self.levels.items():
            where = f"levels.{name}"
            if clean_code(name) == NAMES:
                yield f"{where}: {name!r}: every codebook has this level, each code under its name; rename it"
            placed: dict[tuple[str, str], str] = {}  # role and code → class
            for role, classes in level.classes.items():
                if role not in self.codes:
                    yield f"{where}.classes.{role}: {role!r} is not a role; {self._hint(role, self.codes)}"
                    continue
                yield from self._class_problems(f"{where}.classes.{role}", role, classes, placed)
            unused = [spelling(code) for code in level.unused]
            known = {code for labels in self.labels.values() for code in labels}
            for code in level.unused:
                if spelling(code) not in known:
                    yield f"{where}.unused: {code!r} is no code; {self._hint(code, known)}"
            for (role, code), title in placed.items():
                if code in unused and all(code not in self.labels[other] for other in self.labels if other != role):
                    yield f"{where}.unused: {code!r} is also in the class {title!r}; remove it from one of them"
            for role, labels in self.labels.items():
                lost = [code for code in labels if (role, code) not in placed and code not in unused]
                if lost:
                    codes = ", ".join(lost)
                    yield f"{where}.classes.{role}: {codes}: in no class; add it to one, or to {where}.unused"

    def _class_problems(
        self, where: str, role: str, classes: Mapping[str, Sequence[str]], placed: dict[tuple[str, str], str]
    ) -> Iterator[str]:
        titles: dict[str, str] = {}
        for title, codes in classes.items():
            twin = titles.setdefault(clean_code(title), title)
            if twin != title:
                yield f"{where}.{title}: {title!r}: is the class {twin!r} in another form; join the two"
            if not clean_code(title) or JOIN in title:
                yield f"{where}.{title}: {title!r}: must be a name without {JOIN!r}; rename it"
            if not codes:
                yield f"{where}.{title}: []: the class has no codes; add some, or remove it"
            for code in codes:
                if spelling(code) not in self.labels[role]:
                    hint = self._hint(code, self.labels[role])
                    yield f"{where}.{title}: {code!r} is no code of the {role}; {hint}"
                elif (other := placed.setdefault((role, spelling(code)), title)) != title:
                    yield f"{where}.{title}: {code!r} is also in the class {other!r}; remove it from one of them"
                elif sum(spelling(twin) == spelling(code) for twin in codes) > 1:
                    yield f"{where}.{title}: {code!r} is listed twice; remove one"

    @staticmethod
    def _hint(text: str, known: Sequence[str] | Mapping[str, object] | set[str]) -> str:
        near = get_close_matches(spelling(text), sorted(known), n=1, cutoff=0.5)
        return f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(sorted(known))}"


@dataclass(frozen=True)
class Merge:
    """A level: the classes of each role, and the class of each code."""

    level: str
    roles: dict[str, tuple[str, ...]]  # role → classes in order
    class_of: dict[tuple[str, str], str]  # role and code → class; unused codes have none

    @property
    def labels(self) -> tuple[str, ...]:
        """Return all classes in order."""
        return tuple(dict.fromkeys(name for names in self.roles.values() for name in names))

    @property
    def digest(self) -> str:
        """Return a hash of the classes and their codes."""
        content = [sorted(self.roles.items()), sorted(self.class_of.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]

    def votes(self, role: str, votes: Mapping[str, int]) -> dict[str, int]:
        """Return the votes for the classes, from those for the codes."""
        merged = self._counts(role, votes)
        merged.pop("", None)
        return merged

    def _counts(self, role: str, votes: Mapping[str, int]) -> dict[str, int]:
        """Return the votes for the classes; those for unused codes are under ""."""
        order, merged = label_order(self.roles.get(role, ())), Counter[str]()
        for given, annotators in votes.items():
            names = {self.class_of.get((role, code), "") for code in split_label(given)} - {""}
            merged[JOIN.join(sorted(names, key=order.__getitem__))] += annotators
        return dict(merged)

    def label(self, role: str, label: str | None, votes: Mapping[str, int]) -> str | None:
        """Return the class of a turn, or several that are joined; None if its codes are unused or it has none.

        Args:
            role: of its speaker.
            label: its code, or several that are joined.
            votes: for the codes, where several annotators coded it. They are counted again for the classes: codes that
                have no majority each may have one together.
        """
        if label is None:
            return None
        order = label_order(self.roles.get(role, ()))
        if merged := self._counts(role, votes):
            names = set(majority(merged, order)[0])
        else:
            names = {self.class_of.get((role, code), "") for code in split_label(label)}
        return JOIN.join(sorted(names - {""}, key=lambda name: order[name])) or None

    def codes(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Return, for each role, the classes with the codes that they merge."""
        return {
            role: {
                name: tuple(code for (owner, code), title in self.class_of.items() if (owner, title) == (role, name))
                for name in names
            }
            for role, names in self.roles.items()
        }

    def describe(self) -> str:
        """Return the classes with their codes in one line."""
        named = (f"{name} = {', '.join(codes)}" for classes in self.codes().values() for name, codes in classes.items())
        return "; ".join(named)


def shipped() -> dict[str, Traversable]:
    """Return the codebooks of the package by name."""
    folder = files("data.corpus") / "codebooks"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): folder / name for name in names}
