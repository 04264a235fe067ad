"""The README: its commands run as they stand, its file tree is the project's, and its demo shows what it promises."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import typer

from sweep import run_sweep
from sweep.cli.app import app
from tests.data.test_annomi import write
from tests.security.planted import LOGS, files, found_in, plant, sweep_with_secrets
from tests.sweep.common import sweep

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(section: str) -> list[list[str]]:
    """The `sweep …` lines of the shell blocks of a section, in order, but those that need a cluster."""
    [text] = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", README, flags=re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if "# needs a cluster" not in line]
    lines = [line.split("  #")[0].strip() for line in lines]
    return [shlex.split(line) for line in lines if line.startswith("sweep ")]


def record(folder: Path, sessions: int) -> None:
    """A recording of every session, of three rates and layouts."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for session in range(sessions):
        rate, channels = [(16_000, 1), (44_100, 2), (22_050, 1)][session % 3]
        soundfile.write(folder / f"{session}.wav", rng.standard_normal((13 * rate, channels)) * 0.1, rate)


def run(words: list[str], planted: dict[str, str], ray: set[Path]) -> str:
    """Run a command and return its output. Commands that start Ray get a process and planted secrets, and their Ray
    folders are kept; the others run here."""
    if words[1] in ("run", "confirm"):
        outcome, kept = sweep_with_secrets(planted, *words[1:])
        ray |= kept
    else:
        outcome = sweep(*words[1:])
    assert outcome.code == 0, f"{shlex.join(words)}\n{outcome.out[-2000:]}\n{outcome.err[-2000:]}"
    return f"{outcome.out}{outcome.err}"


def check_secrets(root: Path, outputs: dict[str, str], planted: dict[str, str], ray: set[Path]) -> None:
    """No planted secret is in a file of the sweeps or of Ray, or was printed."""
    try:
        written = [*files(root), *(path for folder in ray for path in files(folder))]
        expected = {"mlflow.db", "study.journal", "config.yaml", "checkpoint.pt", "predictions.json", "metrics.jsonl"}
        assert {path.name for path in written} >= expected | LOGS
        assert found_in(written, planted) == []
        assert [name for name, value in planted.items() if value in "".join(outputs.values())] == []
    finally:
        for folder in ray:
            shutil.rmtree(folder)


@pytest.fixture
def outputs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the commands of a section print when they are typed in an empty folder; no secret is left anywhere."""
    write(tmp_path, sessions=12).rename(tmp_path / "AnnoMI-simple.csv")
    record(tmp_path / "recordings", sessions=12)
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("RAY_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_worker_niceness", "0")  # so that the longest tests do not wait for all others
    planted, ray = plant(), set()
    outputs = {shlex.join(words): run(words, planted, ray) for words in commands(request.param)}
    check_secrets(tmp_path, outputs, planted, ray)
    return outputs


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.xdist_group("corpus")  # beside the demo, which takes longest of all tests
@pytest.mark.parametrize("outputs", ["Your own corpus"], indirect=True)
def test_commands_over_a_corpus_run(outputs: dict[str, str]) -> None:
    assert [command.split()[1] for command in outputs] == ["prepare", "inspect", "run"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("outputs", ["The demo"], indirect=True)
def test_commands_of_the_demo_run(outputs: dict[str, str], tmp_path: Path) -> None:
    assert {command.split()[1] for command in outputs} == {
        *("run", "status", "best", "confirm", "report", "export", "train", "evaluate", "inspect"),
    }
    status = json.loads(outputs["sweep status runs/demo --json"])
    assert len(status["trials"]) == status["target_trials"] >= 8

    def best(modality: str) -> float:
        complete = [trial for trial in status["trials"] if trial["state"] == "COMPLETE"]
        chosen = [trial for trial in complete if trial["params"]["model.modality"] == modality]
        return max(trial["metrics"]["accuracy_ambiguous"] for trial in chosen)

    # Text cannot know: half of these items have either label. With about 110 items, five standard errors are 0.24.
    assert best("text") < 0.7
    assert best("speech") > 0.9
    # The first command again, as after `make sweep`: it shows the leaderboard, starts no Ray, and changes nothing.
    journal = (tmp_path / "runs/demo/study.journal").read_bytes()
    again = sweep("run", "demo")
    assert (again.code, "starting Ray" in outputs["sweep run demo"], "starting Ray" in again.out) == (0, True, False)
    assert "demo: trials by macro_f1" in again.out
    # So does the same from Python.
    outcome = run_sweep("demo", progress=False)
    assert (outcome.state, len(outcome.trials)) == ("done", status["target_trials"])
    assert outcome.best is not None
    assert f"trial {outcome.best.number}" in outputs["sweep best runs/demo"]
    assert (tmp_path / "runs/demo/study.journal").read_bytes() == journal


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z]+)", README, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_page_of_commands_lists_what_the_program_has() -> None:
    page = (ROOT / "docs/sweep.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    listed = set(re.findall(r"^\| `sweep (\w+)", page, flags=re.MULTILINE))
    assert listed == {name for name, command in commands.items() if not command.hidden}
