"""Tables that are no CSV: workbooks, JSON of annotation tools, and folders with a table for each session or split."""

import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import openpyxl
import pytest

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.errors import DataError
from data.importers import guess_format
from data.importers.base import extras, workbook
from data.importers.tables.table import read_table

HEADER = ["conversation", "speaker", "text", "label", "start", "end"]


def read(source: Path, **columns: object) -> Corpus:
    return read_table(source, None, CorpusConfig.model_validate({"columns": {"label": "label"} | columns}))


def save(path: Path, **sheets: list[list[Any]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def said(corpus: Corpus) -> list[tuple[object, ...]]:
    turns = (turn for conversation in corpus.conversations for turn in conversation.turns)
    return [(turn.id, turn.speaker, turn.text, turn.label, turn.start, turn.end) for turn in turns]


def test_cells_of_a_workbook_are_read_as_in_a_csv(tmp_path: Path) -> None:
    """Times of day and lengths of time are seconds, whole numbers have no point, and empty rows are left out."""
    rows: list[list[Any]] = [
        [],
        HEADER,
        [12.0, "T", "hi", "OQ", datetime.time(0, 0, 1, 500000), datetime.timedelta(seconds=2)],
        [None, None, " ", None, None, None],
        [12.0, "C", 42, "CT", 2.5, datetime.datetime(1899, 12, 30, 0, 0, 4)],
    ]
    corpus = read(save(tmp_path / "a.xlsx", notes=[["made by Ann"]], turns=rows), start="start", end="end")
    assert said(corpus) == [("12/0", "therapist", "hi", "oq", 1.5, 2.0), ("12/1", "client", "42", "ct", 2.5, 4.0)]
    assert [turn.where for turn in corpus.conversations[0].turns] == ["a.xlsx:3", "a.xlsx:5"]


def test_sheets_with_the_same_columns_are_read_together(tmp_path: Path) -> None:
    sheet = [["speaker", "text", "label"], ["T", "hi", "q"], ["C", "yes", "x"]]
    path = save(tmp_path / "a.xlsx", s1=sheet, s2=sheet[:2])
    assert [row[0] for row in said(read(path, conversation=workbook.SHEET))] == ["s1/0", "s1/1", "s2/0"]
    save(path, s1=sheet, s2=[["speaker", "label", "text"], ["T", "q", "hi"]])
    with pytest.raises(DataError, match=r"^a\.xlsx: the sheets 's1' and 's2' have different columns"):
        read(path, conversation=workbook.SHEET)


def test_workbook_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.xlsx", s1=[HEADER])
    with pytest.raises(DataError, match=r"a\.xlsx: no rows"):
        read(path)
    monkeypatch.setattr(workbook, "LARGEST", 1000)
    with pytest.raises(DataError, match=r"^a\.xlsx: unpacks to [\d,]+ bytes; save it as CSV"):
        read(path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"^a\.xlsx: not readable as Excel"):
        read(path)


def test_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    with pytest.raises(DataError, match=r"^a\.xlsx: reading it needs openpyxl; .*'speech-llm-sweep\[excel\]'"):
        read(tmp_path / "a.xlsx")


def test_merged_cells_count_for_all_their_rows(tmp_path: Path) -> None:
    """A title above the header is left out."""
    rows: list[list[Any]] = [
        ["coded by Ann"],
        [],
        HEADER[:4],
        ["a", "T", "hi", "q"],
        [None, "C", "yes", "x"],
        ["b", "T", "so", "q"],
    ]
    path = save(tmp_path / "a.xlsx", s1=rows)
    book = openpyxl.load_workbook(path)
    book["s1"].merge_cells("A4:A5")
    book.save(path)
    assert [row[0] for row in said(read(path))] == ["a/0", "a/1", "b/0"]


def test_sheets_without_a_column_of_sessions_are_sessions(tmp_path: Path) -> None:
    sheet = [["speaker", "text", "label"], ["T", "hi", "q"], ["C", "yes", "x"]]
    path = save(tmp_path / "a.xlsx", s1=sheet, s2=sheet[:2], notes=[["made by Ann", "in", "May", "2020"]])
    expected = ["s1/0", "s1/1", "s2/0"]
    assert [row[0] for row in said(read(path))] == expected
    assert [row[0] for row in said(read(path, conversation=None))] == expected
    assert [row[0] for row in said(read(tmp_path))] == [f"a {name}" for name in expected]
    assert guess_format(path) == "table"


def test_formula_without_a_value_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.xlsx", s1=[HEADER[:4], ["a", "T", "=B2", "q"]])
    with pytest.raises(DataError, match=r"^a\.xlsx:s1!2: the formula '=B2' has no stored value; open the workbook"):
        read(path)


def test_errors_of_excel_are_no_codes_or_words(tmp_path: Path) -> None:
    corpus = read(save(tmp_path / "a.xlsx", s1=[HEADER[:4], ["a", "T", "#NAME?", "q"], ["a", "C", "hm", "#REF!"]]))
    assert [row[2:4] for row in said(corpus)] == [("", "q"), ("hm", None)]
    assert {finding.code for finding in corpus.findings} == {"W_TEXT_MISSING", "E_LABEL_CELL"}


def test_minutes_that_excel_took_for_hours_are_refused(tmp_path: Path) -> None:
    clocks = [datetime.time(0, 5), datetime.time(12, 30), datetime.timedelta(hours=25, minutes=10), datetime.time(1)]
    path = save(tmp_path / "a.xlsx", s1=[HEADER[:5], *(["a", "T", "hi", "q", clock] for clock in clocks)])
    with pytest.raises(DataError, match=r"^a\.xlsx:2: all times are whole minutes, up to 25 hours, .*divide"):
        read(path, start="start")


def test_rows_beyond_a_wrong_dimension_are_read(tmp_path: Path) -> None:
    """Some programs write that the sheet has only its first cell; a date above a day is a length of time."""
    day = datetime.datetime(1900, 1, 1, 1)
    path = save(tmp_path / "a.xlsx", s1=[HEADER[:5], ["a", "T", "hi", "q", day], ["a", "C", "yes", "x", 90_001]])
    edit(path, lambda sheet: re.sub(rb'<dimension ref="[^"]+"', b'<dimension ref="A1"', sheet))
    assert [row[4] for row in said(read(path, start="start"))] == [90_000.0, 90_001.0]
    edit(path, lambda sheet: sheet[:-60])
    with pytest.raises(DataError, match=r"^a\.xlsx: not readable as Excel \(.*; save it again"):
        read(path)


def edit(path: Path, change: Callable[[bytes], bytes]) -> None:
    with ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, change(content) if name.endswith("sheet1.xml") else content)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.xls", r"a\.xls: \.xls is not read; save it as \.xlsx, or as CSV"),
        ("a.ods", r"a\.ods: \.ods is not read; save it as \.xlsx, or as CSV"),
        ("a.pdf", r"a\.pdf: \.pdf is not read; save it as \.docx, or as text"),
        ("a.xlsx", "no format recognises it"),
    ],
)
def test_files_of_other_programs_are_refused_with_the_way(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(extras.OLD + bytes(600))
    with pytest.raises(DataError, match=message):
        guess_format(tmp_path / name)
    with pytest.raises(DataError, match="save it as"):
        read(tmp_path / name)


TURNS = "speaker,text,label\nT,hi,q\nC,yes,x\n"


def test_folder_has_a_table_for_each_session(tmp_path: Path) -> None:
    """As in HOPE; what is no table, hidden or a lock file of Excel is left out."""
    for name in ("Copy of 2.csv", "Copy of 1.csv", ".hidden.csv", "~$Copy of 1.xlsx", "notes.md"):
        (tmp_path / name).write_text(TURNS, encoding="utf-8")
    (tmp_path / "empty.csv").write_text(TURNS.partition("\n")[0], encoding="utf-8")
    assert [row[0] for row in said(read(tmp_path))] == ["Copy of 1/0", "Copy of 1/1", "Copy of 2/0", "Copy of 2/1"]
    (tmp_path / "Copy of 1.tsv").write_text(TURNS.replace(",", "\t"), encoding="utf-8")
    with pytest.raises(DataError, match=r"Copy of 1\.tsv: session 'Copy of 1' is already .*; rename or remove one"):
        read(tmp_path)
    assert [row[0] for row in said(read(tmp_path / "Copy of 2.csv", conversation=None))] == [
        "Copy of 2/0",
        "Copy of 2/1",
    ]


def test_files_named_like_splits_fix_the_split(tmp_path: Path) -> None:
    for split, session in (("train-00000-of-00002", "a"), ("train-00001-of-00002", "b"), ("validation", "c")):
        text = "".join(f"{session if number else 'conversation'},{line}\n" for number, line in enumerate(TURNS.split()))
        (tmp_path / f"{split}.csv").write_text(text, encoding="utf-8")
    corpus = read(tmp_path)
    assert {conversation.id: conversation.split for conversation in corpus.conversations} == {
        "a": "train",
        "b": "train",
        "c": "val",
    }


TASK = {"text": "why", "session": "s", "who": "T"}


def task(*chosen: tuple[str, list[str]], **more: object) -> dict[str, object]:
    annotations = [
        {"completed_by": who, "result": [{"type": "choices", "value": {"choices": codes}}]} | more
        for who, codes in chosen
    ]
    return {"id": 1, "data": TASK, "annotations": annotations}


def test_tasks_of_label_studio_are_turns(tmp_path: Path) -> None:
    """Skipped annotations do not count, and several annotators vote."""
    path = tmp_path / "a.json"
    tasks = [task(("ann", ["q", "r"])), task(("ann", ["q"]), was_cancelled=True)]
    path.write_text(json.dumps(tasks), encoding="utf-8")
    columns = {"conversation": "session", "speaker": "who"}
    assert [row[3] for row in said(read(path, **columns))] == ["q|r", None]
    path.write_text(json.dumps([task(("ann", ["q"]), ("bob", ["r"]), ("cy", ["r"]))]), encoding="utf-8")
    [conversation] = read(path, **columns, annotator="annotator", id="id").conversations
    assert [(turn.label, turn.votes) for turn in conversation.turns] == [("r", {"r": 2, "q": 1})]


def test_lists_by_session_are_read(tmp_path: Path) -> None:
    content = {
        "x1.html": [
            {"speaker": "counselor", "text": "hola", "label": [{"tag": "question", "start_pos": 0, "end_pos": 1}]}
        ]
    }
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8")
    corpus = read(tmp_path / "a.json")
    assert said(corpus) == [("x1/0", "therapist", "hola", None, None, None)]
    assert [(finding.code, finding.where) for finding in corpus.findings] == [("E_LABEL_CELL", "a.json:x1.html[0]")]
    (tmp_path / "a.json").write_text('{"version": 3}', encoding="utf-8")
    with pytest.raises(DataError, match=r"^a\.json:1: no list of objects"):
        read(tmp_path / "a.json")
