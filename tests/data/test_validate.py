"""Planted faults: each is reported under its code with its line and spans, and nothing else is reported."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.corpus.audio import SAMPLE_RATE
from data.corpus.config import CorpusConfig
from data.corpus.issues import CODES, BuildError, Finding
from data.errors import ConfigError, DataError
from data.importers import IMPORTERS
from data.preparation.build import prepare
from data.shards.dataset import Shards
from tests.data.world import BASE, END, EVERY, LENGTH, SESSIONS, TURNS, World, clean_world, refused

Expected = list[tuple[str, str]]  # code and utterance
FAULTS: dict[str, Callable[[World], Expected]] = {}
CELLS: dict[str, tuple[str, str, object, str]] = {  # fault: row, column, value or function of the value, code
    "clip of 50 ms": ("s3/6", "end", 6 * EVERY + 0.05, "E_TOO_SHORT"),
    "time in words": ("s3/8", "start", "soon", "E_TS_FORMAT"),
    "end after the recording": ("s3/9", "end", END + 1.56, "E_TS_RANGE"),
    "end just after the recording": ("s4/9", "end", END + 1.45, "W_TS_CLAMPED"),
    "start before the recording": ("s4/0", "start", -0.5, "E_TS_RANGE"),
    "end before the start": ("s4/2", "end", 2 * EVERY - 0.2, "E_TS_END"),
    "misspelled label": ("s4/5", "label", "chnage", "E_LABEL"),
    "label of the other role": ("s4/7", "label", "question", "E_LABEL_ROLE"),
    "unknown speaker": ("s4/8", "speaker", "X", "E_SPEAKER"),
    "no length": ("s5/2", "end", 2 * EVERY, "W_TS_ZERO"),
    "overlap": ("s5/5", "start", 4 * EVERY + LENGTH - 0.06, "W_TS_OVERLAP"),
    "no end": ("s6/9", "end", "", "W_TS_OPEN"),
}


def fault(plant: Callable[[World], Expected]) -> Callable[[World], Expected]:
    FAULTS[plant.__name__] = plant
    return plant


def cell(name: str) -> Callable[[World], Expected]:
    row, column, value, code = CELLS[name]

    def plant(world: World) -> Expected:
        world.row(row)[column] = value
        return [(code, row)]

    return plant


FAULTS |= {name: cell(name) for name in CELLS}


@fault
def missing_recording(world: World) -> Expected:
    world.files.append(lambda folder: (folder / "audio" / "s0.wav").unlink())
    return [("E_AUDIO_MISSING", f"s0/{turn}") for turn in range(TURNS)]


@fault
def file_without_audio(world: World) -> Expected:
    world.files.append(lambda folder: (folder / "audio" / "s1.wav").write_text("not audio"))
    return [("E_AUDIO_UNREADABLE", f"s1/{turn}") for turn in range(TURNS)]


@fault
def empty_recording(world: World) -> Expected:
    world.sound["s2"] = world.sound["s2"][:0]
    return [("E_AUDIO_EMPTY", f"s2/{turn}") for turn in range(TURNS)]


@fault
def nan_samples(world: World) -> Expected:
    world.samples("s3/4")[100:103] = np.nan
    return [("E_AUDIO_NAN", "s3/4")]


@fault
def turns_in_wrong_order(world: World) -> Expected:
    first, second = world.row("s5/7"), world.row("s5/8")
    for name in ("start", "end"):
        first[name], second[name] = second[name], first[name]
    return [("W_TS_SORTED", "s5")]


@fault
def clipped_clip(world: World) -> Expected:
    samples = world.samples("s6/2")
    samples[:] = np.clip(samples * 30, -1, 1)
    return [("W_CLIPPED", "s6/2")]


@fault
def silent_clip(world: World) -> Expected:
    world.samples("s6/4")[:] = 0
    return [("W_SILENT", "s6/4")]


@fault
def clip_with_offset(world: World) -> Expected:
    world.samples("s6/6")[:] += 0.03
    return [("W_DC", "s6/6")]


@fault
def duplicate_row(world: World) -> Expected:
    world.rows.append(dict(world.row("s6/8")))
    return [("W_DUPLICATE", "s6/8")]


@fault
def stereo_recording_at_another_rate(world: World) -> Expected:
    world.sound["s7"] = np.repeat(np.repeat(world.sound["s7"], 2, axis=0), 2, axis=1)
    world.rate["s7"] = 2 * SAMPLE_RATE
    return [("W_STEREO", "s7"), ("W_RESAMPLED", "s7")]


@fault
def truncated_recording(world: World) -> Expected:
    """The header of an MP3 that was cut in half announces the original length."""

    def cut(folder: Path) -> None:
        path = folder / "audio" / "s8.mp3"
        soundfile.write(path, world.sound["s8"], SAMPLE_RATE)
        path.with_suffix(".wav").unlink()
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])

    world.files.append(cut)
    return [("W_TRUNCATED", "s8"), *(("E_TS_RANGE", f"s8/{turn}") for turn in range(5, TURNS))]


@fault
def turn_of_31_seconds(world: World) -> Expected:
    world.sound["s7"] = np.concatenate([world.sound["s7"], world.sound["s7"]])
    world.row("s7/9")["end"] = world.row("s7/9")["start"] + 31
    return [("W_TOO_LONG", "s7/9")]


def codes(findings: list[Finding]) -> Expected:
    return [(finding.code, finding.utterance) for finding in findings]


def assert_consequences(world: World, shards: Shards, findings: list[Finding]) -> None:
    """Check place and consequence of each finding about a turn."""
    for finding in (finding for finding in findings if "/" in finding.utterance):
        row = shards.columns["id"].index(finding.utterance)
        assert finding.where == f"corpus.csv:{world.line(finding.utterance)}"
        assert finding.consequence == CODES[finding.code][1]
        if finding.code.startswith("E_"):
            assert shards.columns["text"][row] == world.row(finding.utterance)["text"]
            assert (shards.columns["label"][row], shards.pcm(row)) == (None, None)
        elif finding.code not in ("W_TS_ZERO", "W_TS_OPEN", "W_DUPLICATE"):
            assert shards.columns["label"][row] is not None
            assert shards.pcm(row) is not None
            assert finding.code in shards.columns["flags"][row]


def test_clean_corpus_has_no_findings(tmp_path: Path, world: World) -> None:
    shards, findings = world.prepare(tmp_path)
    assert findings == []
    assert shards.manifest.findings == {}
    assert sum(shards.manifest.turns.values()) == SESSIONS * TURNS
    assert min(shards.columns["n_samples"]) == LENGTH * SAMPLE_RATE


@pytest.mark.long  # `test_all_faults_are_found_together` plants the same faults
@pytest.mark.parametrize("plant", FAULTS.values(), ids=FAULTS)
def test_single_fault_is_found(tmp_path: Path, world: World, plant: Callable[[World], Expected]) -> None:
    expected = plant(world)
    shards, findings = world.prepare(tmp_path)
    assert codes(findings) == expected
    assert_consequences(world, shards, findings)


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Expected, Shards, list[Finding]]:
    """The corpus with all faults: what is expected, and what was found."""
    world = clean_world()
    expected = [pair for plant in FAULTS.values() for pair in plant(world)]
    world.settings["max_rejected"] = 0.6
    return world, expected, *world.prepare(tmp_path_factory.mktemp("spoiled"))


def test_all_faults_are_found_together(spoiled: tuple[World, Expected, Shards, list[Finding]]) -> None:
    world, expected, shards, findings = spoiled
    assert sorted(codes(findings)) == sorted(expected)
    assert shards.manifest.rejected == sum(code.startswith("E_") for code, _ in expected)
    assert_consequences(world, shards, findings)


def test_findings_have_both_spans_and_a_message(spoiled: tuple[World, Expected, Shards, list[Finding]]) -> None:
    found = {(finding.code, finding.utterance): finding for finding in spoiled[3]}
    assert found["W_TS_OVERLAP", "s5/5"].span == pytest.approx((14.44, 17.5))
    assert found["W_TS_OVERLAP", "s5/5"].other == (12.0, 14.5)
    assert found["E_TS_RANGE", "s3/9"].span == pytest.approx((27, END + 1.56))
    assert found["E_TS_RANGE", "s3/9"].other == pytest.approx((0, END + 1))
    assert "3 samples are NaN or infinite, the first at 12.006 s" in found["E_AUDIO_NAN", "s3/4"].message
    label, role = found["E_LABEL", "s4/5"].message, found["E_LABEL_ROLE", "s4/7"].message
    assert label == "label 'chnage' is unknown; did you mean 'change'? expected: change, neutral, sustain"
    assert role == "label 'question' belongs to therapist, but the speaker is the client"


def test_rare_undeclared_label_is_flagged(tmp_path: Path, world: World) -> None:
    for row in world.rows[1::2]:
        row["label"] = "change"  # a rare label resembles one with 30 turns
    world.row("s4/5")["label"] = "chnage"
    world.settings["labels"] = {}
    shards, findings = world.prepare_text(tmp_path)
    assert codes(findings) == [("W_LABEL_RARE", "s4/5")]
    assert "resembles 'change'" in findings[0].message
    assert "chnage" in shards.manifest.labels


def test_annotators_without_majority_are_reported(tmp_path: Path, world: World) -> None:
    index = next(index for index, row in enumerate(world.rows) if row["id"] == "s1/1")
    world.settings["columns"] = {**BASE["columns"], "annotator": "annotator"}
    world.rows.insert(index + 1, {**world.rows[index], "annotator": "b", "label": "sustain"})
    shards, findings = world.prepare_text(tmp_path)
    assert codes(findings) == [("W_LABEL_TIE", "s1/1")]
    row = shards.columns["id"].index("s1/1")
    assert dict(shards.columns["votes"][row]) == {"change": 1, "sustain": 1}
    assert shards.columns["label"][row] == "change"


def test_sessions_with_shared_audio_stay_in_one_split(tmp_path: Path, world: World) -> None:
    world.sound["s5"] = world.sound["s1"]
    shards, findings = world.prepare(tmp_path)
    assert codes(findings) == [("W_AUDIO_SHARED", "s5")]
    splits = dict(zip(shards.columns["conversation"], shards.columns["split"], strict=True))
    assert splits["s1"] == splits["s5"]


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"therapist": 0}, "channels.client: has no channel"),
        ({"therapist": 1, "client": 0, "clinet": 1}, "channels.clinet: is not a role of the corpus"),
    ],
)
def test_incomplete_channels_are_refused(tmp_path: Path, world: World, channels: dict[str, int], message: str) -> None:
    world.settings["channels"] = channels
    with pytest.raises(ConfigError, match=message):
        world.prepare_text(tmp_path)
    assert not (tmp_path / "shards").exists()


def test_name_too_long_for_a_file_is_missing_recording(tmp_path: Path, world: World) -> None:
    for row in world.rows[:TURNS]:
        row["conversation"] = "long" * 100
    assert {finding.code for finding in world.prepare(tmp_path)[1]} == {"E_AUDIO_MISSING"}


def test_too_many_rejected_rows_fail(tmp_path: Path, world: World) -> None:
    world.settings["max_rejected"] = 0.02
    world.row("s4/5")["label"] = "chnage"
    world.prepare_text(tmp_path / "one of 90")
    world.row("s4/7")["label"] = "question"
    with pytest.raises(BuildError, match=r"^F_REJECTED: 2 of 90 rows are rejected \(2.2%\), but only 2.0%") as caught:
        world.prepare_text(tmp_path / "two of 90")
    assert "corpus.csv:47, s4/5: label 'chnage' is unknown" in str(caught.value)
    assert not (tmp_path / "two of 90" / "shards").exists()


def test_rejects_found_in_the_audio_fail(tmp_path: Path, world: World) -> None:
    world.settings["max_rejected"] = 0.0
    nan_samples(world)
    with pytest.raises(BuildError) as caught:
        world.prepare(tmp_path)
    assert [finding.code for finding in caught.value.findings] == ["E_AUDIO_NAN"]
    assert not (tmp_path / "shards").exists()


def fixed_split(world: World) -> None:
    names = ["train", "train", "train", "train", "val", "val", "test", "test", "test"]
    for row in world.rows:
        row["split"] = names[int(row["conversation"][1:])]


def test_shared_audio_in_two_splits_fails(tmp_path: Path, world: World) -> None:
    fixed_split(world)
    world.sound["s7"] = world.sound["s1"]
    message = refused(world, tmp_path)
    assert "F_LEAK_AUDIO" in message
    assert "conversation s7 is in test, conversation s1 in train" in message


@pytest.mark.parametrize(("code", "row", "column"), [("GROUP", "s7/0", "video"), ("CONVERSATION", "s2/9", "split")])
def test_video_or_conversation_in_two_splits_fails(
    tmp_path: Path, world: World, code: str, row: str, column: str
) -> None:
    fixed_split(world)
    for own in (own for own in world.rows if own["id"] == row or (column == "video" and own["conversation"] == "s7")):
        own[column] = {"video": "v0", "split": "test"}[column]
    with pytest.raises(DataError, match=f"F_LEAK_{code}.*corpus.csv:{world.line(row)}"):
        world.prepare_text(tmp_path)


def test_id_of_two_utterances_fails(tmp_path: Path, world: World) -> None:
    world.rows.append({**world.row("s2/9"), "text": "other words"})
    with pytest.raises(DataError) as caught:
        world.prepare_text(tmp_path)
    message = str(caught.value)
    assert message.startswith("F_DUPLICATE: 1 id(s) are used for different utterances")
    assert f"corpus.csv:{len(world.rows) + 1}, s2/9: is already at corpus.csv:31, with different content" in message


def test_equal_ids_of_two_sessions_fail(tmp_path: Path, world: World) -> None:
    world.rows[1]["conversation"] = "s0/0"
    world.rows[0]["id"], world.rows[1]["id"] = "x/0/7", "x/7"  # both become s0/0/7
    world.rows[0]["text"] = world.rows[1]["text"] = "the same"
    with pytest.raises(DataError, match=r"F_DUPLICATE: 1 id\(s\)"):
        world.prepare_text(tmp_path)


def test_session_in_two_files_fails(tmp_path: Path) -> None:
    for part, turns in enumerate((range(3), range(3, 6))):
        rows = "".join(f"c0,{turn},T,words {turn},x\n" for turn in turns)
        (tmp_path / f"{part}.csv").write_text("conversation,turn,speaker,text,code\n" + rows)
    corpus = IMPORTERS["mi-tags"].read(tmp_path, None, CorpusConfig())
    with pytest.raises(DataError, match=r"F_DUPLICATE 1\.csv:2, c0/3: the session is already at 0\.csv:2"):
        prepare(corpus, tmp_path / "shards")


def test_two_files_of_one_session_name_both(tmp_path: Path) -> None:
    for part in range(2):
        (tmp_path / f"{part}.csv").write_text(f"conversation,turn,speaker,text,code\nc0,1,T,words {part},x\n")
    corpus = IMPORTERS["mi-tags"].read(tmp_path, None, CorpusConfig())
    with pytest.raises(
        DataError, match=r"1\.csv:2, c0/1: the session is already at 0\.csv:2, .* rename one of the two"
    ):
        prepare(corpus, tmp_path / "shards")


def test_wrong_encoding_fails_with_byte_and_line(tmp_path: Path, world: World) -> None:
    def spoil(folder: Path) -> None:
        path = folder / "corpus.csv"
        path.write_bytes(path.read_bytes().replace(b"words of turn 3 in s0", b"caf\xe9 of turn 3 in s0"))

    world.files.append(spoil)
    with pytest.raises(DataError, match=r"F_ENCODING corpus\.csv:5"):
        world.prepare_text(tmp_path)
    shutil.rmtree(tmp_path)
    world.settings["encoding"] = "cp1252"
    assert "café of turn 3 in s0" in world.prepare_text(tmp_path)[0].columns["text"]


def test_every_code_is_tested_somewhere() -> None:
    elsewhere = {"W_TS_FORMAT": "test_annomi.py", "W_ALIGN_LOW": "../model/test_align.py"}
    elsewhere |= dict.fromkeys(("W_LENGTH", "W_SCALED", "W_AUDIO_GAP"), "test_recordings.py")
    elsewhere |= dict.fromkeys(("W_LABEL_SINGLE", "W_LABEL_UNSEEN"), "test_label_counts.py")
    elsewhere |= {"W_TS_ORDER": "test_annomi.py", "W_SPEAKERS_SPLIT": "test_import_sessions.py"}
    elsewhere |= dict.fromkeys(("W_TIER_OTHER", "W_CODE_ALONE"), "test_annotation_tools.py")
    elsewhere |= {"W_FILE_OTHER": "test_transcripts.py", "W_AUDIO_SPEAKERS": "test_speaker_files.py"}
    elsewhere |= {"W_NO_WORDS": "test_import_sessions.py", "W_SESSION_EMPTY": "test_import_sessions.py"}
    elsewhere |= {"W_LABEL_VOTE": "test_votes.py"}
    names = "E_LABEL_CELL W_LABEL_MISSING W_LABEL_UNICODE W_LABEL_SEVERAL W_LABEL_NUMBER W_TEXT_MISSING W_TEXT_EMPTY"
    elsewhere |= dict.fromkeys(names.split(), "test_cells.py")
    elsewhere |= dict.fromkeys(("W_LABEL_MODIFIER", "W_LABEL_ABSENT"), "test_codebook.py")
    for code in CODES:
        path = Path(__file__).parent / elsewhere.get(code, Path(__file__).name)
        assert code.removeprefix("F_LEAK_") in path.read_text(encoding="utf-8"), code


def test_documentation_lists_every_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    listed = dict.fromkeys(line for line in page.splitlines() if line.startswith(("| E_", "| W_", "| F_")))
    assert list(listed) == [f"| {code} | {meaning} | {done} |" for code, (meaning, done) in CODES.items()]
