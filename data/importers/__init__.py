"""Importers of corpus formats: one small module each with the same interface, and the registry of the command line.

An importer reads a source (file or folder), optionally a folder with recordings, and the settings. It returns a
`data.corpus.schema.Corpus`: every row becomes a turn with its position in the source and its label as written, in lower
case. `data.preparation.validate` checks labels, times, ids and recordings for all formats. An importer only reports
what it alone can know: times that cannot be parsed, speakers without a role, annotators without a majority.

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
    """A corpus format."""

    read: Importer  # raises DataError for a source that cannot be used
    description: str  # one sentence for the command line


IMPORTERS: Mapping[str, Format] = MappingProxyType(
    {
        "annomi": Format(read_annomi, "AnnoMI-simple or AnnoMI-full: one CSV; recordings are <transcript_id>.wav."),
        "whisperx": Format(read_whisperx, "WhisperX output with speakers: one JSON file per session."),
        "daic": Format(read_daic, "A folder like DAIC-WOZ: <id>_TRANSCRIPT.csv and <id>_AUDIO.wav."),
        "mi-tags": Format(
            read_mi_tags, "CSV with turn, speaker, text, code and annotator: one file or one per session."
        ),
        "table": Format(read_table, "Any CSV, TSV, JSONL or Parquet file; the settings columns.* name its columns."),
    }
)
