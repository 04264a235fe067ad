"""What a user sees of a sweep while it runs: a bar on a terminal, lines in a log, and what `sweep status` shows."""

import io
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from sweep.analysis.status import progress_json, runner_of, status_lines
from sweep.cli.progress import LOG_SECONDS, ConsoleListener, TrialDisplay
from sweep.durability.heartbeat import Holder
from sweep.search.study import StudyStore
from tests.sweep.common import report
from tests.sweep.tracked import CONFIG, append


def listener(terminal: bool = False) -> tuple[ConsoleListener, io.StringIO]:
    console = Console(file=(out := io.StringIO()), force_terminal=terminal, width=200, color_system=None)
    return ConsoleListener(console), out


def progress_lines(out: io.StringIO) -> list[str]:
    return [line for line in out.getvalue().splitlines() if "trials done" in line]


def test_log_shows_progress_when_it_changed_and_not_too_often(folder: Path) -> None:
    append(folder, 3)
    shown, out = listener()
    display = TrialDisplay(shown, CONFIG, folder)
    display.update()
    assert "trial 3 starts: " in out.getvalue()
    assert progress_lines(out) == []
    display.line_at -= LOG_SECONDS
    display.update()
    [line] = progress_lines(out)
    assert "3/4 trials done; 1 complete, 1 running, 1 pruned, 1 failed; best 0.800 (#0)" in line
    assert line.endswith("#3 epoch 0")
    display.line_at -= LOG_SECONDS
    display.update()
    assert len(progress_lines(out)) == 1, "nothing changed"
    report(study := StudyStore.open(folder, CONFIG), 3, 0.95)
    display.update()
    assert len(progress_lines(out)) == 2
    study.complete(3)
    display.update()
    assert len(progress_lines(out)) == 2, "too soon"
    assert "trial 3 COMPLETE: macro_f1 0.950" in out.getvalue()


def test_terminal_shows_a_bar(folder: Path) -> None:
    shown, out = listener(terminal=True)
    with shown.running(CONFIG, folder):
        shown.say("a [line] as it is")
    assert "3/4 trials done" in out.getvalue()
    assert "trial 0 COMPLETE: macro_f1 0.800" in out.getvalue()
    assert " s  a [line] as it is" in out.getvalue()


def test_study_that_cannot_be_read_is_shown_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report(StudyStore.open(folder, CONFIG), 3, 0.95)
    append(folder, 3)
    shown, out = listener()
    display = TrialDisplay(shown, CONFIG, folder)

    def away(self: StudyStore) -> None:
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(StudyStore, "trials", away)
        display.update()
    assert out.getvalue() == ""
    display.update()
    assert "trial 0 COMPLETE" in out.getvalue()
    assert "trial 3 resumes after epoch 1: " in out.getvalue()


def test_display_creates_nothing_where_no_sweep_is(tmp_path: Path) -> None:
    shown, out = listener()
    with shown.running(CONFIG, tmp_path):
        pass
    assert (out.getvalue(), list(tmp_path.iterdir())) == ("", [])


HOLDER = json.dumps(asdict(Holder("token", "node7", "boot", 41, 0.0, 0.0, 3)))


def lease(folder: Path, age: float, content: str = HOLDER) -> None:
    (path := folder / "lease.json").write_text(content)
    os.utime(path, (time.time() - age,) * 2)


def test_status_says_who_works_on_a_sweep(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    study = StudyStore.open(folder, CONFIG)
    trials = study.trials()
    idle = "not running; `sweep run sweep/config.yaml --out sweep` resumes it"
    head = f"{CONFIG.name}: 3/4 trials done; 1 complete, 1 running, 1 pruned, 1 failed; best 0.800 (#0)"
    assert status_lines(CONFIG, folder, trials) == [head, idle]
    lease(folder, age=5)
    assert status_lines(CONFIG, folder, trials) == [head, "running on node7 (pid 41)"]
    content = progress_json(CONFIG, folder, trials)
    assert content.items() >= {"target": 4, "done": 3, "best": 0, "running_on": "node7", "pid": 41}.items()
    assert (content["cpu_hours"], content["gpu_hours"], content["seconds_left"]) == (0, None, None)
    lease(folder, age=60)
    assert status_lines(CONFIG, folder, trials)[1] == idle, "killed"
    assert progress_json(CONFIG, folder, trials)["running_on"] is None
    report(study, 3, 0.95)
    study.complete(3)
    assert status_lines(CONFIG, folder, study.trials())[1] == "finished"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"host": "a", "pid": null}'])
def test_lease_that_is_being_written_has_no_holder(content: str, tmp_path: Path) -> None:
    lease(tmp_path, 1, content)
    assert runner_of(tmp_path) is None
