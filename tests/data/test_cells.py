"""Cells that are no plain codes: each is read where its meaning is certain, or refused with its place."""

import codecs
import json
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus, Turn
from data.errors import DataError
from data.importers.base.cells import CodeReader, clean_code, clean_name
from data.importers.tables.annomi import read_annomi
from data.importers.tables.table import read_table
from data.preparation.validate import check

HEAD = "conversation,speaker,text,label\n"


def read(folder: Path, text: str | bytes, name: str = "t.csv", audio: Path | None = None, **settings: object) -> Corpus:
    content = text.encode() if isinstance(text, str) else text
    (folder / name).write_bytes(content)
    columns = {"label": "label", **dict(settings.pop("columns", {}))}  # type: ignore[call-overload]
    return read_table(folder / name, audio, CorpusConfig.model_validate({**settings, "columns": columns}))


def turns(corpus: Corpus) -> list[Turn]:
    return [turn for conversation in corpus.conversations for turn in conversation.turns]


def labels(corpus: Corpus) -> list[str | None]:
    return [turn.label for turn in turns(corpus)]


def found(corpus: Corpus) -> list[tuple[str, str]]:
    return [(finding.code, finding.where) for finding in corpus.findings]


@pytest.mark.parametrize("word", ["nan", "None", "N/A", "NA", "null", "NaN", "<NA>", "#N/A", " ", "-"])
def test_words_for_missing_values_are_no_classes(word: str, tmp_path: Path) -> None:
    corpus = read(tmp_path, f"{HEAD}a,c,x,change\na,t,y,{word}\n")
    assert labels(corpus) == ["change", None]
    assert corpus.labels == ("change",)
    assert found(corpus) == ([("W_LABEL_MISSING", "t.csv:3")] if word.strip() else [])


def test_declared_code_may_be_a_word_for_missing(tmp_path: Path) -> None:
    corpus = read(tmp_path, f"{HEAD}a,c,x,None\na,c,y,n/a\n", labels={"client": ["none", "change"]})
    assert labels(corpus) == ["none", None]


def test_missing_texts_are_empty_and_no_examples(tmp_path: Path) -> None:
    """A turn without text is an example only if it has audio."""
    text = f"{HEAD}a,c,nan,change\na,t,None,ask\na,c,,change\n"
    corpus = read(tmp_path, text)
    assert [turn.text for turn in turns(corpus)] == ["", "None", ""], "none is a word"
    check(corpus)
    assert labels(corpus) == [None, "ask", None]
    codes = ["W_TEXT_MISSING", "W_TEXT_EMPTY", "W_TEXT_EMPTY"]
    assert [finding.code for finding in corpus.findings] == codes
    (tmp_path / "a.wav").touch()
    timed = (
        text.replace("label\n", "label,start,end\n").replace("change\n", "change,0,1\n").replace("ask\n", "ask,1,2\n")
    )
    corpus = read(tmp_path, timed, audio=tmp_path)
    check(corpus)
    assert labels(corpus)[0] == "change", "its audio can be coded"


CELLS: dict[str, tuple[object, tuple[str, ...]]] = {
    "list": (["question", "Other"], ("question", "other")),
    "printed list": ("['question', 'other']", ("question", "other")),
    "printed tuple": ("('question',)", ("question",)),
    "json": ('["question"]', ("question",)),
    "choices": ({"choices": ["question", "other"]}, ("question", "other")),
    "printed choices": ("{'choices': ['other']}", ("other",)),
    "choice": ('{"choice": "other"}', ("other",)),
    "span": ([[0, 12, "question"]], ("question",)),
    "span without its full stop": ([[0, 11, "question"]], ("question",)),
    "flat span": ([0, 12, "question"], ("question",)),
    "objects": ([{"start": 0, "end": 12, "text": "x", "labels": ["other"]}], ("other",)),
    "midas object": ([{"tag": "other", "start_pos": 0, "end_pos": 11}], ("other",)),
    "doccano object": ([{"id": 3, "label": "other", "start_offset": 0, "end_offset": 12}], ("other",)),
    "result": ([{"value": {"choices": ["other"]}, "type": "choices", "id": "x"}], ("other",)),
    "empty list": ("[]", ()),
    "missing in a list": (["nan", "other"], ("other",)),
    "bracketed name": ("[other talk]", ("[other talk]",)),
}


@pytest.mark.parametrize("name", CELLS)
def test_structures_are_read_if_they_name_codes(name: str, tmp_path: Path) -> None:
    value, expected = CELLS[name]
    row = {"conversation": "a", "speaker": "c", "text": "what is new.", "label": value}
    corpus = read(tmp_path, json.dumps(row), "t.jsonl")
    assert labels(corpus) == ["|".join(expected) or None]
    assert not [finding for finding in corpus.findings if finding.code.startswith("E_")]


REFUSED: dict[str, tuple[object, str]] = {
    "part of the turn": ([[0, 4, "question"]], "codes the characters 0 to 4 of 12, not the turn"),
    "taxonomy": ({"taxonomy": [["a", "b"]]}, "is an object with taxonomy, not a code"),
    "scores": ([{"label": "question", "score": 0.4}], "is an object with label, score, not a code"),
    "ids": ([3, 4], "contains 3, which is no name of a code"),
    "broken": ("['question', ", "looks like a list, but cannot be read"),
    "share": ("0.87", "is a number, not the name of a code"),
    "number beside names": (13, "is a number beside names of codes"),
    "unclear separator": ("give info; neutral", "may be several codes or one name; set label_separator=';'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_cells_that_are_no_codes_are_refused(name: str, tmp_path: Path) -> None:
    value, message = REFUSED[name]
    row = {"conversation": "a", "speaker": "c", "text": "what is new."}
    lines = "\n".join(json.dumps({**row, "label": label}) for label in ("question", value))
    corpus = read(tmp_path, lines, "t.jsonl")
    assert labels(corpus) == ["question", None]
    assert corpus.labels == ("question",)
    (finding,) = corpus.findings
    assert (finding.code, finding.where) == ("E_LABEL_CELL", "t.jsonl:2")
    assert message in finding.message


def test_several_codes_in_a_cell_are_recognised(tmp_path: Path) -> None:
    """By codes that occur alone, or in two orders; the name of a single code is kept."""
    rows = ["question", "question; reflection", "open/closed question", "advice,info", "info,advice", "yes & no"]
    corpus = read(tmp_path, HEAD + "".join(f'a,t,x,"{row}"\n' for row in [*rows, "reflection"]))
    expected = ["question", "question|reflection", "open/closed question", "advice|info", "info|advice", "yes & no"]
    assert labels(corpus) == [*expected, "reflection"]
    assert [code for code, _ in found(corpus)] == ["W_LABEL_SEVERAL"] * 3
    check(corpus)
    assert len({label for label in labels(corpus) if label and "advice" in label}) == 1
    declared = read(tmp_path, f"{HEAD}a,t,x,a;b\n", labels={"therapist": ["a;b", "a", "b"]})
    assert labels(declared) == ["a;b"]


def test_numbers_without_names_are_flagged(tmp_path: Path) -> None:
    corpus = read(tmp_path, f"{HEAD}a,c,x,0\na,c,y,1.0\n")
    assert labels(corpus) == ["0", "1"]
    assert found(corpus) == [("W_LABEL_NUMBER", "t.csv:2")]
    assert found(read(tmp_path, f"{HEAD}a,c,x,0\n", labels={"client": ["0"]})) == []


def test_class_ids_of_hugging_face_get_their_names(tmp_path: Path) -> None:
    names = {"names": ["question", "change"], "_type": "ClassLabel"}
    features = {"label": names, "speaker": {"names": ["t", "c"], "_type": "ClassLabel"}}
    features["several"] = {"feature": names, "_type": "Sequence"}  # type: ignore[dict-item]
    columns = {"conversation": ["a"] * 3, "speaker": [0, 1, 1], "text": ["x", "y", "z"], "label": [0, 1, -1]}
    table = pa.table({**columns, "several": [[0, 1], [1], []]})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "t.parquet")
    config = CorpusConfig.model_validate({"columns": {"label": "label"}})
    corpus = read_table(tmp_path / "t.parquet", None, config)
    assert [(turn.speaker, turn.label) for turn in turns(corpus)] == [
        ("therapist", "question"),
        ("client", "change"),
        ("client", None),
    ]
    several = CorpusConfig.model_validate({"columns": {"label": "several"}})
    assert labels(read_table(tmp_path / "t.parquet", None, several)) == ["question|change", "change", None]
    wrong = table.set_column(3, "label", pa.array([0, 1, 7])).replace_schema_metadata(metadata)
    pq.write_table(wrong, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet:3: label is 7, but the file names only the classes 0 to 1"):
        read_table(tmp_path / "t.parquet", None, config)


TWINS = ["change\u200b", "\ufeffchange", "\uff43\uff48\uff41\uff4e\uff47\uff45", "CHANGE\u00a0", "cha\u00adnge"]


@pytest.mark.parametrize("code", TWINS)
def test_twins_in_unicode_are_one_class(code: str, tmp_path: Path) -> None:
    corpus = read(tmp_path, f"{HEAD}a,c,x,change\na,c\u200b,y,{code}\na,\uff43,z,give  info\na,c,v,give\u00a0info\n")
    assert labels(corpus)[:2] == ["change", "change"]
    assert corpus.labels == ("change", "give info")
    assert {turn.speaker for turn in turns(corpus)} == {"client"}
    assert {code for code, _ in found(corpus)} <= {"W_LABEL_UNICODE"}
    assert (("W_LABEL_UNICODE", "t.csv:3") in found(corpus)) == (code != "CHANGE\u00a0")


def test_names_are_compared_in_one_form_of_unicode(tmp_path: Path) -> None:
    """A table and a file system may write é in two ways."""
    one, two = (unicodedata.normalize(form, "séance") for form in ("NFC", "NFD"))
    (tmp_path / f"{two}.wav").touch()
    text = f"conversation,speaker,text,label,start,end\n{one},Thérèse,x,a,0,1\n{two},c,y,b,1,2\n"
    roles = {unicodedata.normalize("NFD", "thérèse"): "therapist"}
    corpus = read(tmp_path, text, audio=tmp_path, roles=roles)
    (conversation,) = corpus.conversations
    assert conversation.recording == tmp_path / f"{two}.wav"
    assert [turn.speaker for turn in conversation.turns] == ["therapist", "client"]


@pytest.mark.parametrize("text", ["我想少喝一点", "أريد أن أتوقف", "ok 😀👍🏽", "می‌خواهم", "क्‍ष"])
def test_scripts_are_kept_as_they_are(text: str, tmp_path: Path) -> None:
    corpus = read(tmp_path, f"{HEAD}a,c,{text},{text}\n")
    assert turns(corpus)[0].text == text
    assert clean_name(text) == unicodedata.normalize("NFC", text)
    assert labels(corpus) == [clean_code(text)]


def test_session_without_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^t\.csv:3: conversation is 'nan', a missing value"):
        read(tmp_path, f"{HEAD}a,c,x,a\nnan,c,y,a\n")


def test_reader_without_other_cells_reads_plain_codes() -> None:
    assert CodeReader().read("Open Question").labels == ("open question",)


HEADER = "conversation,speaker,text,label,start,end"
ROWS = "a,t,hi,q,0.0,1.5\na,c,ho,r,1.5,3.25\n"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(codecs.BOM_UTF16_LE + f"{HEADER}\n{ROWS}".encode("utf-16-le"), id="utf-16"),
        pytest.param(codecs.BOM_UTF16_BE + f"{HEADER}\n{ROWS}".encode("utf-16-be"), id="utf-16-be"),
        pytest.param(codecs.BOM_UTF32_LE + f"{HEADER}\n{ROWS}".encode("utf-32-le"), id="utf-32"),
        pytest.param(f"sep=;\r\n{HEADER}\n{ROWS}".replace(",", ";").encode(), id="sep"),
        pytest.param(f"{HEADER}\n{ROWS}".replace(",", ";").replace(".", ",").encode(), id="decimal commas"),
        pytest.param(f"{HEADER},Q/R\n{ROWS}".replace(",", ";").replace("Q/R", "note (q, r)").encode(), id="comma"),
        pytest.param(f"{HEADER}\n{ROWS}".replace("\n", "\r").encode(), id="mac"),
        pytest.param(f"{HEADER}\n{ROWS}".replace(",", "|").encode(), id="bars"),
        pytest.param(f"Conversation,SPEAKER, Text,Label,start,end\n{ROWS}".encode(), id="headers"),
    ],
)
def test_tables_are_read_as_excel_saves_them(content: bytes, tmp_path: Path) -> None:
    if b"note" in content:
        content = content.replace(b"1.5\n", b"1.5;\n").replace(b"3.25\n", b"3.25;\n")
    corpus = read(tmp_path, content, columns={"start": "start", "end": "end"})
    found_turns = [(turn.speaker, turn.text, turn.label, turn.start, turn.end) for turn in turns(corpus)]
    assert found_turns == [("therapist", "hi", "q", 0.0, 1.5), ("client", "ho", "r", 1.5, 3.25)]
    assert corpus.findings == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            f"{HEADER}\n{ROWS}".encode("utf-16-le"),
            r"F_ENCODING t\.csv:1: every second byte .* encoding=utf-16-le",
        ),
        (f"{HEADER}\n".encode("utf-16") + b"a", "is not valid UTF-16; the file is damaged, export it again"),
        (b"PK\x03\x04" + bytes(50), "is a ZIP file, such as Excel and Word write"),
        (f"{HEADER}\n" + "".join(f"a,c,x,q,{n / 9e4},{n / 8e4}\n" for n in range(9)), "fractions of a day, as Excel"),
    ],
)
def test_unreadable_tables_name_their_cause(content: bytes | str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, content, columns={"start": "start", "end": "end"})


def test_fractions_of_a_day_are_read_if_it_is_said(tmp_path: Path) -> None:
    text = f"{HEADER}\na,c,x,q,0.5,0.25\n"
    corpus = read(tmp_path, text, columns={"start": "start", "end": "end"}, time_unit="d")
    assert turns(corpus)[0].span == (43_200, 21_600)


def test_folder_and_file_are_not_confused(tmp_path: Path) -> None:
    (tmp_path / "b.csv").touch()
    with pytest.raises(DataError, match=r"is a folder, but the format reads one file; give .* \(b\.csv\)"):
        read_annomi(tmp_path, None, CorpusConfig())
    with pytest.raises(DataError, match=r"b\.csv: is a file; --audio takes the folder of the recordings"):
        read(tmp_path, f"{HEADER}\n{ROWS}", audio=tmp_path / "b.csv")


def test_rows_by_tier_are_sorted_by_start(tmp_path: Path) -> None:
    tiers = "a,t,one,q,0,1\na,t,three,q,4,5\na,c,two,r,2,3\na,c,four,r,6,7\n"
    corpus = read(tmp_path, f"{HEADER}\n{tiers}", columns={"start": "start"})
    assert [(turn.id, turn.index, turn.text, turn.end) for turn in turns(corpus)] == [
        ("a/0", 0, "one", 2),
        ("a/1", 1, "two", 4),
        ("a/2", 2, "three", 6),
        ("a/3", 3, "four", None),
    ]
    assert found(corpus)[0] == ("W_TS_SORTED", "t.csv:3")
    assert [turn.text for turn in turns(read(tmp_path, f"{HEADER}\n{tiers}"))] == ["one", "three", "two", "four"]


@pytest.mark.parametrize("column", ["turn", "Turn Number", "utterance_id"])
def test_turn_number_decides_the_order(column: str, tmp_path: Path) -> None:
    """Starts in whole seconds may go back by a second; numbers also order a table without times."""
    text = f"{HEADER},{column}\na,c,two,r,3,4,2\na,t,one,q,4,5,1\na,c,three,r,3,6,10\n"
    for columns in ({"start": "start"}, {}):
        corpus = read(tmp_path, text, columns=columns)
        assert [turn.text for turn in turns(corpus)] == ["one", "two", "three"]
        assert found(corpus)[0] == ("W_TS_SORTED", "t.csv:2")
    unnumbered = text.replace(",10\n", ",\n")
    assert [turn.text for turn in turns(read(tmp_path, unnumbered))] == ["two", "one", "three"]


def test_turn_without_time_stays_behind_the_one_before(tmp_path: Path) -> None:
    text = f"{HEADER}\na,t,one,q,0,1\na,c,note,r,,\na,t,three,q,4,5\na,c,two,r,2,3\n"
    corpus = read(tmp_path, text, columns={"start": "start"})
    assert [turn.text for turn in turns(corpus)] == ["one", "note", "two", "three"]


def test_renamed_recording_is_found_beside(tmp_path: Path) -> None:
    """The table names the file as it was before it was converted."""
    (tmp_path / "x.aif").touch()
    text = f"{HEADER},file\na,c,x,q,0,1,x.aiff\n"
    corpus = read(tmp_path, text, audio=tmp_path, columns={"recording": "file"})
    assert corpus.conversations[0].recording == tmp_path / "x.aif"


def test_turn_numbers_of_a_speaker_are_no_order(tmp_path: Path) -> None:
    text = f"{HEADER},turn\na,t,one,q,0,1,1\na,t,three,q,4,5,2\na,c,two,r,2,3,1\na,c,four,r,6,7,2\n"
    corpus = read(tmp_path, text, columns={"start": "start"})
    assert [turn.text for turn in turns(corpus)] == ["one", "two", "three", "four"]


@pytest.mark.parametrize("word", ["nan", "None", "N/A"])
def test_missing_properties_of_sessions_are_no_names(word: str, tmp_path: Path) -> None:
    """Sessions of the video "nan" would all be in one split, and "nan" would be a quality."""
    head = "conversation,speaker,text,label,video,person,quality,split,start,end,file,clip"
    text = f"{head}\na,c,x,q,{word},{word},{word},{word},0,{word},{word},{word}\nb,c,y,q,{word},p,high,train,0,1,,\n"
    names = "video person quality split start end clip".split()
    (tmp_path / "b.wav").touch()
    columns = {"recording": "file", **{name: name for name in names}}
    first, second = read(tmp_path, text, columns=columns).conversations
    assert (first.group, first.people, first.quality, first.split) == ("a", (), None, None)
    assert (second.group, second.people, second.quality, second.split) == ("b", ("p",), "high", "train")
    assert [(turn.start, turn.end, turn.flags) for turn in first.turns] == [(0, None, ("W_TS_OPEN",))]
    columns.pop("clip")
    assert read(tmp_path, text, audio=tmp_path, columns=columns).conversations[0].recording == tmp_path / "a.wav"
