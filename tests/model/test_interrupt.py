"""A run that is asked to end writes a checkpoint at once and resumes bit for bit, wherever it was asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.runtime.system_metrics import PREFIX
from model.training import trainer as training
from model.training.metrics_log import MetricsLog
from model.training.trainer import Trainer, TrialInterrupted, fit, never
from tests.model.common import as_two_workers
from tests.model.trials import CONFIG, DROPOUT, TWO, KilledError, Trial, history, kill_after, same_end

RARE = CONFIG.model_copy(update={"checkpoint_steps": 1000})
TRIAL = Trial(model={"lora": DROPOUT}, tasks=TWO, train=RARE.model_copy(update={"batch_size": 16, "token_budget": 400}))
Place = tuple[int, int, int, bool]  # epoch, step, total_steps, whether it evaluates


def asked_after(times: int) -> Callable[[], bool]:
    """Return a flag that is set at the question of this number, and from then on."""
    count = 0

    def asked() -> bool:
        nonlocal count
        count += 1
        return count > times

    return asked


def run(trial: Trial, models: Path, corpus: Shards, folder: Path, asked: Callable[[], bool]) -> None:
    model, data = trial.start(models, corpus)
    fit(model, data, trial.train, trial.tasks, trial.seed, folder, lambda *_: None, asked)


@pytest.fixture(scope="module")
def whole(models: Path, corpus: Shards, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Place]]:
    """An undisturbed run, and the places where it asks whether to end."""
    folder, places = tmp_path_factory.mktemp("whole"), []
    trainer = TRIAL.trainer(models, corpus, folder)

    def asked() -> bool:
        progress = trainer.progress
        places.append((progress.epoch, progress.step, progress.total_steps, not trainer.model.training))
        return False

    trainer.interrupted = asked
    trainer.resume()
    while not trainer.is_over():
        trainer.train_epoch()
        trainer.finish_epoch()
    trainer.folder.finish()
    steps = history(folder)[-1][1]["steps"]
    assert len({place for place in places if not place[3]}) > steps, "at every step"
    assert places.count((0, steps // 2, steps // 2, True)) >= 2, "between the batches of an evaluation"
    return folder, places


def kinds(places: list[Place]) -> dict[tuple[int, bool], int]:
    """Return the index of the last place of each kind: (epoch, whether it evaluates)."""
    return {(place[0], place[3]): index for index, place in enumerate(places)}


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])
def test_interrupted_run_resumes_bit_for_bit(
    every: bool, whole: tuple[Path, list[Place]], models: Path, corpus: Shards, tmp_path: Path
) -> None:
    """Nothing that was done is repeated, except for an evaluation that was interrupted."""
    folder, places = whole
    for index in range(len(places)) if every else [0, 1, *kinds(places).values()]:
        path = tmp_path / str(index)
        with pytest.raises(TrialInterrupted, match="ended after step"):
            run(TRIAL, models, corpus, path, asked_after(index))
        assert (path / checkpoint.FILE).exists() is (index > 0)
        if index > 0:
            here, after = places[index], places[min(index + 1, len(places) - 1)]
            made = here[2] + (not here[3] and after[2] > here[2])  # a question in a step comes before its end
            assert checkpoint.load(path / checkpoint.FILE)["progress"]["total_steps"] == made
        run(TRIAL, models, corpus, path, never)
        assert same_end(path, folder), places[index]


def test_interrupted_evaluation_repeats_no_step(
    whole: tuple[Path, list[Place]], models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, places = whole
    with pytest.raises(TrialInterrupted):
        run(TRIAL, models, corpus, tmp_path, asked_after(kinds(places)[1, True] - 1))
    progress = checkpoint.load(tmp_path / checkpoint.FILE)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, progress["total_steps"] // 2)
    kill_after(monkeypatch, 0)
    run(TRIAL, models, corpus, tmp_path, never)
    assert same_end(tmp_path, folder)


def test_seconds_count_all_attempts(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that advances by a second with every optimizer step."""
    now, original = 0.0, Trainer.optimizer_step

    def step(self: Trainer, *args: Any) -> None:
        nonlocal now
        now += 1
        original(self, *args)

    monkeypatch.setattr(Trainer, "optimizer_step", step)
    monkeypatch.setattr("model.training.trainer.time.monotonic", lambda: now)
    with pytest.raises(TrialInterrupted):
        run(TRIAL, models, corpus, tmp_path, asked_after(3))
    progress = checkpoint.load(tmp_path / checkpoint.FILE)["progress"]
    assert 0 < progress["seconds"] == progress["step"]  # in the middle of an epoch
    now += 1000  # in the queue
    run(TRIAL, models, corpus, tmp_path, never)
    progress = checkpoint.load(tmp_path / checkpoint.FILE)["progress"]
    assert progress["seconds"] == progress["total_steps"]


def test_checkpoints_by_time_change_nothing(
    whole: tuple[Path, list[Place]], models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    original = Trainer.save
    monkeypatch.setattr(Trainer, "save", lambda self: saved.append(self.progress.total_steps) or original(self))
    timed = TRIAL.train.model_copy(update={"checkpoint_seconds": 1e-9})
    Trial(model=TRIAL.model, tasks=TWO, train=timed).run(models, corpus, tmp_path)
    steps = history(tmp_path)[-1][1]["steps"]
    assert saved == sorted([*range(1, steps + 1), steps // 2, steps])
    assert same_end(tmp_path, whole[0])


SHARED = Trial(model={"lora": DROPOUT}, train=RARE.model_copy(update={"batch_size": 16, "epochs": 1}))
CUTS = [(1, 2), (1, 99)]  # (the rank that is asked to end, after so many questions)


def worker(rank: int, world: int, models: Path, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=world)
    shards = Shards(folder)
    run(SHARED, models, shards, out / "whole", never)
    often = Trial(model=SHARED.model, train=SHARED.train.model_copy(update={"checkpoint_seconds": 1e-9 + 99 * rank}))
    run(often, models, shards, out / "often", never)
    for which, times in CUTS:
        path, ended = out / f"{which}-{times}", ""
        try:
            run(SHARED, models, shards, path, asked_after(times) if rank == which else never)
        except TrialInterrupted as signal:
            ended = str(signal)
        (out / f"{which}-{times}-rank-{rank}").write_text(ended)
        run(SHARED, models, shards, path, never)
    dist.destroy_process_group()


def test_all_workers_end_after_the_same_step(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """Whichever of them is asked; and the clock of rank 0 makes the checkpoints, though theirs differ."""
    as_two_workers(worker, 2, models, corpus.folder, tmp_path)
    for which, times in CUTS:
        ends = [(tmp_path / f"{which}-{times}-rank-{rank}").read_text() for rank in (0, 1)]
        assert ends[0] == ends[1]
        assert bool(ends[0]) == (times < 99)
        assert same_end(tmp_path / f"{which}-{times}", tmp_path / "whole")
    assert same_end(tmp_path / "often", tmp_path / "whole")
    attempts = [checkpoint.load(tmp_path / name / checkpoint.FILE)["attempt"] for name in ("whole", "1-2")]
    assert attempts == [1, 2]


def test_killed_run_leaves_no_gap_in_the_metrics_log(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated steps are logged again with the same values."""
    monkeypatch.setattr(training, "LOG_EVERY", 1)
    Trial(model=TRIAL.model).run(models, corpus, tmp_path / "whole")
    for steps in (2, 5):
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            kill_after(patch, steps)
            Trial(model=TRIAL.model).run(models, corpus, tmp_path / "killed")
    Trial(model=TRIAL.model).run(models, corpus, tmp_path / "killed")

    def points(folder: Path) -> dict[tuple[int, str], list[float]]:
        values: dict[tuple[int, str], list[float]] = {}
        for line in MetricsLog(folder).lines():
            for name, value in line.values.items():
                if name not in ("seconds", "data_wait") and not name.startswith(PREFIX):
                    values.setdefault((line.step, name), []).append(value)
        return values

    expected, killed = points(tmp_path / "whole"), points(tmp_path / "killed")
    assert {key: [values[0]] for key, values in killed.items()} == expected
    assert all(len(set(values)) == 1 for values in killed.values())
    assert max(map(len, killed.values())) > 1
