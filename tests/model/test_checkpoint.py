"""Checkpoints: damage is noticed, the one before is used; later attempts win; a full disk leaves what there was."""

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import StorageError
from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.checkpoints import checksum as sealed
from model.checkpoints.checkpoint import FILE, PREVIOUS, CheckpointError
from model.checkpoints.fencing import StaleAttemptError, TrialLock
from model.config import TrainConfig
from model.training import metrics_log as curve
from tests.model.faults import number_of, state_of
from tests.model.trials import Trial, history, same_end

ROOT = Path(__file__).resolve().parents[2]
FULL = r": the disk is full; free some space and rerun the same command$"
SHORT = Trial(train=TrainConfig(epochs=2, batch_size=16))


def names(folder: Path, start: str = "checkpoint") -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(start))


def saved(folder: Path, *numbers: int) -> Path:
    """A folder with checkpoints, of which the last two are kept."""
    attempt = TrialLock.claim(folder)
    for number in numbers:
        checkpoint.save(folder / FILE, state_of(number), attempt)
    return folder


def test_the_checkpoint_before_is_kept(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    assert names(tmp_path) == [FILE]
    saved(tmp_path, 2, 3)
    assert names(tmp_path) == sorted([FILE, PREVIOUS])
    assert [number_of(checkpoint.load(tmp_path / name)) for name in (FILE, PREVIOUS)] == [3, 2]


def test_damage_to_any_byte_is_noticed(tmp_path: Path) -> None:
    """torch alone reads many of them without a word: it takes the content as it is."""
    path = saved(tmp_path, 1) / FILE
    whole, silent = path.read_bytes(), 0
    assert len(whole) > 9000
    for place in [*range(0, len(whole), 23), *range(len(whole) - 80, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            torch.load(path, weights_only=True)
            silent += 1
        except Exception:
            pass
        with pytest.raises(CheckpointError, match=r"damaged checkpoint \(.*\); remove it to start this trial again$"):
            checkpoint.load(path)
    assert silent > 100
    for size in (0, 10, len(whole) // 2, len(whole) - 71, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged checkpoint"):
            checkpoint.load(path)
    path.write_bytes(whole)
    assert number_of(checkpoint.load(path)) == 1


def test_other_readers_pass_over_the_checksum(tmp_path: Path) -> None:
    path = saved(tmp_path, 1) / FILE
    assert number_of(torch.load(path, weights_only=True)) == 1
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")


def test_a_checkpoint_without_a_checksum_is_refused(tmp_path: Path) -> None:
    torch.save(state_of(1), tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"damaged checkpoint \(it has no checksum\)"):
        checkpoint.load(tmp_path / FILE)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / FILE).write_bytes(b"half a file")
    name, state, notes = checkpoint.newest(tmp_path)
    assert (name, number_of(state)) == (PREVIOUS, 1)
    said, then = notes
    assert said.startswith(f"{tmp_path}/checkpoint.pt: damaged checkpoint (")
    assert said.endswith("; kept for a look as checkpoint.damaged-1.pt")
    assert then == "the trial goes on from checkpoint.previous.pt, which is one checkpoint older"
    assert (tmp_path / "checkpoint.damaged-1.pt").read_bytes() == b"half a file"
    assert checkpoint.newest(tmp_path)[2] == []  # told once
    saved(tmp_path, 3)
    assert [number_of(checkpoint.load(tmp_path / name)) for name in (FILE, PREVIOUS)] == [3, 1]


def test_no_more_than_one_damaged_checkpoint_is_kept(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        saved(tmp_path, number)
        (tmp_path / FILE).write_bytes(str(number).encode())
        checkpoint.newest(tmp_path)
        assert names(tmp_path) == [f"checkpoint.damaged-{number}.pt"]
    saved(tmp_path, 4, 5)
    for name in (FILE, PREVIOUS):
        (tmp_path / name).write_bytes(b"")
    name, state, notes = checkpoint.newest(tmp_path)
    assert (name, state) == (None, {})
    assert notes[-1] == "no checkpoint is left: the trial starts again from its beginning"
    assert len(names(tmp_path)) == 1


def test_a_checkpoint_that_cannot_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is away for a moment must not send a trial back to its beginning."""
    saved(tmp_path, 1, 2)

    def fail(path: Path) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="cannot be read \\(Input/output error\\)"):
        patch.setattr(sealed, "read", fail)
        checkpoint.newest(tmp_path)
    assert checkpoint.newest(tmp_path)[0] == FILE


def test_attempts_are_counted_and_leave_one_file(tmp_path: Path) -> None:
    (tmp_path / "attempt-0001").touch()
    (tmp_path / "attempt-0002").touch()  # killed between the two steps of a claim
    for name in ("checkpoint.pt.unfinished-0002", "predictions.json.unfinished-0001", "config.yaml.unfinished-77"):
        (tmp_path / name).touch()
    assert TrialLock.claim(tmp_path).number == 3
    assert names(tmp_path, "attempt") == ["attempt-0003"]
    assert [path.name for path in tmp_path.glob("*.unfinished-*")] == ["config.yaml.unfinished-77"]  # not a trial's


def test_writers_of_an_older_attempt_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they write, and where the later attempt began while they wrote."""
    first = TrialLock.claim(tmp_path)
    checkpoint.save(tmp_path / FILE, state_of(1), first)
    write = sealed.write

    def slowly(path: Path, content: Any) -> None:
        write(path, content)
        with monkeypatch.context() as patch:
            patch.setattr(sealed, "write", write)
            saved(tmp_path, 2)

    with monkeypatch.context() as patch, pytest.raises(StaleAttemptError):
        patch.setattr(sealed, "write", slowly)
        checkpoint.save(tmp_path / FILE, state_of(7), first)
    for change in (lambda: checkpoint.save(tmp_path / FILE, state_of(8), first), lambda: first.replace("x", "y")):
        with pytest.raises(StaleAttemptError, match="attempt 1 is over, number 2 has begun"):
            change()
    assert number_of(checkpoint.load(tmp_path / FILE)) == 2
    assert set(names(tmp_path, "")) - {".lock"} == {FILE, PREVIOUS, "attempt-0002"}


def test_a_run_that_lives_on_after_its_trial_began_elsewhere_writes_nothing(
    models: Path, corpus: Shards, tmp_path: Path
) -> None:
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
    SHORT.run(models, corpus, tmp_path / "whole")
    assert same_end(tmp_path, tmp_path / "whole")
    assert checkpoint.load(tmp_path / FILE)["attempt"] == 3
    told = list(curve.lines((tmp_path / curve.FILE).read_bytes()))
    assert [line["attempt"] for line in told if "epoch" in line] == [1, 3]


@pytest.mark.parametrize("name", ["write", "flush", "fsync", "link", "metrics"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_what_there_was(
    name: str, code: int, models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(code, os.strerror(code))

    SHORT.run(models, corpus, tmp_path, lambda *_: None)
    before = checkpoint.load(tmp_path / FILE)["digest"]
    longer = Trial(train=TrainConfig(epochs=3, batch_size=16, schedule="constant"))
    with monkeypatch.context() as patch, pytest.raises(StorageError, match=FULL) as error:
        match name:
            case "write":
                patch.setattr(sealed._Stream, "write", lambda stream, _: stream.file.write(b"x" * 99) and full())
            case "flush" | "fsync":
                patch.setattr(os, "fsync", full)
            case "link":
                patch.setattr(Path, "replace", full)
            case "metrics":
                patch.setattr(os, "write", full)
        longer.run(models, corpus, tmp_path)
    assert error.value.common
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*unfinished*"))
    assert checkpoint.newest(tmp_path)[1]["digest"] == before or name == "metrics"
    longer.run(models, corpus, tmp_path)
    longer.run(models, corpus, tmp_path / "whole")
    assert [epoch for epoch, _ in history(tmp_path)] == [1, 2, 3]


def limited(folder: Path, size: int) -> subprocess.CompletedProcess[str]:
    """Save in a process that may write no file larger than `size`."""
    script = (
        "import sys; from pathlib import Path\n"
        "from model.checkpoints import checkpoint; from tests.model.faults import state_of\n"
        "try: checkpoint.save(Path(sys.argv[1]) / checkpoint.FILE, state_of(7))\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    return subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


def test_a_limit_of_the_system_is_a_full_disk(tmp_path: Path) -> None:
    """Here torch itself writes against the wall, not a stand-in."""
    saved(tmp_path, 1)
    done = limited(tmp_path, 4096)
    assert done.stdout == (
        f"StorageError {tmp_path}/checkpoint.pt: the disk is full; free some space and rerun the same command\n"
    ), done.stderr
    assert number_of(checkpoint.load(tmp_path / FILE)) == 1
    assert names(tmp_path) == [FILE]


def test_a_torn_line_stays_alone(tmp_path: Path) -> None:
    path = tmp_path / curve.FILE
    curve.append(path, {"step": 1, "values": {"a": 1.0}})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "val')
    curve.append(path, {"step": 3, "values": {}, "epoch": 1})
    curve.append(path, {"step": 4, "values": {}})
    assert path.read_bytes().count(b"\n") == 4
    assert [line["step"] for line in curve.lines(path.read_bytes())] == [1, 3, 4]
    assert curve.epochs(path) == {1}


def test_a_disk_that_takes_half_a_line_is_left_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write, room = tmp_path / curve.FILE, os.write, [7]
    curve.append(path, {"step": 1, "values": {}})
    before = path.read_bytes()

    def little(descriptor: int, content: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content[: room.pop()])

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "write", little)
        curve.append(path, {"step": 2, "values": {}})
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def whole(models: Path, corpus: Shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    SHORT.run(models, corpus, folder)
    return folder


@pytest.mark.parametrize("damaged", [[FILE], [FILE, PREVIOUS]], ids=["newest", "both"])
def test_a_trial_goes_on_from_what_is_whole(
    damaged: list[str], whole: Path, models: Path, corpus: Shards, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And says so, on the log and beside the curves; a trial of a sweep must not fail for that."""
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
    said = "goes on from checkpoint.previous.pt" if len(damaged) == 1 else "starts again from its beginning"
    notes = [line["note"] for line in map(json.loads, (tmp_path / curve.FILE).open()) if "note" in line]
    assert said in notes[-1]
    assert said in caplog.text


def test_an_epoch_that_the_curve_lacks_is_told_from_the_checkpoint(
    whole: Path, models: Path, corpus: Shards, tmp_path: Path
) -> None:
    """Killed between the checkpoint and the line."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    path = tmp_path / curve.FILE
    lines = path.read_bytes().splitlines(keepends=True)
    assert [json.loads(line).get("epoch") for line in lines] == [1, None, 2], "between them what the machine does"
    path.write_bytes(lines[0] + lines[1] + lines[2][:40])
    for _ in range(2):
        SHORT.run(models, corpus, tmp_path)
        first, _, second = curve.lines(path.read_bytes())
        assert first == json.loads(lines[0])
        assert second == json.loads(lines[2]) | {"attempt": 2}


def test_what_is_over_keeps_no_checkpoint_before_the_last(whole: Path) -> None:
    found = {path.name for path in whole.iterdir()} - {".lock"}
    assert found == {FILE, "attempt-0001", "metrics.jsonl", "predictions.json"}
