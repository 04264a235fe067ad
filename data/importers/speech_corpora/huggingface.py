"""Importer for Hugging Face datasets with audio in Parquet, or as `save_to_disk` writes them: one row per turn.

pyarrow reads both, so the library `datasets` is not needed, nor any script of a dataset.
"""

from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.errors import DataError
from data.importers.base.cells import column_key
from data.importers.base.columnar import SUFFIXES, audio_columns
from data.importers.base.sessions import files_of, first_file
from data.importers.base.tabular import columns_of
from data.importers.tables.table import read_table


def read_huggingface(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read the shards of a dataset; each row is a turn with its own clip.

    Args:
        source: a Parquet or Arrow file, or a folder; the names of files, or of folders, are those of the splits.
        audio: folder of the clips, if the dataset only names them.
        config: settings; `columns` names the columns. The column of the clips is found by its type.

    Raises:
        DataError: a file cannot be read, or the dataset lacks a column.
    """
    first, columns = files_of(source, SUFFIXES)[0], config.columns
    found = audio_columns(first)
    if columns.clip is None and len(found) > 1:
        raise DataError(f"{first}: {', '.join(found)} have audio; choose one, --set columns.clip={found[0]}")
    session = columns.conversation
    if session is not None and column_key(session) not in columns_of(first):
        raise DataError(
            f"{first}: no column {session!r} says which rows are one session; name it, --set columns.conversation=NAME "
            "(null: every file is a session)"
        )
    if columns.clip is None and found:
        config = config.model_copy(update={"columns": columns.model_copy(update={"clip": found[0]})})
    return read_table(source, audio, config, "huggingface", SUFFIXES)


def is_huggingface(source: Path) -> bool:
    """Return whether a source is a Parquet or Arrow file with audio, or a folder of them."""
    path = first_file(source, SUFFIXES)
    return path is not None and bool(audio_columns(path))
