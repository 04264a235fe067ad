"""Atomic writes: complete or not at all, and without temporary files."""

import stat
from pathlib import Path

import pytest

from data.atomic import commit, create_file, new_folder, removed_afterwards, shared_folder, write_file
from data.errors import StorageError, UserError


@pytest.mark.parametrize("durable", [False, True])
def test_write_file_replaces_content_and_removes_leftovers(tmp_path: Path, durable: bool) -> None:
    (tmp_path / "a.unfinished-1").write_text("half")
    for content in ("old", b"new"):
        write_file(tmp_path / "a", content, durable=durable)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new"}


def test_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "a", "old")
    monkeypatch.setattr("data.atomic.commit", lambda *_, **__: commit(tmp_path / "nothing", tmp_path / "a"))
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "a", "new", temporary=tmp_path / "b")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.parametrize("links", [True, False])
def test_create_file_succeeds_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Without hard links the last writer wins, which callers must detect."""

    def refuse(*_: object) -> None:
        raise PermissionError

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    made = [create_file(tmp_path / "a", text, temporary=tmp_path / text, mode=0o600) for text in ("first", "second")]
    assert made == [True, not links]
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "first" if links else "second"}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_temporary_file_is_removed_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), removed_afterwards(tmp_path / "a") as path:
        path.touch()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_folders_appear_complete(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="out: exists already"), new_folder(tmp_path / "out"):
        pass
    with shared_folder(tmp_path / "out") as folder:
        (folder / "b").touch()
    with pytest.raises(StorageError, match="cannot be used"), new_folder(tmp_path / "other") as folder:
        (folder / "c" / "d").touch()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "out"]
