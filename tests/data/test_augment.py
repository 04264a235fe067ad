"""Augmentation and controls: random values depend only on seed, epoch and utterance; controls do what they promise."""

import math
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from data.config import AugmentConfig, DataConfig
from data.corpus.audio import MIN_SAMPLES
from data.corpus.schema import SAMPLE_RATE, SPLITS
from data.errors import DataError
from data.loading.augment import AugmentSeed, add_noise, augment_clip, change_speed, possible_samples
from data.loading.examples import clip_samples, clips_from_arrow, read_example
from data.loading.ray_source import _parts, _read_task
from data.loading.sources import local_source
from data.loading.tasks import Item, items
from data.preparation.build import prepare
from data.shards.dataset import Shards
from tests.data.common import clip, corpus, make, same, text

ROOT = Path(__file__).parents[2]
DIALOGUE = "T:question! C:change! T:other! C:neutral! C:change! T:reflection"
SPEEDS = (0.9, 1.0, 1.1)
BOTH = AugmentConfig(speeds=SPEEDS, noise_db=(5.0, 20.0), noise_probability=0.5)
FAST = AugmentConfig(speeds=(1.5,))
CONFIG, SEED = DataConfig(history=1, augment=BOTH), AugmentSeed(seed=3, epoch=2)
Clips = dict[Item, np.ndarray]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return make(tmp_path_factory.mktemp("augment") / "shards", DIALOGUE)


def recorded(shards: Shards) -> Clips:
    """Every item with its clip as recorded."""
    every = [item for split in SPLITS for item in items(shards, "classify", split)]
    return {item: clip(*map(int, shards.columns["id"][item[1]].split("/"))) for item in every}


def read(shards: Shards, config: DataConfig = CONFIG, seed: AugmentSeed | None = SEED) -> Clips:
    return {item: read_example(shards, item, config, True, seed).pcm for item in recorded(shards)}


def control(sound: Any, **changed: Any) -> DataConfig:
    return DataConfig(history=1, sound=sound, **changed)


def tone(frequency: float, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return np.round(10_000 * np.sin(2 * np.pi * frequency * time)).astype("<i2")


def equal(first: Clips, second: Clips) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(pcm, second[item]) for item, pcm in first.items())


def snr(clip: np.ndarray, noisy: np.ndarray) -> float:
    noise = noisy.astype(float) - clip
    return float(10 * np.log10(np.mean(clip.astype(float) ** 2) / np.mean(noise**2)))


def checksums(shards: Shards) -> str:
    """Checksums of the augmented clips and of the clips of both random controls."""
    every = read(shards), read(shards, control("shuffled"), None), read(shards, control("noisy"), None)
    return " ".join(str(zlib.crc32(b"".join(pcm.tobytes() for pcm in clips.values()))) for clips in every)


def print_checksums(folder: str) -> None:
    print(checksums(Shards(folder)), "torch" in sys.modules, end="")


@pytest.mark.parametrize("speed", [0.5, 0.9, 0.97, 1.03, 1.25, 2.0])
def test_speed_changes_tempo_and_pitch(speed: float) -> None:
    found = change_speed(tone(440), speed)
    assert len(found) == math.ceil(SAMPLE_RATE / speed - 1e-9)
    assert found.dtype == np.dtype("<i2")
    inner = found[len(found) // 10 : -len(found) // 10]  # a resampled tone has soft ends
    spectrum = np.abs(np.fft.rfft(inner * np.hanning(len(inner))))
    assert spectrum.argmax() * SAMPLE_RATE / len(inner) == pytest.approx(440 * speed, abs=2 * SAMPLE_RATE / len(inner))
    assert np.sqrt(2) * inner.astype(float).std() == pytest.approx(10_000, rel=0.01)


def test_resampled_overshoot_is_clipped_without_wrapping() -> None:
    square = np.where(tone(200) > 0, 32_767, -32_768).astype("<i2")
    found = change_speed(square, 0.9).astype(int)
    assert (found.max(), found.min()) == (32_767, -32_768)
    runs = np.split(found, np.flatnonzero(np.diff(np.sign(found))) + 1)
    assert len(runs) < 450, "a wrapped sample would be a separate run"


@pytest.mark.parametrize(("samples", "changes"), [(MIN_SAMPLES, False), (2 * MIN_SAMPLES - 2, False), (3200, True)])
def test_clips_never_get_too_short(samples: int, changes: bool) -> None:
    noise = clip(1, 1)[:1600].repeat(2)[:samples]
    found = change_speed(noise, 2.0)
    assert len(found) == (MIN_SAMPLES if changes else samples)
    assert changes or np.array_equal(found, noise)


def test_settings_are_drawn_over_their_whole_range() -> None:
    short, config = tone(440, 0.25), BOTH.model_copy(update={"noise_probability": 0.3})
    clips = [
        augment_clip(short, config, AugmentSeed(1, epoch), f"{turn}/0") for epoch in range(20) for turn in range(30)
    ]
    lengths = [len(pcm) for pcm in clips]
    assert sorted(set(lengths)) == [math.ceil(len(short) / speed) for speed in reversed(SPEEDS)]
    for length in set(lengths):
        assert lengths.count(length) / len(lengths) == pytest.approx(1 / 3, abs=0.08)
    plain = [pcm for pcm in clips if len(pcm) == len(short)]
    ratios = [snr(short, pcm) for pcm in plain if not np.array_equal(pcm, short)]
    assert len(ratios) / len(plain) == pytest.approx(0.3, abs=0.1)
    assert (min(ratios), max(ratios)) == (pytest.approx(5, abs=2), pytest.approx(20, abs=2))


def test_noise_setting_does_not_change_the_speed() -> None:
    def lengths(config: AugmentConfig) -> list[int]:
        return [len(augment_clip(tone(440), config, SEED, f"{turn}/0")) for turn in range(20)]

    for config in (AugmentConfig(speeds=SPEEDS), BOTH.model_copy(update={"noise_probability": 1.0})):
        assert lengths(config) == lengths(BOTH)


def test_clips_differ_by_seed_and_epoch(shards: Shards) -> None:
    found = read(shards)
    assert equal(found, read(shards))
    for other in (AugmentSeed(3, 1), AugmentSeed(2, 2)):
        changed = read(shards, seed=other)
        assert sum(not np.array_equal(pcm, changed[item]) for item, pcm in found.items()) > len(found) / 2
    assert equal(read(shards, seed=None), recorded(shards))
    assert equal(read(shards, DataConfig()), recorded(shards))
    assert not equal(found, recorded(shards))


@pytest.mark.parametrize("config", [CONFIG, control("noisy")], ids=["augmented", "noisy"])
def test_batches_and_readers_do_not_change_clips(config: DataConfig, shards: Shards) -> None:
    every, expected = list(recorded(shards)), read(shards, config)
    read_local = local_source(shards, config, True)
    for batches in ([every], [[item] for item in reversed(every)], [every[3:9], [], every[9:], every[:3]]):
        order = [item for batch in batches for item in batch]
        clips = [example.pcm for batch in read_local(batches, SEED) for example in batch]
        assert equal(dict(zip(order, clips, strict=True)), expected)
        tasks = [_read_task(shards, config, part, SEED) for part in _parts(batches)]
        # Read tasks share their memory, so each clip is copied.
        through_ray = [np.array(pcm) for task in tasks for table in task() for pcm in clips_from_arrow(table)]
        assert equal(dict(zip(order, through_ray, strict=True)), expected)


def test_other_process_gets_the_same_clips_without_torch(shards: Shards) -> None:
    code = f"from tests.data import test_augment; test_augment.print_checksums({str(shards.folder)!r})"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout == f"{checksums(shards)} False"


def test_tasks_with_the_same_clip_get_the_same_augmentation(shards: Shards) -> None:
    forecasts = {item[1]: item for item in items(shards, "forecast", "train")}
    pairs = [(item, forecasts[item[1] + 1]) for item in items(shards, "classify", "train") if item[1] + 1 in forecasts]
    assert len(pairs) > 8
    for pair in pairs:
        first, second = (read_example(shards, item, CONFIG, True, SEED) for item in pair)
        assert first.id != second.id
        assert np.array_equal(first.pcm, second.pcm)


@pytest.mark.parametrize(("samples", "config"), [(MIN_SAMPLES, BOTH), (2003, FAST), (16_001, BOTH)])
def test_longest_clip_is_known_before(samples: int, config: AugmentConfig) -> None:
    pcm = clip(0, 0).repeat(9)[:samples]
    lengths = [len(change_speed(pcm, speed)) for speed in config.speeds]
    assert possible_samples(samples, config) == (min([samples, *lengths]), max([samples, *lengths]))
    assert possible_samples(samples, AugmentConfig()) == (samples, samples)


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"speeds": [0.4]}, "greater than or equal to 0.5"),
        ({"speeds": [1.0, 2.5]}, "less than or equal to 2"),
        ({"speeds": [0.905]}, "multiple of 0.01"),
        ({"speeds": "fast"}, "valid number"),
        ({"noise_db": [20, 5]}, "the lowest ratio must come first"),
        ({"noise_db": [5]}, "Field required"),
        ({"noise_db": [5, math.inf]}, "finite number"),
        ({"noise_probability": 0}, "greater than 0"),
    ],
)
def test_invalid_settings_are_refused(wrong: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        AugmentConfig.model_validate(wrong)


def test_settings_may_be_text_as_on_a_search_axis() -> None:
    speeds = tuple(number / 100 for number in range(50, 201))
    assert AugmentConfig(speeds=speeds).speeds == speeds
    parsed = AugmentConfig.model_validate({"speeds": "0.9, 1, 1.1", "noise_db": "-5,20"})
    assert parsed == AugmentConfig(speeds=SPEEDS, noise_db=(-5.0, 20.0))
    assert AugmentConfig.model_validate({"speeds": None, "noise_db": None}) == AugmentConfig()


@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "augmented"])
def test_zeroed_clips_are_silent_and_keep_the_length(seed: AugmentSeed | None, shards: Shards) -> None:
    plain, config = read(shards, CONFIG, seed), control("zeroed", augment=BOTH)
    for item, pcm in read(shards, config, seed).items():
        assert (len(pcm), pcm.any(), pcm.dtype) == (len(plain[item]), False, plain[item].dtype)
        assert clip_samples(shards, item, config) == len(recorded(shards)[item])
    assert not add_noise(np.zeros(2000, "<i2"), 0.0, np.random.default_rng(0)).any()


def test_shuffled_clips_are_of_the_same_role_and_split(shards: Shards) -> None:
    columns, config = shards.columns, control("shuffled")
    found, plain = read(shards, config, None), recorded(shards)
    owner = {pcm.tobytes(): item[1] for item, pcm in plain.items()}
    sources = {item[1]: owner[pcm.tobytes()] for item, pcm in found.items()}
    assert len(sources) == len(set(sources.values())) == 6 * 5, "every clip is used once"
    for row, source in sources.items():
        assert row != source
        assert all(columns[name][row] == columns[name][source] for name in ("split", "speaker"))
    for item, pcm in found.items():
        assert clip_samples(shards, item, config) == len(pcm)
        assert same(read_example(shards, item, config, False), read_example(shards, item, control("recorded"), False))
    augmented = {pcm.tobytes() for pcm in read(shards, control("shuffled", augment=BOTH)).values()}
    assert augmented == {pcm.tobytes() for pcm in read(shards).values()}


def test_single_clip_cannot_be_shuffled(tmp_path: Path) -> None:
    shards = make(tmp_path / "shards", "T:question! C:change! C:neutral!")
    alone = next(item for item in recorded(shards) if shards.columns["split"][item[1]] == "val")
    with pytest.raises(DataError, match=r"data\.sound: shuffled .* val split .* only one of the therapist"):
        clip_samples(shards, alone, control("shuffled"))


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
@pytest.mark.parametrize("seed", [None, SEED], ids=["plain", "augmented"])
def test_noisy_clips_have_the_requested_ratio(snr_db: float, seed: AugmentSeed | None, shards: Shards) -> None:
    plain, noises = read(shards, CONFIG, seed), []
    for item, pcm in read(shards, control("noisy", snr_db=snr_db, augment=BOTH), seed).items():
        assert snr(plain[item], pcm) == pytest.approx(snr_db, abs=0.5)
        noises.append((pcm.astype(float) - plain[item])[:1800])
        assert abs(np.corrcoef(noises[-1], plain[item][:1800])[0, 1]) < 0.1
    correlations = np.corrcoef(noises) - np.eye(len(noises))
    assert np.abs(correlations).max() < 0.15, "every utterance has a different noise"


def test_loud_noise_is_clipped_without_wrapping(tmp_path: Path) -> None:
    made = corpus([DIALOGUE] * 6)
    for turn in (turn for conversation in made.conversations for turn in conversation.turns):
        turn.audio = None if turn.audio is None else np.full_like(turn.audio, 32_000)
    shards = prepare(made, tmp_path / "shards")
    for pcm in read(shards, control("noisy", snr_db=20.0), None).values():
        assert (pcm.max(), pcm.min() > 10_000) == (32_767, True)


@pytest.mark.parametrize("with_audio", [True, False])
def test_omitted_text_is_that_of_the_audio_turn(with_audio: bool, shards: Shards) -> None:
    for task, audio_turn, last in (("classify", 4, 4), ("forecast", 4, 4), ("quality", 4, 5)):
        item = items(shards, task, "val")[-1]
        given, omitted = (
            read_example(shards, item, DataConfig(last_text=how), with_audio) for how in ("given", "omitted")
        )
        session = int(given.conversation.removeprefix("s"))
        texts = [text(session, index) for index in range(last + 1)]
        assert [spoken for _, spoken in given.turns] == texts
        assert [spoken for _, spoken in omitted.turns] == [*texts[:audio_turn], "", *texts[audio_turn + 1 :]]
        assert [role for role, _ in omitted.turns] == [role for role, _ in given.turns]
        assert (omitted.answer, omitted.audio_turn, omitted.pcm is None) == (given.answer, audio_turn, not with_audio)


def test_omitted_text_is_the_last_one_without_audio(tmp_path: Path) -> None:
    shards = make(tmp_path / "shards", DIALOGUE.replace("!", ""))
    for task in ("classify", "forecast", "response", "quality"):
        for item in items(shards, task, "val"):
            example = read_example(shards, item, DataConfig(last_text="omitted"), with_audio=False)
            assert [spoken == "" for _, spoken in example.turns] == [False] * (len(example.turns) - 1) + [True]
