"""A whole sweep under Ray, extended after its end; `tests/kill` is about kills.

One sweep carries all the checks, since starting Ray is what costs: two slots, Ray Data as the reader, four kinds of
trials, MLflow on SQLite. Every trial is then trained again by itself, without Ray, and must be equal bit for bit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from data.corpus import synthetic
from data.preparation.build import prepare
from tests.sweep.common import FROZEN, TUNED

TRIALS = 7
SAME = {"model.modality": "speech", "model.lora.rank": 4, "train.learning_rate": 3e-3, "model.cls": "none"}
# The short form of tests/kill compares ledger, bits and MLflow in every run; here no kill hides what differs.
pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(900)]


def settings(models: Path, shards: Path) -> dict[str, Any]:
    return {
        "name": "whole",
        "seed": 3,
        "data": {"shards": str(shards), "history": 1, "reader": "ray"},
        "tasks": {"forecast": 0.5},
        "model": {
            "encoder": {"path": str(models / "whisper")},
            "llm": {"path": str(models / "llm")},
            "lora": {"dropout": 0.1},
        },
        "storage": {"keep": None},
        "train": {"epochs": 3, "batch_size": 8, "checkpoint_steps": 5},
        "search": {
            "trials": TRIALS - 2,
            "startup_trials": 3,
            "pruning": {"first_epoch": 1, "after_trials": 4},
            "space": {
                "model.modality": ["speech", "text"],
                "model.lora.rank": [2, 4],
                "train.learning_rate": {"low": 1e-3, "high": 1e-2, "log": True},
                "model.trainable": {"choices": [FROZEN, TUNED], "when": {"model.modality": ["speech"]}},
                "model.cls": ["none", "before", "after"],
            },
            # The same configuration as first and later trial: nothing may remain of those in between.
            "points": [
                {**SAME, "model.trainable": FROZEN},
                {**SAME, "model.modality": "text"},
                {**SAME, "model.trainable": TUNED},
                {**SAME, "train.learning_rate": 9e-3, "model.trainable": TUNED, "model.cls": "after"},
                {**SAME, "model.trainable": FROZEN},
            ],
        },
    }


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "sweep", *map(str, words)]


def sweep_json(*words: str | Path) -> Any:
    return json.loads(subprocess.run(command(*words, "--json"), check=True, capture_output=True, text=True).stdout)


@pytest.fixture(scope="module")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that had ended, and was then extended."""
    root = tmp_path_factory.mktemp("sweep")
    shards = prepare(synthetic.corpus(sessions=12, turns=12, seed=5), root / "shards")
    (root / "whole.yaml").write_text(yaml.safe_dump(settings(models, shards.folder)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    folder = root / "runs" / "whole"
    run = command("run", root / "whole.yaml", "--out", folder)
    for more in ([], ["--trials", str(TRIALS)]):
        done = subprocess.run([*run, *more], env=environment, capture_output=True, text=True, timeout=400, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        name = f"after-{len(sweep_json('status', folder)['trials'])}.json"
        (root / name).write_text(json.dumps(sweep_json("status", folder)))
    return folder


def test_every_trial_ended_once_and_kept_what_it_was(finished: Path) -> None:
    after = sweep_json("status", finished)
    assert after.keys() == {"sweep", "objective", "direction", "target_trials", "progress", "trials"}
    assert [trial["number"] for trial in after["trials"]] == list(range(TRIALS))
    assert {trial["state"] for trial in after["trials"]} <= {"COMPLETE", "PRUNED"}
    before = json.loads((finished.parents[1] / f"after-{TRIALS - 2}.json").read_text())
    assert before["trials"] == after["trials"][: TRIALS - 2]


def test_every_trial_equals_the_same_configuration_trained_by_itself(finished: Path, tmp_path: Path) -> None:
    """First or later in its slot, in either slot, killed or not, fed by Ray Data or from the local shards."""
    from sweep.config.files import load
    from sweep.execution.trial import run_trial

    digests = {}
    for trial in sweep_json("status", finished)["trials"]:
        number = trial["number"]
        state = torch.load(finished / "trials" / f"{number:04d}" / "checkpoint.pt", weights_only=True)
        digests[number] = state["digest"]
        epochs = state["progress"]["epoch"]
        assert (epochs == 3) == (trial["state"] == "COMPLETE")
        config = load(str(finished / "trials" / f"{number:04d}" / "config.yaml"))

        class EnoughError(Exception):
            pass

        def report(epoch: int, metrics: dict[str, Any], last: int = epochs) -> None:
            if epoch == last:
                raise EnoughError

        with pytest.raises(EnoughError):
            run_trial(config, tmp_path / str(number), report, "local", "cpu")
        alone = torch.load(tmp_path / str(number) / "checkpoint.pt", weights_only=True)
        assert alone["digest"] == state["digest"], f"trial {number}"
        pairs = zip(alone["progress"]["history"], state["progress"]["history"], strict=True)
        clock = {"seconds": 0, "data_wait": 0}
        assert all({**one[1], **clock} == {**two[1], **clock} for one, two in pairs)
    if epochs_of(finished, 0) == epochs_of(finished, 4):
        assert digests[0] == digests[4]
    assert len(set(digests.values())) >= TRIALS - 2


def epochs_of(folder: Path, number: int) -> int:
    state = torch.load(folder / "trials" / f"{number:04d}" / "checkpoint.pt", weights_only=True)
    return int(state["progress"]["epoch"])


def test_mlflow_has_one_parent_and_one_run_a_trial(finished: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{finished.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("whole")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert parent.info.status == "FINISHED"
    trials = sweep_json("status", finished)["trials"]
    assert len(runs) == TRIALS + 1
    expected = {"COMPLETE": "FINISHED", "PRUNED": "KILLED"}
    for trial in trials:
        run = client.get_run(trial["mlflow_run_id"])
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.info.status == expected[trial["state"]]
        assert run.data.params.items() >= {key: str(value) for key, value in trial["params"].items()}.items()
        points = client.get_metric_history(run.info.run_id, "macro_f1")
        assert len({point.step for point in points}) == len(points)
        assert [point.value for point in sorted(points, key=lambda point: point.step)][-1] == trial["value"]
        artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
        pictures = {"confusion_matrix.png", "forecast_confusion_matrix.png"}
        assert artifacts >= {"config.yaml", "predictions.json", "forecast_predictions.json", *pictures}


def test_the_best_trial_can_be_had_again_and_evaluated(finished: Path) -> None:
    best = sweep_json("best", finished)
    assert best["config"]["model"]["lora"]["rank"] == best["params"]["model.lora.rank"]
    complete = [trial for trial in sweep_json("status", finished)["trials"] if trial["state"] == "COMPLETE"]
    assert best["value"] == max(trial["value"] for trial in complete)
    found = sweep_json("evaluate", finished, "--split", "val")
    assert found["macro_f1"] == pytest.approx(best["value"], abs=1e-9)
    assert found["forecast/macro_f1"] == pytest.approx(best["metrics"]["forecast/macro_f1"], abs=1e-9)


def test_a_finished_sweep_stays_as_it_is(finished: Path) -> None:
    """A finished sweep starts no Ray; its ledger is not touched."""
    journal = (finished / "study.journal").read_bytes()
    again = subprocess.run(
        command("run", finished.parents[1] / "whole.yaml", "--out", finished, "--trials", str(TRIALS)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "starting Ray" not in again.stdout
    assert (finished / "study.journal").read_bytes() == journal
    refused = subprocess.run(
        command("run", finished.parents[1] / "whole.yaml", "--out", finished, "--set", "train.epochs=9"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "train.epochs: 3 → 9" in refused.stderr


def test_nothing_is_left_running(finished: Path) -> None:
    for process in psutil.process_iter(["cmdline"]):
        assert str(finished) not in " ".join(process.info["cmdline"] or [])
