"""`train`, `evaluate`, `status` and `best`: their JSON, results that no batch size changes, balanced classes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data.corpus import synthetic
from data.corpus.config import CorpusConfig
from data.corpus.schema import SPLITS
from data.formats import format_interval
from data.loading.tasks import answer_sets, items
from data.preparation.build import prepare
from data.shards.dataset import Shards
from model.checkpoints import checkpoint
from model.evaluation.bootstrap import Interval
from model.evaluation.ceiling import Ceiling
from model.evaluation.metrics import Record
from sweep.analysis.evaluate import Evaluation, SplitPredictions, evaluate_checkpoint
from sweep.analysis.predictions import read_predictions
from sweep.config.diff import claim_folder
from sweep.config.files import load
from sweep.config.paths import trial_folder
from sweep.config.schema import Config
from sweep.execution.trial import open_shards, with_class_weights
from sweep.preflight.checks import resolve_inputs
from sweep.preflight.feature_cache import cache_requests
from sweep.search.study import StudyStore
from tests.conftest import LABELS
from tests.sweep.common import ask, complaint, refused, report, settings, sweep, sweep_runner, tree


def strict(text: str) -> dict[str, Any]:
    """Parse JSON as other languages do, which have no NaN and no Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    content: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return content


def evaluate(source: Path, *args: object) -> dict[str, Any]:
    outcome = sweep("evaluate", source, "--split", "val", "--json", *args)
    assert (outcome.code, outcome.err) == (0, "")
    return strict(outcome.out)


@pytest.fixture(scope="module")
def result(trained: Path) -> dict[str, Any]:
    """The evaluation of a trial on the validation split."""
    return evaluate(trained)


def test_evaluate_json(result: dict[str, Any]) -> None:
    assert result.keys() >= {"n", "accuracy", "macro_f1", "weighted_f1", "intervals", "per_label", "predictions"}
    table = result["per_label"]["classify"]
    assert result["n"] == len(result["predictions"]) == sum(row["support"] for row in table.values())
    assert (list(result["per_label"]), tuple(table)) == (["classify"], LABELS)
    assert all(row.keys() == {"precision", "recall", "f1", "support"} for row in table.values())
    for row in result["predictions"]:
        assert row.keys() == {"id", "task", "label", "prediction", "scores"}
        assert tuple(row["scores"]) == LABELS
        assert row["prediction"] == max(row["scores"], key=row["scores"].get)
    hits = [row["label"] == row["prediction"] for row in result["predictions"]]
    assert result["accuracy"] == pytest.approx(sum(hits) / len(hits))


def test_evaluation_has_the_human_ceiling_where_there_is_one() -> None:
    figures = {"accuracy": Interval(0.8, 0.7, 0.9), "kappa": Interval(0.6, 0.5, 0.7), "Fleiss' kappa": None}
    human = Ceiling(task="classify", split="val", turns=("c/1", "c/2"), sessions=1, annotators=(3, 3), figures=figures)
    records = [
        Record(f"c/{number}", "classify", "c", "client", None, label, "change", (0.0, -1.0, -2.0), 0.5, 2)
        for number, label in enumerate(("sustain", "change", "neutral"))
    ]
    predictions = SplitPredictions(records, {"classify": LABELS}, {"client": LABELS})
    assert "human_ceiling" not in Evaluation("val", predictions, {}, {}).to_json()
    evaluation = Evaluation("val", replace(predictions, ceilings=[human]), {}, {})
    human_line, model_line = evaluation.ceiling_lines()
    assert human_line.startswith("human ceiling of classify (val, 2 turns of 1 session with 3 annotators)")
    assert model_line == "the model on the same turns: accuracy 0.500, macro_f1 0.333, kappa 0.000"
    content = strict(json.dumps(evaluation.to_json()))["human_ceiling"]["classify"]
    assert content["annotator"]["kappa"] == {"value": 0.6, "low": 0.5, "high": 0.7}
    assert content["model"]["accuracy"] == {"value": 0.5, "low": None, "high": None}


def test_evaluate_does_not_depend_on_batch_size(trained: Path, result: dict[str, Any]) -> None:
    assert result["n"] >= 4
    scores = [row["scores"][LABELS[0]] for row in result["predictions"]]
    assert max(scores) - min(scores) > 0.01, "the utterances must differ for this to test anything"
    for size in (1, 3, 16):
        again = evaluate(trained, "--batch-size", size)
        for name in ("n", "accuracy", "macro_f1", "weighted_f1", "per_label"):
            assert again[name] == result[name], (size, name)
        for row, expected in zip(again["predictions"], result["predictions"], strict=True):
            assert (row["id"], row["prediction"]) == (expected["id"], expected["prediction"])
            assert row["scores"] == pytest.approx(expected["scores"], rel=1e-5, abs=1e-5)


def test_evaluate_repeats_the_last_epoch(trained: Path, result: dict[str, Any]) -> None:
    epoch, metrics = checkpoint.load(trained / "checkpoint.pt")["progress"]["history"][-1]
    shared = metrics.keys() & result.keys()
    assert epoch == 2
    assert shared >= {"accuracy", "macro_f1", "weighted_f1", "loss"}
    assert {name: result[name] for name in shared} == pytest.approx({name: metrics[name] for name in shared}, rel=1e-6)
    labels, records = read_predictions(trained)["classify"]
    assert labels == list(LABELS)
    for record, again in zip(records, result["predictions"], strict=True):
        assert (record.id, record.label, record.prediction) == (again["id"], again["label"], again["prediction"])


WEIGHTS = {"client_talk": 0.5, "forecast": 0.25, "response": 2, "quality": 1}
ANSWERS = {"client_talk": LABELS, "forecast": LABELS, "response": (), "quality": ("high", "low")}


def test_evaluate_several_tasks(place: Path, corpus: Shards, tmp_path: Path) -> None:
    several = tmp_path / "trial"
    changed: dict[str, object] = {f"tasks.{task}": weight for task, weight in WEIGHTS.items()}
    changed |= {"tasks.classify": 0, "model.modality": "text", "model.max_new_tokens": 3, "train.epochs": 1}
    options = [f"--set={key}={value}" for key, value in changed.items()]
    assert sweep("train", place / "good.yaml", *options, "--set=search.metric=total_loss", "--out", several).code == 0
    result = evaluate(several)
    tasks = [row["task"] for row in result["predictions"]]
    sizes = {task: len(items(corpus, task, "val")) for task in WEIGHTS}
    assert {task: tasks.count(task) for task in sizes} == sizes
    assert result["n"] == sum(sizes.values())
    assert all(tuple(row["scores"]) == ANSWERS[row["task"]] for row in result["predictions"])
    labels = {task: labels for task, labels in ANSWERS.items() if labels}
    assert {task: tuple(table) for task, table in result["per_label"].items()} == labels
    for task, table in result["per_label"].items():
        assert sum(row["support"] for row in table.values()) == sizes[task]
    assert {"macro_f1", "forecast/ece", "response/bleu", "response/perplexity", "quality/accuracy"} <= result.keys()
    out = sweep("evaluate", several, "--split", "val").out
    assert all(words in out for words in ("forecast: val split", "quality: val split", "response/bleu"))
    _, metrics = checkpoint.load(several / "checkpoint.pt")["progress"]["history"][-1]
    losses = {task: result[f"{task}/loss" if task != "client_talk" else "loss"] for task in WEIGHTS}
    assert metrics["total_loss"] == pytest.approx(sum(weight * losses[task] for task, weight in WEIGHTS.items()))
    predictions = read_predictions(several)
    assert {task: tuple(labels) for task, (labels, _) in predictions.items()} == ANSWERS
    for task, (answers, records) in predictions.items():
        assert {(record.task, len(record.scores)) for record in records} == {(task, len(answers))}
    assert read_predictions(several / "nowhere") == {}


def test_evaluate_changes_data_settings_only(trial: Path, result: dict[str, Any]) -> None:
    recorded, silent = (evaluate(trial, f"--set=data.sound={sound}") for sound in ("recorded", "zeroed"))
    assert recorded == result
    pairs = list(zip(silent["predictions"], recorded["predictions"], strict=True))
    assert all(changed["id"] == row["id"] and changed["scores"] != row["scores"] for changed, row in pairs)
    for override in ("model.cls=after", "train.epochs=1", "tasks.forecast=1"):
        message = refused(trial, "evaluate", "trial", "--set", "data.sound=zeroed", "--set", override)
        assert message.startswith(f"--set {override}: only data.* can be changed")
    assert "data.sound: 'loud': input should be" in refused(trial, "evaluate", "trial", "--set", "data.sound=loud")


def test_intervals_are_those_of_sessions(trained: Path) -> None:
    """The validation split has one session, so its metrics have none."""
    evaluation = evaluate_checkpoint(trained, "train", None)
    assert {"loss", "accuracy", "macro_f1"} <= evaluation.intervals.keys()
    for name, limits in evaluation.intervals.items():
        low, high = strict(json.dumps(evaluation.to_json()))["intervals"][name]
        assert evaluation.metrics[name] == pytest.approx(limits.value)
        assert low < limits.value < high
        assert f"{name} {format_interval(limits.value, low, high)}" in evaluation.line()
    assert evaluation.line().endswith("(in brackets 95 % by session)")


def test_evaluate_reads_every_split(trained: Path) -> None:
    support = 0
    for split in SPLITS:
        out = sweep("evaluate", trained / "checkpoint.pt", "--split", split).out
        assert all(words in out for words in (f"{split} split", "macro_f1"))
        rows = [line.split() for line in out.splitlines() if line.startswith(LABELS)]
        support += sum(int(row[-1]) for row in rows)
    assert support == 9 * 4, "nine dialogues with four labelled turns each"


def results(folder: Path) -> dict[str, bytes | None]:
    """Return the content of a trial's folder, without what counts the attempts at it."""
    return {name: content for name, content in tree(folder).items() if not name.startswith((".lock", "attempt-"))}


def test_train_again_changes_nothing(trial: Path) -> None:
    before = results(trial)
    assert before.keys() == {"config.yaml", "checkpoint.pt", "metrics.jsonl", "predictions.json"}
    outcome = sweep("train", "good.yaml", "--out", "trial")
    assert (outcome.code, results(trial)) == (0, before)
    assert "epoch 2/2" in outcome.out
    other = complaint(sweep("train", "good.yaml", "--out", "trial", "--set", "seed=3"))
    assert other.startswith("trial: started with different settings (seed: 0 → 3)")
    assert results(trial) == before


@pytest.fixture(scope="module", params=["class_weights", "sampling"])
def balanced(request: pytest.FixtureRequest, place: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a trial with balanced classes; its folder comes last."""
    asked = [f"--set=train.{request.param}=balanced", "--set=train.epochs=1", "--set=model.modality=text"]
    folder = tmp_path_factory.mktemp("balanced") / request.param
    command = ["train", str(place / "good.yaml"), *asked, "--out", str(folder)]
    assert sweep(*command).code == 0
    return command


def test_balanced_weights_are_in_the_trials_config(balanced: list[str], here: Path, corpus: Shards) -> None:
    folder = Path(balanced[-1])
    setting, before = folder.name, results(folder)
    counts = answer_sets(corpus, ["classify"])["classify"].counts
    expected = {label: sum(counts) / (len(counts) * count) for label, count in zip(LABELS, counts, strict=True)}
    assert getattr(load(str(folder / "config.yaml")).train, setting) == {"classify": expected}
    assert len(set(expected.values())) > 1
    assert (sweep(*balanced).code, results(folder)) == (0, before)
    assert evaluate(folder)["n"] > 0
    assert sweep("train", folder / "config.yaml", "--out", "again").code == 0
    digests = {checkpoint.load(trial / "checkpoint.pt")["digest"] for trial in (folder, Path("again"))}
    assert len(digests) == 1
    assert Path("again/config.yaml").read_bytes() == before["config.yaml"]
    wrong = f"--set=train.{setting}.classify.chnge=2"
    message = complaint(sweep("train", folder / "config.yaml", "--out", "other", wrong))
    assert message.startswith(f"train.{setting}.classify.chnge: the task has no such label; choose from change, ")
    assert not Path("other").exists()


def test_balanced_weights_are_in_the_trials_job(here: Path) -> None:
    """A resumed trial has the same job, and the configuration of the sweep keeps the word."""
    asked = ["train.class_weights=balanced", "search.space={train.learning_rate: [0.1, 0.2]}"]
    values: dict[str, Any] = {"train.learning_rate": 0.2}
    config = load("good.yaml", asked)
    claim_folder(config, here / "s")
    resolved, runner = resolve_inputs(config), sweep_runner(config, here / "s")
    job = runner.make_job(resolved, 0, values)
    trial = load("s/trials/0000/config.yaml")
    assert trial == with_class_weights(config.for_trial(values), open_shards(resolved))
    assert isinstance(trial.train.class_weights, dict)
    assert Config.model_validate_json(job.config).train == trial.train
    assert runner.make_job(resolved, 0, values) == job
    claim_folder(load("good.yaml", asked), here / "s")
    assert load("s/config.yaml").train.class_weights == "balanced"


def test_fold_has_its_own_weights_and_teacher(here: Path) -> None:
    split = CorpusConfig.model_validate({"split": {"folds": 3, "stratify": []}})
    shards = prepare(synthetic.corpus(sessions=9, turns=8, seed=3), here / "folds", split)
    folds = [{"data.fold": fold} for fold in range(3)]
    search = {"search.space": {"data.fold": [0, 1, 2]}, "search.points": folds, "search.trials": 3}
    train = {"train.class_weights": "balanced", "train.losses.distillation": 1}
    config = load("good.yaml").with_values({"data.shards": str(shards.folder), "search.pruning": None} | search | train)
    claim_folder(config, here / "s")
    runner, weights = sweep_runner(config, here / "s"), []
    for fold, values in enumerate(folds):
        job = runner.make_job(resolve_inputs(config), fold, {**values})
        trial = load(f"s/trials/000{fold}/config.yaml")
        assert (trial.data.fold, json.loads(job.config)["data"]["fold"]) == (fold, fold)
        assert trial == with_class_weights(config.for_trial({**values}), Shards(shards.folder, fold))
        weights.append(trial.train.class_weights)
    assert weights[0] != weights[1] != weights[2]
    requests = [request for request, _ in cache_requests(resolve_inputs(config), here)]
    requested = {tuple(file.name for file in request.files) for request in requests}
    assert len(requested) == 1 + 3, "the features of the whole corpus, and the teacher logits of each fold"


def test_unusable_checkpoint_is_one_error(trial: Path) -> None:
    path, content = trial / "checkpoint.pt", (trial / "checkpoint.pt").read_bytes()
    config = (trial / "config.yaml").read_text()
    (trial / "config.yaml").write_text(config.replace("rank: 8", "rank: 4"))
    assert refused(trial, "evaluate", "trial").startswith("the checkpoint belongs to another configuration: ")
    for damaged in (b"half a file", content[: len(content) // 2], b""):
        path.write_bytes(damaged)
        assert refused(trial, "evaluate", "trial").startswith("trial/checkpoint.pt: damaged checkpoint (")
    torch.save({"weights": 1}, path)
    assert refused(trial, "evaluate", "trial").startswith("trial/checkpoint.pt: ")
    path.unlink()
    assert refused(trial, "evaluate", "trial").startswith("trial: the trial has no checkpoint any more")
    assert refused(trial, "evaluate", "trial/checkpoint.pt").startswith("trial/checkpoint.pt: ")


@pytest.fixture
def study(here: Path) -> StudyStore:
    """A sweep of three trials: complete, failed, running."""
    claim_folder(config := settings(), here / "s")
    study = StudyStore.open(here / "s", config)
    ask(study, 3)
    report(study, 0, 0.25, 0.5)
    study.complete(0)
    study.fail(1, "lost")
    return study


def test_status_and_best_json(study: StudyStore, here: Path) -> None:
    """A value that is not finite is null; a trial that waits for its features has no folder, and is not shown."""
    report(study, 2, float("nan"))
    assert len(strict(sweep("status", "s", "--json").out)["trials"]) == 2
    (folder := trial_folder(here / "s", 2)).mkdir(parents=True)
    (folder / "config.yaml").touch()
    status = strict(sweep("status", "s", "--json").out)
    assert status.keys() == {
        *("sweep", "objective", "direction", "target_trials", "progress", "human_ceiling", "trials")
    }
    assert [trial["state"] for trial in status["trials"]] == ["COMPLETE", "FAIL", "RUNNING"]
    keys = {"number", "state", "params", "value", "metrics", "steps", "epochs", "epoch", "mlflow_run_id"}
    keys |= {"attempts", "reason", "why", "audited", "spared"}
    keys |= {"share", "repeats"}
    assert all(trial.keys() == keys for trial in status["trials"])
    assert status["trials"][2]["value"] is None
    best = strict(sweep("best", "s", "--json").out)
    config = study.trial_config(study.trials()[0]).model_dump(mode="json")
    assert best == status["trials"][0] | {"recommended": 0, "config": config}
    assert (best["number"], best["value"], best["steps"]) == (0, 0.5, 20)
    out = sweep("best", "s").out.replace("\n", " ")
    assert "best: trial 0, macro_f1 0.500" in out
    assert "--set model.lora.rank=2 --set train.learning_rate=0.003" in out
    assert all(state in sweep("status", "s").out for state in ("COMPLETE", "FAIL", "RUNNING"))
    assert complaint(sweep("evaluate", "s")).startswith("s/trials/0000/config.yaml: no such file")


def test_best_needs_a_complete_trial(here: Path) -> None:
    claim_folder(config := settings(), here / "s")
    assert refused(here, "status", "s").startswith("s: no trial has started yet")
    ask(StudyStore.open(here / "s", config), 1)
    for command in ("best", "evaluate"):
        assert refused(here, command, "s").startswith("s: no trial is complete yet; ")
