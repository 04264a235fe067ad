"""Augmentation: what is drawn follows from seed, epoch and utterance alone, and is what it says."""

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
from data.corpus.schema import SAMPLE_RATE
from data.loading.augment import AugmentSeed, add_noise, augment_clip, change_speed, longest_samples
from data.loading.examples import clips_from_arrow, read_example
from data.loading.ray_source import _parts, _read_task
from data.loading.sources import local_source
from data.loading.tasks import Item, items
from data.shards.dataset import Shards
from tests.data.common import clip, make

ROOT = Path(__file__).parents[2]
SPEEDS = (0.9, 1.0, 1.1)
BOTH = AugmentConfig(speeds=SPEEDS, noise_db=(5.0, 20.0), noise_probability=0.5)
CONFIG, DRAW = DataConfig(history=1, augment=BOTH), AugmentSeed(seed=3, epoch=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return make(tmp_path_factory.mktemp("augment") / "shards", "T:question! C:change! T:other! C:neutral! T:reflection")


def train(shards: Shards) -> list[Item]:
    return items(shards, "classify", "train")


def heard(shards: Shards, draw: AugmentSeed | None = DRAW, config: DataConfig = CONFIG) -> dict[str, np.ndarray]:
    found: dict[str, Any] = {}
    for item in train(shards):
        example = read_example(shards, item, config, with_audio=True, seed=draw)
        found[example.id] = example.pcm
    return found


def tone(frequency: float, seconds: float = 1.0) -> np.ndarray:
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return np.round(10_000 * np.sin(2 * np.pi * frequency * time)).astype("<i2")


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(pcm, other[name]) for name, pcm in one.items())


def checksum(clips: dict[str, np.ndarray]) -> str:
    return str(zlib.crc32(b"".join(pcm.tobytes() for pcm in clips.values())))


def tell(folder: str) -> None:
    print(checksum(heard(Shards(folder))), "torch" in sys.modules, end="")


@pytest.mark.parametrize("speed", [0.5, 0.9, 0.97, 1.03, 1.25, 2.0])
def test_speed_changes_tempo_and_pitch_together(speed: float) -> None:
    found = change_speed(tone(440), speed)
    assert len(found) == math.ceil(SAMPLE_RATE / speed - 1e-9)
    assert found.dtype == np.dtype("<i2")
    inner = found[len(found) // 10 : -len(found) // 10]  # a resampled tone begins and ends softly
    spectrum = np.abs(np.fft.rfft(inner * np.hanning(len(inner))))
    assert spectrum.argmax() * SAMPLE_RATE / len(inner) == pytest.approx(440 * speed, abs=2 * SAMPLE_RATE / len(inner))
    assert np.sqrt(2) * inner.astype(float).std() == pytest.approx(10_000, rel=0.01)


def test_what_resampling_lifts_over_full_scale_is_cut_and_does_not_wrap() -> None:
    square = np.where(tone(200) > 0, 32_767, -32_768).astype("<i2")
    found = change_speed(square, 0.9).astype(int)
    assert (found.max(), found.min()) == (32_767, -32_768)
    runs = np.split(found, np.flatnonzero(np.diff(np.sign(found))) + 1)
    assert len(runs) < 450, "a wrapped sample would be a run of its own"


@pytest.mark.parametrize(("samples", "changes"), [(MIN_SAMPLES, False), (2 * MIN_SAMPLES - 2, False), (3200, True)])
def test_no_clip_gets_shorter_than_one_that_is_kept(samples: int, changes: bool) -> None:
    noise = clip(1, 1)[:1600].repeat(2)[:samples]
    found = change_speed(noise, 2.0)
    assert len(found) == (MIN_SAMPLES if changes else samples)
    assert changes or np.array_equal(found, noise)


@pytest.mark.parametrize("snr_db", [-5.0, 10.0, 30.0])
def test_noise_has_the_power_that_was_drawn(snr_db: float) -> None:
    own = tone(440)
    noise = augment_clip(own, AugmentConfig(noise_db=(snr_db, snr_db)), DRAW, "1/1").astype(float) - own
    assert 10 * np.log10(np.mean(own.astype(float) ** 2) / np.mean(noise**2)) == pytest.approx(snr_db, abs=0.2)


def test_every_setting_is_drawn_over_all_of_its_range() -> None:
    own, config = tone(440, 0.25), BOTH.model_copy(update={"noise_probability": 0.3})
    draws = [augment_clip(own, config, AugmentSeed(1, epoch), f"{turn}/0") for epoch in range(20) for turn in range(30)]
    lengths = [len(found) for found in draws]
    assert sorted(set(lengths)) == [math.ceil(len(own) / speed) for speed in reversed(SPEEDS)]
    for length in set(lengths):
        assert lengths.count(length) / len(lengths) == pytest.approx(1 / 3, abs=0.08)
    noises = [found - own.astype(float) for found in draws if len(found) == len(own)]
    ratios = [10 * np.log10(np.mean(own.astype(float) ** 2) / np.mean(one**2)) for one in noises if one.any()]
    assert len(ratios) / len(noises) == pytest.approx(0.3, abs=0.1)
    assert (min(ratios), max(ratios)) == (pytest.approx(5, abs=2), pytest.approx(20, abs=2))


def test_the_noise_that_may_be_drawn_does_not_change_the_speed() -> None:
    for config in (AugmentConfig(speeds=SPEEDS), BOTH, BOTH.model_copy(update={"noise_probability": 1.0})):
        lengths = [len(augment_clip(tone(440), config, DRAW, f"{turn}/0")) for turn in range(20)]
        assert lengths == [len(augment_clip(tone(440), BOTH, DRAW, f"{turn}/0")) for turn in range(20)]


def test_a_clip_is_heard_differently_in_another_epoch_or_run(shards: Shards) -> None:
    found = heard(shards)
    assert equal(found, heard(shards, AugmentSeed(3, 2)))
    for other in (AugmentSeed(3, 1), AugmentSeed(2, 2)):
        changed = heard(shards, other)
        assert sum(not np.array_equal(pcm, changed[name]) for name, pcm in found.items()) > len(found) / 2


def test_no_draw_and_no_setting_leave_clips_as_they_were_recorded(shards: Shards) -> None:
    recorded = {name: clip(*map(int, name.split("/"))) for name in heard(shards)}
    assert equal(heard(shards, None), recorded)
    assert equal(heard(shards, DRAW, DataConfig()), recorded)
    assert not equal(heard(shards), recorded)


def test_batches_and_order_change_no_draw(shards: Shards) -> None:
    own, read = train(shards), local_source(shards, CONFIG, True)
    for batches in ([own], [[item] for item in reversed(own)], [own[3:9], [], own[9:], own[:3]]):
        again = {example.id: example.pcm for batch in read(batches, DRAW) for example in batch}
        assert equal({name: again[name] for name in heard(shards)}, heard(shards))


def test_a_read_task_of_ray_yields_the_bytes_of_the_local_source(shards: Shards) -> None:
    batches = [train(shards)[:5], train(shards)[5:]]
    tasks = [_read_task(shards, CONFIG, part, DRAW) for part in _parts(batches)]
    carried = [clip.tobytes() for task in tasks for table in task() for clip in clips_from_arrow(table)]
    local = list(local_source(shards, CONFIG, True)(batches, DRAW))
    assert carried == [example.pcm.tobytes() for batch in local for example in batch]
    assert len({example.pcm.tobytes() for batch in local for example in batch}) == len(heard(shards))


def test_another_process_draws_the_same_and_needs_no_torch(shards: Shards) -> None:
    code = f"from tests.data import test_augment; test_augment.tell({str(shards.folder)!r})"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == f"{checksum(heard(shards))} False"


def test_tasks_that_hear_the_same_clip_hear_it_alike(shards: Shards) -> None:
    before = {item[1]: item for item in items(shards, "forecast", "train")}
    pairs = [(item, before[item[1] + 1]) for item in train(shards) if item[1] + 1 in before]
    assert len(pairs) > 8
    for pair in pairs:
        one, other = (read_example(shards, item, CONFIG, True, DRAW) for item in pair)
        assert one.id != other.id
        assert np.array_equal(one.pcm, other.pcm)


def under(sound: Any, **changed: Any) -> DataConfig:
    return DataConfig(history=1, sound=sound, augment=BOTH, **changed)


def test_zeroed_sound_stays_silent_and_keeps_the_length_that_would_be_heard(shards: Shards) -> None:
    silent = heard(shards, DRAW, under("zeroed"))
    assert not any(pcm.any() for pcm in silent.values())
    assert [len(pcm) for pcm in silent.values()] == [len(pcm) for pcm in heard(shards).values()]


def test_shuffled_sound_is_what_the_others_hear(shards: Shards) -> None:
    found = {pcm.tobytes() for pcm in heard(shards, DRAW, under("shuffled")).values()}
    assert found == {pcm.tobytes() for pcm in heard(shards).values()}


def test_noisy_sound_is_the_augmented_clip_under_the_noise_that_was_asked_for(shards: Shards) -> None:
    plain = heard(shards)
    for name, pcm in heard(shards, DRAW, under("noisy", snr_db=3.0)).items():
        noise = pcm.astype(float) - plain[name]
        assert 10 * np.log10(np.mean(plain[name].astype(float) ** 2) / np.mean(noise**2)) == pytest.approx(3, abs=0.5)


def test_silence_gets_no_noise() -> None:
    assert not add_noise(np.zeros(2000, "<i2"), 0.0, np.random.default_rng(0)).any()


def test_the_longest_that_a_clip_may_become_is_known_before(shards: Shards) -> None:
    for samples in (MIN_SAMPLES, 2003, 16_001):
        own = clip(0, 0).repeat(9)[:samples]
        for config in (BOTH, AugmentConfig(speeds=(1.5, 2.0)), AugmentConfig()):
            assert longest_samples(samples, config) == max(
                [samples, *(len(change_speed(own, speed)) for speed in config.speeds)]
            )


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
def test_a_setting_that_cannot_be_used_is_refused(wrong: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        AugmentConfig.model_validate(wrong)


def test_every_hundredth_is_a_speed() -> None:
    speeds = tuple(number / 100 for number in range(50, 201))
    assert AugmentConfig(speeds=speeds).speeds == speeds


def test_lists_may_be_written_as_an_axis_has_them() -> None:
    assert AugmentConfig.model_validate({"speeds": "0.9, 1, 1.1", "noise_db": "-5,20"}) == AugmentConfig(
        speeds=SPEEDS, noise_db=(-5.0, 20.0)
    )
    assert AugmentConfig.model_validate({"speeds": None, "noise_db": None}) == AugmentConfig()
