"""A trial whose workers divide the LLM: another number of workers resumes from its checkpoints.

That a step and label scores are equal is in `test_invariance.py`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.config import TrainConfig
from model.training.trainer import fit
from tests.model.common import as_two_workers, close
from tests.model.trials import KilledError, Trial, history, kill_after

TRAIN = TrainConfig(epochs=1, batch_size=8, learning_rate=1e-4, checkpoint_steps=2)
TRIAL = Trial(model={"modality": "text", "end_of_audio": "none", "cls": "none"}, train=TRAIN)


def sharded(rank: int, models: Path, folder: Path, out: Path, steps: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous-{steps}", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        train(Shards(folder), models, out, patch, steps, lambda model: model.shard("cpu"))
    dist.destroy_process_group()


def train(
    corpus: Shards,
    models: Path,
    out: Path,
    patch: pytest.MonkeyPatch,
    steps: int | None,
    prepare: Callable[..., None] = lambda model: None,
) -> None:
    """Train, from the checkpoint in the folder on; before a further step than `steps`, the process is killed."""
    if steps is not None:
        kill_after(patch, steps)
    model, data = TRIAL.start(models, corpus)
    prepare(model)
    try:
        fit(model, data, TRIAL.train, TRIAL.tasks, TRIAL.seed, out, lambda epoch, metrics: None)
    except KilledError:
        assert steps is not None


@pytest.mark.parametrize("begins_sharded", [True, False])
def test_checkpoint_is_resumed_with_another_number_of_workers(
    begins_sharded: bool, models: Path, corpus: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, resumed = tmp_path / "alone", tmp_path / "resumed"
    resumed.mkdir()
    train(corpus, models, alone, monkeypatch, None)
    if begins_sharded:
        as_two_workers(sharded, models, corpus.folder, resumed, 3)
        train(corpus, models, resumed, monkeypatch, None)
    else:
        with monkeypatch.context() as patch:
            train(corpus, models, resumed, patch, 3)
        as_two_workers(sharded, models, corpus.folder, resumed, None)
    (_, expected), (_, found) = history(alone)[0], history(resumed)[0]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    states = [checkpoint.load(folder / "checkpoint.pt") for folder in (alone, resumed)]
    assert states[0]["progress"]["total_steps"] == states[1]["progress"]["total_steps"] > 3
    tensors, others = (state["tensors"] for state in states)
    assert tensors.keys() == others.keys()
    assert all(close(others[name], tensors[name]) for name in tensors)
