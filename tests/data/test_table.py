"""Any table: columns by name, sessions without contradictions, complete rows."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpus.config import CorpusConfig
from data.corpus.issues import BuildError
from data.corpus.schema import Corpus, Turn
from data.errors import ConfigError, DataError
from data.importers.tables.table import read_table

HEAD = "conversation,speaker,text"


def read(
    folder: Path, text: str, audio: Path | None = None, name: str = "t.csv", columns: object = (), **settings: object
) -> Corpus:
    (folder / name).write_text(text, encoding="utf-8")
    return read_table(folder / name, audio, CorpusConfig.model_validate({**settings, "columns": dict(columns)}))


def turns(corpus: Corpus) -> list[Turn]:
    return [turn for conversation in corpus.conversations for turn in conversation.turns]


def fields(corpus: Corpus, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(getattr(turn, name) for name in names) for turn in turns(corpus)]


def test_columns_are_selected_by_name(tmp_path: Path) -> None:
    names = {"conversation": "Session", "text": "Said", "speaker": "Who", "label": "MISC", "start": "t0", "id": "key"}
    text = "key,t0,Session,Who,Said,MISC,notes\nu1,100,s,Coach,hello,FA,x\nu2,1500,s,Smoker,hi,FN,y\n"
    corpus = read(tmp_path, text, columns=names, roles={"coach": "therapist", "smoker": "client"}, time_unit="ms")
    assert fields(corpus, "id", "index", "speaker", "text", "label", "start", "end") == [
        ("s/u1", 0, "therapist", "hello", "fa", 0.1, 1.5),
        ("s/u2", 1, "client", "hi", "fn", 1.5, None),
    ]
    assert (corpus.roles, corpus.declared) == ({"client": ("fn",), "therapist": ("fa",)}, False)
    with pytest.raises(ConfigError, match=r"roles\.coach: 'therapsit' is not a role; did you mean 'therapist'"):
        read(tmp_path, f"{HEAD}\ns,coach,hello\n", roles={"coach": "therapsit"})


def test_columns_that_are_null_are_not_needed(tmp_path: Path) -> None:
    corpus = read(tmp_path, "conversation,speaker\ns,c\n", columns={"text": None})
    assert fields(corpus, "text", "label", "span") == [("", None, None)]
    assert corpus.findings == []
    with pytest.raises(DataError, match=r"t\.csv:1: missing column\(s\) text; .* --set columns\.text=NAME"):
        read(tmp_path, "conversation,speaker\ns,c\n")


def test_index_orders_turns_and_is_their_id(tmp_path: Path) -> None:
    text = f"{HEAD},n\ns,c,third,10\ns,t,first,2\nr,t,only,1\ns,c,second,2.5\n"
    corpus = read(tmp_path, text, columns={"index": "n"})
    expected = [("s/2", 0, "first"), ("s/2.5", 1, "second"), ("s/10", 2, "third"), ("r/1", 0, "only")]
    assert fields(corpus, "id", "index", "text") == expected
    with pytest.raises(DataError, match=r"^t\.csv:2: n 'two' is not a number"):
        read(tmp_path, f"{HEAD},n\ns,c,x,two\n", columns={"index": "n"})


def test_properties_of_sessions_are_kept(tmp_path: Path) -> None:
    rows = "a,c,x,v1,ann,High,Train\na,t,y,,dr bob,,\nb,c,x,v1,,low,train\nc,c,x,,ann,high,test\n"
    columns = {"video": "url", "person": "who", "quality": "q", "split": "part"}
    corpus = read(tmp_path, f"{HEAD},url,who,q,part\n{rows}", columns=columns)
    assert [(one.group, one.people, one.quality, one.split) for one in corpus.conversations] == [
        ("v1", ("ann", "dr bob"), "high", "train"),
        ("v1", (), "low", "train"),
        ("c", ("ann",), "high", "test"),
    ]
    assert corpus.qualities == ("high", "low")


@pytest.mark.parametrize("kind", ["video", "quality", "recording", "split"])
def test_contradicting_rows_of_a_session_are_refused(tmp_path: Path, kind: str) -> None:
    """A session in two splits is a leak with a finding."""
    message = r"t\.csv:4: x is 'two', but 'one' at t\.csv:2; a session has only one$"
    message = (r"^F_LEAK_CONVERSATION " if kind == "split" else "^") + message
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, f"{HEAD},x\na,c,1,one\na,c,2,One\na,c,3,two\n", columns={kind: "x"})
    assert isinstance(error.value, BuildError) == (kind == "split")


def test_recordings_are_named_by_column_or_session(tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    for name in ("one.wav", "b.mp3", "b.flac"):
        (audio / name).touch()
    text = f"{HEAD},file,t\na,c,x,one.wav,0\nb,c,x,,0\n"
    columns = {"recording": "file", "start": "t"}
    corpus = read(tmp_path, text, audio, columns=columns)
    assert [one.recording.name for one in corpus.conversations if one.recording] == ["one.wav", "b.flac"]
    with pytest.raises(ConfigError, match=r"columns\.start: --audio is given, but no column has start times"):
        read(tmp_path, text, audio, columns={"recording": "file"})
    with pytest.raises(DataError, match=r"t\.csv:2: '\.\./one\.wav' is outside the folder of recordings"):
        read(tmp_path, text.replace("one.wav", "../one.wav"), audio, columns=columns)


@pytest.mark.parametrize(("start", "end"), [("start", "end"), ("Onset", "Offset"), ("t_start", "x"), ("from", "to")])
def test_usual_names_of_time_columns_are_found(tmp_path: Path, start: str, end: str) -> None:
    (tmp_path / "a.wav").touch()
    text = f"{HEAD},{start},{end}\na,c,x,1,2.5\na,t,y,3,4\n"
    spans = fields(read(tmp_path, text, tmp_path), "start", "end")
    assert spans == ([(1.0, 3.0), (3.0, None)] if end == "x" else [(1.0, 2.5), (3.0, 4.0)])
    assert fields(read(tmp_path, text), "start") == [(None,), (None,)], "they are only used with recordings"


@pytest.mark.parametrize("row", ["a,0,t,words,y,bob", "a,0,c,other words,y,bob"])
def test_annotators_must_have_the_same_turn(tmp_path: Path, row: str) -> None:
    """A wrong id would give the code of one turn to another."""
    text = f"conversation,id,speaker,text,label,who\na,0,c,words,x,ann\n{row}\n"
    with pytest.raises(DataError, match=r"F_DUPLICATE t\.csv:3, a/0: its (speaker|text) is '(t|other words)'"):
        read(tmp_path, text, columns={"id": "id", "label": "label", "annotator": "who"})


def test_clips_of_turns_need_no_times_or_recordings(tmp_path: Path) -> None:
    (tmp_path / "0.wav").touch()
    text = f"{HEAD},file,t\na,c,x,0.wav,0\na,c,y,,\na,robot,z,2.wav,\n"
    corpus = read(tmp_path, text, tmp_path, columns={"clip": "file", "start": "t"})
    assert fields(corpus, "clip") == [(tmp_path / "0.wav",), (None,), (None,)]
    assert corpus.conversations[0].recording is None
    found = [(finding.code, finding.utterance) for finding in corpus.findings]
    assert found == [("E_SPEAKER", "a/2"), ("W_TS_OPEN", "a/1")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"none of 1 recordings exists \(0\.wav"):
        read(tmp_path, text, tmp_path / "empty", columns={"clip": "file"})


def test_annotators_vote_by_majority(tmp_path: Path) -> None:
    votes = {
        "ann": ("a;b", "", "b", "a", "a;b"),
        "bob": ("b;c", "c", "a", "a", "a;b"),
        "cy": ("b;a", "", "c", "b", "b;a"),
    }
    rows = [f"a,c,x,{number},{code},{who}\n" for who, codes in votes.items() for number, code in enumerate(codes)]
    text, columns = f"{HEAD},n,code,who\n" + "".join(rows), {"label": "code", "annotator": "who", "index": "n"}
    assert fields(read(tmp_path, text, columns=columns, label_separator=";"), "label", "votes", "flags") == [
        ("b|a", {"a|b": 2, "b|c": 1}, ()),
        ("c", {"c": 1}, ()),
        ("a", {"a": 1, "b": 1, "c": 1}, ("W_LABEL_TIE",)),
        ("a", {"a": 2, "b": 1}, ()),
        ("a|b", {"a|b": 3}, ()),
    ]
    declared = read(tmp_path, text, columns=columns, label_separator=";", labels={"client": ["c", "b", "a"]})
    assert [turn.label for turn in turns(declared)] == ["b|a", "c", "c", "a", "b|a"]  # declared order breaks ties
    assert turns(declared)[0].votes == {"b|a": 2, "c|b": 1}
    with pytest.raises(ConfigError, match=r"columns\.annotator: also set columns\.id or columns\.index"):
        read(tmp_path, text, columns={"label": "code", "annotator": "who"})
    text = f"{HEAD},n,code,who\na,c,x,0,p,ann\na,c,x,0,p,bob\na,c,x,0,q,ann\n"
    with pytest.raises(BuildError, match=r"F_DUPLICATE t\.csv:4, a/0: is already at t\.csv:2, by the same"):
        read(tmp_path, text, columns=columns)


def test_lists_in_json_lines_are_several_labels(tmp_path: Path) -> None:
    first = {"conversation": 7, "speaker": "c", "text": "x\u2028y", "code": ["B", "a"]}
    second = {"conversation": 7.0, "speaker": "t", "text": "z", "code": None}
    lines = [json.dumps(row, ensure_ascii=False) for row in (first, second)]
    third = '{"conversation": 7, "speaker": "t", "text": "z"}'
    corpus = read(tmp_path, "\n".join([*lines, "", third]), name="t.jsonl", columns={"label": "code"})
    assert fields(corpus, "id", "text", "label", "where") == [
        ("7/0", "x y", "b|a", "t.jsonl:1"),
        ("7/1", "z", None, "t.jsonl:2"),
        ("7/2", "z", None, "t.jsonl:4"),
    ]


def test_numbers_and_nulls_of_parquet_are_converted(tmp_path: Path) -> None:
    columns = {
        "conversation": pa.array([12.0, 12.0]),  # many tools write whole numbers beside nulls as floats
        "speaker": pa.array(["c", "t"]).dictionary_encode(),
        "text": pa.array(["x", None]),
        "t": pa.array([0.25, float("nan")]),
        "codes": pa.array([["p", "q"], []]),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    config = CorpusConfig.model_validate({"columns": {"start": "t", "label": "codes"}})
    corpus = read_table(tmp_path / "t.parquet", None, config)
    assert fields(corpus, "id", "text", "start", "label") == [("12/0", "x", 0.25, "p|q"), ("12/1", "", None, None)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", f'{HEAD}\na,c,"open\nb,c,x\n', r"^t\.csv:2: not readable as CSV"),
        ("t.csv", f"{HEAD}\na,c,one, two\n", r"^t\.csv:2: the row has more cells"),
        ("t.csv", f"{HEAD}\n\na,c\n", r"^t\.csv:3: the row has fewer cells"),
        ("t.csv", f"{HEAD}\n,c,x\n", r"^t\.csv:2: conversation is empty"),
        ("t.csv", f"{HEAD},text\na,c,x,y\n", r"^t\.csv:1: column text occurs twice"),
        ("t.csv", f"{HEAD}\n , ,\n", "no rows"),
        ("t.jsonl", '{"conversation": 1}\n{"conversation": 2,}\n', r"^t\.jsonl:2: not readable as JSON"),
        ("t.jsonl", "[1]\n", r"^t\.jsonl:1: not a JSON object"),
        ("t.xlsx", "PK", r"^t\.xlsx: not readable as Excel .*save it again, or as CSV"),
        ("t.ods", "PK", r"\.ods is not read; save it as .*CSV"),
    ],
)
def test_invalid_files_are_refused_with_their_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        read(tmp_path, text, name=name)
    assert "\n" not in str(error.value)


def test_empty_cells_and_lines_are_ignored(tmp_path: Path) -> None:
    corpus = read(tmp_path, f"{HEAD}\na,c,x,,\n,,\n\n")
    assert fields(corpus, "id", "where") == [("a/0", "t.csv:2")]
