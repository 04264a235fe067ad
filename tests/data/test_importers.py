"""What all importers have in common: the same dialogues, written in every format, become the same corpus."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.corpus.config import CorpusConfig
from data.corpus.issues import BuildError
from data.corpus.schema import Corpus, Turn
from data.errors import DataError
from data.importers import IMPORTERS
from data.preparation.validate import check
from tests.data.makers import AS_TABLE, DIALOGUES, MAKERS, SPEAKERS, Dialogues, Maker, Said, records, write


@pytest.fixture(params=MAKERS)
def maker(request: pytest.FixtureRequest) -> Maker:
    return MAKERS[request.param]


timed = pytest.mark.parametrize("maker", [maker for maker in MAKERS.values() if maker.times], indirect=False)


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
    with pytest.raises(DataError, match="mi-tags: the format has no times, so audio cannot be cut"):
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
    with pytest.raises(DataError, match="none of 2 recordings exists"):
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
    with pytest.raises(
        BuildError, match=rf"^F_ENCODING {name}:{line}: byte {byte} \(0xe9\) is not valid UTF-8"
    ) as error:
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
    with pytest.raises(DataError, match=r"no rows; check the path of the source"):
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
