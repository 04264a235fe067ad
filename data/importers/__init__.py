"""Corpus formats: one small file each, all with the same interface, and the registry that the command line lists.

An importer reads a source (file or folder), optionally a folder with recordings, and the settings, and yields the
`Corpus` of `data.schema`: every row as a turn with its place in the source and its label as written, in lower case.
Whether labels, times, ids and recordings are right is judged in one place for all formats, `data.validate`; an importer
notes only what it alone can know: times that cannot be read, speakers without a role, annotators without a majority.

A new format needs a module with such a function, an entry here, and a maker in tests/data/makers.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.importers.annomi import read_annomi
from data.importers.daic import read_daic
from data.importers.mi_tags import read_mi_tags
from data.importers.table import read_table
from data.importers.whisperx import read_whisperx

Importer = Callable[[Path, Path | None, CorpusConfig], Corpus]  # source, folder of recordings or None, settings


@dataclass(frozen=True, slots=True)
class Format:
    """A way in which corpora are written."""

    read: Importer  # raises DataError for a source that cannot be used
    description: str  # one sentence, for the command line


IMPORTERS: Mapping[str, Format] = MappingProxyType(
    {
        "annomi": Format(read_annomi, "AnnoMI-simple or AnnoMI-full: one CSV; recordings are <transcript_id>.wav."),
        "whisperx": Format(read_whisperx, "WhisperX output with speakers: one JSON file a session."),
        "daic": Format(read_daic, "A folder like DAIC-WOZ: <id>_TRANSCRIPT.csv, and <id>_AUDIO.wav beside it."),
        "mi-tags": Format(read_mi_tags, "CSV with turn, speaker, text, code and annotator: a file, or one a session."),
        "table": Format(read_table, "Any CSV, TSV, JSONL or Parquet file; columns.* says which column holds what."),
    }
)
