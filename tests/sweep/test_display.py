"""What is seen of a sweep while it runs: a bar on a terminal, lines in a log, and what `sweep status` says of it."""

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from sweep.analysis.status import driver_of, progress_json, status_lines
from sweep.cli.progress import QUIET, Display
from sweep.search.study import StudyStore
from tests.sweep.common import report
from tests.sweep.tracked import CONFIG, append


def display(folder: Path, terminal: bool = False) -> tuple[Display, io.StringIO]:
    console = Console(file=(out := io.StringIO()), force_terminal=terminal, width=200, color_system=None)
    return Display(console, CONFIG, folder), out


def lines(out: io.StringIO) -> list[str]:
    return [line for line in out.getvalue().splitlines() if "trials done" in line]


def test_a_log_gets_a_line_when_something_changed_and_not_too_often(folder: Path) -> None:
    shown, out = display(folder)
    shown._look()
    assert lines(out) == [], "what began is told by lines of its own"
    shown.told_at -= QUIET
    shown._look()
    [line] = lines(out)
    assert "3/4 trials done; 1 complete, 1 running, 1 pruned, 1 failed; best 0.800 (#0)" in line
    assert line.endswith("#3 epoch 0")
    shown.told_at -= QUIET
    shown._look()
    assert len(lines(out)) == 1, "nothing changed"
    report(study := StudyStore.open(folder, CONFIG), 3, 0.95)
    shown._look()
    assert len(lines(out)) == 2
    study.complete(3)
    shown._look()
    assert len(lines(out)) == 2, "too soon"


def test_a_terminal_gets_a_bar(folder: Path) -> None:
    shown, out = display(folder, terminal=True)
    shown.told_at -= QUIET
    with shown:
        pass
    [task] = shown.progress.tasks
    assert (task.completed, task.total) == (3, 4)
    assert "3/4 trials done" in task.description
    assert "trial 0 COMPLETE: macro_f1 0.800" in out.getvalue()


def test_a_ledger_that_cannot_be_read_now_stops_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, out = display(folder)

    def away(self: StudyStore) -> None:
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(StudyStore, "trials", away)
        shown._look()
    assert out.getvalue() == ""
    shown._look()
    assert "trial 0 COMPLETE" in out.getvalue()


def test_nothing_is_made_where_no_sweep_is(tmp_path: Path) -> None:
    shown, out = display(tmp_path)
    with shown:
        pass
    assert (out.getvalue(), list(tmp_path.iterdir())) == ("", [])


def lease(folder: Path, age: float, content: str = json.dumps({"host": "node7", "pid": 41, "beat": 3})) -> None:
    (path := folder / "lease.json").write_text(content)
    os.utime(path, (time.time() - age,) * 2)


def test_status_says_who_works_on_a_sweep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    entries = StudyStore.read(folder, CONFIG).trials()
    nobody = "nobody works on it; `sweep run sweep/config.yaml --out sweep` goes on"
    head = f"{CONFIG.name}: 3/4 trials done; 1 complete, 1 running, 1 pruned, 1 failed; best 0.800 (#0)"
    assert status_lines(CONFIG, folder, entries) == [head, nobody]
    lease(folder, age=5)
    assert status_lines(CONFIG, folder, entries) == [head, "running on node7 (pid 41)"]
    told = progress_json(CONFIG, folder, entries)
    assert told.items() >= {"target": 4, "done": 3, "best": 0, "running_on": "node7", "pid": 41}.items()
    assert (told["cpu_hours"], told["gpu_hours"], told["seconds_left"]) == (0, None, None)
    lease(folder, age=60)
    assert status_lines(CONFIG, folder, entries)[1] == nobody, "killed"
    assert progress_json(CONFIG, folder, entries)["running_on"] is None


def test_a_sweep_that_is_over_wants_nothing(folder: Path) -> None:
    report(study := StudyStore.open(folder, CONFIG), 3, 0.95)
    study.complete(3)
    assert status_lines(CONFIG, folder, study.trials())[1] == "finished"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"host": "a", "pid": null}'])
def test_a_lease_that_is_being_written_is_nobody_s(content: str, tmp_path: Path) -> None:
    lease(tmp_path, 1, content)
    assert driver_of(tmp_path) is None


def test_trials_that_go_on_say_so(folder: Path) -> None:
    report(StudyStore.open(folder, CONFIG), 3, 0.95)
    append(folder, 3)
    shown, out = display(folder)
    shown._look()
    assert "trial 3 goes on after epoch 1" in out.getvalue()
