"""Retention: the best checkpoints are kept, the others are deleted, and the disk need is checked before the start."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from data.errors import StorageError
from model.checkpoints.fencing import StaleAttemptError, TrialLock
from sweep.config.paths import trial_folder
from sweep.config.schema import Config
from sweep.durability.retention import DiskNeed, check_disk, disk_need, prune_checkpoints
from sweep.search.study import StudyStore
from tests.sweep.common import ask, complaint, refused, report, settings, sweep

FILES = ("checkpoint.pt", "checkpoint.previous.pt", "checkpoint.damaged-2.pt")
OTHERS = ("config.yaml", "metrics.jsonl", "predictions.json")


def keeping(keep: int | None, metric: str = "macro_f1") -> Config:
    config = settings(metric=metric)
    return config.model_copy(update={"storage": config.storage.model_copy(update={"keep": keep})})


def make_sweep(folder: Path, config: Config) -> StudyStore:
    """Complete, with two equal values: 0, 1, 2, 3. Failed: 4. Running: 5."""
    folder.mkdir(exist_ok=True)
    study = StudyStore.open(folder, config)
    ask(study, 6)
    for number, value in enumerate([0.3, 0.9, 0.5, 0.5]):
        report(study, number, value)
        study.complete(number)
    study.fail(4, "lost")
    for number in range(6):
        (own := trial_folder(folder, number)).mkdir(parents=True)
        for name in (*FILES, *OTHERS):
            (own / name).write_text(f"{number} {name}")
    return study


def left(folder: Path) -> dict[int, list[str]]:
    """Checkpoints by trial."""
    return {number: [name for name in FILES if (trial_folder(folder, number) / name).exists()] for number in range(6)}


@pytest.mark.parametrize(
    ("keep", "metric", "best"),
    [(2, "macro_f1", [1, 2]), (3, "macro_f1", [1, 2, 3]), (2, "loss", [0, 2]), (9, "macro_f1", [0, 1, 2, 3])],
)
def test_best_and_running_trials_keep_their_checkpoints(
    keep: int, metric: str, best: list[int], tmp_path: Path
) -> None:
    """On a tie the earlier trial; nothing else of any trial is touched."""
    study = make_sweep(tmp_path, keeping(keep, metric))
    deleted = prune_checkpoints(study, tmp_path)
    assert deleted == [number for number in range(5) if number not in best]
    assert left(tmp_path) == {
        number: list(FILES) if number == 5 else [FILES[0]] if number in best else [] for number in range(6)
    }
    for number in range(6):
        for name in OTHERS:
            assert (trial_folder(tmp_path, number) / name).read_text() == f"{number} {name}"
    assert prune_checkpoints(study, tmp_path) == []
    assert len(list(tmp_path.glob("trials/*/attempt-0002"))) == 0, "done already: nothing is claimed again"


def test_null_keeps_all_checkpoints(tmp_path: Path) -> None:
    study = make_sweep(tmp_path, keeping(None))
    assert prune_checkpoints(study, tmp_path) == []
    assert left(tmp_path) == {key: list(FILES) for key in range(6)}


def test_better_trial_replaces_a_kept_one(tmp_path: Path) -> None:
    study = make_sweep(tmp_path, keeping(1))
    prune_checkpoints(study, tmp_path)
    report(study, 5, 0.95)
    study.complete(5)
    assert prune_checkpoints(study, tmp_path) == [1]
    assert left(tmp_path)[5] == [FILES[0]]


@pytest.mark.parametrize("at", [0, 1, 4, 9])
def test_kill_between_deletions_leaves_the_rest(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    unlink, done = os.unlink, 0

    def killing(path: str, **options: int) -> None:
        nonlocal done
        if "checkpoint" in str(path):
            if done == at:
                raise Killed
            done += 1
        unlink(path, **options)

    study = make_sweep(tmp_path, keeping(1))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "unlink", killing)
        prune_checkpoints(study, tmp_path)
    prune_checkpoints(study, tmp_path)
    assert left(tmp_path) == {0: [], 1: [FILES[0]], 2: [], 3: [], 4: [], 5: list(FILES)}


def test_worker_of_an_ended_trial_loses_its_lock(tmp_path: Path) -> None:
    """Otherwise the checkpoint would come back and stay."""
    study = make_sweep(tmp_path, keeping(1))
    running, ended = (TrialLock.claim(trial_folder(tmp_path, number)) for number in (5, 4))
    prune_checkpoints(study, tmp_path)
    with pytest.raises(StaleAttemptError):
        ended.check()
    running.check()


def test_trial_without_folder_is_skipped(tmp_path: Path) -> None:
    study = make_sweep(tmp_path, keeping(1))
    shutil.rmtree(trial_folder(tmp_path, 4))
    prune_checkpoints(study, tmp_path)
    assert not trial_folder(tmp_path, 4).exists()


def test_need_counts_running_and_kept_checkpoints() -> None:
    one = disk_need(keeping(3), 10**8, concurrent=1).each
    assert one == pytest.approx(1.2e9, rel=0.01)  # weights and two moments, four bytes each
    assert disk_need(keeping(3), 10**8, concurrent=2) == DiskNeed(one, (3 * 2 + 3) * one)
    assert disk_need(keeping(None), 10**8, concurrent=2) == DiskNeed(one, (3 * 2 + 7) * one)  # of nine trials
    assert disk_need(keeping(20), 10**8, concurrent=99) == DiskNeed(one, (3 * 9 + 9) * one)


def test_need_is_shown_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 20_000_000_000))
    new = tmp_path / "not" / "there"
    assert check_disk(new, DiskNeed(10**8, 12 * 10**8)) == "checkpoints: up to 1.2 GB (100 MB each); 20.0 GB are free"
    with pytest.raises(StorageError) as error:
        check_disk(new, DiskNeed(10**9, 21 * 10**9))
    assert str(error.value) == (
        f"{new}: checkpoints: up to 21.0 GB (1.0 GB each); 20.0 GB are free; free some space, use --out on another "
        "disk, or lower storage.keep or resources.slots"
    )
    assert not new.exists()
    (own := trial_folder(tmp_path, 0)).mkdir(parents=True)
    with (own / "checkpoint.pt").open("wb") as file:
        file.truncate(2 * 10**9)  # a sweep that resumes has some of it already
    check_disk(tmp_path, DiskNeed(10**9, 21 * 10**9))


def test_evaluating_a_deleted_checkpoint_is_refused(here: Path, trial: Path) -> None:
    (trial / "checkpoint.pt").unlink()
    for source in ("trial", "trial/checkpoint.pt"):
        said = refused(here, "evaluate", source)
        assert said.startswith(
            f"{source}: the trial has no checkpoint any more: a sweep keeps those of its best trials"
        )
        assert "`sweep train trial/config.yaml`" in said.replace("\n", " ")
    (trial / "predictions.json").unlink()
    assert complaint(sweep("evaluate", "trial")).startswith("trial: the trial has no checkpoint yet; train it first")
