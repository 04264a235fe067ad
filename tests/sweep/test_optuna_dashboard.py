"""optuna-dashboard opens the store as it is: by the command of docs/choose.md, read by its own API."""

import contextlib
import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sweep.execution.cluster import free_port
from sweep.search.study import StudyStore
from sweep.search.study_storage import FILE
from tests.sweep.common import ask, report
from tests.sweep.mlflow_server import wait_for
from tests.sweep.tracked import CONFIG

PROGRAM = shutil.which("optuna-dashboard", path=str(Path(sys.executable).parent))
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs `pip install optuna-dashboard`")


@pytest.fixture
def store(tmp_path: Path) -> StudyStore:
    """The study of a sweep with a trial in every state."""
    made = StudyStore.open(tmp_path, CONFIG)
    ask(made, 4)
    report(made, 0, 0.9, 0.8, 0.7, 0.95)
    made.complete(0)
    assert report(made, 1, 0.1) == [True]
    made.fail(2, "lost")
    return made


@pytest.fixture
def api(store: StudyStore, tmp_path: Path) -> Iterator[Any]:
    """Query a dashboard that shows the sweep."""
    root = f"http://127.0.0.1:{(port := free_port())}/api"
    words = [str(PROGRAM), str(tmp_path / FILE), "--host", "127.0.0.1", "--port", str(port)]

    def asked(path: str) -> Any:
        with urllib.request.urlopen(f"{root}/{path}", timeout=60) as answer:
            return json.load(answer)

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        with contextlib.suppress(OSError):
            return bool(asked("meta"))
        return False

    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        wait_for(answers)
        yield asked
    finally:
        process.kill()
        process.wait()


def test_dashboard_shows_every_trial(api: Any, store: StudyStore, tmp_path: Path) -> None:
    before = (tmp_path / FILE).read_bytes()
    [study] = api("studies")["study_summaries"]
    assert study["study_name"] == CONFIG.name
    shown = api(f"studies/{study['study_id']}?after=0")
    trials, records = shown["trials"], store.trials()
    assert [trial["state"] for trial in trials] == ["Complete", "Pruned", "Fail", "Running"]
    for trial, record in zip(trials, records, strict=True):
        assert trial["number"] == record.number
        params = {param["name"]: param["param_external_value"] for param in trial["params"]}
        assert params == {key: str(value) for key, value in record.params.items()}
        curve = {one["step"]: one["value"] for one in trial["intermediate_values"]}
        assert curve == record.curve
    assert (trials[0]["values"], shown["directions"]) == ([0.95], ["maximize"])
    assert (tmp_path / FILE).read_bytes() == before, "reading changes nothing"
