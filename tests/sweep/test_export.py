"""`export` and `best --config`: a trial as a self-contained folder, and as a configuration that trains it again."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from model.checkpoints import checkpoint
from model.training.trainer import never
from sweep.analysis.predictions import read_predictions
from sweep.config.diff import claim_folder
from sweep.config.files import load
from sweep.config.version import code_version
from sweep.durability.retention import prune_checkpoints
from sweep.execution.trial import fit_job, open_shards
from sweep.preflight.checks import resolve_inputs
from sweep.search.study import StudyStore, TrialRecord
from tests.conftest import LABELS
from tests.model.trials import history
from tests.sweep.common import ask, complaint, refused, sweep, sweep_runner, tree

SPACE = "search.space={train.learning_rate: [0.02, 0.001, 0.0005], model.end_of_audio: [learned]}"
FILES = {"README.md", "config.yaml", "labels.json", "speech.safetensors", "lora"}


@pytest.fixture(scope="module")
def swept(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two complete trials, of which the better one has kept its checkpoint, and one that runs."""
    folder = tmp_path_factory.mktemp("swept") / "s"
    config = load(str(place / "good.yaml"), [SPACE, "search.trials=3", "storage.keep=1", "model.priors=balanced"])
    claim_folder(config, folder)
    resolved, runner = resolve_inputs(config), sweep_runner(config, folder)
    runner.study.bind(open_shards(resolved).fingerprint, code_version())
    for number in range(2):
        [asked] = ask(runner.study, 1)
        job = runner.make_job(resolved, *asked)
        assert fit_job(job, partial(runner.study.report, number), never)
        runner.study.complete(number)
    ask(runner.study, 1)
    assert len(prune_checkpoints(runner.study, folder)) == 1
    return folder


@pytest.fixture
def study(here: Path, swept: Path) -> StudyStore:
    """The same in the working folder, as `s`."""
    shutil.copytree(swept, here / "s")
    return StudyStore.read(Path("s"), load("s/config.yaml"))


@pytest.fixture
def best(study: StudyStore) -> TrialRecord:
    trial = study.best()
    assert trial is not None
    return trial


def test_best_config_trains_the_same_weights(study: StudyStore, best: TrialRecord) -> None:
    outcome = sweep("best", "s", "--config")
    assert (outcome.code, outcome.err) == (0, "")
    Path("best.yaml").write_text(outcome.out)
    assert load("best.yaml") == study.trial_config(best)
    assert sweep("train", "best.yaml", "--out", "again").code == 0
    trial = Path("s/trials") / f"{best.number:04d}"
    assert history(Path("again")) == history(trial)
    assert len({checkpoint.load(folder / "checkpoint.pt")["digest"] for folder in (Path("again"), trial)}) == 1
    assert read_predictions(Path("again")) == read_predictions(trial)


def test_export_writes_weights_labels_and_card(
    study: StudyStore, best: TrialRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep("export", "s", "--out", "made/m").code == 0
    assert {path.name for path in Path("made").iterdir()} == {"m"}
    assert {path.name for path in Path("made/m").iterdir()} == FILES
    labels = json.loads(Path("made/m/labels.json").read_text())
    assert labels["tasks"]["classify"]["labels"] == list(LABELS)
    assert sum(labels["tasks"]["classify"]["counts"]) > 0
    assert (labels["sweep"], labels["trial"], labels["corpus"]) == ("t", best.number, "synthetic")
    assert labels["roles"] == {"client": list(LABELS)}
    assert load("made/m/config.yaml") == study.trial_config(best)
    trial = Path("s/trials") / f"{best.number:04d}"
    tensors = checkpoint.load(trial / "checkpoint.pt")["tensors"]
    speech = load_file("made/m/speech.safetensors")
    assert speech.keys() == {name for name in tensors if "lora_" not in name}
    assert all(tensor.equal(tensors[name]) for name, tensor in speech.items())
    assert len(load_file("made/m/lora/adapter_model.safetensors")) == len(tensors) - len(speech)
    card = Path("made/m/README.md").read_text()
    records = read_predictions(trial)["classify"][1]
    assert card.startswith(f"# t, trial {best.number}\n")
    for words in (
        f"classify: {len(records)} items of 1 session.",
        f"| macro_f1 | {best.metrics['macro_f1']:.4g} |  |",
        f"| accuracy | {best.metrics['accuracy']:.4g} | ",
        *(f"| {row} |" for row in ("sweep", "seed", "corpus", "code version", "trained parts")),
        f"fingerprint `{study.fingerprint()}`",
        f"`{code_version()}`",
        "after epoch 2 of 2",
        "must not be used to judge individual clients",
        'PeftModel.from_pretrained(base, "lora")',
        "\nsweep train config.yaml --out again\n",
    ):
        assert words in card
    assert sweep("export", "s", "--trial", best.number, "--out", "named").code == 0
    assert tree(Path("named")) == tree(Path("made/m"))
    before = history(trial)
    monkeypatch.chdir("made/m")
    assert sweep("train", "config.yaml", "--out", "again").code == 0
    assert history(Path("again")) == before


def test_export_without_lora(here: Path) -> None:
    changed = ("--set=model.lora.enabled=false", "--set=train.epochs=1", "--set=model.encoder.path=mine")
    encoder = yaml.safe_load((here / "good.yaml").read_text())["model"]["encoder"]["path"]
    shutil.copytree(encoder, here / "mine")
    assert sweep("train", "good.yaml", *changed, "--out", "trial").code == 0
    assert sweep("export", "trial", "--out", "m").code == 0
    assert {path.name for path in Path("m").iterdir()} == FILES - {"lora"}
    assert json.loads(Path("m/labels.json").read_text())["trial"] is None
    assert load("m/config.yaml").model.encoder.path == str(here / "mine"), "the folder may be moved"
    card = Path("m/README.md").read_text()
    assert ("PeftModel" in card, "| trial | trained alone |" in card, "(at the export)" in card) == (False, True, True)


def test_export_refuses_in_one_line(here: Path, best: TrialRecord) -> None:
    other = 1 - best.number
    cases = {
        "--out taken: exists already; choose another name": ("s", "--out", "taken"),
        "--trial last: give the number of a trial, or best": ("s", "--trial", "last", "--out", "m"),
        "--trial 7: the sweep has no such trial": ("s", "--trial", 7, "--out", "m"),
        "--trial 2: it has not ended yet": ("s", "--trial", 2, "--out", "m"),
        f"s/trials/{other:04d}: the trial has no checkpoint any more": ("s", "--trial", other, "--out", "m"),
        "taken: neither a sweep, a trial nor a checkpoint": ("taken", "--out", "m"),
        "--trial 0: s/trials/0000 is no sweep": ("s/trials/0000", "--trial", 0, "--out", "m"),
    }
    for message, words in cases.items():
        assert refused(here, "export", *words).startswith(message), message


@pytest.mark.usefixtures("study")
def test_failed_export_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = tree(Path())
    monkeypatch.setattr("sweep.export.export.write", full)
    assert complaint(sweep("export", "s", "--out", "m")).startswith("m: the disk is full")
    assert tree(Path()) == before
