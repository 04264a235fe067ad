"""Controls: what is heard or read in place of the real thing is what it says, and the same in every trial."""

import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.config import DataConfig
from data.corpus.schema import SPLITS
from data.errors import DataError
from data.loading.examples import clip_samples, read_example
from data.loading.sources import local_source
from data.loading.tasks import Item, items
from data.preparation.build import prepare
from data.shards.dataset import Shards
from tests.data.common import clip, corpus, make, same, text

ROOT = Path(__file__).parents[2]
DIALOGUE = "T:question! C:change! T:other! C:neutral! C:change! T:reflection"
SHUFFLED = DataConfig(sound="shuffled")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return make(tmp_path_factory.mktemp("controls") / "shards", DIALOGUE)


def own_clips(shards: Shards) -> Iterator[tuple[Item, np.ndarray]]:
    """Every item, and the clip that was recorded for it."""
    for item in (item for split in SPLITS for item in items(shards, "classify", split)):
        yield item, clip(*map(int, shards.columns["id"][item[1]].split("/")))


def heard(shards: Shards, config: DataConfig) -> dict[Item, np.ndarray]:
    return {item: read_example(shards, item, config, with_audio=True).pcm for item, _ in own_clips(shards)}


def checksum(clips: dict[Item, np.ndarray]) -> str:
    return str(zlib.crc32(b"".join(pcm.tobytes() for pcm in clips.values())))


def tell(folder: str, sound: Any) -> None:
    print(checksum(heard(Shards(folder), DataConfig(sound=sound))), end="")


def test_recorded_sound_is_as_it_was_recorded(shards: Shards) -> None:
    for item, own in own_clips(shards):
        assert np.array_equal(heard(shards, DataConfig())[item], own)


def test_zeroed_sound_is_silence_of_the_same_length(shards: Shards) -> None:
    found = heard(shards, DataConfig(sound="zeroed"))
    for item, own in own_clips(shards):
        assert (len(found[item]), found[item].any(), found[item].dtype) == (len(own), False, own.dtype)
        assert clip_samples(shards, item, DataConfig(sound="zeroed")) == len(own)


def test_shuffled_sound_is_anothers_of_the_same_role_and_split(shards: Shards) -> None:
    columns, found = shards.columns, heard(shards, SHUFFLED)
    owner = {own.tobytes(): item[1] for item, own in own_clips(shards)}
    assert len(owner) == len(found) == 6 * 5
    sources = {item[1]: owner[pcm.tobytes()] for item, pcm in found.items()}
    assert sorted(sources.values()) == sorted(sources), "every clip is heard once"
    for row, source in sources.items():
        assert row != source
        assert all(columns[name][row] == columns[name][source] for name in ("split", "speaker"))
    for item, pcm in found.items():
        assert clip_samples(shards, item, SHUFFLED) == len(pcm)


def test_a_shuffle_takes_clips_and_nothing_else(shards: Shards) -> None:
    for item, _ in own_clips(shards):
        assert same(read_example(shards, item, SHUFFLED, False), read_example(shards, item, DataConfig(), False))


@pytest.mark.parametrize("sound", ["shuffled", "noisy"])
def test_a_control_is_the_same_in_every_process(sound: Any, shards: Shards) -> None:
    again = heard(Shards(shards.folder), DataConfig(sound=sound))
    found = heard(shards, DataConfig(sound=sound))
    assert all(np.array_equal(pcm, again[item]) for item, pcm in found.items())
    code = f"from tests.data import test_controls; test_controls.tell({str(shards.folder)!r}, {sound!r})"
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == checksum(found)


def test_a_clip_that_is_alone_cannot_be_shuffled(tmp_path: Path) -> None:
    shards = make(tmp_path / "shards", "T:question! C:change! C:neutral!")
    assert len(heard(shards, DataConfig())) == 18
    [(alone, _), *_] = [(item, own) for item, own in own_clips(shards) if shards.columns["split"][item[1]] == "val"]
    with pytest.raises(DataError, match=r"data\.sound: shuffled .* val split .* only one of the therapist"):
        clip_samples(shards, alone, SHUFFLED)


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
def test_noise_has_the_power_that_was_asked_for(snr_db: float, shards: Shards) -> None:
    found = heard(shards, DataConfig(sound="noisy", snr_db=snr_db))
    noises = []
    for item, own in own_clips(shards):
        noise = found[item].astype(float) - own
        assert 10 * np.log10(np.mean(own.astype(float) ** 2) / np.mean(noise**2)) == pytest.approx(snr_db, abs=0.5)
        assert abs(np.corrcoef(noise, own)[0, 1]) < 0.1
        noises.append(noise[:2000])
    correlations = np.corrcoef(noises) - np.eye(len(noises))
    assert np.abs(correlations).max() < 0.15, "every utterance has a noise of its own"


def test_loud_noise_is_cut_and_does_not_wrap(tmp_path: Path) -> None:
    made = corpus([DIALOGUE] * 6)
    for turn in (turn for conversation in made.conversations for turn in conversation.turns):
        turn.audio = None if turn.audio is None else np.full_like(turn.audio, 32_000)
    shards = prepare(made, tmp_path / "shards")
    for pcm in heard(shards, DataConfig(sound="noisy", snr_db=20.0)).values():
        assert pcm.max() == 32_767
        assert pcm.min() > 10_000


def test_noise_does_not_depend_on_what_is_read_together(shards: Shards) -> None:
    own = items(shards, "classify", "train")
    read = local_source(shards, DataConfig(sound="noisy"), with_audio=True)
    together = {example.id: example.pcm for batch in read([own]) for example in batch}
    for batch in read([[item] for item in reversed(own)]):
        assert np.array_equal(batch[0].pcm, together[batch[0].id])


@pytest.mark.parametrize("sound", [True, False])
def test_the_words_of_the_heard_turn_are_left_out_and_no_others(sound: bool, shards: Shards) -> None:
    for task, heard_turn, last in (("classify", 4, 4), ("forecast", 4, 4), ("quality", 4, 5)):
        item = items(shards, task, "val")[-1]
        given, omitted = (read_example(shards, item, DataConfig(last_text=how), sound) for how in ("given", "omitted"))
        session = int(given.conversation.removeprefix("s"))
        words = [text(session, index) for index in range(last + 1)]
        assert [said for _, said in given.turns] == words
        assert [said for _, said in omitted.turns] == [*words[:heard_turn], "", *words[heard_turn + 1 :]]
        assert [role for role, _ in omitted.turns] == [role for role, _ in given.turns]
        assert (omitted.answer, omitted.audio_turn, omitted.pcm is None) == (given.answer, heard_turn, not sound)


def test_without_sound_the_words_of_the_last_turn_are_left_out(tmp_path: Path) -> None:
    shards = make(tmp_path / "shards", DIALOGUE.replace("!", ""))
    for task in ("classify", "forecast", "response", "quality"):
        for item in items(shards, task, "val"):
            example = read_example(shards, item, DataConfig(last_text="omitted"), with_audio=False)
            assert [said == "" for _, said in example.turns] == [False] * (len(example.turns) - 1) + [True]
