"""Hugging Face datasets with audio: shards, splits, names of classes, and clips that are read row by row."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from data.corpus import decoding
from data.corpus.config import CorpusConfig
from data.corpus.decoding import StoredClip
from data.corpus.schema import SAMPLE_RATE
from data.errors import DataError
from data.importers import guess_format
from data.importers.base import columnar
from data.importers.speech_corpora.huggingface import read_huggingface
from data.preparation.build import prepare

FEATURES = {"audio": {"_type": "Audio"}, "label": {"_type": "ClassLabel", "names": ["change", "sustain"]}}
CONFIG = CorpusConfig.model_validate({"columns": {"conversation": "session", "label": "label"}})


def flac(level: float) -> bytes:
    soundfile.write(sink := io.BytesIO(), np.full(SAMPLE_RATE, level), SAMPLE_RATE, format="FLAC")
    return sink.getvalue()


def table(sessions: range, *, embedded: bool = True) -> pa.Table:
    rows = [
        {
            "session": f"s{session}",
            "speaker": "client",
            "text": f"turn {turn} of {session}",
            "label": turn % 2,
            "audio": {"bytes": flac(session / 20 + turn / 200) if embedded else None, "path": f"{session}-{turn}.flac"},
        }
        for turn in range(4)
        for session in sessions  # the sessions are interleaved
    ]
    audio = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = [("session", pa.string()), ("speaker", pa.string()), ("text", pa.string()), ("label", pa.int64())]
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    return pa.Table.from_pylist(rows, pa.schema([*names, ("audio", audio)], metadata))


def write_parquet(folder: Path) -> Path:
    (folder / "data").mkdir(parents=True)
    parts = {
        "train-00000-of-00002": range(2),
        "train-00001-of-00002": range(2, 4),
        "validation-00000-of-00001": range(4, 5),
    }
    for name, sessions in {**parts, "test-00000-of-00001": range(5, 6)}.items():
        pq.write_table(table(sessions), folder / "data" / f"{name}.parquet", row_group_size=3)
    (folder / "README.md").write_text("---\n---\n")
    return folder


def write_arrow(folder: Path) -> Path:
    for name, sessions in {"train": range(4), "validation": range(4, 5), "test": range(5, 6)}.items():
        (folder / name).mkdir(parents=True)
        content = table(sessions)
        with pa.ipc.new_stream(str(folder / name / "data-00000-of-00001.arrow"), content.schema) as writer:
            writer.write_table(content, max_chunksize=3)
        (folder / name / "state.json").write_text("{}")
    (folder / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    return folder


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_dataset_becomes_shards_with_its_splits(write: object, tmp_path: Path) -> None:
    source = write(tmp_path / "dataset")
    assert guess_format(source) == "huggingface"
    corpus = read_huggingface(source, None, CONFIG)
    assert corpus.labels == ("change", "sustain")
    assert {one.id: one.split for one in corpus.conversations} == {
        **dict.fromkeys(("s0", "s1", "s2", "s3"), "train"),
        "s4": "val",
        "s5": "test",
    }
    shards = prepare(corpus, tmp_path / "shards", CONFIG)
    for row, name in enumerate(shards.index["id"].to_pylist()):
        session, _, turn = name.partition("/")
        expected = int(session[1:]) / 20 + int(turn) / 200
        assert len(shards.pcm(row)) == SAMPLE_RATE
        assert shards.pcm(row)[0] / 32768 == pytest.approx(expected, abs=1e-4)
    assert set(shards.index["label"].to_pylist()) == {"change", "sustain"}


def test_importing_reads_no_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[str]] = []
    batches = pq.ParquetFile.iter_batches

    def watch(self: object, size: int, columns: list[str], **rest: object) -> object:
        read.append(columns)
        return batches(self, size, columns=columns, **rest)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watch)
    corpus = read_huggingface(write_parquet(tmp_path / "dataset"), None, CONFIG)
    assert {column for columns in read for column in columns} == {"session", "speaker", "text", "label"}
    assert isinstance(corpus.conversations[0].turns[0].clip, StoredClip)


def test_few_cells_are_in_memory_at_a_time(tmp_path: Path) -> None:
    """Going forward continues, going back begins the row group again."""
    pq.write_table(table(range(6)), path := tmp_path / "x.parquet")
    cells = decoding._Cells(path, 0, "audio")
    for row in (0, 9, 20, 3):
        assert cells.read(row) == flac(row % 6 / 20 + row // 6 / 200)
        assert cells.cells is not None
        assert len(cells.cells) <= decoding._CELLS
    assert cells.read(24) is None


def test_clips_that_are_only_named_are_in_the_audio_folder(tmp_path: Path) -> None:
    pq.write_table(table(range(3), embedded=False), path := tmp_path / "x.parquet")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "0-0.flac").write_bytes(flac(0.1))
    corpus = read_huggingface(path, tmp_path / "clips", CONFIG)
    assert corpus.conversations[0].turns[0].clip == tmp_path / "clips" / "0-0.flac"
    changed = table(range(3), embedded=False).to_pylist()
    for name in ("/etc/passwd", "../secret.wav"):
        changed[0]["audio"]["path"] = name
        pq.write_table(pa.Table.from_pylist(changed, table(range(3)).schema), path)
        with pytest.raises(DataError, match="is outside the folder of recordings"):
            read_huggingface(path, tmp_path / "clips", CONFIG)


def test_broken_clip_is_a_finding_of_its_row(tmp_path: Path) -> None:
    rows = table(range(6)).to_pylist()
    rows[1]["audio"]["bytes"], rows[2]["audio"]["bytes"] = b"no audio", None
    pq.write_table(pa.Table.from_pylist(rows, table(range(6)).schema), path := tmp_path / "x.parquet")
    config = CONFIG.model_copy(update={"max_rejected": 0.5})
    corpus = read_huggingface(path, None, config)
    prepare(corpus, tmp_path / "shards", config)
    found = [(one.utterance, one.message) for one in corpus.findings if one.code == "E_AUDIO_UNREADABLE"]
    assert [utterance for utterance, _ in found] == ["s1/0", "s2/0"]
    assert found[0][1].startswith("x.parquet:2: not readable as audio")
    assert found[1][1] == "x.parquet:3: not readable as audio (the cell has no audio); convert it to WAV or FLAC"


def test_what_a_dataset_lacks_is_said(tmp_path: Path) -> None:
    pq.write_table(table(range(3)), path := tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column 'conversation' says which rows .* columns.conversation=NAME"):
        read_huggingface(path, None, CorpusConfig())
    two = table(range(3)).append_column("other", table(range(3))["audio"])
    pq.write_table(two, path)
    with pytest.raises(DataError, match=r"audio, other have audio; choose one, --set columns.clip=audio"):
        read_huggingface(path, None, CONFIG)
    assert columnar.audio_columns(path) == ["audio", "other"]
    text = CONFIG.model_copy(update={"columns": CONFIG.columns.model_copy(update={"text": "other", "clip": "audio"})})
    with pytest.raises(DataError, match="other is not text"):
        read_huggingface(path, None, text)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="not readable as Parquet"):
        read_huggingface(path, None, CONFIG)
