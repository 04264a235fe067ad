"""The feature cache of a sweep: what its trials request, that it is computed once, and what a kill leaves."""

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from filelock import FileLock, Timeout

from data.errors import StorageError
from data.formats import format_bytes
from data.loading import cached_arrays, feature_files, teacher_files
from data.loading.feature_files import heard_rows
from data.shards.store import LOCK
from model.encoders.base import OUTPUT, SpeechEncoder
from model.encoders.frozen_features import FeatureJob, FeatureSpec
from sweep.config.resolve import resolve
from sweep.execution.job import RETRIES
from sweep.execution.joined_cluster import ClusterError
from sweep.execution.tasks import EndedTask
from sweep.execution.trial import build
from sweep.preflight import checks, feature_cache
from sweep.preflight.cache_kinds import encoder_features, teacher_logits
from sweep.preflight.checks import building
from sweep.preflight.feature_cache import (
    ENCODER_FEATURES,
    TEACHER_LOGITS,
    CacheFolders,
    Precomputation,
    cache_folder,
    cached_folders,
    compute_here,
    compute_on_workers,
    describe,
    mark_used,
    precompute,
)
from tests.sweep.cached import UPPER, Sweeps, requests
from tests.sweep.common import FROZEN, sweep

DAY = 86400


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows with the files that are computed."""
    files: list[str] = []
    compute_here = feature_cache.compute_here

    def recorded(jobs: Sequence[Any]) -> Iterator[int]:
        for job in jobs:
            files.extend(f"{folder.name}/{job.file.name}" for folder in job.keys)
            yield from compute_here([job])

    monkeypatch.setattr(feature_cache, "compute_here", recorded)
    return files


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(feature_files, "FILE_SAMPLES", 10_000)
    monkeypatch.setattr(teacher_files, "FILE_TOKENS", 100)
    feature_files._feature_files.cache_clear()
    teacher_logits._inputs.clear()
    yield
    feature_files._feature_files.cache_clear()
    teacher_logits._inputs.clear()


def arrays(cache: Path) -> dict[Path, bytes]:
    return {path.relative_to(cache): path.read_bytes() for path in cache.rglob("*.arrow")}


def ignore(line: str) -> None:
    pass


def test_one_pass_keeps_each_layer_that_is_heard_once(sweeps: Sweeps, tmp_path: Path, computed: list[str]) -> None:
    space: dict[str, Any] = {"model.encoder.layers": ["last", 1, [0, 2], "weighted"]}
    lines: list[str] = []
    precompute(sweeps.features(space), tmp_path, lines.append)
    found = requests(sweeps.features(space), tmp_path)
    assert sorted(request.key.state for request in found) == [OUTPUT, 0, 1]
    assert len(computed) == sum(len(request.files) for request in found)
    disk = format_bytes(sum(request.kind.bytes(request, request.files) for request in found))
    assert re.fullmatch(rf".*features of whisper, layers 0, 1, 2 of 2, pooled by 8 / 4: .*, {disk}, shared.*", lines[0])
    kept = {request.key.state: request.folder for request in found}
    for layers, states in (("last", [OUTPUT]), (1, [1]), ([0, 2], [0, OUTPUT]), ("weighted", [0, 1, OUTPUT])):
        trial = resolve(sweeps.features(space).for_trial({"model.encoder.layers": layers}))
        assert cached_folders(trial, tmp_path).features == tuple(kept[state] for state in states)
    lora = {"model.trainable": ["new"], "model.encoder.lora.rank": [0, 2, 4], "model.encoder.lora.layers": [1]}
    specs = {request.key.spec for request in requests(sweeps.features(lora), tmp_path)}
    assert specs == {FeatureSpec(pool=(8, 4)), FeatureSpec(1)}
    upper = sweeps.features(
        model={"trainable": UPPER, "encoder": {"path": str(sweeps.models / "whisper"), "layers": [0, 2]}}
    )
    assert [request.key.spec for request in requests(upper, tmp_path)] == [FeatureSpec(1), FeatureSpec(state=0)]


@pytest.mark.parametrize("kind", ["features", "logits"])
def test_files_are_computed_once_for_all_sweeps(kind: str, sweeps: Sweeps, tmp_path: Path, computed: list[str]) -> None:
    make = sweeps.features if kind == "features" else sweeps.logits
    cached: list[Any] = [(), None]
    searched = make({"model.lora.rank": [2, 4], "train.learning_rate": [1e-3, 2e-3]})
    assert cached_folders(make(), tmp_path) == CacheFolders()
    lines: list[str] = []
    precompute(searched, tmp_path, lines.append)
    [request] = requests(searched, tmp_path)
    assert len(computed) == len(request.files)
    named, count = "features" if kind == "features" else "teacher logits", len(computed)
    patterns = (
        rf"feature cache: {named} of .* shared by all trials; {count} of {count} files to compute",
        r"feature cache: .* computed in [\d.]+ s, saves about \d+ \w+ of training",
    )
    assert all(map(re.fullmatch, patterns, lines)), lines
    cached[kind == "logits"] = request.folder if kind == "logits" else (request.folder,)
    assert list(cached_folders(make(), tmp_path)) == cached
    precompute(searched, tmp_path, lines.append)
    precompute(make(), tmp_path, lines.append)
    assert (len(computed), len(lines)) == (len(request.files), 2)
    assert next(describe([request])).endswith("; already computed")
    written = sum((request.folder / file.name).stat().st_size for file in request.files)
    about = 60 * sum(len(file.inputs or file.rows) for file in request.files)  # hashes and offsets
    assert abs((request.kind.bytes(request, request.files) + about) / written - 1) < 0.5  # the files are small


def test_one_forward_pass_computes_all_its_keys(
    sweeps: Sweeps, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, jobs = [], list[Any]()
    states, compute = SpeechEncoder.layer_inputs, feature_cache.compute_here
    monkeypatch.setattr(SpeechEncoder, "layer_inputs", lambda *args: encoded.append(1) or states(*args))
    monkeypatch.setattr(feature_cache, "compute_here", lambda work: jobs.extend(work) or compute(work))
    space = {"model.trainable": [FROZEN, UPPER], "model.adapter.window": [4, 8], "model.lora.rank": [2, 4]}
    lines: list[str] = []
    precompute(sweeps.features(space), tmp_path / "together", lines.append)
    clips = len(heard_rows(sweeps.shards, ("classify",), "recorded"))
    assert (len(encoded), len(computed)) == (clips, 3)
    assert [len(job.keys) for job in jobs] == [3]
    assert sum("shared by all trials" in line for line in lines) == 3
    # With too little memory for all keys at once, each has a pass of its own.
    monkeypatch.setattr(encoder_features, "MAX_SHARED_BYTES", 0)
    jobs.clear()
    precompute(sweeps.features(space), tmp_path / "apart", ignore)
    assert [len(job.keys) for job in jobs] == [1, 1, 1]
    for trainable, window in ((FROZEN, 4), (FROZEN, 8), (UPPER, 4)):
        alone = {"model.trainable": [trainable], "model.adapter.window": [window]}
        precompute(sweeps.features(alone), tmp_path / "alone", ignore)
    assert arrays(tmp_path / "together") == arrays(tmp_path / "apart") == arrays(tmp_path / "alone") != {}


@pytest.mark.usefixtures("small_files")
def test_requests_get_exactly_the_files_they_lack(sweeps: Sweeps, tmp_path: Path, computed: list[str]) -> None:
    both = sweeps.features({"model.trainable": [FROZEN, UPPER]})
    precompute(both, tmp_path, ignore)
    whole, upper = sorted(requests(both, tmp_path), key=lambda request: request.key.layers)
    assert whole.kind.work(whole, 1) > upper.kind.work(upper, 1) > 0  # the upper layers are not computed
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*.arrow")}
    gone = {whole.folder / whole.files[0].name, *(upper.folder / file.name for file in upper.files[:2])}
    for path in gone:
        path.unlink()
    computed.clear()
    precompute(both, tmp_path, ignore)
    assert sorted(computed) == sorted(f"{path.parent.name}/{path.name}" for path in gone)
    for path, (content, written) in before.items():
        assert path.read_bytes() == content
        assert (path.stat().st_mtime_ns == written) == (path not in gone)


@pytest.mark.usefixtures("computed")
def test_complete_request_blocks_no_other_sweep(
    sweeps: Sweeps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    precompute(sweeps.features(), tmp_path, ignore)
    both = sweeps.features({"model.trainable": [FROZEN, UPPER]})
    complete, lacking = sorted(requests(both, tmp_path), key=lambda request: len(request.missing))
    unlocked: list[bool] = []

    def try_locks(*_: Any) -> None:
        for request in (complete, lacking):
            with contextlib.suppress(Timeout), FileLock(request.folder / LOCK, timeout=0):
                unlocked.append(request is complete)

    monkeypatch.setattr(feature_cache, "_compute", try_locks)
    precompute(both, tmp_path, ignore)
    assert unlocked == [True]


class Workers:
    """A queue whose tasks are done in this process, as the workers of two groups do them."""

    def __init__(self, *ends: bool) -> None:
        self.ends, self.tasks = iter(ends), list[list[Any]]()

    def run(self, tasks: Sequence[Any], **limits: object) -> Iterator[EndedTask]:
        assert limits == {"at_once": 2, "restarts": RETRIES, "temporary": True}
        for index, calls in enumerate(tasks):
            self.tasks.append(calls())
            died = next(self.ends, False)
            yield EndedTask(index, None if died else [call() for call in self.tasks[-1]])


@pytest.mark.usefixtures("small_files")
def test_workers_compute_several_files_in_a_task(
    sweeps: Sweeps, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But little work is done by the driver, whose workers may not run yet."""
    one = sweeps.features()
    [request] = requests(one, tmp_path)

    def steps(queue: Any, cache: Path) -> list[set[Path]]:
        work = Precomputation(one, cache, ignore, compute=compute_on_workers(queue, 2))
        assert work.awaits(one, work.pending)
        return list(work.steps())

    steps(queue := Workers(), tmp_path / "driver")
    assert (queue.tasks, len(computed)) == ([], len(request.files))
    monkeypatch.setattr(feature_cache, "SMALL_WORK", 0)
    monkeypatch.setattr(feature_cache, "TASKS", 1)
    computed.clear()
    queue = Workers()
    assert steps(queue, tmp_path) == [{request.folder}]
    files = [job.file.name for task in queue.tasks for job in task]
    assert sorted(files) == sorted(file.name for file in request.files)
    assert len(files) > len(queue.tasks) > 1
    assert computed == []
    assert cached_folders(one, tmp_path).features == (request.folder,)
    with pytest.raises(ClusterError, match=r"its workers died too often.*rerun the same command"):
        steps(Workers(False, True), tmp_path / "lost")
    assert cached_folders(one, tmp_path / "lost") == CacheFolders()


@pytest.mark.parametrize("kind", ["features", "logits"])
@pytest.mark.usefixtures("small_files")
def test_kill_loses_only_the_file_in_progress(
    kind: str, sweeps: Sweeps, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = sweeps.features() if kind == "features" else sweeps.logits({"data.history": [3]})
    written, write = iter(range(2)), cached_arrays.write_file

    def killed(*args: Any) -> int:
        if next(written, None) is None:
            raise KeyboardInterrupt
        return write(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cached_arrays, "write_file", killed)
        precompute(one, tmp_path, ignore)
    [request] = requests(one, tmp_path)
    left = len(request.missing)
    assert left == len(request.files) - 2 > 0
    assert cached_folders(request.config, tmp_path) == CacheFolders()  # a trial would compute all of it
    computed.clear()
    precompute(one, tmp_path, ignore)
    assert len(computed) == left
    cached = cached_folders(request.config, tmp_path)
    assert request.folder in (*cached.features, cached.teacher_logits)


@pytest.mark.usefixtures("computed")
def test_trial_reads_cached_teacher_logits(sweeps: Sweeps, tmp_path: Path) -> None:
    one = sweeps.logits()
    precompute(one, tmp_path, ignore)
    _, data = build(one, "local", ("train", "val"), "cpu", cached_folders(one, tmp_path))
    for split in ("train", "val"):
        [examples] = data.read(split, [[0, 1]])
        assert [example.teacher_logits is not None for example in examples] == [split == "train"] * 2
    data.close()


def test_full_disk_is_reported_before_computing(
    sweeps: Sweeps, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(StorageError, match=r"sweep cache prune.*storage\.features=live"):
        precompute(sweeps.features(), tmp_path, ignore)
    assert computed == []


def test_cache_is_beside_the_sweep_or_as_configured(sweeps: Sweeps, tmp_path: Path) -> None:
    assert cache_folder(sweeps.features(), tmp_path / "runs" / "demo") == tmp_path / "runs" / "cache"
    configured = sweeps.features(storage={"cache": str(tmp_path / "elsewhere")})
    assert cache_folder(configured, tmp_path / "runs" / "demo") == tmp_path / "elsewhere"


@pytest.mark.usefixtures("computed")
def test_cache_is_listed_and_pruned(sweeps: Sweeps, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    searched = [
        sweeps.features({"model.adapter.stride": [2, 4, 8], "model.trainable": [FROZEN, UPPER]}),
        sweeps.logits(temperature=2.0),
    ]
    for one in searched:
        precompute(one, cache, ignore)
    found = [request for one in searched for request in requests(one, cache)]
    features = [request for request in found if request.kind is ENCODER_FEATURES]
    pooled = {request.key.pool[1]: request.folder for request in features if request.key.pool}
    [upper] = [request for request in features if request.key.layers]
    [teacher] = [request.folder for request in found if request.kind is TEACHER_LOGITS]
    written = sum(path.stat().st_size for path in upper.folder.glob("features-*.arrow"))
    assert 0.9 < upper.kind.bytes(upper, upper.files) / written <= 1  # Whisper computes whole windows
    now = time.time()
    for folder, days in {upper.folder: 50, teacher: 35, pooled[2]: 40, pooled[4]: 3, pooled[8]: 0}.items():
        os.utime(folder / "about.json", (now - days * DAY, now - days * DAY))
    listed = sweep("cache", "ls", cache)
    assert listed.code == 0
    assert all(request.folder.name in listed.out for request in found)
    assert "temperature 2.0" in listed.out
    assert sweep("cache", "prune", cache, "--days", 30).code == 0
    assert [folder for folder in (upper.folder, teacher, *pooled.values()) if folder.exists()] == [pooled[4], pooled[8]]
    assert sweep("cache", "prune", cache, "--max-gb", 0).code == 0
    assert [stride for stride, folder in pooled.items() if folder.exists()] == [8]  # a trial may use it
    assert "give --days 30, or --max-gb 100" in sweep("cache", "prune", cache).err
    os.utime(pooled[8] / "about.json", (now - 9 * DAY, now - 9 * DAY))
    with FileLock(pooled[8] / LOCK):
        assert "a sweep computes it now" in sweep("cache", "prune", cache, "--max-gb", 0).out
    mark_used(CacheFolders(features=(pooled[8],)))  # a trial that reads it starts
    assert sweep("cache", "prune", cache, "--max-gb", 0).code == 0
    assert pooled[8].exists()
    assert "no such folder" in sweep("cache", "ls", tmp_path / "nothing").err


def test_only_heard_clips_are_encoded_and_extended(
    sweeps: Sweeps, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second sweep that hears more clips encodes only those that are missing, and reads the files of both."""
    encoded: list[int] = []
    features = FeatureJob.compute
    monkeypatch.setattr(FeatureJob, "compute", lambda job, rows: encoded.extend(rows) or features(job, rows))
    client = sweeps.features(tasks={"classify": 0, "client_talk": 1})
    both = sweeps.features({"tasks.classify": [0.0, 1.0]}, tasks={"client_talk": 1})
    precompute(client, tmp_path, ignore)
    columns = sweeps.shards.columns
    assert {(columns["speaker"][row], columns["split"][row] == "test") for row in encoded} == {("client", False)}
    assert len(encoded) == len(heard_rows(sweeps.shards, ("client_talk",), "recorded"))
    assert cached_folders(client, tmp_path).features
    assert not cached_folders(resolve(both.for_trial({"tasks.classify": 1.0})), tmp_path).features
    first = list(encoded)
    precompute(both, tmp_path, ignore)
    assert sorted(encoded) == sorted(heard_rows(sweeps.shards, ("classify", "client_talk"), "recorded"))
    assert len(encoded) > len(first)
    trial = resolve(both.for_trial({"tasks.classify": 1.0}))
    cached = cached_folders(trial, tmp_path)
    _, with_features = build(trial, "local", ("train",), "cpu", cached)
    precompute(trial, tmp_path / "whole", ignore)
    _, whole = build(trial, "local", ("train",), "cpu", cached_folders(trial, tmp_path / "whole"))
    batch = [list(range(len(whole.splits["train"].items)))]
    pairs = zip(*(next(iter(data.read("train", batch))) for data in (with_features, whole)), strict=True)
    assert all(np.array_equal(one.features[0], other.features[0]) for one, other in pairs)
    with_features.close()
    whole.close()


def test_files_of_earlier_versions_are_read(sweeps: Sweeps, tmp_path: Path, computed: list[str]) -> None:
    """They hold every clip of the corpus, and no hashes of clips."""
    trial = sweeps.features()
    [request] = requests(trial, tmp_path)
    for file in feature_files.feature_files(sweeps.shards, trial.data):
        FeatureJob(replace(file, inputs=()), {request.folder: request.key}, 1, sweeps.shards, trial.data)()
    assert cached_folders(trial, tmp_path).features == (request.folder,)
    precompute(trial, tmp_path, ignore)
    assert computed == []
    _, data = build(trial, "local", ("train", "val"), "cpu", cached_folders(trial, tmp_path))
    [examples] = data.read("val", [[0, 1, 2]])
    assert all(example.features for example in examples)
    data.close()


def test_cache_that_costs_more_than_it_saves_is_skipped(
    sweeps: Sweeps, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"model.modality": ["speech", "text", "text+speech"], "model.adapter.window": [2, 4, 6, 8]}
    few = sweeps.features(space, train={"epochs": 1})
    lines: list[str] = []
    precompute(few, tmp_path, lines.append, trials=1)
    assert (computed, len(lines)) == ([], 1)
    assert re.fullmatch(r"feature cache: not computed: .* need \d+ % of it; they compute it themselves", lines[0])
    assert list(feature_cache.preview(few, tmp_path, 1))[-1] == lines[0]
    assert "not computed" not in " ".join(feature_cache.preview(few, tmp_path, 20))
    precompute(few, tmp_path, lines.append, trials=20)
    assert computed != []


def test_trial_need_not_wait_for_all_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two of them the driver pauses, and another thread may build the model of a trial that starts."""
    free = list[bool]()

    def try_to_build(_: float) -> None:
        def build() -> None:
            free.append(building.acquire(blocking=False))
            if free[-1]:
                building.release()

        (trial := threading.Thread(target=build)).start()
        trial.join()

    monkeypatch.setattr(checks, "time", SimpleNamespace(sleep=try_to_build))
    job: Any = lambda: None  # noqa: E731
    job.file = SimpleNamespace(size=1)
    assert sum(compute_here([job] * 3)) == 3
    assert free == [True] * 3
