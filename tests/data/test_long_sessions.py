"""Preparing a long session: its recording is hashed once, and its clips are not all in memory."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.corpus import audio, synthetic
from data.corpus.schema import SAMPLE_RATE, Conversation, Corpus, Turn
from data.preparation import shard_jobs
from data.preparation.build import prepare
from data.shards import format as shard_format
from data.shards.dataset import Shards

ROLES = {"client": ("a", "b"), "therapist": ("a", "b")}


def spoken(folder: Path, sessions: int = 4, turns: int = 6) -> Corpus:
    """Return sessions with a recording each."""
    conversations = []
    for session in range(sessions):
        path = folder / f"s{session}.wav"
        noise = np.random.default_rng(session).standard_normal(turns * SAMPLE_RATE) * 0.1
        soundfile.write(path, noise, SAMPLE_RATE)
        said = [Turn(f"s{session}/{index}", index, "client", "words", "ab"[index % 2]) for index in range(turns)]
        for turn in said:
            turn.start, turn.end = float(turn.index), turn.index + 0.9
        conversations.append(Conversation(f"s{session}", f"s{session}", said, recording=path))
    return Corpus("spoken", ("a", "b"), ROLES, conversations)


def test_recording_is_hashed_once_for_all_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []

    def count(pcm: np.ndarray) -> str:
        hashed.append(pcm.shape)
        return f"x{len(hashed)}"

    monkeypatch.setattr(shard_jobs, "_hash", count)
    shards = prepare(spoken(tmp_path), tmp_path / "shards")
    assert len(hashed) == 4
    assert set(shards.index["recording_hash"].to_pylist()) == {"x1", "x2", "x3", "x4"}


def content(shards: Shards) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(shards.folder).glob("*.arrow")}


def test_shard_in_a_temporary_file_has_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = content(prepare(synthetic.corpus(sessions=4, turns=6, seed=1), tmp_path / "memory"))
    monkeypatch.setattr(shard_format, "IN_MEMORY", 1 << 10)
    assert content(prepare(synthetic.corpus(sessions=4, turns=6, seed=1), tmp_path / "file")) == memory


def test_clips_of_a_session_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = spoken(tmp_path)
    for conversation in corpus.conversations:
        for turn in conversation.turns:
            turn.clip = conversation.recording
        conversation.recording = None
    turns = [turn for conversation in corpus.conversations for turn in conversation.turns]
    held = []
    read = shard_jobs.read_clip

    def watch(turn: Turn, findings: list[object]) -> None:
        held.append(sum(other.audio is not None for other in turns))
        read(turn, findings)

    monkeypatch.setattr(shard_jobs, "read_clip", watch)
    prepare(corpus, tmp_path / "shards")
    assert held == [0] * len(turns)


@pytest.mark.parametrize("channels", [2, 3, 7, 9])
def test_mix_of_channels_is_their_mean_bit_by_bit(channels: int) -> None:
    block = np.random.default_rng(0).standard_normal((999, channels)).astype(np.float32)
    mono = audio._mean(block)
    assert np.array_equal(mono, block.mean(axis=1, keepdims=True))
    squares = np.square(np.concatenate([mono, block], axis=1), dtype=np.float64).sum(axis=0)
    assert audio._power(mono, block) == pytest.approx(squares, rel=1e-12)
