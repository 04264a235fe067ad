"""Adversarial files: each gives a valid result or a UserError of one line, never another exception, and nothing is
written outside the requested folder."""

import io
import json
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from data.corpus.audio import read_recording
from data.corpus.config import CorpusConfig
from data.corpus.schema import SAMPLE_RATE
from data.importers import IMPORTERS
from data.preparation.build import prepare
from data.shards.dataset import MANIFEST, Shards
from data.shards.format import describe_shard, to_bytes
from sweep.config.files import dump, load
from sweep.config.loader import load_settings, read_tree
from tests.data.makers import DIALOGUES, MAKERS, records, write
from tests.security.mutations import changed, check_variety, mutated, outcome

SESSIONS = {f"s{number}": dialogue for number in range(6) for dialogue in DIALOGUES.values()}


@pytest.mark.parametrize(
    "name", ["annomi-full", "whisperx", "daic", "mi-tags", "table", "table-jsonl", "table-parquet", "kaldi", "lhotse"]
)
def test_mutated_sources_are_prepared_or_refused(name: str, tmp_path: Path) -> None:
    """From the file to shards: validation and the writer get what an importer accepts."""
    maker = MAKERS.get(name, MAKERS["table"])
    settings = maker.config.model_copy(update={"max_rejected": 1.0})
    outcomes = []
    for seed in range(10):
        if name == "table-parquet":
            (tmp_path / "source").mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(records(SESSIONS)), source := tmp_path / "source/table.parquet")
        else:
            source = write(maker, tmp_path / "source", maker.files(SESSIONS))
        path = random.Random(seed).choice(sorted(source.iterdir()) if maker.folder else [source])
        path.write_bytes(mutated(path.read_bytes(), seed))

        def work(source: Path = source) -> None:
            corpus = IMPORTERS[maker.format].read(source, None, settings)
            prepare(corpus, tmp_path / "out", settings).verify()

        outcomes.append(outcome(work))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
    check_variety(outcomes)


def read_all(folder: Path) -> None:
    shards = Shards(folder)
    for row in range(shards.index.num_rows):
        shards.pcm(row)


def test_mutated_manifests_are_read_or_refused(corpus: Shards, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(str(corpus.folder), tmp_path / "shards"))
    whole = (folder / MANIFEST).read_bytes()
    cases = [mutated(whole, seed) for seed in range(25)]
    cases += [json.dumps(changed(json.loads(whole), seed)).encode() for seed in range(25)]
    outcomes = []
    for case in cases:
        (folder / MANIFEST).write_bytes(case)
        outcomes.append(outcome(lambda: read_all(folder)))
    check_variety(outcomes)


@pytest.mark.parametrize("which", ["index", "shard"])
def test_mutated_arrow_files_are_read_or_refused(which: str, corpus: Shards, tmp_path: Path) -> None:
    """`verify` would find these by their hash, but an attacker can update the hash."""
    folder = Path(shutil.copytree(str(corpus.folder), tmp_path / "shards"))
    path = folder / (corpus.manifest.index if which == "index" else corpus.manifest.shards[0].name)
    whole, outcomes = path.read_bytes(), []
    for seed in range(30):
        path.write_bytes(mutated(whole, seed))
        outcomes.append(outcome(lambda: read_all(folder)))
    assert any(outcomes)


def test_mutated_recordings_are_read_or_refused(tmp_path: Path) -> None:
    """Files of six containers, from the header on."""
    path, outcomes = tmp_path / "x", []
    tone = np.random.default_rng(1).uniform(-0.5, 0.5, (SAMPLE_RATE // 4, 2))
    for number, kind in enumerate(("WAV", "FLAC", "OGG", "AIFF", "W64", "AU")):
        soundfile.write(sink := io.BytesIO(), tone, 22_050, format=kind)
        whole = sink.getvalue()
        for seed in range(10):
            cut = len(whole) if seed % 2 else 100  # every second case changes the header
            path.write_bytes(mutated(whole[:cut], 100 * number + seed) + whole[cut:])
            outcomes.append(outcome(lambda: read_recording(path)))
    check_variety(outcomes)


HEADERS = [(rate, 1, 16, 1000) for rate in (2**31 - 1, 2**32 - 1, 44_101, 0, 1)]
HEADERS += [(16_000, 65_535, 16, 1000), (16_000, 0, 16, 1000), (16_000, 1, 0, 1000)]
HEADERS += [(16_000, 1, 16, length) for length in (0, 2**32 - 1)]


@pytest.mark.parametrize(("rate", "channels", "bits", "length"), HEADERS)
def test_recording_with_an_absurd_header_is_refused(
    rate: int, channels: int, bits: int, length: int, tmp_path: Path
) -> None:
    """A rate that nothing divides made the resampler ask for gigabytes."""
    frame = channels * bits // 8 % 2**16
    form = struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * frame % 2**32, frame, bits)
    head = b"RIFF" + struct.pack("<I", 2**32 - 1) + b"WAVEfmt " + form + b"data" + struct.pack("<I", length)
    (path := tmp_path / "x.wav").write_bytes(head + bytes(1000))
    error = outcome(lambda: read_recording(path))
    assert error == "" or error.startswith(f"{path}: not readable as audio (")


def test_mutated_settings_load_or_are_refused(tmp_path: Path) -> None:
    """What is accepted is a configuration that reads back as it was written."""
    whole = dump(load("demo")).encode()
    path, outcomes = tmp_path / "a.yaml", []

    def work() -> None:
        loaded = load(str(path))
        (tmp_path / "b.yaml").write_text(dump(loaded), encoding="utf-8")
        assert load(str(tmp_path / "b.yaml")) == loaded

    plain = read_tree(replaced(path, whole))
    for seed in range(25):
        replaced(path, mutated(whole, seed) if seed % 3 == 0 else json.dumps(changed(plain, seed)).encode())
        outcomes.append(outcome(work))
    check_variety(outcomes)
    plain = json.loads(CorpusConfig().model_dump_json())
    for seed in range(25):
        replaced(path, json.dumps(changed(plain, seed)).encode())
        outcomes.append(outcome(lambda: load_settings(CorpusConfig, path, ())))


def replaced(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
)


YAML = {
    "bomb": (BOMB, "more than 100000 values"),
    "itself": ("name: a\nsearch: &a {space: *a}\n", "more than 100000 values"),
    "deep": ("name: " + "[" * 5000, "not a YAML file of settings"),
    "object": ("name: !!python/object/apply:os.system [touch pwned]\n", "not valid YAML"),
    "name": ("name: !!python/name:os.system\n", "not valid YAML"),
    "secret": ("name: ${oc.env:HOME}\n", "is not filled in"),
    "hidden": ('name: "\\x24{oc.env:HOME}"\n', "is not filled in"),
    "strings": ("a: ${b}${b}\nb: ${c}${c}\nc: x\n", "is not filled in"),
}


@pytest.mark.parametrize("name", YAML)
def test_hostile_yaml_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, message = YAML[name]
    monkeypatch.chdir(tmp_path)
    error = outcome(lambda: load(str(replaced(tmp_path / "a.yaml", text.encode()))))
    assert message in error
    assert str(Path.home()) not in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml"]


@pytest.mark.parametrize("override", ["=1", ".=1", "a..b=1", "train.[=1", "train.epochs=" + "[" * 3000, "name=${seed}"])
def test_hostile_override_is_refused(override: str) -> None:
    assert outcome(lambda: load("demo", [override]))


def test_empty_recording_of_any_rate_is_read(tmp_path: Path) -> None:
    """The resampler took no signal without samples."""
    soundfile.write(tmp_path / "x.wav", np.zeros(0), 44_100)
    assert read_recording(tmp_path / "x.wav").pcm.shape == (1, 0)


def test_poisoned_index_is_refused_where_it_is_read(corpus: Shards, tmp_path: Path) -> None:
    """With foreign columns, nulls, or locations outside any shard; Arrow itself follows any offset."""
    folder = Path(shutil.copytree(str(corpus.folder), tmp_path / "shards"))
    index, path = corpus.index, folder / corpus.manifest.index
    row = corpus.columns["n_samples"].index(max(corpus.columns["n_samples"]))
    for column, value, message in (
        ("text", None, "text contains null values"),
        ("shard", 99, f"the location of row {row} is invalid"),
        ("offset", -1, f"the location of row {row} is invalid"),
        ("n_samples", 2**30, "is corrupt"),
        ("length", 2**40, "is corrupt"),
    ):
        values = index[column].to_pylist()
        values[row] = value
        position, field = index.column_names.index(column), index.schema.field(column)
        path.write_bytes(to_bytes(index.set_column(position, field, pa.array(values, field.type))))
        assert message in outcome(lambda: Shards(folder).pcm(row)), column
    path.write_bytes(to_bytes(index.drop_columns("text")))
    assert "its columns are not those of a corpus" in outcome(lambda: Shards(folder).columns)


def test_damaged_shard_of_unfinished_preparation_is_one_line(corpus: Shards) -> None:
    name = corpus.manifest.shards[0].name
    whole = (Path(corpus.folder) / name).read_bytes()
    outcomes = [
        outcome(lambda seed=seed: describe_shard(name, pa.py_buffer(mutated(whole, seed)))) for seed in range(25)
    ]
    assert all(error.startswith(f"{name}: not a readable shard (") for error in outcomes if error)
    check_variety(outcomes)
