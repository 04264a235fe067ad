"""The importer conformance suite: the same dialogues in every format become the same corpus."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpus.config import CorpusConfig
from data.corpus.issues import BuildError
from data.corpus.schema import Corpus, Turn
from data.errors import DataError
from data.importers import IMPORTERS, guess_format
from data.preparation.validate import check
from tests.data.makers import AS_TABLE, DIALOGUES, MAKERS, SPEAKERS, Dialogues, Files, Maker, Said, records, write


@pytest.fixture(params=MAKERS)
def maker(request: pytest.FixtureRequest) -> Maker:
    return MAKERS[request.param]


timed = pytest.mark.parametrize("maker", [maker for maker in MAKERS.values() if maker.times], indirect=False)


def read(maker: Maker, folder: Path, audio: Path | None = None, dialogues: Dialogues = DIALOGUES) -> Corpus:
    return read_files(maker, folder, maker.files(dialogues), audio)


def read_files(maker: Maker, folder: Path, files: Files, audio: Path | None = None, **changed: object) -> Corpus:
    """Write files and read them with the settings of the maker, of which some may be changed."""
    config = maker.config.model_copy(update=changed)
    return IMPORTERS[maker.format].read(write(maker, folder, files), audio, config)


def turns(corpus: Corpus) -> Iterator[tuple[Turn, Said]]:
    for conversation in corpus.conversations:
        yield from zip(conversation.turns, DIALOGUES[conversation.id], strict=True)


def text_at(where: str, folder: Path) -> str:
    """Return the text at "file:line" or "file:segment"."""
    name, _, position = where.rpartition(":")
    text = (folder / name).read_text(encoding="utf-8")
    if position.startswith("segments["):
        segments = json.loads(text)
        while isinstance(segments, dict):  # the list has other names in other formats
            segments = next(content for content in segments.values() if isinstance(content, dict | list))
        return json.dumps(segments[int(position[9:-1])], ensure_ascii=False)
    if name.endswith(".eaf"):  # the id of an annotation
        return text.split(f'ANNOTATION_ID="{position}"')[1].partition("</ANNOTATION>")[0]
    if name.endswith(".TextGrid"):  # the number of an interval on its tier
        tier, _, number = position.removesuffix("]").partition("[")
        rows = text.split(f'"{tier}"\n')[1].partition('"IntervalTier"')[0]
        return re.findall(r'^\d+\n\d+\n"((?:[^"]|"")*)"$', rows, flags=re.MULTILINE)[int(number) - 1]
    return text.splitlines()[int(position) - 1]


def test_every_format_has_a_maker_and_a_description() -> None:
    assert {maker.format for maker in MAKERS.values()} | {"huggingface"} == set(IMPORTERS)  # test_huggingface.py
    assert all(known.description.endswith(".") for known in IMPORTERS.values())


def test_format_is_guessed_from_the_content(maker: Maker, tmp_path: Path) -> None:
    assert guess_format(write(maker, tmp_path / "source", maker.files(DIALOGUES))) == maker.format


def test_unknown_source_is_refused_by_guessing(tmp_path: Path) -> None:
    (tmp_path / "notes.docx").write_bytes(b"PK")
    for source, message in ((tmp_path, r"no format recognises it \(notes\.docx\)"), (tmp_path / "x", "no such file")):
        with pytest.raises(DataError, match=message):
            guess_format(source)


def test_same_dialogues_are_read_from_every_format(maker: Maker, tmp_path: Path) -> None:
    """Speakers, text, labels, ids and positions are those of the dialogues; importing twice gives equal corpora."""
    corpus = read(maker, tmp_path / "source")
    assert corpus.name == maker.format
    assert sorted(conversation.id for conversation in corpus.conversations) == ["12", "7"]
    for turn, said in turns(corpus):
        assert (turn.speaker, turn.text) == (said.speaker, " ".join(said.text.split()))
        assert turn.label == (said.label if maker.labels else None)
        assert turn.audio is turn.clip is None
        assert said.text.split()[0] in text_at(turn.where, tmp_path / "source")
    for conversation in corpus.conversations:
        assert conversation.recording is None
        indices = range(len(DIALOGUES[conversation.id]))
        assert [turn.id for turn in conversation.turns] == [f"{conversation.id}/{index}" for index in indices]
        assert [turn.index for turn in conversation.turns] == list(indices)
    assert read(maker, tmp_path / "source") == corpus
    check(corpus)
    assert {finding.code for finding in corpus.findings} <= {"W_TS_OPEN"}


def test_labels_and_roles_are_those_of_the_dialogues(maker: Maker, tmp_path: Path) -> None:
    corpus = read(maker, tmp_path / "source")
    assert set(corpus.roles) == set(SPEAKERS)
    assert corpus.labels == tuple(label for labels in corpus.roles.values() for label in labels)
    for turn, _ in turns(corpus):
        assert turn.label is None or turn.label in corpus.roles[turn.speaker]
    if not corpus.declared:
        assert set(corpus.labels) == ({said.label for _, said in turns(corpus)} if maker.labels else set())
        assert all(list(labels) == sorted(labels) for labels in corpus.roles.values())


def test_settings_override_labels_and_their_order(maker: Maker, tmp_path: Path) -> None:
    labels = {"therapist": ("Reflection", "question", "other"), "client": ("sustain", "neutral", "change")}
    changed = {"labels": labels, "qualities": ("low", "High")}
    corpus = read_files(maker, tmp_path / "source", maker.files(DIALOGUES), **changed)
    assert corpus.labels == ("reflection", "question", "other", "sustain", "neutral", "change")
    assert corpus.roles == {"therapist": corpus.labels[:3], "client": corpus.labels[3:]}
    assert corpus.qualities == ("low", "high")
    assert corpus.declared
    numbers = CorpusConfig.model_validate({"roles": {0: "therapist"}, "labels": {"client": [1, 2]}})  # as YAML reads
    assert (numbers.roles, numbers.labels) == ({"0": "therapist"}, {"client": ("1", "2")})


def test_times_are_equal_if_the_format_has_them(maker: Maker, tmp_path: Path) -> None:
    corpus = read(maker, tmp_path / "source")
    for turn, said in turns(corpus):
        last = said is DIALOGUES[turn.id.split("/", maxsplit=1)[0]][-1]
        end = said.end if maker.ends or not last else None
        assert (turn.start, turn.end) == ((said.start, end) if maker.times else (None, None))
    assert [finding.code for finding in corpus.findings] == ([] if maker.ends else ["W_TS_OPEN"] * 2)


@timed
def test_recordings_are_found_by_name(maker: Maker, tmp_path: Path) -> None:
    audio = tmp_path / "audio"
    audio.mkdir()
    (audio / maker.audio.format("12").replace(".wav", ".FLAC")).touch()
    corpus = read(maker, tmp_path / "source", audio)
    found = {conversation.id: conversation.recording for conversation in corpus.conversations}
    assert found["12"] == audio / maker.audio.format("12").replace(".wav", ".FLAC")
    assert found["7"] == audio / maker.audio.format("7")  # the expected path; the validation reports that it is missing
    check(corpus)
    missing = [finding.utterance for finding in corpus.findings if finding.code == "E_AUDIO_MISSING"]
    assert missing == ["7/0", "7/1"]


@timed
def test_folder_without_recordings_is_refused(maker: Maker, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.wav").touch()
    with pytest.raises(DataError, match="none of 2 recordings exists"):
        read(maker, tmp_path / "source", tmp_path / "other")
    with pytest.raises(DataError, match="no such folder"):
        read(maker, tmp_path / "source", tmp_path / "nowhere")


def test_recordings_without_times_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="mi-tags: the format has no times, so audio cannot be cut"):
        read(MAKERS["mi-tags"], tmp_path / "source", tmp_path)


@pytest.mark.parametrize(("encoding", "newline"), [("utf-8-sig", "\n"), ("utf-8", "\r\n"), ("utf-8-sig", "\r\n")])
def test_byte_order_mark_and_line_ends_change_nothing(
    maker: Maker, tmp_path: Path, encoding: str, newline: str
) -> None:
    source = write(maker, tmp_path / "source", maker.files(DIALOGUES), encoding=encoding, newline=newline)
    assert IMPORTERS[maker.format].read(source, None, maker.config) == read(maker, tmp_path / "plain")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_byte_order_mark_decides_the_encoding(maker: Maker, tmp_path: Path, encoding: str) -> None:
    source = write(maker, tmp_path / "source", maker.files(DIALOGUES), encoding=encoding)
    assert IMPORTERS[maker.format].read(source, None, maker.config) == read(maker, tmp_path / "plain")


@pytest.mark.parametrize("name", [name for name, maker in MAKERS.items() if maker.column and name != "table-jsonl"])
def test_case_and_spaces_of_headers_change_nothing(name: str, tmp_path: Path) -> None:
    maker, files = MAKERS[name], {}
    for file, content in MAKERS[name].files(DIALOGUES).items():
        head, _, rest = content.partition("\n")
        files[file] = f"{head.upper().replace('_', ' ')}\n{rest}"
    assert read_files(maker, tmp_path / "source", files) == read(maker, tmp_path / "plain")


@pytest.mark.parametrize("name", [name for name, maker in MAKERS.items() if maker.times and maker.format != "annomi"])
def test_turns_by_tier_are_sorted_by_their_start(name: str, tmp_path: Path) -> None:
    """Annotation tools write one speaker after the other. AnnoMI numbers its turns."""
    maker = MAKERS[name]
    tiers = {session: sorted(said, key=lambda turn: turn.speaker) for session, said in DIALOGUES.items()}
    corpus, expected = read(maker, tmp_path / "tiers", dialogues=tiers), read(maker, tmp_path / "plain")
    for conversation, plain in zip(corpus.conversations, expected.conversations, strict=True):
        found = [(turn.id, turn.index, turn.text, turn.label, turn.span) for turn in conversation.turns]
        assert found == [(turn.id, turn.index, turn.text, turn.label, turn.span) for turn in plain.turns]
    found = [finding.code for finding in corpus.findings if finding.code != "W_TS_OPEN" or maker.ends]
    assert found == ([] if maker.by_time else ["W_TS_SORTED"])


def test_other_encoding_is_refused_with_line_and_byte(maker: Maker, tmp_path: Path) -> None:
    files = maker.files(DIALOGUES)
    source = write(maker, tmp_path / "source", files, encoding="cp1252")
    name = next(name for name, content in files.items() if "é" in content)
    before = files[name].partition("é")[0]
    position = rf"^F_ENCODING {name}:{before.count(chr(10)) + 1}: byte {len(before)} \(0xe9\) is not valid UTF-8"
    importer = IMPORTERS[maker.format]
    with pytest.raises(BuildError, match=f"{position}.*--set encoding=cp1252") as error:
        importer.read(source, None, maker.config)
    assert [finding.code for finding in error.value.findings] == ["F_ENCODING"]
    config = maker.config.model_copy(update={"encoding": "cp1252"})
    assert importer.read(source, None, config) == read(maker, tmp_path / "plain")
    with pytest.raises(DataError, match="encoding: 'cp12520' is unknown"):
        importer.read(source, None, maker.config.model_copy(update={"encoding": "cp12520"}))


def test_empty_or_missing_source_is_refused(maker: Maker, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the file is empty|not readable as JSON"):
        read_files(maker, tmp_path / "empty", dict.fromkeys(maker.files(DIALOGUES), ""))
    (tmp_path / "folder").mkdir()
    for name in ("folder", "nowhere"):
        with pytest.raises(DataError):
            IMPORTERS[maker.format].read(tmp_path / name, None, maker.config)


@pytest.mark.parametrize("name", ["annomi", "daic", "mi-tags", "table", "table-tsv", "web-vtt"])
def test_header_without_rows_is_refused(name: str, tmp_path: Path) -> None:
    heads = {file: content.partition("\n")[0] for file, content in MAKERS[name].files(DIALOGUES).items()}
    with pytest.raises(DataError, match="no rows; check the path of the source"):
        read_files(MAKERS[name], tmp_path / "source", heads)


@pytest.mark.parametrize("name", [name for name, maker in MAKERS.items() if maker.column])
def test_missing_column_is_named_with_the_nearest(name: str, tmp_path: Path) -> None:
    maker, near = MAKERS[name], MAKERS[name].column[:-1]
    files = {file: content.replace(maker.column, near) for file, content in maker.files(DIALOGUES).items()}
    message = rf":1: missing column\(s\) {maker.column} \(did you mean {near}\?\); the file has "
    with pytest.raises(DataError, match=message) as error:
        read_files(maker, tmp_path / "source", files)
    assert "\n" not in str(error.value)


def test_unknown_speaker_keeps_text_and_loses_label(maker: Maker, tmp_path: Path) -> None:
    changed = {**DIALOGUES, "7": [DIALOGUES["7"][0], DIALOGUES["7"][1]._replace(speaker="Stranger")]}
    corpus = read(maker, tmp_path / "source", dialogues=changed)
    turn = next(turn for conversation in corpus.conversations for turn in conversation.turns if turn.id == "7/1")
    assert (turn.speaker, turn.text, turn.label) == ("unknown", "Go on.", None)
    assert set(corpus.roles) == set(SPEAKERS)
    (finding,) = (finding for finding in corpus.findings if finding.code == "E_SPEAKER")
    assert "roles: {'Stranger': client}" in finding.message
    roles = {**maker.config.roles, "STRANGER": "client"}
    named = dataclasses.replace(maker, config=maker.config.model_copy(update={"roles": roles}))
    again = read(named, tmp_path / "source", dialogues=changed)
    assert not [finding for finding in again.findings if finding.code == "E_SPEAKER"]


@pytest.mark.parametrize("name", ["annomi", "annomi-full", "mi-tags"])  # in the others the position is the id
def test_duplicate_row_is_found_and_dropped(name: str, tmp_path: Path) -> None:
    maker = MAKERS[name]
    files = maker.files(DIALOGUES)
    file = next(iter(files))
    lines = files[file].split("\n")
    corpus = read_files(maker, tmp_path / "source", {**files, file: "\n".join([*lines[:2], *lines[1:]])})
    expected = read(maker, tmp_path / "plain")
    check(corpus)
    check(expected)
    assert [finding.utterance for finding in corpus.findings if finding.code == "W_DUPLICATE"] == ["12/0"]
    for pair in zip(corpus.conversations, expected.conversations, strict=True):
        first, second = ([(turn.id, turn.label, turn.span) for turn in conversation.turns] for conversation in pair)
        assert first == second


def test_parquet_is_read_like_the_other_tables(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(records(DIALOGUES)), tmp_path / "table.parquet")
    corpus = IMPORTERS["table"].read(tmp_path / "table.parquet", None, AS_TABLE)
    expected = read(MAKERS["table"], tmp_path / "source")
    places = [turn.where for turn, _ in turns(corpus)]
    assert places == [f"table.parquet:{number}" for number in range(1, 8)]
    for turn, _ in turns(expected):
        turn.where = places.pop(0)
    assert corpus == expected
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(DataError, match="not readable as Parquet"):
        IMPORTERS["table"].read(tmp_path / "text.parquet", None, AS_TABLE)
