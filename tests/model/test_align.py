"""Forced alignment: its logic on planted frames, and its error on synthetic sessions with known times."""

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

from data.corpus.config import AlignConfig
from data.corpus.issues import Finding
from data.corpus.schema import SAMPLE_RATE, Turn, reject
from data.errors import ConfigError
from model.alignment import aligner
from model.alignment.aligner import CTCAligner
from model.alignment.ctc import CTCModel, identity, load_ctc
from tests.model import voices
from tests.model.voices import HOP

VOCABULARY = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'")
SECOND = SAMPLE_RATE // HOP  # frames


class Planted(CTCModel):
    """A model of ten seconds in which given letters are in given frames, with silence between them."""

    frame = HOP

    def __init__(self, folder: Path, letters: dict[int, str], probability: float) -> None:
        (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(VOCABULARY)}))
        config = SimpleNamespace(pad_token_id=0, vocab_size=len(VOCABULARY))
        super().__init__(SimpleNamespace(config=config), None, Wav2Vec2CTCTokenizer(str(folder / "vocab.json")))
        self.probs = torch.full((10 * SECOND, self.size), 1e-6)
        self.probs[:, self.blank] = 1.0
        for frame, letter in letters.items():
            self.probs[frame, self.blank] = 1 - probability
            self.probs[frame, VOCABULARY.index(letter)] = probability

    def log_probs(self, pcm: np.ndarray) -> torch.Tensor:
        return self.probs.log()[: len(pcm) // HOP]


@pytest.fixture
def aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Align turns, given as (text, start, end), with planted letters."""

    def run(
        letters: dict[int, str],
        *given: tuple[str, float | None, float | None],
        probability: float = 0.9,
        margin: float = 0.0,
        **settings,
    ) -> tuple[list[Turn], list[Finding]]:
        monkeypatch.setattr(aligner, "load_ctc", lambda path: Planted(tmp_path, letters, probability))
        monkeypatch.setattr(aligner, "MARGIN", margin)
        turns = [
            Turn(f"s/{index}", index, "client", text, start=start, end=end)
            for index, (text, start, end) in enumerate(given)
        ]
        findings: list[Finding] = []
        pcm = np.zeros(10 * SAMPLE_RATE, np.int16)
        CTCAligner(AlignConfig(model="planted", **settings))(pcm, turns, findings)
        return turns, findings

    return run


def at(start: float, text: str, step: int = 5) -> dict[int, str]:
    """A letter every `step` frames from `start` (s) on."""
    return {round(start * SECOND) + step * index: letter for index, letter in enumerate(text)}


def test_turn_gets_the_times_of_its_first_and_last_letter(aligned) -> None:
    (turn,), findings = aligned(at(3.4, "SO|IT|IS"), ("So, it is.", 3.0, 5.0))
    assert (turn.start, turn.end) == pytest.approx((3.4, 3.4 + (7 * 5 + 1) / SECOND))
    assert turn.given == (3.0, 5.0)
    assert turn.confidence == pytest.approx(0.9, abs=1e-3)
    assert not findings
    assert not turn.flags


def test_turn_of_low_confidence_keeps_its_times_and_is_flagged(aligned) -> None:
    (turn,), (finding,) = aligned(at(3.4, "SO|IT|IS"), ("So it is", 3.0, 5.0), probability=0.4)
    assert (turn.start, turn.end, turn.given) == (3.0, 5.0, None)
    assert turn.confidence == pytest.approx(0.4, abs=1e-3)
    assert turn.flags == ("W_ALIGN_LOW",)
    assert "0.40 is below 0.5" in finding.message
    (turn,), findings = aligned(at(3.4, "SO|IT|IS"), ("So it is", 3.0, 5.0), probability=0.4, min_confidence=0.3)
    assert turn.start == pytest.approx(3.4)
    assert not findings


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("...", "no word"),
        ("[laughs]", "no word"),
        ("42", "no word"),
        ("你好", "no word"),
        ("so 42", "begins or ends"),
        ("20 it is", "begins or ends"),
        ("so " * 300, "frames"),
        ("never mind", "confidence"),
        ("it", "0.06 s"),  # two letters within less than a tenth of a second
    ],
)
def test_turn_that_cannot_be_aligned_keeps_its_times(aligned, text: str, why: str) -> None:
    (turn,), (finding,) = aligned(at(3.4, "IT", step=2), (text, 3.0, 5.0))
    assert (turn.start, turn.end, turn.given) == (3.0, 5.0, None)
    assert finding.code == "W_ALIGN_LOW"
    assert why in finding.message
    assert finding.span == (3.0, 5.0)


@pytest.mark.parametrize(
    "text",
    ["DON'T go", "don\u2019t \u2014 go!", "[sighs] Don't... go? [unintelligible 00:01:18]", "don't/GO", "don't 你 go"],
)
def test_case_punctuation_and_remarks_do_not_matter(aligned, text: str) -> None:
    (turn,), _ = aligned(at(3.4, "DON'T|GO"), (text, 3.0, 5.0))
    assert (turn.start, turn.end) == pytest.approx((3.4, 3.4 + 36 / SECOND))


def test_figure_within_a_turn_matches_any_speech(aligned) -> None:
    letters = at(3.4, "SO") | at(3.7, "|TWENTY|") | at(4.6, "IT|IS")
    (turn,), _ = aligned(letters, ("so 20 it is", 3.0, 5.0))
    assert (turn.start, turn.end) == pytest.approx((3.4, 4.6 + 21 / SECOND))
    assert turn.confidence == pytest.approx(0.9, abs=1e-3)


def test_neighbours_identify_one_of_many_equal_turns(aligned) -> None:
    """Each is within the window of each, and three are given the same second."""
    letters = at(2.1, "SURE") | at(2.8, "OKAY") | at(3.6, "SURE") | at(4.4, "WELL|SURE")
    turns, findings = aligned(
        letters, ("sure", 2.0, 2.0), ("okay", 2.0, 2.0), ("sure", 2.0, 4.0), ("well, sure", 4.0, None)
    )
    assert not findings
    assert [turn.start for turn in turns] == pytest.approx([2.1, 2.8, 3.6, 4.4])


def test_speech_without_a_transcript_belongs_to_no_turn(aligned) -> None:
    letters = at(1.0, "HELLO|THERE") | at(3.4, "SO|IT|IS") | at(5.0, "GOODBYE")
    (turn,), _ = aligned(letters, ("so it is", 3.0, 5.0))
    assert (turn.start, turn.end) == pytest.approx((3.4, 3.4 + 36 / SECOND))


def test_turn_without_length_or_end_gets_both_times(aligned) -> None:
    turns, _ = aligned(at(3.4, "SO|IT|IS") | at(5.5, "WELL"), ("so it is", 3.0, 3.0), ("well", 5.0, None))
    assert [turn.span for turn in turns] == [
        pytest.approx((3.4, 3.4 + 36 / SECOND)),
        pytest.approx((5.5, 5.5 + 16 / SECOND)),
    ]
    assert [turn.given for turn in turns] == [(3.0, 3.0), (5.0, None)]


def test_words_outside_the_window_are_not_found(aligned) -> None:
    letters = at(6.5, "SO|IT|IS")
    assert aligned(letters, ("so it is", 3.0, 5.0), window=1.0)[0][0].given is None
    assert aligned(letters, ("so it is", 3.0, 5.0), window=3.0)[0][0].start == pytest.approx(6.5)


def test_margin_and_window_end_where_the_recording_does(aligned) -> None:
    letters = at(0.02, "SO") | at(5.0, "WELL") | at(9.86, "NO")
    given = ("so", 0.0, 1.0), ("well", 5.0, 6.0), ("no", 9.0, 10.0), ("no", 14.0, 15.0)
    for margin, spans in (
        (0.0, [(0.02, 0.14), (5.0, 5.32), (9.86, 9.98)]),
        (0.05, [(0.0, 0.19), (4.95, 5.37), (9.81, 10.0)]),
    ):
        turns, findings = aligned(letters, *given, margin=margin)
        assert [turn.span for turn in turns] == [*map(pytest.approx, spans), (14.0, 15.0)]
        assert [finding.utterance for finding in findings] == ["s/3"]


def test_turns_without_usable_times_are_not_changed(aligned, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, findings = aligned(at(3.4, "SO|IT|IS"), ("so it is", None, None), ("so it is", 5.0, 3.0))
    assert not findings
    assert [turn.span for turn in turns] == [None, (5.0, 3.0)]
    rejected = Turn("s/0", 0, "client", "so it is", start=3.0, end=5.0)
    reject(rejected, findings, "E_LABEL", "unknown")
    CTCAligner(AlignConfig(model="planted"))(np.zeros(10 * SAMPLE_RATE, np.int16), [rejected], findings)
    assert rejected.given is None
    assert len(findings) == 1


def test_times_in_whole_seconds_become_true_times(ctc: Path) -> None:
    pcm, turns, truth = voices.session(seed=0, n_turns=40)
    given = np.array([(turn.start, np.nan if turn.end is None else turn.end) for turn in turns])
    findings: list[Finding] = []
    CTCAligner(AlignConfig(model=str(ctc)))(pcm, turns, findings)
    aligned_times = np.array([turn.span for turn in turns])
    before, after = (np.nanmedian(abs(times - truth), axis=0) for times in (given, aligned_times))
    assert before[0] > 0.4
    assert (after < 0.08).all()
    assert len(findings) < 6
    is_found = np.array([turn.given is not None for turn in turns])
    assert (abs(aligned_times - truth)[is_found] < 0.5).mean() > 0.97
    assert all(turn.start >= 0 and turn.end <= len(pcm) / SAMPLE_RATE for turn in turns)


def test_times_do_not_depend_on_turns_far_away(ctc: Path) -> None:
    pcm, turns, _ = voices.session(seed=1, n_turns=24)
    _, fewer, _ = voices.session(seed=1, n_turns=24)
    aligner = CTCAligner(AlignConfig(model=str(ctc)))
    aligner(pcm, turns, [])
    aligner(pcm, fewer[:16], [])
    assert [turn.span for turn in turns[:12]] == [turn.span for turn in fewer[:12]]


def test_blocks_of_a_long_recording_join_without_a_gap(ctc: Path) -> None:
    pcm, _, _ = voices.session(seed=2, n_turns=50)
    assert len(pcm) > 45 * SAMPLE_RATE  # three blocks
    model = load_ctc(str(ctc))
    whole, blocks = model._log_probs(pcm), model.log_probs(pcm)
    assert abs(len(whole) - len(blocks)) <= 1
    same = (whole[: len(blocks)].argmax(dim=-1) == blocks[: len(whole)].argmax(dim=-1)).float().mean()
    assert same > 0.95  # not all: each block is normalised by itself


def test_wav2vec2_with_letters_loads_and_its_frame_is_measured(tmp_path: Path) -> None:
    make_wav2vec2(tmp_path)
    model = load_ctc(str(tmp_path))
    assert model.frame == HOP
    assert model.spell("It's") == tuple(VOCABULARY.index(letter) for letter in "IT'S")
    assert model.delimiter == (VOCABULARY.index("|"),)
    assert model.log_probs(np.zeros(SAMPLE_RATE, np.int16)).shape == (SECOND - 1, len(VOCABULARY))
    assert model.log_probs(np.zeros(0, np.int16)).shape == (0, len(VOCABULARY))


def make_wav2vec2(folder: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = Wav2Vec2Config(
        **small, conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, vocab_size=32
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(VOCABULARY)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)


def key(folder: Path, **settings: float) -> str:
    return CTCAligner(AlignConfig(model=str(folder), **settings)).key


def test_key_depends_on_weights_and_settings(tmp_path: Path) -> None:
    """An aligner pickles as its settings, also once it has loaded the model."""
    make_wav2vec2(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = key(tmp_path / "a")
    assert key(tmp_path / "b") == first
    weights = tmp_path / "b" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert len({first, key(tmp_path / "a", window=3.0), key(tmp_path / "b")}) == 3
    used = CTCAligner(AlignConfig(model=str(tmp_path / "a")))
    used(np.zeros(SAMPLE_RATE, np.int16), [], [])
    content = pickle.dumps(used)
    assert len(content) < 2_000
    assert pickle.loads(content).key == first


def test_identity_of_a_hub_model_has_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout of the hub's cache, which needs no network."""
    repository, commit = tmp_path / "models--a--b", "0123456789abcdef0123456789abcdef01234567"
    make_wav2vec2(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert identity("a/b") == f"a/b@{commit}"


def test_model_without_ctc_is_refused_in_one_line(models: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make_wav2vec2(tmp_path / "headless")
    shutil.copytree(tmp_path / "headless", tmp_path / "mute")
    for file in ("vocab.json", "tokenizer_config.json"):
        (tmp_path / "mute" / file).unlink()
    shutil.copy(models / "wav2vec2-group" / "model.safetensors", tmp_path / "headless")
    cases = {
        models / "whisper": "is a whisper model",
        tmp_path / "nowhere": "cannot load",
        tmp_path / "empty": "cannot load",
        tmp_path / "mute": "cannot load",
        tmp_path / "headless": "lacks",
    }
    for folder, why in cases.items():
        with pytest.raises(ConfigError, match=why) as error:
            load_ctc(str(folder))
        assert "\n" not in str(error.value)
        assert str(folder) in str(error.value)
    with pytest.raises(ConfigError, match="is a whisper model"):
        _ = CTCAligner(AlignConfig(model=str(models / "whisper"))).key
    with pytest.raises(ConfigError, match=r"align\.model"):
        CTCAligner(AlignConfig())
