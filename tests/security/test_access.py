"""The token of the cluster that `sweep run` starts; `tests/sweep/test_cluster.py` tries to get in without it."""

import os
import stat
from pathlib import Path

import pytest

from sweep.execution.cluster import private_token, write_token


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_token_is_new_and_readable_by_its_owner_only(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir(mode=0o700)
        paths.append(write_token(tmp_path / name))
    assert [mode(path) for path in paths] == [0o600, 0o600]
    assert len({path.read_text() for path in paths}) == 2
    assert [len(path.read_text()) for path in paths] == [64, 64]
    assert [list(path.parent.iterdir()) for path in paths] == [[path] for path in paths]


def test_given_token_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/elsewhere/token")
    with private_token(tmp_path):
        assert os.environ["RAY_AUTH_TOKEN_PATH"] == "/elsewhere/token"
    assert list(tmp_path.iterdir()) == []
