"""Frozen passes of teachers: which there are, that each is computed once, and what a kill leaves."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from data.loading import teacher_files as files
from data.preparation.build import prepare
from data.shards.dataset import Shards
from sweep.config.schema import Config
from sweep.execution.trial import build
from sweep.preflight import cache_passes as frozen
from sweep.preflight.cache_passes import compute, described, folders_for, needs
from sweep.preflight.teacher_pass import need_of
from tests.data.common import corpus
from tests.sweep.common import sweep
from tests.sweep.passes import config as any_config
from tests.sweep.passes import in_this_process, killed_and_continued

DIALOGUE = "T:question C:change T:other C:neutral"  # without sound, so that nothing else is computed


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return prepare(corpus([DIALOGUE] * 6), tmp_path_factory.mktemp("corpus") / "shards")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return in_this_process(monkeypatch)


def config(models: Path, shards: Shards, space: dict[str, Any] | None = None, **changed: Any) -> Config:
    """Of a distillation between texts."""
    model = {"modality": "text", "trainable": "lora"} | changed.pop("model", {})
    losses = {"distillation": 0.5} | changed.pop("losses", {})
    return any_config(models, shards, space, model=model, train={"losses": losses}, **changed)


def folder_of(config: Config, cache: Path) -> Path | None:
    """Where a trial reads what its teacher says."""
    found = folders_for(config, cache)
    assert found["features"] is None
    return Path(found["taught"]) if found["taught"] else None


def test_only_a_distillation_without_hidden_states_reads_files(models: Path, shards: Shards, tmp_path: Path) -> None:
    def has(**changed: Any) -> bool:
        return need_of(config(models, shards, **changed), tmp_path) is not None

    assert has()
    assert not has(losses={"distillation": 0.0})
    assert not has(losses={"hidden": 0.1})
    assert not has(losses={"distillation": 0.0, "hidden": 0.1})
    assert not has(storage={"features": "live"})


def test_all_that_the_space_may_ask_for_is_counted(models: Path, shards: Shards, tmp_path: Path) -> None:
    def count(space: dict[str, Any]) -> int:
        return len(needs(config(models, shards, space), tmp_path))

    assert count({}) == 1
    assert count({"model.lora.rank": [2, 4], "train.learning_rate": {"low": 1e-4, "high": 1e-2}}) == 1
    assert count({"train.losses.distillation": {"low": 0.0, "high": 1.0}}) == 1  # whatever the weight
    assert count({"train.losses.distillation": [0.0, 0.1, 0.5]}) == 1
    assert count({"train.losses.next_token": {"low": 0.0, "high": 1.0}}) == 1
    assert count({"train.losses.hidden": [0.0, 0.5], "train.losses.temperature": [1.0, 2.0]}) == 2
    assert count({"model.precision": ["float32", "bfloat16"], "data.history": [0, 1, 2]}) == 6
    assert count({"data.last_text": ["given", "omitted"], "tasks.response": {"low": 0.0, "high": 1.0}}) == 4
    assert count({"model.prompt.separator": ["\n", " "], "model.llm.max_text_tokens": [20, 512]}) == 4
    assert count({"train.losses.temperature": {"low": 1.0, "high": 2.0}}) == 0  # such trials compute by themselves
    assert count({"model.prompt.format": ["plain", "chat"]}) == 1  # its tokenizer has no template
    # What does not fit is no reason to stop: should it be drawn, the trial says so.
    assert count({"model.llm.max_text_tokens": [1, 512]}) == 1


def test_each_pass_is_computed_once_and_shared_by_trials_and_sweeps(
    models: Path, shards: Shards, tmp_path: Path, made: list[str]
) -> None:
    one = config(models, shards, {"model.lora.rank": [2, 4], "train.losses.distillation": [0.0, 0.5]})
    assert folder_of(config(models, shards), tmp_path) is None
    said: list[str] = []
    compute(one, tmp_path, said.append)
    assert len(made) == 1
    assert "of a worker, which spares the trials about " in said[1]
    assert [
        said[0].startswith("teacher "),
        "1 of 1 parts to compute" in said[0],
        "s, which spares the trials" in said[-1],
    ] == [True] * 3
    folder = folder_of(config(models, shards), tmp_path)
    assert folder is not None
    assert folder_of(config(models, shards, losses={"distillation": 0.0}), tmp_path) is None
    compute(one, tmp_path, said.append)
    assert (len(made), len(said)) == (1, 3)
    # Another task lies beside it, and what is there already is not computed again.
    compute(config(models, shards, tasks={"response": 1.0}), tmp_path, said.append)
    assert len(made) == 2
    assert {path.parent for path in (tmp_path / "teacher").rglob("*.arrow")} == {folder}
    [need] = needs(one, tmp_path)
    assert "there already" in described(need)
    [path] = [folder / part.name for part in need.parts]
    assert abs(need.bytes(need.parts) / path.stat().st_size - 1) < 0.2


def test_little_work_is_not_worth_a_process(
    models: Path, shards: Shards, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "SMALL", 1e11)
    compute(config(models, shards), tmp_path, lambda text: None)
    assert made == []
    assert folder_of(config(models, shards), tmp_path) is not None


def test_a_trial_is_given_the_files(models: Path, shards: Shards, tmp_path: Path, made: list[str]) -> None:
    one = config(models, shards)
    compute(one, tmp_path, lambda text: None)
    for reader in ("local", "ray"):  # words come from the index alone
        _, data = build(one, reader, ("train", "val"), "cpu", taught=folder_of(one, tmp_path))
        for split, taught in (("train", True), ("val", False)):
            [examples] = data.read(split, [[0, 1, 2]])
            assert [example.taught is not None for example in examples] == [taught] * 3
        data.close()


def test_a_kill_loses_the_part_that_was_under_way(
    models: Path, shards: Shards, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PART_TOKENS", 100)
    one = config(models, shards, data={"shards": str(shards.folder), "history": 3})
    need = killed_and_continued(one, tmp_path, files, made, monkeypatch)
    assert folder_of(one, tmp_path) == need.folder


def test_the_cache_is_listed_and_bounded(models: Path, shards: Shards, tmp_path: Path, made: list[str]) -> None:
    cache = tmp_path / "cache"
    space = {"train.losses.temperature": [1.0, 2.0]}
    compute(config(models, shards, space), cache, lambda text: None)
    old, new = (need.folder for need in needs(config(models, shards, space), cache))
    os.utime(old / "about.json", (time.time() - 40 * 86400,) * 2)
    listed = sweep("cache", "ls", cache)
    assert listed.code == 0
    assert all(word in listed.out for word in (old.name, new.name, "teacher", "temperature 2.0"))
    assert sweep("cache", "prune", cache, "--days", 30).code == 0
    assert (old.exists(), new.exists()) == (False, True)
    assert sweep("cache", "prune", cache, "--max-gb", 0).code == 0
    assert new.exists()  # it may be in use
