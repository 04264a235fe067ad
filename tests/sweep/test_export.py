"""`export` and `best --config`: a trial as files that stand alone, and as a configuration that trains it again."""

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
from sweep.search.study import StudyStore
from tests.conftest import LABELS
from tests.model.trials import history
from tests.sweep.common import ask, complaint, refused, sweep, sweep_runner, tree

SPACE = "search.space={train.learning_rate: [0.02, 0.001], model.end_of_audio: [learned]}"
FILES = {"README.md", "config.yaml", "labels.json", "speech.safetensors", "lora"}


@pytest.fixture(scope="module")
def swept(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two complete trials, of which the better one has kept its checkpoint, and one that runs."""
    folder = tmp_path_factory.mktemp("swept") / "s"
    config = load(str(place / "good.yaml"), [SPACE, "search.trials=3", "storage.keep=1", "model.priors=balanced"])
    claim_folder(config, folder)
    resolved, attempt = resolve_inputs(config), sweep_runner(config, folder)
    attempt.study.bind(open_shards(resolved).fingerprint, code_version())
    for number in range(2):
        [asked] = ask(attempt.study, 1)
        job = attempt.make_job(resolved, *asked)
        assert fit_job(job, partial(attempt.study.report, number), never)
        attempt.study.complete(number)
    ask(attempt.study, 1)
    assert len(prune_checkpoints(attempt.study, folder)) == 1
    return folder


@pytest.fixture
def swept_here(here: Path, swept: Path) -> StudyStore:
    """The same in the working folder, as `s`."""
    shutil.copytree(swept, here / "s")
    return StudyStore.read(Path("s"), load("s/config.yaml"))


def test_the_configuration_of_the_best_trains_it_again(swept_here: StudyStore) -> None:
    best = swept_here.best()
    assert best is not None
    outcome = sweep("best", "s", "--config")
    assert (outcome.code, outcome.err) == (0, "")
    Path("best.yaml").write_text(outcome.out)
    assert load("best.yaml") == swept_here.trial_config(best)
    assert sweep("train", "best.yaml", "--out", "again").code == 0
    before = Path("s/trials") / f"{best.number:04d}"
    assert history(Path("again")) == history(before)
    digests = {checkpoint.load(own / "checkpoint.pt")["digest"] for own in (Path("again"), before)}
    assert len(digests) == 1
    assert read_predictions(Path("again")) == read_predictions(before)


@pytest.mark.parametrize("named", [False, True])
def test_a_trial_of_a_sweep_is_exported(named: bool, swept_here: StudyStore) -> None:
    best = swept_here.best()
    assert best is not None
    which = ("--trial", best.number) if named else ()
    assert sweep("export", "s", *which, "--out", "made/m").code == 0
    assert {path.name for path in Path("made").iterdir()} == {"m"}
    assert {path.name for path in Path("made/m").iterdir()} == FILES
    labels = json.loads(Path("made/m/labels.json").read_text())
    assert labels["tasks"]["classify"]["labels"] == list(LABELS)
    assert sum(labels["tasks"]["classify"]["counts"]) > 0
    assert (labels["sweep"], labels["trial"], labels["corpus"]) == ("t", best.number, "synthetic")
    assert labels["roles"] == {"client": list(LABELS)}
    assert load("made/m/config.yaml") == swept_here.trial_config(best)
    state = checkpoint.load(Path("s/trials") / f"{best.number:04d}" / "checkpoint.pt")
    speech = load_file("made/m/speech.safetensors")
    assert speech.keys() == {name for name in state["tensors"] if "lora_" not in name}
    assert all(tensor.equal(state["tensors"][name]) for name, tensor in speech.items())
    assert len(load_file("made/m/lora/adapter_model.safetensors")) == len(state["tensors"]) - len(speech)


def test_the_card_says_where_it_comes_from_and_how_good_it_was(swept_here: StudyStore) -> None:
    best = swept_here.best()
    assert best is not None
    assert sweep("export", "s", "--out", "m").code == 0
    card = Path("m/README.md").read_text()
    records = read_predictions(Path("s/trials") / f"{best.number:04d}")["classify"][1]
    assert card.startswith(f"# t, trial {best.number}\n")
    assert f"classify: {len(records)} items of 1 session." in card
    assert f"| macro_f1 | {best.metrics['macro_f1']:.4g} |  |" in card
    assert f"| accuracy | {best.metrics['accuracy']:.4g} | " in card
    assert all(f"| {row} |" in card for row in ("sweep", "seed", "corpus", "code version", "trained parts"))
    assert f"fingerprint `{swept_here.fingerprint()}`" in card
    assert f"`{code_version()}`" in card
    assert "after epoch 2 of 2" in card
    assert "must not be used to judge individual clients" in card
    assert 'PeftModel.from_pretrained(base, "lora")' in card


def test_the_command_of_the_card_trains_it_again(swept_here: StudyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    best = swept_here.best()
    assert best is not None
    assert sweep("export", "s", "--out", "m").code == 0
    assert "\nsweep train config.yaml --out again\n" in Path("m/README.md").read_text()
    monkeypatch.chdir("m")
    assert sweep("train", "config.yaml", "--out", "again").code == 0
    assert history(Path("again")) == history(Path("../s/trials") / f"{best.number:04d}")


def test_without_lora_there_is_none(here: Path) -> None:
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


def test_what_cannot_be_exported_is_one_error(here: Path, swept_here: StudyStore) -> None:
    best = swept_here.best()
    assert best is not None
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


def test_a_failure_in_the_middle_leaves_nothing(swept_here: StudyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = tree(Path())
    monkeypatch.setattr("sweep.export.export.write", full)
    assert complaint(sweep("export", "s", "--out", "m")).startswith("m: the disk is full")
    assert tree(Path()) == before
