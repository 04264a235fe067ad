"""Names in files do not lead out of their folders, neither to read there nor to write."""

import json
import shutil
import socket
from pathlib import Path

import psutil
import pytest

from data.corpus.config import ColumnConfig, CorpusConfig
from data.errors import DataError, UserError
from data.preparation.unlabelled import read_sessions
from data.shards.dataset import MANIFEST, Shards
from data.shards.store import Store
from sweep.config.schema import parse
from sweep.durability import mirror
from sweep.execution.orphans import end_orphans, scratch_root
from tests.sweep.common import tree

OUTSIDE = ["../secret", "/etc/passwd", "a/../../secret"]


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    """A folder of recordings, beside a recording that no table may name."""
    (folder := tmp_path / "audio").mkdir()
    shutil.copy(__file__, folder / "1.wav")
    shutil.copy(__file__, tmp_path / "secret.wav")
    return folder


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("column", ["clip", "recording", "conversation"])
def test_table_names_no_audio_outside_its_folder(column: str, name: str, audio: Path, tmp_path: Path) -> None:
    """As `sweep prepare` and `sweep predict` read it."""
    row = {"conversation": "1", "speaker": "client", "text": "hi", "start": "0", "end": "1", column: name}
    (source := tmp_path / "sessions.csv").write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    named = {} if column == "conversation" else {column: column}
    columns = ColumnConfig(label=None, start="start", end="end", **named)
    with pytest.raises(DataError, match=r"sessions\.csv:2: .* is outside the folder of recordings"):
        read_sessions("table", source, audio, CorpusConfig(columns=columns), {"client": ["change"]})


@pytest.mark.parametrize("name", OUTSIDE)
def test_annomi_names_no_audio_outside_its_folder(name: str, audio: Path, tmp_path: Path) -> None:
    header = "transcript_id,mi_quality,video_url,utterance_id,interlocutor,timestamp,utterance_text"
    (tmp_path / "a.csv").write_text(f"{header}\n{name},high,v,0,client,00:00:01,hi\n")
    with pytest.raises(DataError, match=r"a\.csv:2: .* is outside the folder of recordings"):
        read_sessions("annomi", tmp_path / "a.csv", audio, CorpusConfig(), {"client": ["change"]})


@pytest.mark.parametrize(
    "name", ["../x-0.arrow", "/etc/passwd", "shard-0.arrow/../x", "shard-0.arrow\n", "", "manifest.json"]
)
@pytest.mark.parametrize("key", ["index", "shards"])
def test_manifest_names_files_of_its_folder_alone(key: str, name: str, corpus: Shards, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(str(corpus.folder), tmp_path / "shards"))
    manifest = json.loads((folder / MANIFEST).read_text())
    if key == "index":
        manifest["index"] = name
    else:
        manifest["shards"][0]["name"] = name
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"manifest\.json: {key}.*: String should match pattern"):
        Shards(folder)


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a/b", ".a", "a\n", ""])
def test_sweeps_name_is_the_name_of_a_folder(name: str) -> None:
    with pytest.raises(UserError, match="name: "):
        parse({"name": name}, "a.yaml")


def test_writing_replaces_a_link_and_not_its_target(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("mine")
    (folder := tmp_path / "shards").mkdir()
    (folder / MANIFEST).symlink_to(tmp_path / "outside")
    Store(folder).write(MANIFEST, b"{}")
    assert ((tmp_path / "outside").read_text(), (folder / MANIFEST).read_bytes()) == ("mine", b"{}")


def test_only_a_sweeps_files_are_taken_from_a_copy(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "a/b/sweep"
    for name in ("config.yaml", ".bashrc", "trials/0000/config.yaml", "trials/0000/evil.sh", "trials/evil/config.yaml"):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_text("name: a\n")
    folder.mkdir(parents=True)
    mirror.fetch(folder, str(store))
    taken = {name for name, content in tree(tmp_path / "a").items() if content is not None}
    assert taken == {"b/sweep/config.yaml", "b/sweep/trials/0000/config.yaml", "b/sweep/mirror.json"}


def test_orphans_are_removed_in_their_own_folder_only(tmp_path: Path) -> None:
    """The record is in the sweep's folder, where other users may be able to write."""
    (tmp_path / "sweep-ray-x").mkdir()
    for scratch in (
        tmp_path / "sweep-ray-x",
        scratch_root() / "sweep-ray-x/../.." / tmp_path,
        Path("/"),
        Path("sweep-ray-x"),
    ):
        record = {"host": socket.gethostname(), "boot": psutil.boot_time(), "processes": {}, "scratch": str(scratch)}
        (tmp_path / "processes.json").write_text(json.dumps(record))
        assert end_orphans(tmp_path) == []
        assert not (tmp_path / "processes.json").exists(), "it was not read"
        assert (tmp_path / "sweep-ray-x").is_dir()
