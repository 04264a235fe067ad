"""Files stay where they were named, and a printed command that is pasted into a shell does the same."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from sqlalchemy import make_url

from sweep.analysis.status import train_command
from sweep.cli.show import program
from sweep.config.files import dump, load
from sweep.config.loader import apply_overrides, override
from sweep.config.paths import shell_command, sqlite_uri
from sweep.search import study_storage
from sweep.search.study import StudyStore
from sweep.tracking.access import tracking_uri, ui_address, ui_command
from tests.sweep.common import ask, report, settings, sweep, tree
from tests.sweep.tracked import make_sweep, runs, track

NAMES = ["a?b", "a#b", "50%", "a%41b", "a b", "é中", "it's", 'a"b', "a$HOME`b`", "a;b&c|d>e", "a@b:c", "a\nb", "-o"]
# What YAML would read as something else, or not at all.
PLAIN = [
    "",
    " ",
    "yes",
    "null",
    "1e-3",
    "0x1F",
    "2020-01-01",
    "[1, 2]",
    "{a: b}",
    "# a",
    "a: b",
    "- a",
    "&a",
    "!a",
    "~",
]
ODD = ["\\n", "\\", "'", '"', "''", "a\r\nb", "tab\tbed", "\x1b[31m", "\x7f\x85\u2028\ufeff", "🎧 a", "\xa0a", "a, b"]
TEXTS = [*NAMES, *PLAIN, *ODD]
VALUES = [*TEXTS, True, False, None, 0, -1, 2**40, 1e-05, 0.1 + 0.2, 1e22, -3.5, ["a b", "$c"]]


def pasted(command: str) -> list[str]:
    """Return the words of a command as a POSIX shell reads them."""
    done = subprocess.run(["sh", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True)
    return done.stdout.decode().split("\0")[:-1]


def test_overrides_survive_shell_and_yaml() -> None:
    words = pasted(shell_command("sweep", *(override(f"key{index}", value) for index, value in enumerate(VALUES))))
    assert apply_overrides({}, words[1:]) == {f"key{index}": value for index, value in enumerate(VALUES)}
    assert [type(value) for value in apply_overrides({}, words[1:]).values()] == [type(value) for value in VALUES]
    assert override("model.modality", "text+speech") == "model.modality=text+speech"


def test_paths_in_commands_are_paths_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = pasted(shell_command("sweep", "report", *(tmp_path / name for name in NAMES)))[2:]
    assert [Path(word).absolute() for word in words] == [tmp_path / name for name in NAMES]
    assert not [word for word in words if word.startswith("-")]


@pytest.mark.parametrize("name", NAMES)
def test_database_uri_names_the_file(name: str) -> None:
    uri = sqlite_uri(Path("/runs") / name / "mlflow.db")
    assert make_url(uri).database == f"/runs/{name}/mlflow.db"
    assert make_url(uri).get_backend_name() == "sqlite"


@pytest.fixture
def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a sweep with an awkward name, whose trials differ in strings that a shell would change."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {
        "model.llm.path": [f"models/{text}" for text in TEXTS],
        "model.init_from": [None, "yes", "$HOME"],
        "train.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "model.trainable": settings().search.space["model.trainable"].model_dump(exclude_none=True),
        "model.modality": ["speech", "text"],
    }
    config = settings(trials=len(TEXTS), space=space, points=[{"model.llm.path": f"models/{text}"} for text in TEXTS])
    (folder := tmp_path / "a ?#%41é'\"$b" / "it is").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    study = StudyStore.open(folder, config)
    for number, _ in ask(study, len(TEXTS)):
        report(study, number, *(0.5 + number / 100 for _ in range(4)))
        study.complete(number)
    return folder


def test_train_command_reproduces_every_trial(searched: Path) -> None:
    study = StudyStore.of(searched)
    seen = set()
    for trial in study.trials():
        _, verb, path, *sets = pasted(train_command(searched, trial.params))
        assert (verb, sets[::2]) == ("train", ["--set"] * len(trial.params))
        assert load(path, sets[1::2]).for_trial({}) == study.trial_config(trial)
        seen.add(trial.params["model.llm.path"])
    assert seen == {f"models/{text}" for text in TEXTS}


def test_printed_commands_name_the_folder(searched: Path) -> None:
    out = sweep("best", searched).out
    commands = dict(re.findall(r"^(reproduce|evaluate|confirm|report): +(.*)$", out, flags=re.MULTILINE))
    words = {name: pasted(command) for name, command in commands.items()}
    folder = str(searched.relative_to(searched.parents[1]))
    name = str(program("sweep"))
    assert words["evaluate"] == [name, "evaluate", folder, "--split", "test"]
    assert (words["confirm"], words["report"]) == ([name, "confirm", folder], [name, "report", folder])
    assert words["reproduce"][:3] == [name, "train", f"{folder}/config.yaml"]
    [resume] = re.findall(r"not running; `(.*)` resumes it", sweep("status", unfinished(searched)).out)
    assert pasted(resume) == ["sweep", "run", f"{folder}/config.yaml", "--out", folder]


def unfinished(folder: Path) -> Path:
    """Raise the number of trials of a sweep."""
    config = load(str(folder / "config.yaml"))
    (folder / "config.yaml").write_text(dump(config.with_values({"search.trials": 99})), encoding="utf-8")
    return folder


def test_mlflow_files_stay_in_the_named_folder(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (place := tmp_path / "a ?#%41é中'\"$b :c").mkdir()
    folder = make_sweep(place / "x y", database)
    track(folder)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    assert sorted(path.name for path in place.iterdir()) == ["mlartifacts", "mlflow.db", "x y"]
    parent, children = runs(folder)
    client = MlflowClient(tracking_uri(folder))
    assert [file.path for file in client.list_artifacts(parent.info.run_id)] == ["config.yaml"]
    assert "confusion_matrix.png" in [file.path for file in client.list_artifacts(children[0].info.run_id)]
    assert any(name.endswith("/config.yaml") for name in tree(place / "mlartifacts"))


@pytest.mark.parametrize("name", NAMES)
def test_study_database_stays_in_the_named_folder(name: str) -> None:
    """Optuna gets the address as a text."""
    text = study_storage._url("sqlite:///study.db", Path("/runs") / name).render_as_string()
    assert make_url(text).database == f"/runs/{name}/study.db"


def test_server_command_opens_the_database_of_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        words = pasted(ui_command(Path(name) / "x"))
        options = dict(zip(words[2::2], words[3::2], strict=True))
        database = make_url(options["--backend-store-uri"]).database
        assert Path(str(database)).absolute() == tmp_path / name / "mlflow.db"
        assert ui_address(tracking_uri(Path(name) / "x")) == f"http://{options['--host']}:{options['--port']}"


@pytest.mark.parametrize(
    ("uri", "command", "address"),
    [
        ("https://mlflow.example.org/base/", "https://mlflow.example.org/base/", "https://mlflow.example.org/base"),
        ("databricks", "databricks", None),
        (
            "postgresql://db/runs?sslmode=require&a=b",
            "mlflow server --backend-store-uri 'postgresql://db/runs?sslmode=require&a=b' --host 127.0.0.1 --port 5000",
            "http://127.0.0.1:5000",
        ),
    ],
)
def test_address_of_the_ui(uri: str, command: str, address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert (ui_command(Path("runs/a")), ui_address(tracking_uri(Path("runs/a")))) == (command, address)
