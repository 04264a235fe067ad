"""Frozen passes of a sweep: which there are, that each is computed once, and what a kill leaves."""

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock, Timeout

from data.errors import StorageError
from data.loading import feature_files as files
from data.preparation.build import prepare
from data.shards.dataset import Shards
from data.shards.store import LOCK
from model.encoders.base import SpeechEncoder
from sweep.config.schema import Config
from sweep.preflight import cache_passes as frozen
from sweep.preflight import encoder_pass as features
from sweep.preflight.cache_passes import cache_of, compute, described, folders_for, needs
from sweep.preflight.encoder_pass import need_of
from tests.data.common import corpus
from tests.sweep.common import FROZEN, TUNED, sweep
from tests.sweep.passes import config, in_this_process, killed_and_continued

DIALOGUE = "T:question! C:change! T:other C:neutral!"
UPPER = f"{FROZEN}+encoder.*.layers.1.*"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return prepare(corpus([DIALOGUE] * 6), tmp_path_factory.mktemp("corpus") / "shards")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return in_this_process(monkeypatch)


def folder_of(config: Config, cache: Path) -> Path | None:
    """Where a trial reads its features."""
    found = folders_for(config, cache)["features"]
    return Path(found) if found else None


def kept(cache: Path) -> dict[Path, bytes]:
    """The files of a cache."""
    return {path.relative_to(cache): path.read_bytes() for path in cache.rglob("*.arrow")}


def test_only_what_is_frozen_and_hears_clips_as_they_are_has_features(
    models: Path, shards: Shards, tmp_path: Path
) -> None:
    def has(**changed: Any) -> bool:
        return need_of(config(models, shards, **changed), tmp_path) is not None

    base = config(models, shards).model.model_dump()
    assert has()
    assert has(data={"shards": str(shards.folder), "sound": "zeroed"})
    assert not has(model=base | {"modality": "text"})
    assert not has(model=base | {"trainable": TUNED})
    assert not has(storage={"features": "live"})
    upper = base | {"trainable": UPPER}
    assert has(model=upper)
    assert not has(model=upper | {"trainable": f"{FROZEN}+encoder.*.layers.*"})
    assert not has(model=upper | {"encoder": base["encoder"] | {"dropout": 0.1}})
    assert not has(model=upper | {"encoder": base["encoder"] | {"spec_augment": 0.1}})
    for augment in ({"speeds": [0.9, 1.1]}, {"noise_db": [0, 20]}):
        assert not has(data={"shards": str(shards.folder), "augment": augment})
        assert not has(model=upper, data={"shards": str(shards.folder), "augment": augment})


def test_all_that_the_space_may_ask_for_is_counted(models: Path, shards: Shards, tmp_path: Path) -> None:
    space = {
        "model.modality": ["speech", "text"],
        "model.trainable": [FROZEN, TUNED],
        "model.adapter.window": {"low": 4, "high": 8, "step": 2},
        "model.adapter.stride": [2, 4],
        "model.lora.rank": [2, 4, 8],
        "data.sound": ["recorded", "shuffled", "zeroed"],
    }
    found = needs(config(models, shards, space), tmp_path)
    assert {(need.recipe.sound, need.recipe.pool) for need in found} == {
        (sound, (window, stride)) for sound in ("recorded", "zeroed") for window in (4, 6, 8) for stride in (2, 4)
    }
    assert len({need.folder for need in found}) == len(found)
    assert needs(config(models, shards, {"model.trainable": [TUNED]}, model={"trainable": TUNED}), tmp_path) == []
    continuous = {"data.snr_db": {"low": 0.0, "high": 9.0}}
    assert needs(config(models, shards, continuous), tmp_path) == []  # such trials encode by themselves


def test_an_axis_that_is_not_always_drawn_leaves_the_other_trials_their_features(
    models: Path, shards: Shards, tmp_path: Path
) -> None:
    space = {
        "model.trainable": [FROZEN, UPPER, TUNED],
        "model.encoder.spec_augment": {"low": 0.1, "high": 0.2, "when": {"model.trainable": [TUNED]}},
        "model.encoder.dropout": {"low": 0.0, "high": 0.2},
        "data.sound": ["recorded", "noisy"],
        "data.snr_db": {"low": 0.0, "high": 9.0, "when": {"data.sound": ["noisy"]}},
    }
    found = needs(config(models, shards, space), tmp_path)
    assert {(need.recipe.layers, need.recipe.pool, need.recipe.sound) for need in found} == {
        (0, (8, 4), "recorded"),
        (1, None, "recorded"),
    }
    assert [need.describe() for need in found if need.recipe.layers] == ["frozen whisper up to layer 1 of 2"]


def test_each_pass_is_computed_once_and_shared_by_trials_and_sweeps(
    models: Path, shards: Shards, tmp_path: Path, made: list[str]
) -> None:
    one = config(models, shards, {"model.lora.rank": [2, 4], "model.modality": ["speech", "text"]})
    assert folder_of(config(models, shards), tmp_path) is None
    said: list[str] = []
    compute(one, tmp_path, said.append)
    assert len(made) == 1
    assert "of a worker, which spares the trials about " in said[1]
    assert ["1 of 1 parts to compute" in said[0], "s, which spares the trials" in said[-1]] == [True, True]
    folder = folder_of(config(models, shards), tmp_path)
    assert folder is not None
    compute(one, tmp_path, said.append)
    compute(config(models, shards, {"train.learning_rate": [1e-3, 2e-3]}), tmp_path, said.append)
    assert (len(made), len(said)) == (1, 3)
    assert "there already" in described(needs(one, tmp_path)[0])
    [need] = needs(one, tmp_path)
    written = sum(path.stat().st_size for path in folder.glob("features-*.arrow"))
    assert abs(need.bytes(need.parts) / written - 1) < 0.5  # of small files


def test_what_one_pass_of_an_encoder_yields_is_computed_in_one(
    models: Path, shards: Shards, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    states = SpeechEncoder.states
    monkeypatch.setattr(SpeechEncoder, "states", lambda *args: encoded.append(1) or states(*args))
    monkeypatch.setattr(frozen, "FEW", 1)
    space = {"model.trainable": [FROZEN, UPPER], "model.adapter.window": [4, 8], "model.lora.rank": [2, 4]}
    said: list[str] = []
    compute(config(models, shards, space), tmp_path / "both", said.append)
    clips = sum(n_samples > 0 for n_samples in shards.columns["n_samples"])
    assert (len(encoded), len(made)) == (2 + clips, 3)  # two beforehand, to say how long it takes
    assert sum("once for all trials" in line for line in said) == 3
    for trainable, window in ((FROZEN, 4), (FROZEN, 8), (UPPER, 4)):
        alone = config(models, shards, {"model.trainable": [trainable], "model.adapter.window": [window]})
        compute(alone, tmp_path / "alone", said.append)
    assert kept(tmp_path / "both") == kept(tmp_path / "alone") != {}


def test_what_a_pass_cannot_hold_at_once_is_computed_one_by_one(
    models: Path, shards: Shards, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"model.trainable": [FROZEN, UPPER], "model.adapter.window": [4, 8]}
    compute(config(models, shards, space), tmp_path / "at once", lambda text: None)
    monkeypatch.setattr(features, "LARGE", 0)
    jobs: list[Any] = []
    here = frozen.ray_jobs
    monkeypatch.setattr(frozen, "ray_jobs", lambda work, **options: jobs.extend(work) or here(work, **options))
    compute(config(models, shards, space), tmp_path / "apart", lambda text: None)
    assert [len(job.recipes) for job in jobs] == [1, 1, 1]
    assert kept(tmp_path / "at once") == kept(tmp_path / "apart") != {}


def test_needs_that_lack_different_parts_get_what_they_lack(
    models: Path, shards: Shards, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PART_SAMPLES", 10_000)
    files._parts.cache_clear()
    both = config(models, shards, {"model.trainable": [FROZEN, UPPER]})
    compute(both, tmp_path, lambda text: None)
    whole, upper = sorted(needs(both, tmp_path), key=lambda need: need.recipe.layers)
    assert whole.work(1) > upper.work(1) > 0  # which is spared the layers that train
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*.arrow")}
    gone = {whole.folder / whole.parts[0].name, upper.folder / upper.parts[0].name, upper.folder / upper.parts[1].name}
    for path in gone:
        path.unlink()
    made.clear()
    compute(both, tmp_path, lambda text: None)
    assert sorted(made) == sorted(f"{path.parent.name}/{path.name}" for path in gone)
    for path, (content, written) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == written) == (path not in gone)
    files._parts.cache_clear()


def test_a_need_that_is_met_makes_no_other_sweep_wait(
    models: Path, shards: Shards, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute(config(models, shards), tmp_path, lambda text: None)
    both = config(models, shards, {"model.trainable": [FROZEN, UPPER]})
    met, lacking = sorted(needs(both, tmp_path), key=lambda need: len(need.missing))
    tried: list[bool] = []

    def look(*args: Any) -> None:
        for need in (met, lacking):
            with contextlib.suppress(Timeout), FileLock(need.folder / LOCK, timeout=0):
                tried.append(need is met)

    monkeypatch.setattr(frozen, "_compute", look)
    compute(both, tmp_path, lambda text: None)
    assert tried == [True]


def test_a_pass_writes_only_what_is_missing(models: Path, shards: Shards, tmp_path: Path, made: list[str]) -> None:
    compute(config(models, shards), tmp_path, lambda text: None)
    [kept] = tmp_path.rglob("*.arrow")
    before = kept.stat().st_mtime_ns
    compute(config(models, shards, {"model.trainable": [FROZEN, UPPER]}), tmp_path, lambda text: None)
    assert (len(made), kept.stat().st_mtime_ns) == (2, before)


def test_little_work_is_not_worth_a_process(
    models: Path, shards: Shards, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "SMALL", 1e11)
    compute(config(models, shards), tmp_path, lambda text: None)
    assert made == []
    assert folder_of(config(models, shards), tmp_path) is not None


def test_a_kill_loses_the_part_that_was_under_way(
    models: Path, shards: Shards, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PART_SAMPLES", 10_000)
    files._parts.cache_clear()
    one = config(models, shards)
    need = killed_and_continued(one, tmp_path, files, made, monkeypatch)
    assert folder_of(one, tmp_path) == need.folder
    files._parts.cache_clear()


def test_a_full_disk_is_told_before_anything_is_computed(
    models: Path, shards: Shards, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 100

    monkeypatch.setattr(frozen.shutil, "disk_usage", lambda path: Full)
    with pytest.raises(StorageError, match=r"sweep cache prune.*storage\.features=live"):
        compute(config(models, shards), tmp_path, lambda text: None)
    assert made == []


def test_the_cache_lies_beside_the_sweep_or_where_it_is_told(models: Path, shards: Shards, tmp_path: Path) -> None:
    assert cache_of(config(models, shards), tmp_path / "runs" / "demo") == tmp_path / "runs" / "cache"
    named = config(models, shards, storage={"cache": str(tmp_path / "own")})
    assert cache_of(named, tmp_path / "runs" / "demo") == tmp_path / "own"


def test_the_cache_is_listed_and_bounded(models: Path, shards: Shards, tmp_path: Path, made: list[str]) -> None:
    cache = tmp_path / "cache"
    space = {"model.adapter.stride": [2, 4, 8], "model.trainable": [FROZEN, UPPER]}
    compute(config(models, shards, space), cache, lambda text: None)
    folders = {
        need.recipe.pool[1]: need.folder for need in needs(config(models, shards, space), cache) if need.recipe.pool
    }
    [layers] = [need for need in needs(config(models, shards, space), cache) if need.recipe.layers]
    written = sum(path.stat().st_size for path in layers.folder.glob("features-*.arrow"))
    assert 0.9 < layers.bytes(layers.parts) / written <= 1  # whole windows of Whisper
    now = time.time()
    os.utime(layers.folder / "about.json", (now - 50 * 86400, now - 50 * 86400))
    for stride, days in ((2, 40), (4, 3), (8, 0)):
        os.utime(folders[stride] / "about.json", (now - days * 86400, now - days * 86400))
    listed = sweep("cache", "ls", cache)
    assert listed.code == 0
    assert all(folder.name in listed.out for folder in (*folders.values(), layers.folder))
    assert sweep("cache", "prune", cache, "--days", 30).code == 0
    assert [stride for stride, folder in folders.items() if folder.exists()] == [4, 8]
    assert not layers.folder.exists()
    assert sweep("cache", "prune", cache, "--max-gb", 0).code == 0
    assert [stride for stride, folder in folders.items() if folder.exists()] == [8]  # it may be in use
    assert "say what may go" in sweep("cache", "prune", cache).err
    os.utime(folders[8] / "about.json", (now - 9 * 86400, now - 9 * 86400))
    with FileLock(folders[8] / LOCK):
        assert "a sweep computes it" in sweep("cache", "prune", cache, "--max-gb", 0).out
    frozen.used({"features": str(folders[8]), "taught": None})  # a trial starts that reads it
    assert sweep("cache", "prune", cache, "--max-gb", 0).code == 0
    assert folders[8].exists()
    assert "no such folder" in sweep("cache", "ls", tmp_path / "nothing").err
    assert folder_of(config(models, shards), cache) is None


def test_a_dry_run_says_what_is_computed_once(models: Path, shards: Shards, tmp_path: Path) -> None:
    path = tmp_path / "test.yaml"
    either = config(models, shards, {"model.trainable": [FROZEN, UPPER]})
    path.write_text(yaml.safe_dump(either.model_dump(mode="json")))
    outcome = sweep("run", path, "--dry-run", "--out", tmp_path / "runs" / "test")
    assert outcome.code == 0
    assert "pooled by 8 / 4: " in outcome.out
    assert "frozen whisper up to layer 1 of 2: " in outcome.out
    assert "once for all trials; 1 of 1 parts to compute" in outcome.out.replace("\n", " ")
    assert not (tmp_path / "runs").exists()
