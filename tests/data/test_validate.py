"""Planted faults: each is found under its code, at its line, with its spans, and nothing else is said."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.corpus.audio import SAMPLE_RATE
from data.corpus.issues import CODES, BuildError
from data.errors import ConfigError
from tests.data.world import BASE, END, EVERY, LENGTH, SESSIONS, TURNS, World, refused

Expected = list[tuple[str, str]]  # code and utterance
FAULTS: dict[str, Callable[[World], Expected]] = {}


def fault(plant: Callable[[World], Expected]) -> Callable[[World], Expected]:
    FAULTS[plant.__name__] = plant
    return plant


@fault
def a_missing_recording(world: World) -> Expected:
    world.files.append(lambda folder: (folder / "audio" / "s0.wav").unlink())
    return [("E_AUDIO_MISSING", f"s0/{turn}") for turn in range(TURNS)]


@fault
def a_file_that_is_no_sound(world: World) -> Expected:
    world.files.append(lambda folder: (folder / "audio" / "s1.wav").write_text("not a sound"))
    return [("E_AUDIO_UNREADABLE", f"s1/{turn}") for turn in range(TURNS)]


@fault
def an_empty_recording(world: World) -> Expected:
    world.sound["s2"] = world.sound["s2"][:0]
    return [("E_AUDIO_EMPTY", f"s2/{turn}") for turn in range(TURNS)]


@fault
def samples_that_are_no_numbers(world: World) -> Expected:
    world.samples("s3/4")[100:103] = np.nan
    return [("E_AUDIO_NAN", "s3/4")]


@fault
def a_clip_of_50_ms(world: World) -> Expected:
    world.row("s3/6")["end"] = world.row("s3/6")["start"] + 0.05
    return [("E_TOO_SHORT", "s3/6")]


@fault
def a_time_in_words(world: World) -> Expected:
    world.row("s3/8")["start"] = "soon"
    return [("E_TS_FORMAT", "s3/8")]


@fault
def a_time_after_the_recording(world: World) -> Expected:
    world.row("s3/19")["end"] = END + 1.06
    return [("E_TS_RANGE", "s3/19")]


@fault
def a_time_just_after_the_recording(world: World) -> Expected:
    world.row("s4/19")["end"] = END + 1.04
    return [("W_TS_CLAMPED", "s4/19")]


@fault
def a_time_before_the_recording(world: World) -> Expected:
    world.row("s4/0")["start"] = -0.5
    return [("E_TS_RANGE", "s4/0")]


@fault
def an_end_before_the_start(world: World) -> Expected:
    world.row("s4/2")["end"] = world.row("s4/2")["start"] - 0.2
    return [("E_TS_END", "s4/2")]


@fault
def a_misspelt_label(world: World) -> Expected:
    world.row("s4/5")["label"] = "chnage"
    return [("E_LABEL", "s4/5")]


@fault
def a_label_of_the_other_role(world: World) -> Expected:
    world.row("s4/7")["label"] = "question"
    return [("E_LABEL_ROLE", "s4/7")]


@fault
def a_speaker_nobody_knows(world: World) -> Expected:
    world.row("s4/9")["speaker"] = "X"
    return [("E_SPEAKER", "s4/9")]


@fault
def no_length(world: World) -> Expected:
    world.row("s5/2")["end"] = world.row("s5/2")["start"]
    return [("W_TS_ZERO", "s5/2")]


@fault
def no_end(world: World) -> Expected:
    world.row("s5/19")["end"] = ""
    return [("W_TS_OPEN", "s5/19")]


@fault
def two_talk_at_once(world: World) -> Expected:
    world.row("s5/5")["start"] -= EVERY - LENGTH + 0.06
    return [("W_TS_OVERLAP", "s5/5")]


@fault
def a_start_that_goes_backwards(world: World) -> Expected:
    one, other = world.row("s5/8"), world.row("s5/9")
    for name in ("start", "end"):
        one[name], other[name] = other[name], one[name]
    return [("W_TS_ORDER", "s5/9")]


@fault
def a_clipped_clip(world: World) -> Expected:
    samples = world.samples("s6/2")
    samples[:] = np.clip(samples * 30, -1, 1)
    return [("W_CLIPPED", "s6/2")]


@fault
def a_silent_clip(world: World) -> Expected:
    world.samples("s6/4")[:] = 0
    return [("W_SILENT", "s6/4")]


@fault
def an_offset(world: World) -> Expected:
    world.samples("s6/6")[:] += 0.03
    return [("W_DC", "s6/6")]


@fault
def the_same_row_twice(world: World) -> Expected:
    world.rows.append(dict(world.row("s6/8")))
    return [("W_DUPLICATE", "s6/8")]


@fault
def a_stereo_recording_at_another_rate(world: World) -> Expected:
    world.sound["s7"] = np.repeat(np.repeat(world.sound["s7"], 2, axis=0), 2, axis=1)
    world.rate["s7"] = 2 * SAMPLE_RATE
    return [("W_STEREO", "s7"), ("W_RESAMPLED", "s7")]


@fault
def a_recording_that_breaks_off(world: World) -> Expected:
    """An MP3 that was cut in half announces its former length."""

    def cut(folder: Path) -> None:
        wav = folder / "audio" / "s8.wav"
        soundfile.write(folder / "audio" / "s8.mp3", world.sound["s8"], SAMPLE_RATE)
        wav.unlink()
        content = (folder / "audio" / "s8.mp3").read_bytes()
        (folder / "audio" / "s8.mp3").write_bytes(content[: len(content) * 29 // 60])

    world.files.append(cut)
    return [("W_TRUNCATED", "s8"), *(("E_TS_RANGE", f"s8/{turn}") for turn in range(9, TURNS))]


@fault
def a_turn_of_31_seconds(world: World) -> Expected:
    world.sound["s7"] = np.concatenate([world.sound["s7"], world.sound["s7"]])
    world.row("s7/19")["end"] = world.row("s7/19")["start"] + 31
    return [("W_TOO_LONG", "s7/19")]


def test_a_clean_corpus_raises_no_alarm(tmp_path: Path, world: World) -> None:
    shards, findings = world.prepare(tmp_path)
    assert findings == []
    assert shards.manifest.findings == {}
    assert sum(shards.manifest.turns.values()) == SESSIONS * TURNS
    assert min(shards.columns["n_samples"]) == LENGTH * SAMPLE_RATE


@pytest.mark.parametrize("plant", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found_where_it_is(tmp_path: Path, world: World, plant: Callable[[World], Expected]) -> None:
    expected = plant(world)
    shards, findings = world.prepare(tmp_path)
    assert [(finding.code, finding.utterance) for finding in findings] == expected
    for finding in findings:
        if "/" in finding.utterance:
            assert finding.where == f"corpus.csv:{world.line(finding.utterance)}"
        row = shards.columns["id"].index(finding.utterance) if "/" in finding.utterance else None
        assert finding.consequence == CODES[finding.code][1]
        if row is not None and finding.code.startswith("E_"):
            assert shards.columns["text"][row] == world.row(finding.utterance)["text"]
            assert (shards.columns["label"][row], shards.pcm(row)) == (None, None)
        elif row is not None and finding.code not in ("W_TS_ZERO", "W_TS_OPEN", "W_DUPLICATE"):
            assert shards.columns["label"][row] is not None
            assert shards.pcm(row) is not None
            assert finding.code in shards.columns["flags"][row]


def test_all_faults_at_once_are_all_found(tmp_path: Path, world: World) -> None:
    expected = [one for plant in FAULTS.values() for one in plant(world)]
    world.settings["max_rejected"] = 0.6
    shards, findings = world.prepare(tmp_path)
    assert sorted((finding.code, finding.utterance) for finding in findings) == sorted(expected)
    assert shards.manifest.rejected == sum(code.startswith("E_") for code, _ in expected)


def test_spans_name_both_sides(tmp_path: Path, world: World) -> None:
    two_talk_at_once(world)
    a_time_after_the_recording(world)
    samples_that_are_no_numbers(world)
    found = {finding.code: finding for finding in world.prepare(tmp_path)[1]}
    assert found["W_TS_OVERLAP"].span == pytest.approx((14.44, 17.5))
    assert found["W_TS_OVERLAP"].other == (12.0, 14.5)
    assert found["E_TS_RANGE"].span == pytest.approx((57, END + 1.06))
    assert found["E_TS_RANGE"].other == pytest.approx((0, END + 1))
    assert "3 samples are NaN or infinite, the first at 12.006 s" in found["E_AUDIO_NAN"].message


def test_the_nearest_label_is_named(tmp_path: Path, world: World) -> None:
    a_misspelt_label(world)
    a_label_of_the_other_role(world)
    messages = {finding.code: finding.message for finding in world.prepare(tmp_path)[1]}
    assert messages["E_LABEL"] == "label 'chnage' is unknown; did you mean 'change'? expected: change, neutral, sustain"
    assert messages["E_LABEL_ROLE"] == "label 'question' belongs to therapist, but the speaker is the client"


def test_a_rare_label_that_nobody_declared_may_be_a_typing_error(tmp_path: Path, world: World) -> None:
    a_misspelt_label(world)
    world.settings["labels"] = {}
    shards, findings = world.prepare(tmp_path)
    assert [(finding.code, finding.utterance) for finding in findings] == [("W_LABEL_RARE", "s4/5")]
    assert "resembles 'change'" in findings[0].message
    assert "chnage" in shards.manifest.labels


def test_annotators_without_a_majority_are_told(tmp_path: Path, world: World) -> None:
    place = next(place for place, row in enumerate(world.rows) if row["id"] == "s1/1")
    world.settings["columns"] = {**BASE["columns"], "annotator": "annotator"}
    world.rows.insert(place + 1, {**world.rows[place], "annotator": "b", "label": "sustain"})
    shards, findings = world.prepare(tmp_path)
    assert [(finding.code, finding.utterance) for finding in findings] == [("W_LABEL_TIE", "s1/1")]
    row = shards.columns["id"].index("s1/1")
    assert dict(shards.columns["votes"][row]) == {"change": 1, "sustain": 1}
    assert shards.columns["label"][row] == "change"


def test_the_same_sound_in_two_sessions_keeps_them_in_one_split(tmp_path: Path, world: World) -> None:
    world.sound["s5"] = world.sound["s1"]
    shards, findings = world.prepare(tmp_path)
    assert [(finding.code, finding.utterance) for finding in findings] == [("W_AUDIO_SHARED", "s5")]
    splits = dict(zip(shards.columns["conversation"], shards.columns["split"], strict=True))
    assert splits["s1"] == splits["s5"]


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ({"therapist": 0}, "channels.client: has no channel"),
        ({"therapist": 1, "client": 0, "clinet": 1}, "channels.clinet: is not a role of the corpus"),
    ],
)
def test_nobody_is_heard_on_the_channel_of_another(
    tmp_path: Path, world: World, channels: dict[str, int], message: str
) -> None:
    world.settings["channels"] = channels
    with pytest.raises(ConfigError, match=message):
        world.prepare(tmp_path)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("time", ["1e308", "1e7", "99999:00:00", "nan"])
def test_a_time_out_of_this_world_is_a_finding(tmp_path: Path, world: World, time: str) -> None:
    world.row("s1/4")["end"] = time
    assert [(finding.code, finding.utterance) for finding in world.prepare(tmp_path)[1]] == [("E_TS_FORMAT", "s1/4")]


def test_a_name_that_no_file_can_have_is_a_missing_recording(tmp_path: Path, world: World) -> None:
    for row in world.rows[:TURNS]:
        row["conversation"] = "long" * 100
    assert {finding.code for finding in world.prepare(tmp_path)[1]} == {"E_AUDIO_MISSING"}


def test_more_rejects_than_allowed_fail(tmp_path: Path, world: World) -> None:
    world.settings["max_rejected"] = 0.01
    a_misspelt_label(world)
    world.prepare(tmp_path / "one of 180")
    a_label_of_the_other_role(world)
    message = refused(world, tmp_path / "two of 180")
    assert message.startswith("F_REJECTED: 2 of 180 rows are rejected (1.1%), but only 1.0% are allowed")
    assert "corpus.csv:87, s4/5: label 'chnage' is unknown" in message


def test_rejects_that_only_the_sound_shows_fail_too(tmp_path: Path, world: World) -> None:
    world.settings["max_rejected"] = 0.0
    samples_that_are_no_numbers(world)
    with pytest.raises(BuildError) as caught:
        world.prepare(tmp_path)
    assert [finding.code for finding in caught.value.findings] == ["E_AUDIO_NAN"]
    assert not (tmp_path / "shards").exists()


def test_every_code_is_planted_somewhere() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    elsewhere = {"W_TS_FORMAT": "test_annomi.py", "W_ALIGN_LOW": "../model/test_align.py"}
    faults = ("F_LEAK_AUDIO", "F_LEAK_GROUP", "F_LEAK_CONVERSATION", "F_DUPLICATE", "F_ENCODING")
    elsewhere |= dict.fromkeys(faults, "test_build_faults.py")
    for code in CODES:
        text = (Path(__file__).parent / elsewhere[code]).read_text(encoding="utf-8") if code in elsewhere else here
        assert code in text, code


def test_the_page_lists_every_code_as_it_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    listed = dict.fromkeys(line for line in page.splitlines() if line.startswith(("| E_", "| W_", "| F_")))
    assert list(listed) == [f"| {code} | {meaning} | {done} |" for code, (meaning, done) in CODES.items()]
