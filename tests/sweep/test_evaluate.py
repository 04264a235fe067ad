"""`train`, `evaluate`, `status` and `best`: what they print for scripts, and that no batch size changes a result."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from data.corpus import synthetic
from data.corpus.config import CorpusConfig
from data.corpus.schema import SPLITS
from data.loading.tasks import answer_sets, items
from data.preparation.build import prepare
from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from sweep.analysis.predictions import read_predictions
from sweep.config.diff import claim_folder
from sweep.config.files import load
from sweep.config.resolve import resolve
from sweep.config.schema import Config, parse
from sweep.execution.trial import open_shards, with_class_weights
from sweep.preflight.checks import resolve_inputs
from sweep.preflight.feature_cache import cache_requests
from sweep.search.study import StudyStore
from tests.conftest import LABELS
from tests.sweep.common import ask, complaint, refused, report, settings, sweep, sweep_runner, tree


def strict(text: str) -> dict[str, Any]:
    """JSON as other languages read it: NaN and Infinity are none."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


def evaluate(source: Path, *args: object) -> dict[str, Any]:
    outcome = sweep("evaluate", source, "--split", "val", "--json", *args)
    assert (outcome.code, outcome.err) == (0, "")
    return strict(outcome.out)


def test_the_json_holds_what_is_promised(trial: Path) -> None:
    result = evaluate(trial)
    assert result.keys() >= {"n", "accuracy", "macro_f1", "weighted_f1", "per_label", "predictions"}
    table = result["per_label"]["classify"]
    assert result["n"] == len(result["predictions"]) == sum(row["support"] for row in table.values())
    assert (list(result["per_label"]), tuple(table)) == (["classify"], LABELS)
    for row in table.values():
        assert row.keys() == {"precision", "recall", "f1", "support"}
    for row in result["predictions"]:
        assert row.keys() == {"id", "task", "label", "prediction", "scores"}
        assert tuple(row["scores"]) == LABELS
        assert row["prediction"] == max(row["scores"], key=row["scores"].get)
    hits = [row["label"] == row["prediction"] for row in result["predictions"]]
    assert result["accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_no_batch_size_changes_a_result(trial: Path) -> None:
    reference = evaluate(trial)
    assert reference["n"] >= 4
    scores = [row["scores"][LABELS[0]] for row in reference["predictions"]]
    assert max(scores) - min(scores) > 0.01, "the utterances must be told apart for this to test anything"
    for size in (1, 2, 3, 16):
        result = evaluate(trial, "--batch-size", size)
        for name in ("n", "accuracy", "macro_f1", "weighted_f1", "per_label"):
            assert result[name] == reference[name], (size, name)
        for row, other in zip(result["predictions"], reference["predictions"], strict=True):
            assert (row["id"], row["prediction"]) == (other["id"], other["prediction"])
            assert row["scores"] == pytest.approx(other["scores"], rel=1e-5, abs=1e-5)


def test_it_repeats_the_last_epochs_evaluation(trial: Path) -> None:
    result = evaluate(trial)
    epoch, metrics = checkpoint.load(trial / "checkpoint.pt")["progress"]["history"][-1]
    shared = metrics.keys() & result.keys()
    assert epoch == 2
    assert shared >= {"accuracy", "macro_f1", "weighted_f1", "loss"}
    assert {name: result[name] for name in shared} == pytest.approx({name: metrics[name] for name in shared}, rel=1e-6)
    written = json.loads((trial / "predictions.json").read_text())
    assert written["labels"] == {"classify": list(LABELS)}
    for row, again in zip(written["records"], result["predictions"], strict=True):
        assert {name: row[name] for name in ("id", "task", "label", "prediction")}.items() <= again.items()


WEIGHTS = {"client_talk": 0.5, "forecast": 0.25, "response": 2, "quality": 1}
ANSWERS = {"client_talk": LABELS, "forecast": LABELS, "response": (), "quality": ("high", "low")}


@pytest.fixture(scope="module")
def several(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trial of several tasks."""
    folder = tmp_path_factory.mktemp("several") / "trial"
    changed = {"tasks.classify": 0} | {f"tasks.{task}": weight for task, weight in WEIGHTS.items()}
    changed |= {"model.modality": "text", "model.max_new_tokens": 3, "train.epochs": 1, "search.metric": "total_loss"}
    options = [f"--set={key}={value}" for key, value in changed.items()]
    assert sweep("train", place / "good.yaml", *options, "--out", folder).code == 0
    return folder


def test_several_tasks_stand_side_by_side(several: Path, corpus: Shards) -> None:
    result = evaluate(several)
    tasks = [row["task"] for row in result["predictions"]]
    sizes = {task: len(items(corpus, task, "val")) for task in WEIGHTS}
    assert {task: tasks.count(task) for task in sizes} == sizes
    assert result["n"] == sum(sizes.values())
    for row in result["predictions"]:
        assert tuple(row["scores"]) == ANSWERS[row["task"]]
    assert {task: tuple(table) for task, table in result["per_label"].items()} == {
        task: labels for task, labels in ANSWERS.items() if labels
    }
    for task, table in result["per_label"].items():
        assert sum(row["support"] for row in table.values()) == sizes[task]
    assert {"macro_f1", "forecast/ece", "response/bleu", "response/perplexity", "quality/accuracy"} <= result.keys()
    shown = sweep("evaluate", several, "--split", "val").out
    assert all(word in shown for word in ("forecast: val split", "quality: val split", "response/bleu"))


def test_the_total_loss_weighs_the_tasks(several: Path) -> None:
    result = evaluate(several)
    _, metrics = checkpoint.load(several / "checkpoint.pt")["progress"]["history"][-1]
    losses = {task: result[f"{task}/loss" if task != "client_talk" else "loss"] for task in WEIGHTS}
    total = sum(weight * losses[task] for task, weight in WEIGHTS.items())
    assert metrics["total_loss"] == pytest.approx(total, rel=1e-6)


def test_predictions_are_read_back_by_task(several: Path) -> None:
    said = read_predictions(several)
    assert {task: tuple(labels) for task, (labels, _) in said.items()} == ANSWERS
    for task, (labels, records) in said.items():
        assert {(record.task, len(record.scores)) for record in records} == {(task, len(labels))}
    assert read_predictions(several / "nowhere") == {}


def test_a_trained_model_is_judged_under_a_control(trial: Path) -> None:
    heard, silent = (evaluate(trial, f"--set=data.sound={sound}") for sound in ("recorded", "zeroed"))
    assert heard == evaluate(trial)
    assert [row["id"] for row in silent["predictions"]] == [row["id"] for row in heard["predictions"]]
    pairs = zip(silent["predictions"], heard["predictions"], strict=True)
    assert all(one["scores"] != other["scores"] for one, other in pairs)


def test_nothing_but_the_data_of_a_trained_model_can_be_changed(trial: Path) -> None:
    for override in ("model.cls=after", "train.epochs=1", "tasks.forecast=1"):
        message = refused(trial, "evaluate", "trial", "--set", "data.sound=zeroed", "--set", override)
        assert message.startswith(f"--set {override}: only data.* can be changed")
    assert "data.sound: 'loud': input should be" in refused(trial, "evaluate", "trial", "--set", "data.sound=loud")


def test_every_split_can_be_read_and_shown(trial: Path) -> None:
    counts = {}
    for split in SPLITS:
        outcome = sweep("evaluate", trial / "checkpoint.pt", "--split", split)
        assert all(word in outcome.out for word in (*LABELS, f"{split} split", "macro_f1"))
        counts[split] = strict(sweep("evaluate", trial, "--split", split, "--json").out)["n"]
    assert sum(counts.values()) == 9 * 4, "nine dialogues with four labelled turns each"


def test_training_a_finished_trial_changes_nothing(trial: Path) -> None:
    before = results(trial)
    assert before.keys() == {"config.yaml", "checkpoint.pt", "metrics.jsonl", "predictions.json"}
    outcome = sweep("train", "good.yaml", "--out", "trial")
    assert (outcome.code, results(trial)) == (0, before)
    assert "epoch 2/2" in outcome.out
    other = complaint(sweep("train", "good.yaml", "--out", "trial", "--set", "seed=3"))
    assert other.startswith("trial: started with different settings (seed: 0 → 3)")
    assert results(trial) == before


def results(folder: Path) -> dict[str, bytes | None]:
    """The content of a trial's folder, without what counts the attempts at it."""
    return {name: content for name, content in tree(folder).items() if not name.startswith((".lock", "attempt-"))}


@pytest.fixture(scope="module", params=["class_weights", "sampling"])
def balanced(request: pytest.FixtureRequest, place: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a trial that was asked to balance its classes; its folder comes last."""
    asked = [f"--set=train.{request.param}=balanced", "--set=train.epochs=1", "--set=model.modality=text"]
    folder = tmp_path_factory.mktemp("balanced") / request.param
    command = ["train", str(place / "good.yaml"), *asked, "--out", str(folder)]
    assert sweep(*command).code == 0
    return command


def test_the_configuration_that_ran_says_the_numbers(balanced: list[str], here: Path, corpus: Shards) -> None:
    folder = Path(balanced[-1])
    setting, before = folder.name, results(folder)
    counts = answer_sets(corpus, ["classify"])["classify"].counts
    expected = {label: sum(counts) / (len(counts) * count) for label, count in zip(LABELS, counts, strict=True)}
    assert getattr(load(str(folder / "config.yaml")).train, setting) == {"classify": expected}
    assert len(set(expected.values())) > 1
    assert (sweep(*balanced).code, results(folder)) == (0, before)
    assert evaluate(folder)["n"] > 0
    assert sweep("train", folder / "config.yaml", "--out", "again").code == 0
    one, other = (checkpoint.load(own / "checkpoint.pt")["digest"] for own in (folder, Path("again")))
    assert one == other
    assert Path("again/config.yaml").read_bytes() == before["config.yaml"]
    wrong = f"--set=train.{setting}.classify.chnge=2"
    complained = complaint(sweep("train", folder / "config.yaml", "--out", "other", wrong))
    assert complained.startswith(f"train.{setting}.classify.chnge: the task has no such label; choose from change, ")
    assert not Path("other").exists()


def test_a_trial_of_a_sweep_says_the_numbers_and_the_sweep_does_not(here: Path) -> None:
    asked = ["train.class_weights=balanced", "search.space={train.learning_rate: [0.1, 0.2]}"]
    values = {"train.learning_rate": 0.2}
    config = load("good.yaml", asked)
    claim_folder(config, here / "s")
    resolved, attempt = resolve_inputs(config), sweep_runner(config, here / "s")
    job = attempt.make_job(resolved, 0, values)
    own = load("s/trials/0000/config.yaml")
    assert own == with_class_weights(config.for_trial(values), open_shards(resolved))
    assert isinstance(own.train.class_weights, dict)
    assert Config.model_validate_json(job.config).train == own.train
    assert attempt.make_job(resolved, 0, values) == job, "as a resumed trial has it"
    claim_folder(load("good.yaml", asked), here / "s")
    assert load("s/config.yaml").train.class_weights == "balanced"


def test_a_trial_on_a_fold_has_the_numbers_and_the_teacher_of_its_own_training_split(here: Path) -> None:
    split = CorpusConfig.model_validate({"split": {"folds": 3, "stratify": []}})
    shards = prepare(synthetic.corpus(sessions=9, turns=8, seed=3), here / "folds", split)
    space = "search.space={data.fold: [0, 1, 2]}"
    points = [
        "search.points=[{data.fold: 0}, {data.fold: 1}, {data.fold: 2}]",
        "search.trials=3",
        "search.pruning=null",
    ]
    asked = [f"data.shards={shards.folder}", "train.class_weights=balanced", "train.losses.distillation=1"]
    config = load("good.yaml", [*asked, space, *points])
    claim_folder(config, here / "s")
    attempt, weights = sweep_runner(config, here / "s"), []
    for fold in range(3):
        job = attempt.make_job(resolve_inputs(config), fold, {"data.fold": fold})
        own = load(f"s/trials/000{fold}/config.yaml")
        assert (own.data.fold, json.loads(job.config)["data"]["fold"]) == (fold, fold)
        assert own == with_class_weights(config.for_trial({"data.fold": fold}), Shards(shards.folder, fold))
        weights.append(own.train.class_weights)
    assert weights[0] != weights[1] != weights[2]
    requests = [request for request, _ in cache_requests(resolve_inputs(config), here)]
    requested = {tuple(file.name for file in request.files) for request in requests}
    assert len(requested) == 1 + 3, "the features of the whole corpus, and the teacher logits of each fold"


def test_a_checkpoint_that_cannot_be_used_is_one_error(trial: Path) -> None:
    path, whole = trial / "checkpoint.pt", (trial / "checkpoint.pt").read_bytes()
    for content in (b"half a file", whole[: len(whole) // 2]):
        path.write_bytes(content)
        assert refused(trial, "evaluate", "trial").startswith("trial/checkpoint.pt: damaged checkpoint (")
    path.unlink()
    refused(trial, "evaluate", "trial")
    assert refused(trial, "evaluate", "trial/checkpoint.pt").startswith("trial/checkpoint.pt: ")


def test_an_empty_checkpoint_is_one_error(trial: Path) -> None:
    (trial / "checkpoint.pt").write_bytes(b"")
    refused(trial, "evaluate", "trial")


def test_a_checkpoint_of_something_else_is_one_error(trial: Path) -> None:
    torch.save({"weights": 1}, trial / "checkpoint.pt")
    refused(trial, "evaluate", "trial")


def test_a_checkpoint_of_another_configuration_is_one_error(trial: Path) -> None:
    text = (trial / "config.yaml").read_text()
    (trial / "config.yaml").write_text(text.replace("rank: 8", "rank: 4"))
    assert refused(trial, "evaluate", "trial").startswith("the checkpoint belongs to another configuration: ")


def a_sweep(here: Path) -> StudyStore:
    """A sweep of three trials: complete, failed, running."""
    claim_folder(config := settings(), here / "s")
    study = StudyStore.open(here / "s", config)
    ask(study, 3)
    report(study, 0, 0.25, 0.5)
    study.complete(0)
    study.fail(1, "lost")
    return study


def test_status_and_best_for_scripts(here: Path) -> None:
    study = a_sweep(here)
    status = strict(sweep("status", "s", "--json").out)
    assert status.keys() == {"sweep", "objective", "direction", "target_trials", "progress", "trials"}
    assert [trial["state"] for trial in status["trials"]] == ["COMPLETE", "FAIL", "RUNNING"]
    keys = {"number", "state", "params", "value", "metrics", "steps", "epochs", "mlflow_run_id"}
    keys |= {"attempts", "reason", "why", "audited", "spared"}
    assert all(trial.keys() == keys for trial in status["trials"])
    best = strict(sweep("best", "s", "--json").out)
    own = study.trial_config(study.trials()[0]).model_dump(mode="json")
    assert best == status["trials"][0] | {"config": own}
    assert (best["number"], best["value"], best["steps"]) == (0, 0.5, 20)
    shown = sweep("best", "s").out.replace("\n", " ")
    assert "best: trial 0, macro_f1 0.500" in shown
    assert "--set model.lora.rank=2 --set train.learning_rate=0.003" in shown
    assert all(state in sweep("status", "s").out for state in ("COMPLETE", "FAIL", "RUNNING"))


def test_a_sweep_without_a_complete_trial_has_no_best(here: Path) -> None:
    claim_folder(config := settings(), here / "s")
    assert refused(here, "status", "s").startswith("s: no trial has started yet")
    ask(StudyStore.open(here / "s", config), 1)
    assert refused(here, "best", "s").startswith("s: no trial is complete yet; `sweep status s`")
    assert refused(here, "evaluate", "s").startswith("s: no trial is complete yet")


def test_a_value_that_is_not_finite_leaves_the_json_valid(here: Path) -> None:
    study = a_sweep(here)
    report(study, 2, float("nan"))
    strict(sweep("status", "s", "--json").out)


def test_evaluating_a_sweep_takes_its_best_trial(here: Path) -> None:
    a_sweep(here)
    assert complaint(sweep("evaluate", "s")).startswith("s/trials/0000/config.yaml: no such file")


def test_local_paths_hold_in_any_folder(here: Path, corpus: Shards) -> None:
    """Ray's workers do not run where the command was given."""
    shutil.copytree(corpus.folder, here / "mine")
    model = {"llm": {"path": "an/id"}, "encoder": {"path": "mine"}}
    resolved = resolve(parse({"name": "x", "data": {"shards": "mine"}, "model": model}, "x"))
    assert resolved.data.shards == str(here / "mine")
    assert resolved.model.llm.path == "an/id"
