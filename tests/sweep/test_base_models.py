"""Base models under a sweep: their files are checked before anything starts, and other ones are not taken silently."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from data.errors import UserError
from model.checkpoints import checkpoint, checksum, peft_export
from model.checkpoints.fingerprint import BaseIdentity, OtherBaseError, identify_bases
from model.training.trainer import never
from sweep.analysis.leaderboard import find_doubts
from sweep.config.diff import claim_folder
from sweep.config.files import load
from sweep.config.resolve import resolve
from sweep.execution.trial import fit_job, open_shards
from sweep.preflight.checks import resolve_inputs
from sweep.runner import SweepRunner
from sweep.search.base_models import study_bases
from sweep.search.study import StudyStore
from sweep.tracking.summary import start_tags
from tests.model.test_base_files import cut, only_gguf, remove
from tests.model.test_fingerprint import flip
from tests.sweep.common import ask, complaint, refused, report, sweep, sweep_runner
from tests.sweep.test_predict import write_corpus

SPACE = "search.space={train.learning_rate: [0.01, 0.001], model.llm.path: [llm]}"
DAMAGED: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "no weights": ("llm", remove("model.safetensors"), "model.llm.path: llm: lacks model.safetensors (the weights)"),
    "cut off": ("encoder", cut("model.safetensors", -1), "model.encoder.path: encoder: model.safetensors has "),
    "no tokenizer": ("llm", remove("tokenizer.json"), "model.llm.path: llm: lacks tokenizer.json (the tokenizer)"),
    "GGUF": ("llm", only_gguf, "model.llm.path: llm: lacks model.safetensors (the weights); it holds GGUF files"),
}
COMMANDS = ("inspect good.yaml", "run good.yaml --dry-run --out new", "run good.yaml --out new", "train good.yaml")


@pytest.fixture(scope="module")
def made(place: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with own copies of two models, a trial that was trained on them, and this exported."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        good = json.loads((place / "good.yaml").read_text())
        shutil.copytree(models / "llm", "llm")
        shutil.copytree(models / "hubert-group", "encoder")
        good["model"] |= {"encoder": {"path": "encoder"}, "llm": {"path": "llm"}}
        good["train"] |= {"epochs": 1}
        Path("good.yaml").write_text(json.dumps(good))
        assert sweep("train", "good.yaml", "--out", "trial").code == 0
        assert sweep("export", "trial", "--out", "m").code == 0
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as working folder, where a sweep that would start Ray fails."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    config = (tmp_path / "m/config.yaml").read_text()
    (tmp_path / "m/config.yaml").write_text(config.replace(str(made), str(tmp_path)))
    disable_progress_bar()  # as main() does before transformers is imported
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SweepRunner, "execute", lambda *_: pytest.fail("Ray would start"))
    return tmp_path


def identities() -> dict[str, BaseIdentity]:
    return identify_bases(resolve(load("good.yaml")).model)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_model_is_one_line_before_anything(name: str, command: str, work: Path) -> None:
    folder, damage, message = DAMAGED[name]
    damage(work / folder)
    error = refused(work, *command.split())
    assert error.startswith(message)
    assert len(error.splitlines()) == 1


def test_damaged_model_is_found_without_torch(work: Path) -> None:
    (work / "llm/model.safetensors").unlink()
    code = """
import sys
from sweep.cli.app import main
for command in sys.argv[1:]:
    sys.argv = ["sweep", *command.split()]
    try:
        main()
    except SystemExit as ended:
        print(ended.code, *({"torch", "transformers", "ray", "mlflow"} & sys.modules.keys()))
"""
    ran = subprocess.run([sys.executable, "-c", code, *COMMANDS], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["2"] * len(COMMANDS)


def test_damaged_model_on_an_axis_is_found(work: Path) -> None:
    shutil.copytree("llm", "other")
    (work / "other/config.json").unlink()
    space = "search.space={model.llm.path: [llm, other]}"
    message = refused(work, "run", "good.yaml", "--set", space, "--dry-run", "--out", "new")
    assert message.startswith("model.llm.path: other: lacks config.json")


def test_results_hold_the_identity_of_their_models(work: Path) -> None:
    now = identities()
    assert now.keys() == {"model.llm.path", "model.encoder.path"}
    digests = {setting: base.digest for setting, base in now.items()}
    stored = checkpoint.bases_of(checkpoint.load(work / "trial/checkpoint.pt"))
    assert {setting: base.digest for setting, base in stored.items()} == digests
    assert {setting: base.digest for setting, base in peft_export.read(work / "m").bases.items()} == digests
    card = (work / "m/README.md").read_text()
    assert all(f"digest `{digest}` |" in card for digest in digests.values())


@pytest.mark.parametrize("folder", ["llm", "encoder"])
def test_other_base_is_refused_in_one_line(folder: str, work: Path) -> None:
    write_corpus(work)
    shutil.copytree("trial", "resumed")
    predict = ("predict", "m", "--csv", "corpus.csv", "--audio", "clips", "--config", "mapping.yaml", "--out", "coded")
    commands: list[tuple[str, ...]] = [
        ("evaluate", "trial", "--split", "val", "--json"),
        ("export", "trial", "--out", "again"),
        predict,
        ("train", "good.yaml", "--out", "resumed"),
    ]
    before = identities()[f"model.{folder}.path"].digest
    scores = json.loads(sweep(*commands[0]).out)["predictions"]
    weights = work / folder / "model.safetensors"
    tensors = {name: 1.5 * tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    after = identities()[f"model.{folder}.path"].digest
    for command in commands:
        message = complaint(sweep(*command))
        assert len(message.splitlines()) == 1
        assert f"model.{folder}.path {work / folder} was {before} and is now {after}" in message
        assert message.endswith("restore its files, or accept other results with --allow-other-base\n")
        assert not any(map(Path.exists, (work / "again", work / "coded")))
    for command in commands:
        outcome = sweep(*command, "--allow-other-base")
        assert (outcome.code, outcome.err) == (0, "")
    other = json.loads(sweep(*commands[0], "--allow-other-base").out)["predictions"]
    assert other != scores, "the weights must matter for this to test anything"
    assert peft_export.read(work / "again").bases[f"model.{folder}.path"].digest == before


def test_checkpoint_without_identity_is_accepted_and_gains_one(work: Path) -> None:
    """As earlier versions wrote it. What is computed from it on is computed with what is there now."""
    path = work / "trial/checkpoint.pt"
    state: Any = checkpoint.load(path)
    del state["bases"]
    checksum.write(path, state)
    exported = json.loads((work / "m/labels.json").read_text())
    del exported["bases"]
    (work / "m/labels.json").write_text(json.dumps(exported))
    flip(work / "llm/model.safetensors")
    assert sweep("evaluate", "trial", "--split", "val").code == 0
    assert sweep("export", "trial", "--out", "again").code == 0
    assert "(at the export)" in (work / "again/README.md").read_text()
    assert peft_export.read(work / "m").bases == {}
    config = resolve(load("good.yaml", ["train.epochs=2", "model.init_from=m"]))
    resolve_inputs(config)
    assert sweep("train", "good.yaml", "--set=model.init_from=trial", "--out", "second").code == 0
    assert checkpoint.load(work / "second/checkpoint.pt")["bases"].keys() == identities().keys()


def test_parent_that_was_trained_on_another_base_is_refused(work: Path, made: Path) -> None:
    for path in (work / "trial/checkpoint.pt", work / "m/labels.json"):  # which name the folder of the models
        if path.suffix == ".json":
            path.write_text(path.read_text().replace(str(made), str(work)))
            continue
        state: Any = checkpoint.load(path)
        for base in state["bases"].values():
            base["path"] = base["path"].replace(str(made), str(work))
        checksum.write(path, state)
    flip(work / "llm/model.safetensors")
    for parent in ("trial", "m"):
        command = ("run", "good.yaml", f"--set=model.init_from={parent}", "--out", "new")
        assert refused(work, *command).startswith(f"model.init_from: {work / parent}")
    resolve_inputs(load("good.yaml", ["model.init_from=trial"]), allow_other_base=True)
    shutil.copytree("llm", "named")
    resolve_inputs(load("good.yaml", ["model.init_from=trial", "model.llm.path=named"]))  # as the configuration says


@pytest.fixture
def study(work: Path) -> StudyStore:
    """A sweep of two trials, of which the first is complete."""
    config = load("good.yaml", [SPACE, "search.trials=2"])
    claim_folder(config, work / "s")
    study = StudyStore.open(work / "s", config)
    study.bind(open_shards(resolve(config)).fingerprint, None, study_bases(config))
    ask(study, 2)
    report(study, 0, 0.5)
    study.complete(0)
    return study


def test_extended_sweep_refuses_another_base(study: StudyStore, work: Path) -> None:
    command = ("run", "good.yaml", "--set", SPACE, "--trials", 4, "--out", "s")
    assert sweep(*command, "--dry-run").code == 0
    before = study.bases()["model.llm.path"]["llm"].digest
    flip(work / "llm/model.safetensors")
    after = identities()["model.llm.path"].digest
    preview = sweep(*command, "--dry-run")
    assert preview.code == 2
    assert "refused without --allow-other-base" in preview.out
    assert sweep(*command, "--dry-run", "--allow-other-base").code == 0
    for refused_command in (command, ("confirm", "s", "--top", 1, "--seeds", 1)):
        message = complaint(sweep(*refused_command))
        assert len(message.splitlines()) == 1
        assert f"started with another base model (model.llm.path llm was {before} and is now {after}); " in message
        assert message.endswith("or accept other results with --allow-other-base\n")
    assert StudyStore.of(work / "s").bases() == study.bases()


def test_allowed_base_is_stored_beside_the_former(study: StudyStore, work: Path) -> None:
    fingerprint, before = str(study.fingerprint()), study.bases()
    flip(work / "encoder/model.safetensors")
    now = study_bases(study.config)
    with pytest.raises(UserError, match=r"model.encoder.path encoder was .* and is now "):
        study.bind(fingerprint, None, now)
    note = study.bind(fingerprint, None, now, allow_other_base=True)
    assert str(note).startswith("base models: model.encoder.path encoder was ")
    assert study.bases() == now != before
    assert study.bind(fingerprint, None, now) is None
    [former] = study.study.user_attrs["former_bases"]
    assert former["model.encoder.path"]["encoder"]["digest"] == before["model.encoder.path"]["encoder"].digest


def test_sweep_without_identity_gains_one(work: Path) -> None:
    """As earlier versions wrote it; a new value of an axis is no other base either."""
    claim_folder(config := load("good.yaml"), work / "s")
    study = StudyStore.open(work / "s", config)
    study.bind(fingerprint := open_shards(resolve(config)).fingerprint)
    assert study.bases() == {}
    assert study.bind(fingerprint, None, study_bases(config)) is None
    assert study.bases().keys() == {"model.llm.path", "model.encoder.path"}
    shutil.copytree("llm", "other")
    flip(work / "other/model.safetensors")
    wider = load("good.yaml", ["search.space={model.llm.path: [llm, other]}"])
    assert study.bind(fingerprint, None, study_bases(wider)) is None
    assert study.bases()["model.llm.path"].keys() == {"llm", "other"}


def test_changed_start_of_trials_is_another_base(work: Path) -> None:
    config = load("good.yaml", ["model.init_from=m"])
    claim_folder(config, work / "s")
    study = StudyStore.open(work / "s", config)
    study.bind("f", None, study_bases(config))
    (work / "m/labels.json").write_text((work / "m/labels.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"model.init_from m was .* and is now "):
        study.bind("f", None, study_bases(config))


def test_worker_with_another_base_stops_the_sweep(study: StudyStore, work: Path) -> None:
    """On another node, or after the driver has started."""
    runner = sweep_runner(study.config, work / "s")
    runner.bases = study_bases(study.config)
    resolved = resolve_inputs(study.config)
    number, values = 1, dict(study.trials()[1].params)
    job = runner.make_job(resolved, number, values)
    [stored] = [trial.bases for trial in StudyStore.of(work / "s").trials() if trial.number == number]
    assert stored == {setting: runner.bases[setting][name] for setting, name in _named().items()}
    assert fit_job(job, lambda epoch, metrics: None, never)
    state = checkpoint.load(work / "s/trials/0001/checkpoint.pt")
    assert {setting: base.digest for setting, base in checkpoint.bases_of(state).items()} == {
        setting: base.digest for setting, base in stored.items()
    }
    flip(work / "llm/model.safetensors")
    with pytest.raises(OtherBaseError, match="while the sweep runs; restore the files, on all nodes") as error:
        fit_job(job, lambda epoch, metrics: None, never)
    assert (error.value.common, error.value.outside, error.value.reason) == (True, True, "bad data")


def _named() -> dict[str, str]:
    return {"model.llm.path": "llm", "model.encoder.path": "encoder"}


def test_trials_of_different_bases_are_named_above_the_table(study: StudyStore, work: Path) -> None:
    first, second = (BaseIdentity(path="llm", digest=digit * 16) for digit in "ab")
    study.start(1, {"model.llm.path": second})
    running = study.trials()[1]
    same, other = (replace(running, number=0, bases={"model.llm.path": base}) for base in (second, first))
    assert find_doubts(study.config, work / "s", [same, running]) == []
    assert find_doubts(study.config, work / "s", [other, running]) == [
        f"model.llm.path: llm changed, so trials are not comparable: {first} in trials 0; {second} in trials 1"
    ]
    assert start_tags(study.config, running, ["1"])["sweep.base.llm"] == str(second)
