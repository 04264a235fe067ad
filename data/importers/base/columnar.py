"""Read Parquet files, and the Arrow files of Hugging Face datasets, batch by batch. Audio stays in the file.

A cell with the bytes of an audio file becomes a `StoredClip`, which names its row and is read when clips are cut.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data.corpus.decoding import ARROW, StoredClip
from data.errors import DataError, reason

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

SUFFIXES = (".parquet", ".pq", ARROW)
_ROWS = 1000  # rows that are read at a time


def read_columnar(path: Path) -> tuple[list[str], Iterator[tuple[int | str, dict[str, object]]]]:
    """Return the columns, and the rows with their number from 1.

    Raises:
        DataError: the file cannot be read.
    """
    schema = _schema(path)
    return schema.names, _rows(path, schema)


def audio_columns(path: Path) -> list[str]:
    """Return the columns with audio: bytes, or a struct of bytes and path, as the Audio feature stores them.

    Raises:
        DataError: the file cannot be read.
    """
    return _audio_columns(_schema(path))


def _audio_columns(schema: "pa.Schema") -> list[str]:
    import pyarrow as pa

    def has_bytes(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return bool(kind.get_field_index("bytes") >= 0 and kind.get_field_index("path") >= 0)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    return [field.name for field in schema if has_bytes(field.type)]


def _schema(path: Path) -> "pa.Schema":
    import pyarrow as pa
    from pyarrow.parquet import read_schema

    try:
        if path.suffix.lower() != ARROW:
            return read_schema(path)
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            return stream.schema
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> DataError:
    kind = "Arrow" if path.suffix.lower() == ARROW else "Parquet"
    return DataError(f"{path}: not readable as {kind} ({reason(error)}); check the path of the source")


def _rows(path: Path, schema: "pa.Schema") -> Iterator[tuple[int | str, dict[str, object]]]:
    import pyarrow as pa

    names, audio, number = _class_names(schema), _audio_columns(schema), 0
    try:
        for batch, named in _batches(path, schema, audio):
            for cells in batch.to_pylist():
                number += 1
                for column in audio:
                    inner = cells.get(column)
                    file = inner.get("path") if column in named and isinstance(inner, dict) else None
                    cells[column] = file if column in named else StoredClip(path, number - 1, column)
                for column in names.keys() & cells.keys():
                    cells[column] = _named(cells[column], names[column], f"{path.name}:{number}: {column}")
                yield number, cells
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _batches(path: Path, schema: "pa.Schema", audio: Sequence[str]) -> Iterator[tuple["pa.RecordBatch", set[str]]]:
    """Yield batches without audio, and the columns of audio that only name files, which they have."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    others = [name for name in schema.names if name not in audio]
    if path.suffix.lower() == ARROW:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                structs = [name for name in audio if pa.types.is_struct(batch.schema.field(name).type)]
                named = {name for name in structs if batch.column(name).field("bytes").null_count == len(batch)}
                yield batch.select([*others, *sorted(named)]), named
        return
    with ParquetFile(path) as file:
        named = {name for name in audio if _only_names(file, name)}
        columns = [*others, *(f"{name}.path" for name in sorted(named))]
        if not columns:
            return
        for batch in file.iter_batches(_ROWS, columns=columns):
            yield batch, named


def _only_names(file: "ParquetFile", column: str) -> bool:
    """Return whether no cell of a column has bytes, by the statistics of the file."""
    metadata = file.metadata
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(number)
            if chunk.path_in_schema != f"{column}.bytes":
                continue
            if not chunk.is_stats_set or chunk.statistics.null_count != metadata.row_group(group).num_rows:
                return False
    return f"{column}.bytes" in {metadata.schema.column(number).path for number in range(metadata.num_columns)}


def _class_names(schema: "pa.Schema") -> dict[str, list[str]]:
    """Return the names of the classes of every ClassLabel column that Hugging Face datasets wrote."""
    try:
        content = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = content["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    names = {}
    for column, content in features.items() if isinstance(features, dict) else ():
        feature = content
        while isinstance(feature, list) and feature:  # a list of classes
            feature = feature[0]
        while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
            feature = feature["feature"]
        found = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
        if isinstance(found, list):
            names[column] = [str(name) for name in found]
    return names


def _named(value: object, names: Sequence[str], place: str) -> object:
    """Return the name of a class id, or the names of a list of them; -1 and null are no class."""
    if isinstance(value, list):
        return [_named(part, names, place) for part in value]
    if not isinstance(value, int) or value == -1:
        return None if value == -1 else value
    if not 0 <= value < len(names):
        raise DataError(f"{place} is {value}, but the file names only the classes 0 to {len(names) - 1}; fix the file")
    return names[value]
