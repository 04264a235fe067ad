"""Nothing needs a home folder that can be written: caches move to the temporary folder."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from data import user_cache
from sweep.config import resolve

HOMELESS = """
from data.user_cache import use_writable_caches
use_writable_caches()
import matplotlib
from huggingface_hub import constants
print(matplotlib.get_cachedir())
print(constants.HF_HOME)
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("XDG_CACHE_HOME", "SWEEP_CACHE", "MPLCONFIGDIR", "TRITON_CACHE_DIR", "HF_HOME"):
        monkeypatch.setenv(name, "")  # so that what the function sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    user_cache._writable_cache.cache_clear()


@pytest.mark.parametrize("home", ["/dev/null", "/proc/none"])
def test_caches_move_where_the_home_cannot_be_written(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    cache = tmp_path / f"speech-llm-sweep-{os.getuid()}"
    assert user_cache.cache_home() == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert resolve._folder("demo").is_relative_to(cache)
    user_cache.use_writable_caches()
    assert os.environ["MPLCONFIGDIR"] == str(cache / "matplotlib")
    assert os.environ["HF_HOME"] == str(cache / "huggingface")


def test_home_that_can_be_written_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache.cache_home() == tmp_path / "home/.cache"
    user_cache.use_writable_caches()
    assert "MPLCONFIGDIR" not in os.environ
    assert list(tmp_path.iterdir()) == []
    user_cache._writable_cache.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert user_cache.cache_home() == tmp_path / "cache"


def test_folder_of_another_user_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    (tmp_path / "speech-llm-sweep-4321").mkdir()
    cache = user_cache.cache_home()
    assert (cache.parent, cache.is_dir()) == (tmp_path, True)
    assert cache.name != "speech-llm-sweep-4321"


def test_libraries_work_without_a_home(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    environment |= {"HOME": "/dev/null", "TMPDIR": str(tmp_path)}
    ended = subprocess.run(
        [sys.executable, "-c", HOMELESS], env=environment, capture_output=True, text=True, check=True
    )
    cache = tmp_path / f"speech-llm-sweep-{os.getuid()}"
    assert ended.stdout.splitlines() == [str(cache / "matplotlib"), str(cache / "huggingface")]
    assert ended.stderr == ""
