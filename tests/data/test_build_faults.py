"""Faults that end a preparation: each is told with its place, and leaves no shards."""

import shutil
from pathlib import Path

import pytest

from data.corpus.config import CorpusConfig
from data.errors import DataError
from data.importers import IMPORTERS
from data.preparation.build import prepare
from tests.data.world import BASE, World, refused


def fixed_split(world: World, **other: str) -> None:
    names = ["train", "train", "train", "train", "val", "val", "test", "test", "test"]
    for row in world.rows:
        row["split"] = other.get(row["conversation"], names[int(row["conversation"][1:])])


def test_the_same_sound_in_two_splits_fails(tmp_path: Path, world: World) -> None:
    fixed_split(world)
    world.sound["s7"] = world.sound["s1"]
    message = refused(world, tmp_path)
    assert "F_LEAK_AUDIO" in message
    assert "s1" in message
    assert "s7" in message


def test_a_video_in_two_splits_fails(tmp_path: Path, world: World) -> None:
    fixed_split(world)
    for row in world.rows:
        row["video"] = row["video"].replace("v7", "v0")
    assert "F_LEAK_GROUP" in refused(world, tmp_path)


def test_a_conversation_in_two_splits_fails(tmp_path: Path, world: World) -> None:
    fixed_split(world)
    world.row("s2/9")["split"] = "test"
    message = refused(world, tmp_path)
    assert "F_LEAK_CONVERSATION" in message
    assert f"corpus.csv:{world.line('s2/9')}" in message


def test_an_id_with_two_contents_fails(tmp_path: Path, world: World) -> None:
    world.rows.append({**world.row("s2/9"), "text": "other words"})
    message = refused(world, tmp_path)
    assert message.startswith("F_DUPLICATE: 1 id(s)")
    assert f"corpus.csv:{len(world.rows) + 1}, s2/9: is already at corpus.csv:51, with different content" in message


def test_ids_that_are_equal_across_sessions_fail(tmp_path: Path, world: World) -> None:
    world.rows[1]["conversation"] = "s0/0"
    world.rows[0]["id"], world.rows[1]["id"] = "x/0/7", "x/7"  # both become s0/0/7
    world.rows[0]["text"] = world.rows[1]["text"] = "the same"
    config = CorpusConfig.model_validate(BASE)
    with pytest.raises(DataError, match=r"F_DUPLICATE: 1 id\(s\) are used for different utterances"):
        prepare(IMPORTERS["table"].read(world.write(tmp_path)[0], None, config), tmp_path / "shards", config)


def test_a_session_in_two_places_is_not_mixed_up(tmp_path: Path) -> None:
    (tmp_path / "coded").mkdir()
    for part, turns in enumerate((range(3), range(3, 6))):
        rows = "".join(f"c0,{turn},T,words {turn},x\n" for turn in turns)
        (tmp_path / "coded" / f"{part}.csv").write_text("conversation,turn,speaker,text,code\n" + rows)
    corpus = IMPORTERS["mi-tags"].read(tmp_path / "coded", None, CorpusConfig())
    with pytest.raises(DataError, match=r"F_DUPLICATE 1\.csv:2, c0/3: the session is already at 0\.csv:2"):
        prepare(corpus, tmp_path / "shards")


def test_text_in_another_encoding_fails_with_byte_and_line(tmp_path: Path, world: World) -> None:
    def spoil(folder: Path) -> None:
        path = folder / "corpus.csv"
        path.write_bytes(path.read_bytes().replace(b"words of turn 3 in s0", b"caf\xe9 of turn 3 in s0"))

    world.files.append(spoil)
    message = refused(world, tmp_path)
    assert "F_ENCODING" in message
    assert "corpus.csv:5" in message
    shutil.rmtree(tmp_path)
    world.settings["encoding"] = "cp1252"
    assert "café of turn 3 in s0" in world.prepare(tmp_path)[0].columns["text"]
