"""Checkpoints: damage is noticed, the one before is used; later attempts win; a full disk changes nothing."""

import errno
import json
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import StorageError
from data.shards.dataset import Shards
from model.checkpoints import checkpoint, checksum
from model.checkpoints.checkpoint import FILE, PREVIOUS, CheckpointError
from model.checkpoints.fencing import StaleAttemptError, TrialLock
from model.config import TrainConfig
from model.training.metrics_log import FILE as METRICS
from model.training.metrics_log import MetricsLog
from tests.model.faults import number_of, state_of
from tests.model.trials import Trial, history, same_end

FULL = r": the disk is full; free some space and rerun the same command$"
SHORT = Trial(train=TrainConfig(epochs=2, batch_size=16, schedule="constant"))
LONGER = Trial(train=TrainConfig(epochs=3, batch_size=16, schedule="constant"))


def names(folder: Path, start: str = "checkpoint") -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(start))


def saved(folder: Path, *numbers: int) -> Path:
    """A folder with checkpoints, of which the last two are kept."""
    lock = TrialLock.claim(folder)
    for number in numbers:
        checkpoint.save(folder / FILE, state_of(number), lock)
    return folder


def numbers(folder: Path) -> list[int]:
    return [number_of(checkpoint.load(folder / name)) for name in (FILE, PREVIOUS)]


@pytest.fixture(scope="module")
def whole(models: Path, corpus: Shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a trial that is over."""
    folder = tmp_path_factory.mktemp("whole")
    SHORT.run(models, corpus, folder)
    assert {path.name for path in folder.iterdir()} == {
        *(FILE, "attempt-0001", METRICS, "predictions.json", ".lock")  # and no PREVIOUS
    }
    return folder


def test_damage_to_any_byte_is_noticed(tmp_path: Path) -> None:
    """torch alone does not notice many of them. Other readers ignore the checksum."""
    path = saved(tmp_path, 1) / FILE
    assert names(tmp_path) == [FILE]
    assert number_of(torch.load(path, weights_only=True)) == 1
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")
    whole, silent = path.read_bytes(), 0
    for index in [*range(0, len(whole), 61), *range(len(whole) - 80, len(whole))]:
        damaged = bytearray(whole)
        damaged[index] ^= 1 << index % 8
        path.write_bytes(damaged)
        try:
            torch.load(path, weights_only=True)
            silent += 1
        except Exception:
            pass
        with pytest.raises(CheckpointError, match=r"damaged checkpoint \(.*\); remove it to start this trial again$"):
            checkpoint.load(path)
    assert silent > 40
    for size in (0, 10, len(whole) // 2, len(whole) - 71, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged checkpoint"):
            checkpoint.load(path)
    path.write_bytes(whole)
    assert number_of(checkpoint.load(path)) == 1


def test_file_that_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    contents = {"not a checkpoint of a trial": {"model": torch.ones(2)}, r"\(it has no checksum\)": state_of(1)}
    for match, content in ({"no such checkpoint": None} | contents).items():
        if content is not None:
            torch.save(content, tmp_path / FILE)
        with pytest.raises(CheckpointError, match=match) as error:
            checkpoint.load(tmp_path / FILE)
        assert "\n" not in str(error.value)


def test_damaged_checkpoint_is_set_aside_for_the_previous_one(tmp_path: Path) -> None:
    """Only the last damaged one is kept."""
    saved(tmp_path, 1, 2)
    (tmp_path / FILE).write_bytes(b"half a file")
    (name, state), warnings = checkpoint.newest(tmp_path)
    assert (name, number_of(state)) == (PREVIOUS, 1)
    assert warnings[0].startswith(f"{tmp_path}/checkpoint.pt: damaged checkpoint (")
    assert warnings[0].endswith("; kept for inspection as checkpoint.damaged-1.pt")
    assert warnings[1:] == ["the trial continues from checkpoint.previous.pt, which is one checkpoint older"]
    assert (tmp_path / "checkpoint.damaged-1.pt").read_bytes() == b"half a file"
    assert checkpoint.newest(tmp_path)[1] == [], "one warning is enough"
    saved(tmp_path, 3)
    assert numbers(tmp_path) == [3, 1]
    for name in (FILE, PREVIOUS):
        (tmp_path / name).write_bytes(b"")
    newest, warnings = checkpoint.newest(tmp_path)
    assert newest is None
    assert warnings[-1] == "no checkpoint is left: the trial starts again from its beginning"
    assert names(tmp_path) == ["checkpoint.damaged-3.pt"]


def test_unreadable_checkpoint_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is away for a moment must not send a trial back to its beginning."""
    saved(tmp_path, 1, 2)

    def fail(path: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="cannot be read \\(Input/output error\\)"):
        patch.setattr(checksum, "read", fail)
        checkpoint.newest(tmp_path)
    assert checkpoint.newest(tmp_path)[0].name == FILE


def test_claim_counts_attempts_and_removes_unfinished_files(tmp_path: Path) -> None:
    for name in ("attempt-0001", "attempt-0002"):  # killed between the two steps of a claim
        (tmp_path / name).touch()
    for name in ("checkpoint.pt.unfinished-0002", "predictions.json.unfinished-0001", "config.yaml.unfinished-77"):
        (tmp_path / name).touch()
    assert TrialLock.claim(tmp_path).number == 3
    assert names(tmp_path, "attempt") == ["attempt-0003"]
    assert [path.name for path in tmp_path.glob("*.unfinished-*")] == ["config.yaml.unfinished-77"]  # not a trial's


def test_earlier_attempt_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it writes, and where the later attempt begins while it writes."""
    first = TrialLock.claim(tmp_path)
    checkpoint.save(tmp_path / FILE, state_of(1), first)
    write = checksum.write

    def slowly(path: Path, content: Any) -> None:
        write(path, content)
        with monkeypatch.context() as patch:
            patch.setattr(checksum, "write", write)
            saved(tmp_path, 2)

    with monkeypatch.context() as patch, pytest.raises(StaleAttemptError):
        patch.setattr(checksum, "write", slowly)
        checkpoint.save(tmp_path / FILE, state_of(7), first)
    for change in (lambda: checkpoint.save(tmp_path / FILE, state_of(8), first), lambda: first.replace("x", "y")):
        with pytest.raises(StaleAttemptError, match="attempt 1 is superseded by attempt 2"):
            change()
    assert numbers(tmp_path) == [2, 1]
    assert set(names(tmp_path, "")) - {".lock"} == {FILE, PREVIOUS, "attempt-0002"}


def test_superseded_run_writes_nothing(whole: Path, models: Path, corpus: Shards, tmp_path: Path) -> None:
    """Not a checkpoint, not a line, not a prediction."""
    at_takeover: dict[str, bytes] = {}

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def elsewhere(epoch: int, metrics: dict[str, Any]) -> None:
        TrialLock.claim(tmp_path)
        at_takeover.update(content())

    with pytest.raises(StaleAttemptError):
        SHORT.run(models, corpus, tmp_path, elsewhere)
    assert content() == at_takeover
    SHORT.run(models, corpus, tmp_path)
    assert same_end(tmp_path, whole)
    assert checkpoint.load(tmp_path / FILE)["attempt"] == 3
    assert [line.attempt for line in MetricsLog(tmp_path).lines() if line.epoch] == [1, 3]


@pytest.mark.parametrize(
    ("step", "code"),
    [("write", errno.ENOSPC), ("fsync", errno.EDQUOT), ("rename", errno.ENOSPC), ("metrics", errno.EDQUOT)],
)
def test_full_disk_is_one_line_and_changes_nothing(
    step: str, code: int, whole: Path, models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    before = checkpoint.load(tmp_path / FILE)["digest"]
    with monkeypatch.context() as patch, pytest.raises(StorageError, match=FULL) as error:
        match step:
            case "write":
                patch.setattr(checksum._HashingWriter, "write", lambda out, _: out.file.write(b"x" * 99) and full())
            case "fsync":
                patch.setattr(os, "fsync", full)
            case "rename":
                patch.setattr(Path, "replace", full)
            case "metrics":
                patch.setattr(os, "write", full)
        LONGER.run(models, corpus, tmp_path)
    assert error.value.common
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*unfinished*"))
    assert checkpoint.newest(tmp_path)[0].state["digest"] == before or step == "metrics"
    LONGER.run(models, corpus, tmp_path)
    assert [epoch for epoch, _ in history(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("damaged", [[FILE], [FILE, PREVIOUS]], ids=["newest", "both"])
def test_trial_continues_from_the_newest_intact_checkpoint(
    damaged: list[str], whole: Path, models: Path, corpus: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And warns in the log and in the metrics log."""
    with pytest.raises(ZeroDivisionError):
        SHORT.run(models, corpus, tmp_path, lambda epoch, _: 1 // (2 - epoch))
    for name in damaged:
        content = bytearray((tmp_path / name).read_bytes())
        content[len(content) // 2] ^= 4
        (tmp_path / name).write_bytes(content)
    epochs: list[int] = []
    with caplog.at_level(logging.WARNING):
        SHORT.run(models, corpus, tmp_path, lambda epoch, _: epochs.append(epoch))
    assert epochs == [1, 2]
    assert same_end(tmp_path, whole)
    expected = "continues from checkpoint.previous.pt" if len(damaged) == 1 else "starts again from its beginning"
    assert expected in [line.note for line in MetricsLog(tmp_path).lines() if line.note][-1]
    assert expected in caplog.text


def test_epoch_that_the_metrics_log_lacks_is_logged_on_resume(
    whole: Path, models: Path, corpus: Shards, tmp_path: Path
) -> None:
    """Killed between the checkpoint and the line."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    path = tmp_path / METRICS
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line).get("epoch") for line in lines] == [1, None, 2], "between them system metrics"
    path.write_bytes(lines[0] + lines[1] + lines[2][:40])
    for _ in range(2):
        SHORT.run(models, corpus, tmp_path)
        first, _, torn, second = path.read_bytes().splitlines(keepends=True)
        assert (first, torn) == (lines[0], lines[2][:40] + b"\n")
        assert json.loads(second) == json.loads(lines[2]) | {"attempt": 2}
