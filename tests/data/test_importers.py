"""What all importers have in common: the same dialogues, written in every format, become the same corpus."""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpus_config import ColumnConfig, CorpusConfig
from data.errors import DataError
from data.findings import BuildError
from data.importers import IMPORTERS
from data.schema import Corpus, Turn
from data.validate import check


class Said(NamedTuple):
    speaker: str
    text: str  # the first word is unique
    label: str
    start: int  # s
    end: int  # s, the start of the next turn


Dialogues = dict[str, list[Said]]
Files = dict[str, str]  # name → content

DIALOGUES: Dialogues = {
    "12": [
        Said("therapist", "What brings you here today?", "question", 0, 2),
        Said("client", 'Well, my wife says "stop", olé', "neutral", 2, 5),
        Said("therapist", "She worries\nabout you.", "reflection", 5, 6),
        Said("client", "Smoking costs me too much; I want to stop.", "change", 6, 65),
        Said("therapist", "Fine.", "other", 65, 66),
    ],
    "7": [
        Said("client", "Beer helps me sleep.", "sustain", 1, 3),
        Said("therapist", "Go on.", "other", 3, 4),
    ],
}


def separated(header: str, rows: list[list[object]], mark: str = ",") -> str:
    sink = io.StringIO()
    csv.writer(sink, delimiter=mark, lineterminator="\n").writerows([header.split(), *rows])
    return sink.getvalue()


def clock(seconds: int) -> str:
    return f"00:{seconds // 60:02}:{seconds % 60:02}"


def annomi(dialogues: Dialogues, annotators: int = 0) -> Files:
    header = "transcript_id mi_quality video_title video_url topic utterance_id interlocutor timestamp utterance_text"
    rows: list[list[object]] = []
    for name, said in dialogues.items():
        for number, one in enumerate(said):
            codes = [one.label, "n/a"] if one.speaker == "therapist" else ["n/a", one.label]
            row = [name, "high", "t", f"video{name}", "x", number, one.speaker, clock(one.start), one.text]
            rows += [[*row, *who, *codes] for who in ([[place] for place in range(annotators)] or [[]])]
    who = " annotator_id" if annotators else ""
    return {"annomi.csv": separated(f"{header}{who} main_therapist_behaviour client_talk_type", rows)}


def annomi_full(dialogues: Dialogues) -> Files:
    return annomi(dialogues, annotators=3)


def whisperx(dialogues: Dialogues) -> Files:
    speakers = {"therapist": "SPEAKER_00", "client": "SPEAKER_01"}
    files = {}
    for name, said in dialogues.items():
        segments = [
            {
                "start": float(one.start),
                "end": float(one.end),
                "text": f" {one.text}",
                "speaker": speakers.get(one.speaker, one.speaker),
                "words": [{"word": "x", "score": 0.5}],
            }
            for one in said
        ]
        files[f"{name}.json"] = json.dumps({"segments": segments, "language": "en"}, ensure_ascii=False, indent=1)
    return files


def daic(dialogues: Dialogues) -> Files:
    speakers = {"therapist": "Ellie", "client": "Participant"}
    files = {}
    for name, said in dialogues.items():
        rows: list[list[object]] = [
            [f"{one.start}.000", f"{one.end}.0", speakers.get(one.speaker, one.speaker), one.text] for one in said
        ]
        files[f"{name}_TRANSCRIPT.csv"] = separated("start_time stop_time speaker value", rows, "\t")
    return files


def mi_tags(dialogues: Dialogues) -> Files:
    files = {}
    for name, said in dialogues.items():
        rows: list[list[object]] = [
            [
                number,
                one.speaker[0].upper() if one.speaker in SPEAKERS else one.speaker,
                one.text,
                one.label.upper(),
                who,
            ]
            for who in ("ann", "bob")
            for number, one in enumerate(said)
        ]
        files[f"{name}.csv"] = separated("turn speaker text code annotator", rows)
    return files


SPEAKERS = ("therapist", "client")
COLUMNS = "conversation speaker text label start end"


def records(dialogues: Dialogues) -> list[dict[str, object]]:
    rows = [
        [name, one.speaker, one.text, one.label, one.start, one.end] for name in dialogues for one in dialogues[name]
    ]
    return [dict(zip(COLUMNS.split(), row, strict=True)) for row in rows]


def table(dialogues: Dialogues) -> Files:
    return {"table.csv": separated(COLUMNS, [list(row.values()) for row in records(dialogues)])}


def semicolons(dialogues: Dialogues) -> Files:
    return {"table.csv": separated(COLUMNS, [list(row.values()) for row in records(dialogues)], ";")}


def tabs(dialogues: Dialogues) -> Files:
    return {"table.tsv": separated(COLUMNS, [list(row.values()) for row in records(dialogues)], "\t")}


def json_lines(dialogues: Dialogues) -> Files:
    return {"table.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records(dialogues))}


PLAIN = CorpusConfig()


@dataclass(frozen=True)
class Maker:
    """How the dialogues are written in a format, and what it can tell of them."""

    format: str
    files: Callable[[Dialogues], Files]
    column: str = ""  # one that it must have
    config: CorpusConfig = PLAIN
    folder: bool = False  # whether the source is a folder
    ends: bool = True
    times: bool = True
    labels: bool = True
    audio: str = "{}.wav"


AS_TABLE = CorpusConfig(columns=ColumnConfig(label="label", start="start", end="end"))
WHISPERX = CorpusConfig(roles={"speaker_00": "therapist", "SPEAKER_01": "client"})
MAKERS = {
    "annomi": Maker("annomi", annomi, "utterance_text", ends=False),
    "annomi-full": Maker("annomi", annomi_full, "client_talk_type", ends=False),
    "whisperx": Maker("whisperx", whisperx, config=WHISPERX, folder=True, labels=False),
    "daic": Maker("daic", daic, "stop_time", folder=True, labels=False, audio="{}_AUDIO.wav"),
    "mi-tags": Maker("mi-tags", mi_tags, "speaker", folder=True, times=False),
    "table": Maker("table", table, "conversation", AS_TABLE),
    "table-semicolons": Maker("table", semicolons, "label", AS_TABLE),
    "table-tsv": Maker("table", tabs, "text", AS_TABLE),
    "table-jsonl": Maker("table", json_lines, "speaker", AS_TABLE),
}


@pytest.fixture(params=MAKERS)
def maker(request: pytest.FixtureRequest) -> Maker:
    return MAKERS[request.param]


timed = pytest.mark.parametrize("maker", [maker for maker in MAKERS.values() if maker.times], indirect=False)


def write(maker: Maker, folder: Path, files: Files, *, encoding: str = "utf-8", newline: str = "\n") -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding=encoding, newline=newline)
    return folder if maker.folder else folder / next(iter(files))


def read(maker: Maker, folder: Path, audio: Path | None = None, dialogues: Dialogues = DIALOGUES) -> Corpus:
    return IMPORTERS[maker.format].read(write(maker, folder, maker.files(dialogues)), audio, maker.config)


def turns(corpus: Corpus) -> Iterator[tuple[Turn, Said]]:
    for conversation in corpus.conversations:
        yield from zip(conversation.turns, DIALOGUES[conversation.id], strict=True)


def place_of(where: str, folder: Path) -> str:
    """What stands at a place: a line of a file, or a segment."""
    name, _, place = where.rpartition(":")
    text = (folder / name).read_text(encoding="utf-8")
    if place.startswith("segments["):
        return str(json.loads(text)["segments"][int(place[9:-1])]["text"])
    return text.splitlines()[int(place) - 1]


def test_every_format_has_a_maker_and_a_description() -> None:
    assert {maker.format for maker in MAKERS.values()} == set(IMPORTERS)
    assert all(known.description.endswith(".") for known in IMPORTERS.values())


def test_the_same_dialogues_are_read_from_every_format(maker: Maker, tmp_path: Path) -> None:
    corpus = read(maker, tmp_path / "source")
    assert corpus.name == maker.format
    assert sorted(one.id for one in corpus.conversations) == ["12", "7"]
    for turn, said in turns(corpus):
        assert (turn.speaker, turn.text) == (said.speaker, " ".join(said.text.split()))
        assert turn.label == (said.label if maker.labels else None)
        assert turn.audio is None
    for conversation in corpus.conversations:
        assert [turn.id for turn in conversation.turns] == [
            f"{conversation.id}/{place}" for place in range(len(DIALOGUES[conversation.id]))
        ]
        assert [turn.index for turn in conversation.turns] == list(range(len(conversation.turns)))


def test_labels_and_roles_are_those_of_the_dialogues(maker: Maker, tmp_path: Path) -> None:
    corpus = read(maker, tmp_path / "source")
    assert set(corpus.roles) == set(SPEAKERS)
    assert corpus.labels == tuple(label for own in corpus.roles.values() for label in own)
    for turn, _ in turns(corpus):
        assert turn.label is None or turn.label in corpus.roles[turn.speaker]
    if not corpus.declared:
        given = {said.label for _, said in turns(corpus)} if maker.labels else set()
        assert set(corpus.labels) == given
        assert all(list(own) == sorted(own) for own in corpus.roles.values())


def test_names_may_be_numbers_in_yaml() -> None:
    config = CorpusConfig.model_validate({"roles": {0: "therapist"}, "labels": {"client": [1, 2]}})
    assert (config.roles, config.labels) == ({"0": "therapist"}, {"client": ("1", "2")})


def test_labels_of_the_settings_come_first_and_in_their_order(maker: Maker, tmp_path: Path) -> None:
    own = {"therapist": ("Reflection", "question", "other"), "client": ("sustain", "neutral", "change")}
    config = maker.config.model_copy(update={"labels": own, "qualities": ("low", "High")})
    source = write(maker, tmp_path / "source", maker.files(DIALOGUES))
    corpus = IMPORTERS[maker.format].read(source, None, config)
    assert corpus.labels == ("reflection", "question", "other", "sustain", "neutral", "change")
    assert corpus.roles == {"therapist": corpus.labels[:3], "client": corpus.labels[3:]}
    assert corpus.qualities == ("low", "high")
    assert corpus.declared


def test_times_are_equal_where_the_format_has_them(maker: Maker, tmp_path: Path) -> None:
    corpus = read(maker, tmp_path / "source")
    for turn, said in turns(corpus):
        last = said is DIALOGUES[turn.id.split("/", maxsplit=1)[0]][-1]
        end = said.end if maker.ends or not last else None
        assert (turn.start, turn.end) == ((said.start, end) if maker.times else (None, None))
    opened = [finding.code for finding in corpus.findings]
    assert opened == ([] if maker.ends else ["W_TS_OPEN"] * 2)


def test_places_name_the_row(maker: Maker, tmp_path: Path) -> None:
    for turn, said in turns(read(maker, tmp_path / "source")):
        assert said.text.split()[0] in place_of(turn.where, tmp_path / "source")


def test_sound_that_cannot_be_cut_is_not_ignored(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mi-tags: the format has no times, so no sound can be cut"):
        read(MAKERS["mi-tags"], tmp_path / "source", tmp_path)


@timed
def test_recordings_are_found_by_name(maker: Maker, tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    (audio / maker.audio.format("12").replace(".wav", ".FLAC")).touch()
    corpus = read(maker, tmp_path / "source", audio)
    found = {one.id: one.recording for one in corpus.conversations}
    assert found["12"] == audio / maker.audio.format("12").replace(".wav", ".FLAC")
    assert found["7"] == audio / maker.audio.format("7")  # where it was looked for: the validation finds it missing
    check(corpus)
    missing = [finding.utterance for finding in corpus.findings if finding.code == "E_AUDIO_MISSING"]
    assert missing == ["7/0", "7/1"]


def test_without_audio_the_corpus_is_text_only(maker: Maker, tmp_path: Path) -> None:
    corpus = read(maker, tmp_path / "source")
    assert all(one.recording is None for one in corpus.conversations)
    assert all(turn.clip is None for turn, _ in turns(corpus))


@timed
def test_a_folder_without_recordings_is_refused(maker: Maker, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.wav").touch()
    with pytest.raises(DataError, match="none of 2 recordings is here"):
        read(maker, tmp_path / "source", tmp_path / "other")
    with pytest.raises(DataError, match="no such folder"):
        read(maker, tmp_path / "source", tmp_path / "nowhere")


def test_a_clean_corpus_passes_the_validation_without_rejects(maker: Maker, tmp_path: Path) -> None:
    corpus = read(maker, tmp_path / "source")
    check(corpus)
    assert {finding.code for finding in corpus.findings} <= {"W_TS_OPEN"}


def test_importing_twice_gives_equal_corpora(maker: Maker, tmp_path: Path) -> None:
    assert read(maker, tmp_path / "source") == read(maker, tmp_path / "source")


@pytest.mark.parametrize(("encoding", "newline"), [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8-sig", "\r\n")])
def test_byte_order_marks_and_line_ends_of_windows_change_nothing(
    maker: Maker, tmp_path: Path, encoding: str, newline: str
) -> None:
    files = maker.files(DIALOGUES)
    source = write(maker, tmp_path / "source", files, encoding=encoding, newline=newline)
    assert IMPORTERS[maker.format].read(source, None, maker.config) == read(maker, tmp_path / "plain")


def test_bytes_of_another_encoding_are_refused_with_line_and_byte(maker: Maker, tmp_path: Path) -> None:
    files = maker.files(DIALOGUES)
    source = write(maker, tmp_path / "source", files, encoding="cp1252")
    name = next(name for name, content in files.items() if "é" in content)
    before = files[name].partition("é")[0]
    line, byte = before.count("\n") + 1, len(before)
    with pytest.raises(BuildError, match=rf"^F_ENCODING {name}:{line}: byte {byte} \(0xe9\) is not UTF-8") as error:
        IMPORTERS[maker.format].read(source, None, maker.config)
    assert "--set encoding=cp1252" in str(error.value)
    assert [finding.code for finding in error.value.findings] == ["F_ENCODING"]
    config = maker.config.model_copy(update={"encoding": "cp1252"})
    assert IMPORTERS[maker.format].read(source, None, config) == read(maker, tmp_path / "plain")
    with pytest.raises(DataError, match="encoding: 'cp12520' is unknown"):
        IMPORTERS[maker.format].read(source, None, maker.config.model_copy(update={"encoding": "cp12520"}))


def test_an_empty_source_is_refused(maker: Maker, tmp_path: Path) -> None:
    nothing = dict.fromkeys(maker.files(DIALOGUES), "")
    with pytest.raises(DataError, match=r"the file is empty|not readable as JSON"):
        IMPORTERS[maker.format].read(write(maker, tmp_path / "empty", nothing), None, maker.config)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError):
        IMPORTERS[maker.format].read(tmp_path / "folder", None, maker.config)
    with pytest.raises(DataError):
        IMPORTERS[maker.format].read(tmp_path / "nowhere", None, maker.config)


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("whisperx", "table-jsonl")])
def test_a_header_without_rows_is_refused(name: str, tmp_path: Path) -> None:
    maker = MAKERS[name]
    heads = {file: content.partition("\n")[0] for file, content in maker.files(DIALOGUES).items()}
    with pytest.raises(DataError, match=r"no rows; is this the right file\?"):
        IMPORTERS[maker.format].read(write(maker, tmp_path / "source", heads), None, maker.config)


@pytest.mark.parametrize("name", [name for name, maker in MAKERS.items() if maker.column])
def test_a_missing_column_is_named_with_the_nearest(name: str, tmp_path: Path) -> None:
    maker = MAKERS[name]
    near = maker.column.title()
    files = {file: content.replace(maker.column, near) for file, content in maker.files(DIALOGUES).items()}
    source = write(maker, tmp_path / "source", files)
    with pytest.raises(DataError, match=rf":1: missing column\(s\) {maker.column} \(did you mean {near}\?\)") as error:
        IMPORTERS[maker.format].read(source, None, maker.config)
    assert "the file has " in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_speaker_keeps_the_words_and_loses_the_label(maker: Maker, tmp_path: Path) -> None:
    changed = {**DIALOGUES, "7": [DIALOGUES["7"][0], DIALOGUES["7"][1]._replace(speaker="Stranger")]}
    corpus = read(maker, tmp_path / "source", dialogues=changed)
    turn = next(turn for one in corpus.conversations for turn in one.turns if turn.id == "7/1")
    assert (turn.speaker, turn.text, turn.label) == ("unknown", "Go on.", None)
    assert set(corpus.roles) == set(SPEAKERS)
    (finding,) = (finding for finding in corpus.findings if finding.code == "E_SPEAKER")
    assert "roles: {'Stranger': client}" in finding.message
    roles = {**maker.config.roles, "STRANGER": "client"}
    known = dataclasses.replace(maker, config=maker.config.model_copy(update={"roles": roles}))
    again = read(known, tmp_path / "source", dialogues=changed)
    assert not [finding for finding in again.findings if finding.code == "E_SPEAKER"]


@pytest.mark.parametrize("name", ["annomi", "annomi-full", "mi-tags"])  # in the others the place is the name
def test_a_row_that_stands_twice_changes_nothing_but_is_found(name: str, tmp_path: Path) -> None:
    maker = MAKERS[name]
    files = maker.files(DIALOGUES)
    file = next(iter(files))
    lines = files[file].split("\n")
    again = {**files, file: "\n".join([*lines[:2], *lines[1:]])}
    corpus = IMPORTERS[maker.format].read(write(maker, tmp_path / "source", again), None, maker.config)
    expected = read(maker, tmp_path / "plain")
    check(corpus)
    check(expected)
    assert [finding.utterance for finding in corpus.findings if finding.code == "W_DUPLICATE"] == ["12/0"]
    for one, other in zip(corpus.conversations, expected.conversations, strict=True):
        assert [(turn.id, turn.label, turn.span) for turn in one.turns] == [
            (turn.id, turn.label, turn.span) for turn in other.turns
        ]


def test_parquet_is_read_like_the_other_tables(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(records(DIALOGUES)), tmp_path / "table.parquet")
    corpus = IMPORTERS["table"].read(tmp_path / "table.parquet", None, AS_TABLE)
    expected = read(MAKERS["table"], tmp_path / "source")
    places = [turn.where for one in corpus.conversations for turn in one.turns]
    assert places == [f"table.parquet:{number}" for number in range(1, 8)]
    for turn in (turn for one in expected.conversations for turn in one.turns):
        turn.where = places.pop(0)
    assert corpus == expected
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(DataError, match="not readable as Parquet"):
        IMPORTERS["table"].read(tmp_path / "text.parquet", None, AS_TABLE)
