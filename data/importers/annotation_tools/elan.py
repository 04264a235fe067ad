"""Importer for ELAN: `.eaf` files, and the tab-delimited text that ELAN exports; one file per session.

The XML is read with the standard library: pympi-ling refuses files without the address of their schema, which other
programs write, and does not say where a fault is.
"""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.errors import DataError, reason
from data.importers.annotation_tools.tiers import Annotation, Tier, tier_segments
from data.importers.base.builder import TurnBuilder
from data.importers.base.sessions import Segment, first_file, read_sessions
from data.importers.base.tabular import read_text

SUFFIXES = (".eaf", ".txt")
UNITS = {"milliseconds": 1000.0, "NTSC-frames": 30000 / 1001, "PAL-frames": 25.0}  # per second


def read_elan(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read files of ELAN, in which each speaker has a tier, and perhaps another one with codes; see `tier_segments`.

    Args:
        source: an .eaf file, a tab-delimited export with a header, or a folder of either; the file name is the session
            id, and in an export the name in the column File.
        audio: folder with `<session>.<wav|flac|…>`; None: text only.
        config: settings; `roles` maps participants, or tiers without one, to roles; `tiers` says which have codes.

    Raises:
        DataError: a file cannot be read, or there are no recordings.
    """
    path = first_file(source, SUFFIXES)
    suffixes = (path.suffix.lower(),) if path is not None else SUFFIXES
    return read_sessions(TurnBuilder("elan", config), source, audio, suffixes, _parse)


def is_elan(source: Path) -> bool:
    """Return whether a source is a file of ELAN or its export, or a folder of them."""
    path = first_file(source, SUFFIXES)
    if path is None or path.suffix.lower() == ".eaf":
        return path is not None
    return _columns(next(iter(read_text(path, "utf-8").splitlines()), "").split("\t")) is not None


def _parse(path: Path, builder: TurnBuilder) -> list[Segment]:
    text = read_text(path, builder.config.encoding)
    if path.suffix.lower() == ".eaf":
        root = _root(path, text)
        names = [medium.get("RELATIVE_MEDIA_URL") or medium.get("MEDIA_URL") or "" for medium in _media(root)]
        segments = tier_segments(_tiers(path, root), builder, path.name)
        return [segment._replace(recording=unquote(names[0]) if names else "") for segment in segments]
    return [
        segment._replace(session=session)
        for session, tiers in _exported(path, text).items()
        for segment in tier_segments(list(tiers.values()), builder, path.name)
    ]


def _root(path: Path, text: str) -> ElementTree.Element:
    """Return the document of an .eaf file.

    Raises:
        DataError: it is no XML of ELAN.
    """
    try:
        root = ElementTree.fromstring(text.encode())
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path.name}: not readable as XML ({reason(error)}); export it again from ELAN") from None
    if root.tag != "ANNOTATION_DOCUMENT":
        raise DataError(f"{path.name}:1: not a file of ELAN ({root.tag}); save it as .eaf")
    return root


def _tiers(path: Path, root: ElementTree.Element) -> list[Tier]:
    """Return the tiers of an .eaf file; an annotation without times of its own has those of the one it refers to."""
    header = root.find("HEADER")
    per_second = UNITS.get(header.get("TIME_UNITS", "") if header is not None else "", UNITS["milliseconds"])
    slots = {slot.get("TIME_SLOT_ID"): slot.get("TIME_VALUE") for slot in root.iter("TIME_SLOT")}
    media = _media(root)
    origin = (_slot(media[0].get("TIME_ORIGIN"), UNITS["milliseconds"]) or 0.0) if media else 0.0
    coded = {kind.get("LINGUISTIC_TYPE_ID") for kind in root.iter("LINGUISTIC_TYPE") if _vocabulary(kind)}
    times: dict[str | None, tuple[float, float]] = {}
    for tier in root.iter("TIER"):
        aligned = list(tier.iter("ALIGNABLE_ANNOTATION"))
        edges = [slot for element in aligned for slot in (element.get("TIME_SLOT_REF1"), element.get("TIME_SLOT_REF2"))]
        known = _filled({slot: _slot(slots.get(slot), per_second) for slot in edges})
        for element in aligned:
            start, end = (known[element.get(f"TIME_SLOT_REF{number}")] for number in (1, 2))
            if start is not None and end is not None:
                times[element.get("ANNOTATION_ID")] = start + origin, end + origin
    waiting = list(root.iter("REF_ANNOTATION"))
    while waiting:
        timed = [element for element in waiting if element.get("ANNOTATION_REF") in times]
        times |= {element.get("ANNOTATION_ID"): times[element.get("ANNOTATION_REF")] for element in timed}
        if not timed:
            break
        waiting = [element for element in waiting if element not in timed]
    tiers = []
    for tier in root.iter("TIER"):
        annotations = []
        for element in (*tier.iter("ALIGNABLE_ANNOTATION"), *tier.iter("REF_ANNOTATION")):
            span = times.get(element.get("ANNOTATION_ID"))
            value = element.findtext("ANNOTATION_VALUE") or ""
            if span is not None:
                annotations.append(Annotation(*span, value, f"{path.name}:{element.get('ANNOTATION_ID')}"))
        tiers.append(
            Tier(
                tier.get("TIER_ID", ""),
                annotations,
                tier.get("PARTICIPANT", "").strip(),
                tier.get("PARENT_REF", ""),
                tier.get("LINGUISTIC_TYPE_REF") in coded,
            )
        )
    return tiers


def _filled(times: Mapping[str | None, float | None]) -> dict[str | None, float | None]:
    """Return the times of a tier's slots in order; those without one are evenly between their neighbours, as in ELAN.

    Slots before the first or behind the last time stay without one.
    """
    filled, waiting, before = dict[str | None, float | None](), list[str | None](), None
    for slot, time in times.items():
        if time is not None and before is not None:
            step = (time - before) / (len(waiting) + 1)
            filled |= {late: before + step * place for place, late in enumerate(waiting, start=1)}
        if time is not None:
            waiting, before = [], time
        else:
            waiting.append(slot)
        filled[slot] = time
    return filled


def _media(root: ElementTree.Element) -> list[ElementTree.Element]:
    """Return the media of a file, sound first; TIME_ORIGIN is where in it the annotations begin."""
    return sorted(
        root.findall("HEADER/MEDIA_DESCRIPTOR"), key=lambda medium: not medium.get("MIME_TYPE", "").startswith("audio/")
    )


def _vocabulary(kind: ElementTree.Element) -> bool:
    return bool(kind.get("CONTROLLED_VOCABULARY_REF"))


def _slot(value: str | None, per_second: float) -> float | None:
    try:
        return None if value is None else int(value) / per_second
    except ValueError:
        return None


def _columns(header: list[str]) -> Mapping[str, int] | None:
    """Return where an export has tier, begin, end, annotation and file; None if it is no export."""
    found: dict[str, int] = {}
    for index, name in enumerate(cell.strip().lower() for cell in header):
        for key in ("tier", "begin time", "end time", "annotation", "participant", "file"):
            if name == key or name.startswith(f"{key} -"):
                found.setdefault(key, index)
    return found if {"tier", "begin time", "end time", "annotation"} <= found.keys() else None


def _exported(path: Path, text: str) -> dict[str, dict[str, Tier]]:
    """Return the tiers of each session of an export.

    Raises:
        DataError: a row or a time cannot be read.
    """
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    columns = _columns(next(rows, []))
    if columns is None:
        raise DataError(
            f"{path.name}:1: no columns Tier, Begin Time, End Time and Annotation; export with column names, or use "
            "the .eaf file"
        )
    sessions: dict[str, dict[str, Tier]] = {}
    for cells in rows:
        where = f"{path.name}:{rows.line_num}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) <= max(columns.values()):
            raise DataError(f"{where}: the row has fewer cells than the header; export the file again")
        name, value = cells[columns["tier"]], cells[columns["annotation"]]
        file = cells[columns["file"]] if "file" in columns else ""
        participant = cells[columns["participant"]] if "participant" in columns else ""
        tiers = sessions.setdefault(Path(file.strip()).stem or path.stem, {})
        tier = tiers.setdefault(name, Tier(name, [], participant))
        start, end = (_time(cells[columns[key]], where) for key in ("begin time", "end time"))
        tier.annotations.append(Annotation(start, end, value, where))
    return sessions


def _time(stamp: str, where: str) -> float:
    """Return the seconds of hh:mm:ss.ms, or of seconds or milliseconds alone."""
    try:
        parts = [float(part) for part in stamp.strip().replace(",", ".").split(":")]
    except ValueError:
        raise DataError(f"{where}: time {stamp!r} cannot be read; export times as hh:mm:ss.ms or seconds") from None
    if len(parts) == 1 and "." not in stamp:
        return parts[0] / 1000
    seconds = 0.0
    for part in parts:
        seconds = seconds * 60 + part
    return seconds
