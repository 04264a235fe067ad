"""A run that is asked to end writes a checkpoint at once and goes on bit for bit, wherever it was asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.runtime import system_metrics as usage
from model.training import metrics_log as curve
from model.training import trainer as train
from model.training.trainer import Trainer, TrialInterrupted, fit
from tests.model.common import as_two_workers
from tests.model.trials import CONFIG, DROPOUT, TWO, KilledError, Trial, history, kill_after, same_end

RARE = CONFIG.model_copy(update={"checkpoint_steps": 1000})
TRIAL = Trial(model={"lora": DROPOUT}, tasks=TWO, train=RARE.model_copy(update={"batch_size": 16, "token_budget": 400}))


def asked_after(times: int) -> Callable[[], bool]:
    """Asked to end at the question of this number, as a flag that was set, and from then on."""
    count = 0

    def asked() -> bool:
        nonlocal count
        count += 1
        return count > times

    return asked


def run(trial: Trial, models: Path, corpus: Shards, folder: Path, asked: Callable[[], bool]) -> None:
    model, data = trial.start(models, corpus)
    fit(model, data, trial.train, trial.tasks, trial.seed, folder, lambda *_: None, asked)


def questions(trial: Trial, models: Path, corpus: Shards, folder: Path) -> list[str]:
    """Where an undisturbed run asks: in a step, or between steps."""
    found: list[str] = []
    model, data = trial.start(models, corpus)
    trainer = Trainer(model, data, trial.train, trial.tasks, trial.seed, folder)

    def asked() -> bool:
        steps = trainer.state.total_steps
        found.append(f"{trainer.state.epoch}/{trainer.state.step}/{steps}{'' if model.training else ' evaluating'}")
        return False

    trainer.interrupted = asked
    trainer.resume()
    while not trainer.is_over():
        trainer.train_epoch()
        trainer.finish_epoch()
    trainer.finish()
    return found


@pytest.fixture(scope="module")
def whole(models: Path, corpus: Shards, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An undisturbed run, and where it asked."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, questions(TRIAL, models, corpus, folder)


def test_a_run_asks_at_every_step_and_between_the_batches_of_an_evaluation(whole: tuple[Path, list[str]]) -> None:
    folder, places = whole
    steps = history(folder)[-1][1]["steps"]
    assert len({place for place in places if "evaluating" not in place}) > steps
    assert places.count(f"0/{steps // 2}/{steps // 2} evaluating") >= 2


def test_a_run_that_is_asked_to_end_goes_on_bit_for_bit(
    whole: tuple[Path, list[str]], models: Path, corpus: Shards, tmp_path: Path
) -> None:
    """At every place where it asks; nothing that was done is done again, but for an evaluation that was cut off."""
    folder, places = whole
    for place in range(len(places)):
        own = tmp_path / str(place)
        with pytest.raises(TrialInterrupted, match="ended after step"):
            run(TRIAL, models, corpus, own, asked_after(place))
        if place > 0:
            progress = checkpoint.load(own / checkpoint.FILE)["progress"]
            assert progress["total_steps"] == int(places[place].split()[0].split("/")[2]) + in_step(places, place)
        run(TRIAL, models, corpus, own, lambda: False)
        assert same_end(own, folder), places[place]


def in_step(places: list[str], place: int) -> int:
    """1 where a question is asked in a step, which is then finished: the next one finds it counted."""
    here, after = places[place], places[place + 1] if place + 1 < len(places) else places[place]
    return int("evaluating" not in here and int(after.split()[0].split("/")[2]) > int(here.split()[0].split("/")[2]))


def test_after_the_last_step_of_an_epoch_only_the_evaluation_is_left(
    whole: tuple[Path, list[str]], models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, places = whole
    last = [place for place, name in enumerate(places) if "evaluating" in name][-2]
    with pytest.raises(TrialInterrupted):
        run(TRIAL, models, corpus, tmp_path, asked_after(last))
    progress = checkpoint.load(tmp_path / checkpoint.FILE)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, progress["total_steps"] // 2)
    kill_after(monkeypatch, 0)  # no step is left to be made
    run(TRIAL, models, corpus, tmp_path, lambda: False)
    assert same_end(tmp_path, folder)


def test_asked_before_the_first_step(models: Path, corpus: Shards, tmp_path: Path) -> None:
    with pytest.raises(TrialInterrupted):
        run(TRIAL, models, corpus, tmp_path, lambda: True)
    assert not (tmp_path / checkpoint.FILE).exists()


def test_the_time_of_all_attempts_counts(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that goes on by a second with every optimizer step, a trial of two attempts takes its steps."""
    now, original = 0.0, Trainer._optimizer_step

    def step(self: Trainer, *args: Any) -> None:
        nonlocal now
        now += 1
        original(self, *args)

    monkeypatch.setattr(Trainer, "_optimizer_step", step)
    monkeypatch.setattr("model.training.trainer.time.monotonic", lambda: now)
    with pytest.raises(TrialInterrupted):
        run(TRIAL, models, corpus, tmp_path, asked_after(3))
    progress = checkpoint.load(tmp_path / checkpoint.FILE)["progress"]
    assert 0 < progress["seconds"] == progress["step"]  # in the middle of an epoch
    now += 1000  # in the queue
    run(TRIAL, models, corpus, tmp_path, lambda: False)
    progress = checkpoint.load(tmp_path / checkpoint.FILE)["progress"]
    assert progress["seconds"] == progress["total_steps"]


@pytest.mark.parametrize(("seconds", "saves"), [(1e-9, True), (3600.0, False)])
def test_time_makes_checkpoints_which_change_nothing(
    seconds: float,
    saves: bool,
    whole: tuple[Path, list[str]],
    models: Path,
    corpus: Shards,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []
    original = Trainer.save

    def save(self: Trainer) -> None:
        made.append(self.state.total_steps)
        original(self)

    monkeypatch.setattr(Trainer, "save", save)
    timed = TRIAL.train.model_copy(update={"checkpoint_seconds": seconds})
    Trial(model=TRIAL.model, tasks=TWO, train=timed).run(models, corpus, tmp_path)
    steps = history(tmp_path)[-1][1]["steps"]
    half = steps // 2
    every = [*range(1, half + 1), half, *range(half + 1, steps + 1), steps]
    assert made == (every if saves else [half, steps])
    assert same_end(tmp_path, whole[0])


SHARED = Trial(model={"lora": DROPOUT}, train=RARE.model_copy(update={"batch_size": 16}))
CUTS = [(1, 2), (0, 5), (1, 99)]  # (the rank that is asked to end, after so many questions)


def worker(rank: int, world: int, models: Path, folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=world)
    shards = Shards(folder)
    run(SHARED, models, shards, out / "whole", lambda: False)
    often = Trial(model=SHARED.model, train=SHARED.train.model_copy(update={"checkpoint_seconds": 1e-9 + 99 * rank}))
    run(often, models, shards, out / "often", lambda: False)
    for which, times in CUTS:
        own, ended = out / f"{which}-{times}", ""
        try:
            run(SHARED, models, shards, own, asked_after(times) if rank == which else lambda: False)
        except TrialInterrupted as error:
            ended = str(error)
        (out / f"{which}-{times}-rank-{rank}").write_text(ended)
        run(SHARED, models, shards, own, lambda: False)
    dist.destroy_process_group()


def test_several_workers_end_after_the_same_step(models: Path, corpus: Shards, tmp_path: Path) -> None:
    """Whichever of them was asked; and the clock of the first decides, though theirs differ."""
    as_two_workers(worker, 2, models, corpus.folder, tmp_path)
    for which, times in CUTS:
        said = [(tmp_path / f"{which}-{times}-rank-{rank}").read_text() for rank in (0, 1)]
        assert said[0] == said[1]
        assert bool(said[0]) == (times < 99)
        assert same_end(tmp_path / f"{which}-{times}", tmp_path / "whole")
    assert same_end(tmp_path / "often", tmp_path / "whole")
    attempts = [checkpoint.load(tmp_path / name / checkpoint.FILE)["attempt"] for name in ("whole", "1-2")]
    assert attempts == [1, 2]


def test_a_kill_and_a_resume_leave_a_curve_without_holes(
    models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Repeated steps are told again, with the same values; readers drop them."""
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    Trial(model=TRIAL.model).run(models, corpus, tmp_path / "whole")
    for steps in (2, 4, 5):
        with monkeypatch.context() as patch, pytest.raises(KilledError):
            kill_after(patch, steps)
            Trial(model=TRIAL.model).run(models, corpus, tmp_path / "killed")
    Trial(model=TRIAL.model).run(models, corpus, tmp_path / "killed")

    def points(folder: Path) -> dict[tuple[int, str], list[float]]:
        found: dict[tuple[int, str], list[float]] = {}
        for line in curve.lines((folder / curve.FILE).read_bytes()):
            for name, value in line["values"].items():
                if name not in ("seconds", "data_wait") and not name.startswith(usage.PREFIX):
                    found.setdefault((line["step"], name), []).append(value)
        return found

    one, other = points(tmp_path / "whole"), points(tmp_path / "killed")
    assert one.keys() == other.keys()
    assert {place: [values[0]] for place, values in other.items()} == one
    assert all(len(set(values)) == 1 for values in other.values())
    assert any(len(values) > 1 for values in other.values())
