"""Any table: columns by name, sessions that agree with themselves, rows that are whole."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpus.config import CorpusConfig
from data.corpus.issues import BuildError
from data.corpus.schema import Corpus, Turn
from data.errors import ConfigError, DataError
from data.importers.table import read_table


def read(
    folder: Path, text: str, audio: Path | None = None, name: str = "t.csv", columns: object = (), **settings: object
) -> Corpus:
    (folder / name).write_text(text, encoding="utf-8")
    return read_table(folder / name, audio, CorpusConfig.model_validate({**settings, "columns": dict(columns)}))


def turns(corpus: Corpus) -> list[Turn]:
    return [turn for conversation in corpus.conversations for turn in conversation.turns]


def test_columns_are_taken_by_name(tmp_path: Path) -> None:
    names = {"conversation": "Session", "text": "Said", "speaker": "Who", "label": "MISC", "start": "t0", "id": "key"}
    text = "key,t0,Session,Who,Said,MISC,notes\nu1,100,s,Coach,hello,FA,x\nu2,1500,s,Smoker,hi,FN,y\n"
    corpus = read(tmp_path, text, columns=names, roles={"coach": "therapist", "smoker": "client"}, time_unit="ms")
    assert [(turn.id, turn.index, turn.speaker, turn.text, turn.label, turn.start) for turn in turns(corpus)] == [
        ("s/u1", 0, "therapist", "hello", "fa", 0.1),
        ("s/u2", 1, "client", "hi", "fn", 1.5),
    ]
    assert turns(corpus)[0].end == 1.5
    assert (corpus.roles, corpus.declared) == ({"client": ("fn",), "therapist": ("fa",)}, False)


def test_a_role_that_is_misspelt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"roles\.coach: 'therapsit' is not a role; did you mean 'therapist'"):
        read(tmp_path, "conversation,speaker,text\ns,coach,hello\n", roles={"coach": "therapsit"})


def test_columns_that_are_null_are_not_needed(tmp_path: Path) -> None:
    corpus = read(tmp_path, "conversation,speaker\ns,c\n", columns={"text": None})
    assert [(turn.text, turn.label, turn.span) for turn in turns(corpus)] == [("", None, None)]
    assert corpus.findings == []
    with pytest.raises(DataError, match=r"t\.csv:1: missing column\(s\) text; .* --set columns\.text=NAME"):
        read(tmp_path, "conversation,speaker\ns,c\n")


def test_the_index_orders_a_session_and_names_its_turns(tmp_path: Path) -> None:
    text = "conversation,speaker,text,n\ns,c,third,10\ns,t,first,2\nr,t,only,1\ns,c,second,2.5\n"
    corpus = read(tmp_path, text, columns={"index": "n"})
    assert [(turn.id, turn.index, turn.text) for turn in turns(corpus)] == [
        ("s/2", 0, "first"),
        ("s/2.5", 1, "second"),
        ("s/10", 2, "third"),
        ("r/1", 0, "only"),
    ]
    with pytest.raises(DataError, match=r"^t\.csv:2: n 'two' is not a number"):
        read(tmp_path, "conversation,speaker,text,n\ns,c,x,two\n", columns={"index": "n"})


def test_what_is_said_of_a_session_is_kept(tmp_path: Path) -> None:
    text = (
        "conversation,speaker,text,url,who,q,part\n"
        "a,c,x,v1,ann,High,Train\na,t,y,,dr bob,,\nb,c,x,v1,,low,train\nc,c,x,,ann,high,test\n"
    )
    columns = {"video": "url", "person": "who", "quality": "q", "split": "part"}
    corpus = read(tmp_path, text, columns=columns)
    assert [(one.group, one.people, one.quality, one.split) for one in corpus.conversations] == [
        ("v1", ("ann", "dr bob"), "high", "train"),
        ("v1", (), "low", "train"),
        ("c", ("ann",), "high", "test"),
    ]
    assert corpus.qualities == ("high", "low")


@pytest.mark.parametrize("kind", ["video", "quality", "recording"])
def test_rows_of_a_session_that_contradict_each_other_are_named(tmp_path: Path, kind: str) -> None:
    text = "conversation,speaker,text,x\na,c,1,one\na,c,2,One\na,c,3,two\n"
    with pytest.raises(DataError, match=r"^t\.csv:4: x is 'two', but 'one' at t\.csv:2; a session has only one"):
        read(tmp_path, text, columns={kind: "x"})


def test_a_session_in_two_splits_is_a_leak(tmp_path: Path) -> None:
    text = "conversation,speaker,text,x\na,c,1,train\na,c,2,test\n"
    with pytest.raises(BuildError, match=r"^F_LEAK_CONVERSATION t\.csv:3: .* at t\.csv:2") as error:
        read(tmp_path, text, columns={"split": "x"})
    assert [finding.code for finding in error.value.findings] == ["F_LEAK_CONVERSATION"]


def test_recordings_are_taken_from_a_column_or_by_name(tmp_path: Path) -> None:
    (tmp_path / "sound").mkdir()
    for name in ("one.wav", "b.mp3", "b.flac"):
        (tmp_path / "sound" / name).touch()
    text = "conversation,speaker,text,file,t\na,c,x,one.wav,0\nb,c,x,,0\n"
    columns = {"recording": "file", "start": "t"}
    corpus = read(tmp_path, text, tmp_path / "sound", columns=columns)
    assert [one.recording.name for one in corpus.conversations if one.recording] == ["one.wav", "b.flac"]
    with pytest.raises(ConfigError, match=r"columns\.start: --audio is given, but no column has start times"):
        read(tmp_path, text, tmp_path / "sound", columns={"recording": "file"})
    with pytest.raises(DataError, match=r"t\.csv:2: '\.\./one\.wav' is outside the folder of recordings"):
        read(tmp_path, text.replace("one.wav", "../one.wav"), tmp_path / "sound", columns=columns)


@pytest.mark.parametrize(
    ("start", "end"), [("start", "end"), ("Onset", "Offset"), ("t_start", "other"), ("from", "to")]
)
def test_usual_names_of_times_need_not_be_told(tmp_path: Path, start: str, end: str) -> None:
    (tmp_path / "a.wav").touch()
    text = f"conversation,speaker,text,{start},{end}\na,c,x,1,2.5\na,t,y,3,4\n"
    known = turns(read(tmp_path, text, tmp_path))
    assert [(turn.start, turn.end) for turn in known] == [(1.0, 3.0 if end == "other" else 2.5), (3.0, known[1].end)]
    assert [turn.start for turn in turns(read(tmp_path, text))] == [None, None], "without sound they are nobody's"


@pytest.mark.parametrize("cell", ["robot", "other words"])
def test_annotators_must_code_the_same_turn(tmp_path: Path, cell: str) -> None:
    """Or a wrong id would give one person's code to the words of another."""
    rows = ["a,0,c,words,x,ann", "a,0,t,words,y,bob" if cell == "robot" else f"a,0,c,{cell},y,bob"]
    text = "conversation,id,speaker,text,label,who\n" + "\n".join(rows) + "\n"
    with pytest.raises(DataError, match=r"F_DUPLICATE t\.csv:3, a/0: its (speaker|text) is '(t|other words)'"):
        read(tmp_path, text, columns={"id": "id", "label": "label", "annotator": "who"})


def test_a_file_a_turn_needs_neither_times_nor_recordings(tmp_path: Path) -> None:
    (tmp_path / "0.wav").touch()
    text = "conversation,speaker,text,file,t\na,c,x,0.wav,0\na,c,y,,\na,robot,z,2.wav,\n"
    corpus = read(tmp_path, text, tmp_path, columns={"clip": "file", "start": "t"})
    assert [turn.clip for turn in turns(corpus)] == [tmp_path / "0.wav", None, None]
    assert corpus.conversations[0].recording is None
    assert [(finding.code, finding.utterance) for finding in corpus.findings] == [
        ("E_SPEAKER", "a/2"),
        ("W_TS_OPEN", "a/1"),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"none of 1 recordings exists \(0\.wav"):
        read(tmp_path, text, tmp_path / "empty", columns={"clip": "file"})


def test_annotators_are_put_to_the_vote(tmp_path: Path) -> None:
    text = "conversation,speaker,text,n,code,who\n" + "".join(
        f"a,c,x,{number},{code},{who}\n"
        for who, codes in {
            "ann": ("a;b", "", "b", "a", "a;b"),
            "bob": ("b;c", "c", "a", "a", "a;b"),
            "cy": ("b;a", "", "c", "b", "b;a"),
        }.items()
        for number, code in enumerate(codes)
    )
    columns = {"label": "code", "annotator": "who", "index": "n"}
    corpus = read(tmp_path, text, columns=columns, label_separator=";")
    assert [(turn.label, turn.votes, turn.flags) for turn in turns(corpus)] == [
        ("b|a", {"b": 3, "a": 2, "c": 1}, ()),
        ("c", {"c": 1}, ()),
        ("a", {"a": 1, "b": 1, "c": 1}, ("W_LABEL_TIE",)),
        ("a", {"a": 2, "b": 1}, ()),
        ("a|b", {"a": 3, "b": 3}, ()),
    ]
    declared = read(tmp_path, text, columns=columns, label_separator=";", labels={"client": ["c", "b", "a"]})
    assert [turn.label for turn in turns(declared)] == ["b|a", "c", "c", "a", "b|a"]  # ties go by this order
    with pytest.raises(ConfigError, match=r"columns\.annotator: also set columns\.id or columns\.index"):
        read(tmp_path, text, columns={"label": "code", "annotator": "who"})


def test_an_annotator_who_contradicts_himself_fails_the_build(tmp_path: Path) -> None:
    text = "conversation,speaker,text,n,code,who\na,c,x,0,p,ann\na,c,x,0,p,bob\na,c,x,0,q,ann\n"
    columns = {"label": "code", "annotator": "who", "id": "n"}
    with pytest.raises(BuildError, match=r"F_DUPLICATE t\.csv:4, a/0: is already at t\.csv:2, by the same"):
        read(tmp_path, text, columns=columns)


def test_lists_of_json_lines_are_several_labels(tmp_path: Path) -> None:
    rows = [
        {"conversation": 7, "speaker": "c", "text": "x\u2028y", "code": ["B", "a"]},
        {"conversation": 7.0, "speaker": "t", "text": "z", "code": None},
        {"conversation": 7, "speaker": "t", "text": "z"},
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows[:2]) + "\n\n" + json.dumps(rows[2])
    corpus = read(tmp_path, text, name="t.jsonl", columns={"label": "code"})
    assert [(turn.id, turn.text, turn.label, turn.where) for turn in turns(corpus)] == [
        ("7/0", "x y", "b|a", "t.jsonl:1"),
        ("7/1", "z", None, "t.jsonl:2"),
        ("7/2", "z", None, "t.jsonl:4"),
    ]


def test_numbers_and_gaps_of_parquet_are_read_as_they_are_meant(tmp_path: Path) -> None:
    columns = {
        "conversation": pa.array([12.0, 12.0]),  # whole numbers beside gaps become fractions in many tools
        "speaker": pa.array(["c", "t"]).dictionary_encode(),
        "text": pa.array(["x", None]),
        "t": pa.array([0.25, float("nan")]),
        "codes": pa.array([["p", "q"], []]),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    config = CorpusConfig.model_validate({"columns": {"start": "t", "label": "codes"}})
    corpus = read_table(tmp_path / "t.parquet", None, config)
    assert [(turn.id, turn.text, turn.start, turn.label) for turn in turns(corpus)] == [
        ("12/0", "x", 0.25, "p|q"),
        ("12/1", "", None, None),
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.csv", 'conversation,speaker,text\na,c,"open\nb,c,x\n', r"^t\.csv:2: not readable as CSV"),
        ("t.csv", "conversation,speaker,text\na,c,one, two\n", r"^t\.csv:2: the row has more cells"),
        ("t.csv", "conversation,speaker,text\n\na,c\n", r"^t\.csv:3: the row has fewer cells"),
        ("t.csv", "conversation,speaker,text\n,c,x\n", r"^t\.csv:2: conversation is empty"),
        ("t.csv", "conversation,speaker,text,text\na,c,x,y\n", r"^t\.csv:1: column text occurs twice"),
        ("t.csv", "conversation,speaker,text\n , ,\n", "no rows"),
        ("t.jsonl", '{"conversation": 1}\n{"conversation": 2,}\n', r"^t\.jsonl:2: not readable as JSON"),
        ("t.jsonl", "[1]\n", r"^t\.jsonl:1: not a JSON object"),
        ("t.xlsx", "PK", r"\.xlsx' is not supported .*save it as CSV"),
    ],
)
def test_files_that_are_not_whole_are_refused_with_their_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as error:
        read(tmp_path, text, name=name)
    assert "\n" not in str(error.value)


def test_empty_cells_and_lines_at_the_end_are_no_rows(tmp_path: Path) -> None:
    corpus = read(tmp_path, "conversation,speaker,text\na,c,x,,\n,,\n\n")
    assert [(turn.id, turn.where) for turn in turns(corpus)] == [("a/0", "t.csv:2")]
