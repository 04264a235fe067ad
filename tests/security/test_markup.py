"""Words of a corpus and values of settings are data wherever they are shown: no markup in pages, no formulas in sheets,
no orders to a terminal.

tests/data/test_report.py has the page of a corpus, tests/sweep/test_predict.py the page of a transcript.
"""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from data.report.transcript import Coding, codings_csv
from sweep.search.study import StudyStore
from sweep.tracking.note import note
from tests.sweep.common import sweep
from tests.sweep.searched import SPACE, played, settings

EVIL = "<script>alert(1)</script>|</td><img src=x onerror=alert(1)>"


def test_page_and_note_of_a_sweep_escape_markup(tmp_path: Path) -> None:
    """A value of an axis, as the path of a model may be, and the words of an error."""
    config = settings(space=SPACE | {"model.llm.path": [EVIL, "b"]})
    played(config, folder := tmp_path / "sweep")
    study = StudyStore.open(folder, config)
    asked = study.ask([], config.search.trials + 1)
    assert asked is not None
    study.fail(asked[0], EVIL)
    outcome = sweep("report", folder)
    assert (outcome.code, outcome.err) == (0, "")
    page = (folder / "report/report.html").read_text(encoding="utf-8")
    for text in (page, note(config, folder, study.trials())):
        assert "alert(1)" in text
        assert "<script>alert" not in text
        assert "<img src=x" not in text


@pytest.mark.parametrize("text", ["=HYPERLINK(A1)", "+1", "-1+cmd|'/c calc'!A0", "@SUM(1)"])
def test_sheet_computes_no_text(text: str) -> None:
    """Spreadsheets compute a cell that begins so, and a formula can send the cells beside it away."""
    coding = Coding(0, text, text, text, -0.5, 1.0, text, reason=text)
    [row] = list(csv.DictReader(io.StringIO(codings_csv([coding]), newline="")))
    assert {row[name] for name in ("session", "turn", "speaker", "text", "not_coded")} == {f"'{text}"}
    assert row["start"] == "-0.500", "a number stays one"
    plain = replace(coding, text="well, 1 = 1 - 0")
    assert "well, 1 = 1 - 0" in codings_csv([plain])


def test_terminal_gets_no_control_sequence(tmp_path: Path) -> None:
    """In tables, findings, examples and errors; an escape sequence may clear the screen, or rename its window."""
    orders = "\x1b]0 mine\x07\x9b2J\x7f"
    header, turns = ["conversation,speaker,text,label"], [("therapist", "question"), ("client", "change")] * 2
    rows = [f"{n}{orders},{who},said{orders},{label}{orders}" for n in range(6) for who, label in turns]
    (source := tmp_path / "a.csv").write_text("\n".join(header + rows))
    prepare = ("prepare", "table", source, "--set", "columns.label=label")
    outcomes = [
        sweep(*prepare, "--out", tmp_path / "shards"),
        sweep("inspect", tmp_path / "shards"),
        sweep(*prepare, "--set", "labels.client=[other]", "--out", tmp_path / "refused"),
    ]
    assert [outcome.code for outcome in outcomes] == [0, 0, 2]
    for shown in [*(outcome.out for outcome in outcomes), outcomes[2].err]:
        assert r"\x1b]0 mine\x07\x9b2j\x7f" in shown.lower()
        assert shown.replace("\n", "").isprintable()
