"""Importer for lhotse manifests: supervisions, or cuts with supervisions, as JSONL. A recording is a session.

The lines are read here: lhotse itself imports torch and a thousand modules, and its audio sources may be commands.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.errors import DataError, reason
from data.importers.base.builder import TurnBuilder, refuse_no_turns
from data.importers.base.recordings import set_recordings
from data.importers.base.sessions import Segment, conversation
from data.importers.base.tabular import as_text, read_text
from data.importers.speech_corpora.files import named_file

SUFFIXES = (".jsonl", ".jsonl.gz")
_KINDS = ("supervision", "cut")  # of two kinds in a folder, the first is read
_MOST = 1 << 30  # characters of an unpacked manifest
Line = Mapping[str, object]


def read_lhotse(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read manifests.

    Args:
        source: a manifest of supervisions or cuts, or a folder with some, and with recordings.
        audio: folder of the recordings; None: text only.
        config: settings; `columns.label` names a key of `custom` with the code.

    Raises:
        DataError: a manifest cannot be read, or a recording is no file.
    """
    builder = TurnBuilder("lhotse", config)
    said: dict[str, dict[tuple[str, float], Segment]] = {}
    files: dict[str, tuple[str, object]] = {}
    for path in _manifests(source):
        for where, line in _lines(path, config.encoding):
            for name, key, segment in _segments(line, where, config):
                said.setdefault(name, {}).setdefault(key, segment)
            _note_recording(line.get("recording"), where, files)
    for path in sorted(source.glob("*recording*.jsonl*")) if source.is_dir() else ():
        for where, line in _lines(path, config.encoding):
            _note_recording(line, where, files)
    builder.codes.learn(segment.code for segments in said.values() for segment in segments.values())
    sessions = [conversation(name, list(segments.values()), builder) for name, segments in said.items()]
    refuse_no_turns(sessions, source)
    named = {}
    for name in said if audio is not None else ():
        file = _file(*files[name], audio) if name in files and audio is not None else None
        named.update({name: file} if file else {})
    set_recordings(sessions, audio, builder, named)
    return builder.corpus(sessions)


def is_lhotse(source: Path) -> bool:
    """Return whether a source is a manifest of supervisions or cuts, or a folder with one."""
    try:
        path = _manifests(source)[0]
        _, line = next(_lines(path, "utf-8"), ("", {}))
    except (DataError, OSError):
        return False
    return {"recording_id", "start", "duration"} <= line.keys() or {"supervisions", "duration"} <= line.keys()


def _manifests(source: Path) -> list[Path]:
    if source.is_file():
        if not source.name.lower().endswith(SUFFIXES):
            raise DataError(f"{source}: not a .jsonl or .jsonl.gz file; convert it with: lhotse copy IN OUT.jsonl.gz")
        return [source]
    for kind in _KINDS:
        found = sorted(path for path in source.glob(f"*{kind}*") if path.name.lower().endswith(SUFFIXES))
        if found:
            return found
    raise DataError(f"{source}: no supervisions.jsonl.gz or cuts.jsonl.gz; give a folder with lhotse manifests")


def _lines(path: Path, encoding: str) -> Iterator[tuple[str, Line]]:
    if path.name.lower().endswith(".gz"):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                text = file.read(_MOST)
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{path}: not readable as gzip ({reason(error)}); copy it again") from None
    else:
        text = read_text(path, encoding)
    if not text.strip():
        raise DataError(f"{path.name}: the file is empty; check the path of the source")
    for number, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            line = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not readable as JSON ({reason(error)}); write one object per line") from None
        if not isinstance(line, dict):
            raise DataError(f"{where}: not a JSON object; write one supervision or cut per line")
        yield where, line


def _segments(line: Line, where: str, config: CorpusConfig) -> Iterator[tuple[str, tuple[str, float], Segment]]:
    """Yield recording, identity and segment of each supervision of a line."""
    inner, offset = line.get("supervisions"), 0.0
    if line.get("type") == "MixedCut" or "tracks" in line:
        raise DataError(f"{where}: is a MixedCut, whose audio is made by lhotse; give the supervisions instead")
    if inner is not None:
        offset = _seconds(line.get("start", 0.0), where)
    for one in inner if isinstance(inner, list) else [line]:
        if not isinstance(one, dict) or not isinstance(one.get("recording_id"), str):
            raise DataError(f"{where}: not a supervision with recording_id, start and duration; give such a manifest")
        start = offset + _seconds(one.get("start"), where)
        custom, label = one.get("custom"), config.columns.label
        code = as_text(custom.get(label)) if isinstance(custom, dict) and label else ""
        segment = Segment(
            where,
            as_text(one.get("speaker")),
            as_text(one.get("text")),
            round(start, 6),
            round(start + _seconds(one.get("duration"), where), 6),
            code,
        )
        yield one["recording_id"], (as_text(one.get("id")), round(start, 3)), segment


def _seconds(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: start or duration is {value!r}, not seconds; fix the line")
    return float(value)


def _note_recording(content: object, where: str, files: dict[str, tuple[str, object]]) -> None:
    if isinstance(content, dict) and isinstance(content.get("id"), str):
        files.setdefault(content["id"], (where, content.get("sources")))


def _file(where: str, sources: object, audio: Path) -> str | None:
    first = sources[0] if isinstance(sources, list) and sources else None
    if not isinstance(first, dict):
        return None
    if first.get("type") != "file":
        raise DataError(
            f"{where}: the audio is a {first.get('type')!r}, not a file; commands are not run and nothing is "
            "downloaded: write it to a file (lhotse: recording.move_to_memory, save_audio) and name that file"
        )
    return named_file(as_text(first.get("source")), audio)
