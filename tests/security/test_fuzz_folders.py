"""Adversarial folders: of a sweep, of its copy in a store, of an exported model."""

import json
import random
import shutil
from pathlib import Path

import pytest

from model.checkpoints import peft_export as exported
from sweep.analysis.predictions import INTERVALS
from sweep.config.diff import claim_folder
from sweep.config.paths import trial_folder
from sweep.durability.mirror import OWNER, mirrored
from sweep.execution.orphans import end_orphans
from sweep.search.study import StudyStore
from tests.security.mutations import ODD, VALUES, changed, check_variety, mutated, outcome
from tests.sweep.common import PREDICTIONS, ask, report, settings, sweep, tree


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a sweep with a complete and a running trial, with every file that a trial may have."""
    config = settings(trials=3)
    claim_folder(config, folder := tmp_path / "sweep")
    study = StudyStore.open(folder, config)
    ask(study, 2)
    report(study, 0, 0.5, 0.75)
    study.complete(0)
    (trial := trial_folder(folder, 0)).mkdir(parents=True)
    (trial / "predictions.json").write_text(json.dumps(PREDICTIONS))
    metrics = {"time": 1.0, "step": 8, "attempt": 1, "values": {"loss": 1.0}}
    (trial / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    (trial / "mlflow.json").write_text(json.dumps({"run_id": "a", "ended": True}))
    forecast = {"trials": 3, "before": 0.0, "work": 1.0, "seconds": 1.0, "took": None}
    (folder / "plan.json").write_text(json.dumps({"steps": {}, "excluded": ["x"], "forecast": forecast}))
    return folder


def test_status_reads_a_mutated_folder_or_says_why_not(folder: Path, tmp_path: Path) -> None:
    """`sweep status` reads all files: it shows what is intact, or says in one line what is damaged."""
    assert sweep("status", folder).code == 0  # which caches intervals and recomputes them when predictions change
    whole, files = tree(folder), sorted(path for path in folder.rglob("*") if path.is_file())
    before = {name: text for name, text in whole.items() if not name.endswith(INTERVALS)}
    outcomes = []
    for seed in range(40):
        path = random.Random(seed).choice(files)
        path.write_bytes(mutated(path.read_bytes(), seed))
        done = sweep("status", folder, *(["--json"] if seed % 2 else []))
        assert done.code in (0, 2), (path.name, done.err)
        assert done.err.count("error: ") == (done.code == 2)
        assert "Traceback" not in done.err
        outcomes.append(done.err)
        path.write_bytes(whole[str(path.relative_to(folder))] or b"")
        assert {name: text for name, text in tree(folder).items() if not name.endswith(INTERVALS)} == before
    check_variety(outcomes)


def test_record_of_processes_is_no_list_of_targets(tmp_path: Path) -> None:
    """Whatever the record says, no other process is ended and no other folder removed."""
    (tmp_path / "sweep-ray-mine").mkdir()
    plain = {"host": "h", "boot": 0.0, "scratch": str(tmp_path / "sweep-ray-mine"), "processes": {"1": 0.0}}
    for value in (*VALUES, *(changed(plain, seed) for seed in range(20))):
        (tmp_path / "processes.json").write_text(json.dumps(value))
        assert end_orphans(tmp_path) == []
    assert (tmp_path / "sweep-ray-mine").exists()


@pytest.mark.parametrize("content", [*ODD, b"[]", b"{}", b'{"holder": 1, "generation": 0, "open": true}'])
def test_copy_with_a_damaged_owner_is_one_line(content: bytes, tmp_path: Path) -> None:
    (folder := tmp_path / "sweep").mkdir()
    (store := tmp_path / "store").mkdir()
    (store / OWNER).write_bytes(content)

    def work() -> None:
        with mirrored(folder, str(store), print, settle=0.0):
            pytest.fail("it was taken over")

    assert outcome(work).startswith(f"{store}/{OWNER}: ")


def test_mutated_exports_are_read_or_refused(tmp_path: Path) -> None:
    plain = {"format": 1, "sweep": "a", "trial": 0, "corpus": "c", "fingerprint": "f", "meaning": {}, "digest": "d"}
    tasks = {"classify": {"labels": ["change", "neutral"], "counts": [3, 4]}}
    plain |= {"roles": {"client": ["change", "neutral"]}, "tasks": tasks}
    outcomes = []
    for seed in range(30):
        content = json.dumps(changed(plain, seed)).encode()
        (tmp_path / exported.LABELS).write_bytes(mutated(content, seed) if seed % 2 else content)
        outcomes.append(outcome(lambda: exported.read(tmp_path)))
    check_variety(outcomes)
    for tasks in ({"clasify": {"labels": [], "counts": []}}, {"classify": {"labels": ["a", "a"], "counts": [1, 1]}}):
        (tmp_path / exported.LABELS).write_text(json.dumps(plain | {"tasks": tasks}))
        assert f"{exported.LABELS}: file: Value error, " in outcome(lambda: exported.read(tmp_path))


def test_damaged_study_is_one_line(folder: Path) -> None:
    """Lines that are no JSON, or none of Optuna's; or the first one is gone, without which the others say nothing."""
    path = folder / "study.journal"
    whole = path.read_bytes()
    headless = whole[whole.index(b"\n") + 1 :]
    for damaged in (whole + b"[1]\n", whole + b"{}\n", b"\xff\n" + whole, b"[" * 5000 + b"\n" + whole, headless):
        path.write_bytes(damaged)
        for work in (StudyStore.read, StudyStore.open):
            error = outcome(lambda work=work: work(folder, settings(trials=3)))
            assert error.startswith(f"{path}: damaged study ("), damaged
    shutil.rmtree(folder)
