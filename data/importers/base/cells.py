"""Read what people write into cells: codes of a turn, names, and words for a missing value.

A code is read where its meaning is certain. Anything else is refused with its place, because every cell that is taken
for a code becomes a class.
"""

import ast
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from data.corpus.codebook import INVISIBLE
from data.corpus.codebook import clean_code as clean_code  # noqa: PLC0414  importers find it here
from data.corpus.schema import JOIN

# What pandas reads as a missing value, and what it and others write for one; in lower case.
MISSING = frozenset("nan none null n/a na <na> #n/a #na nat nil -nan - -- ? . undefined".split()) | {"", "#n/a n/a"}
# What Excel writes for a formula that cannot be computed, such as a text that begins with "-" or "=".
ERRORS = frozenset("#NULL! #DIV/0! #VALUE! #REF! #NAME? #NUM! #SPILL! #CALC! #GETTING_DATA".split())
# The same in texts and names, where "none" or "na" may be a word.
MISSING_TEXT = frozenset("nan NaN <NA> #N/A NULL null NaT -nan undefined".split()) | ERRORS
MISSING_NAME = MISSING_TEXT | {"None", "none", "N/A", "n/a"}
SEPARATORS = ";,/+&\n\t"
_MARKS = ";\n\t"  # they are in no name of a code
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")
_CHOICES = ("choices", "choice", "labels", "label", "value", "tag")  # keys of Label Studio, doccano and MIDAS
_INCLUSIVE = "end_pos"  # of MIDAS: the last character of a span
_SPAN = ("start", "end", "start_offset", "end_offset", "start_pos", _INCLUSIVE)
_HARMLESS = {"id", "type", "text", "from_name", "to_name", "origin", *_SPAN}  # keys beside them that mean nothing


def clean_name(text: str) -> str:
    """Return a name of a session, speaker or recording as it is compared: NFC, without invisible characters."""
    return " ".join(unicodedata.normalize("NFC", text.translate(INVISIBLE)).split())


def speaker_key(name: str) -> str:
    """Return the name of a speaker as `roles` is searched for it: also without case and full-width forms."""
    return " ".join(unicodedata.normalize("NFKC", clean_name(name)).lower().split())


def column_key(name: str) -> str:
    """Return the name of a column without case, spaces, underscores and hyphens."""
    return re.sub(r"[\s_\-]+", "", clean_code(name))


@dataclass(frozen=True, slots=True)
class Codes:
    """What a cell says about the codes of a turn."""

    labels: tuple[str, ...] = ()
    missing: str = ""  # the word for a missing value, if the cell is one
    refused: str = ""  # why the cell is no code
    changed: bool = False  # whether characters were normalised
    guessed: bool = False  # whether a separator was found that the settings do not name


@dataclass(slots=True)
class CodeReader:
    """Reads the cells of a column of codes; what is certain depends on the other cells and on the declared codes."""

    separator: str | None = None  # between several codes, by the settings
    declared: frozenset[str] = frozenset()
    known: set[str] = field(default_factory=set)  # codes that occur alone
    names: bool = False  # whether there are codes that are no numbers

    def learn(self, cells: Iterable[str]) -> None:
        """Note which codes occur alone, and which occur together in two orders."""
        orders: dict[tuple[str, frozenset[str]], tuple[str, ...]] = {}
        for cell in set(cells):
            code = clean_code(cell)
            if code in MISSING or code.startswith(("[", "{")) or _NUMBER.fullmatch(code):
                continue
            self.names = True
            marks = [mark for mark in (*SEPARATORS, JOIN) if mark in cell]
            if not marks:
                self.known.add(code)
            for mark in marks:
                parts = tuple(clean_code(part) for part in cell.split(mark))
                if all(parts) and orders.setdefault((mark, frozenset(parts)), parts) != parts:
                    self.known |= set(parts)

    def read(self, cell: str, text: str = "") -> Codes:
        """Return the codes of a cell.

        Args:
            cell: the cell; lists and objects as JSON, or as Python prints them.
            text: of the turn; a span of an annotation tool must cover it.
        """
        code = clean_code(cell)
        if code in self.declared and code:
            return Codes((code,), changed=_is_changed(cell, code))
        if code in MISSING:
            return Codes(missing=code)
        if cell.strip() in ERRORS:
            return Codes(refused="is an error of Excel; fix the formula")
        value = _parsed(cell) if code[0] in "[{(" else None
        if value is not None:
            return self._structure(value, text)
        if code[0] in "[{" and not re.fullmatch(r"\[[\w -]+\]", code):
            return Codes(refused="looks like a list, but cannot be read")
        return self._words(cell, code)

    def _words(self, cell: str, code: str) -> Codes:
        marks = [re.escape(mark) for mark in (self.separator, JOIN) if mark]
        parts = re.split("|".join(marks), cell, flags=re.IGNORECASE)
        if len(parts) > 1:
            return self._joined(parts)
        if _NUMBER.fullmatch(code):
            return self._number(code)
        return self._plain(cell, code)

    def _plain(self, cell: str, code: str) -> Codes:
        for mark in SEPARATORS:
            parts = list(dict.fromkeys(filter(None, (clean_code(part) for part in cell.split(mark)))))
            if len(parts) > 1 and all(part in self.known or part in self.declared for part in parts):
                return Codes(tuple(parts), guessed=True)
        unclear = next((mark for mark in _MARKS if mark in cell.strip()), None)
        if unclear is not None and not self.declared and self.separator is None:
            return Codes(
                refused=f"may be several codes or one name; set label_separator={unclear!r}, or declare it in labels"
            )
        return Codes((code,), changed=_is_changed(cell, code))

    def _number(self, code: str) -> Codes:
        number = float(code)
        if not number.is_integer() or abs(number) > 1e9:
            return Codes(refused="is a number, not the name of a code")
        if self.names:
            return Codes(refused="is a number beside names of codes; write the name")
        return Codes((str(int(number)),))

    def _joined(self, parts: Sequence[str]) -> Codes:
        codes = [(part, clean_code(part)) for part in parts]
        kept = [(part, code) for part, code in codes if code in self.declared or code not in MISSING]
        labels = tuple(dict.fromkeys(code for _, code in kept))
        changed = any(_is_changed(part, code) for part, code in kept)
        return Codes(labels, changed=changed) if labels else Codes(missing=codes[0][1])

    def _structure(self, value: object, text: str) -> Codes:
        labels: list[str] = []
        refused = _collect(value, labels, text)
        if refused:
            return Codes(refused=refused)
        return self._joined(labels) if labels else Codes(missing="[]")


def _is_changed(cell: str, code: str) -> bool:
    return cell.strip().lower() != code


def _parsed(cell: str) -> object:
    """Return the list or object that a cell contains, as JSON or as Python prints it; None if it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(cell.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if isinstance(value, list | tuple | dict | set):
            return list(value) if isinstance(value, tuple | set) else value
    return None


def _collect(value: object, labels: list[str], text: str) -> str:
    """Add the codes of a list or object to `labels`; return why it has none, or ""."""
    if isinstance(value, str):
        labels.append(value)
    elif isinstance(value, list | tuple):
        if len(value) == 3 and isinstance(value[2], str) and all(isinstance(place, int) for place in value[:2]):
            return _partial(int(value[0]), int(value[1]), text) or _collect(value[2], labels, text)
        for part in value:
            refused = _collect(part, labels, text)
            if refused:
                return refused
    elif isinstance(value, dict):
        keys = [key for key in _CHOICES if key in value]
        others = sorted(str(key) for key in value if key not in _CHOICES and key not in _HARMLESS)
        if len(keys) != 1 or others:
            return f"is an object with {', '.join(map(str, value)) or 'nothing'}, not a code"
        places = [value[key] + (key == _INCLUSIVE) for key in _SPAN if isinstance(value.get(key), int)]
        partial = _partial(places[0], places[1], text) if len(places) == 2 else ""
        return partial or _collect(value[keys[0]], labels, text)
    elif value is not None:
        return f"contains {value!r}, which is no name of a code"
    return ""


def _partial(start: int, end: int, text: str) -> str:
    """Return why a span is no code of its turn: it covers only a part of the text."""
    covered = len(text[:start].strip()) == 0 and len(text[max(0, end) :].strip(" .!?…,;")) == 0
    return "" if covered and end > start else f"codes the characters {start} to {end} of {len(text)}, not the turn"
