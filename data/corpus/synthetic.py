"""The synthetic corpus: seeded counselling-like dialogues whose client turns are synthetic speech.

Half of the client turns can be labelled from their words. In the other half, the subset "ambiguous", the key word
carries no information and the label follows from the tone of voice: pitch and loudness rise over the clip for "change"
and fall for "sustain". Clear turns have a random contour too, so a model must recognise the word before it may rely on
the tone. Maximum accuracy by construction: 0.75 of all turns and 0.50 of ambiguous turns from the text alone; 1.0 of
both from speech.

The reply of a good therapist follows from the label of the client turn, that of a poor one is random. So the replies
determine the quality of the session.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.corpus.schema import SAMPLE_RATE, Conversation, Corpus, Turn

VERSION = "2"  # part of every cache key; increase it when a clip, a word or a text changes
NAME = "synthetic"
LABELS = ("change", "sustain", "neutral")

KEYS: dict[str, tuple[str, ...]] = {
    "change": ("quit", "stop", "ready", "reduce"),
    "sustain": ("keep", "enjoy", "refuse", "cannot"),
    "neutral": ("weather", "lunch", "bus", "tuesday"),
    "ambiguous": ("maybe", "might", "guess", "suppose"),
}
FILLERS = ("i", "it", "well", "so", "really", "now", "then", "just", "you", "okay")
WORDS = (
    *(word for words in KEYS.values() for word in words),
    *FILLERS,
)  # `Clip.words_at` contains indices into this tuple
PROMPTS = (
    "how are you today",
    "tell me more",
    "what do you think about it",
    "how was the week",
    "what would help you",
    "go on",
)

QUALITIES = ("high", "low")
REPLIES = {"change": PROMPTS[1], "sustain": PROMPTS[4], "neutral": PROMPTS[2]}  # the replies of a good therapist
POOR_REPLIES = (PROMPTS[0], PROMPTS[3], PROMPTS[5])

CONTOUR = 1.6  # end pitch / start pitch of a rising clip, the amplitude ratio is its square; falling: the inverse
RISING = {"change": True, "sustain": False}  # the label of an ambiguous turn follows from its tone
THERAPIST_SECONDS = 1.5  # duration of a therapist turn, which has no audio

_ID = {word: index for index, word in enumerate(WORDS)}
_KERNEL_SECONDS = 0.016  # ringing of a formant after a glottal pulse, cut off below 2 %
_PRETRAINING_STREAM, _CORPUS_STREAM = 1, 2  # separate random streams: no pre-training clip is in any corpus


@dataclass(frozen=True, slots=True)
class Utterance:
    """The words of a client turn and the tone in which they are spoken."""

    words: tuple[str, ...]
    label: str
    ambiguous: bool
    rise: bool


@dataclass(frozen=True, slots=True)
class Clip:
    """The audio of an utterance with its alignment, all of length n_samples."""

    audio: np.ndarray  # int16 at SAMPLE_RATE
    words_at: np.ndarray  # index into WORDS
    f0: np.ndarray  # Hz
    rise: bool


@dataclass(frozen=True, slots=True)
class Voice:
    """A speaker: mean pitch (Hz), gain, and response of the vocal tract to a glottal pulse [n_words, n_samples]."""

    pitch: float
    gain: float
    kernels: np.ndarray


def corpus(*, sessions: int = 48, turns: int = 60, seed: int = 0) -> Corpus:
    """Return `sessions` dialogues of `turns` turns each; every second turn is a labelled client turn with a clip.

    A session depends only on the seed and its number, not on the number of sessions.
    """
    conversations = [_conversation(session, turns, seed) for session in range(sessions)]
    return Corpus(NAME, LABELS, {"client": LABELS}, conversations, qualities=QUALITIES)


def clips(count: int, *, seed: int = 0) -> Iterator[Clip]:
    """Yield aligned clips of different voices for pre-training an encoder. None of them is in any corpus."""
    rng = np.random.default_rng((seed, _PRETRAINING_STREAM))
    for _ in range(count):
        yield speak(utterance(rng), _voice(rng), rng)


def utterance(rng: np.random.Generator) -> Utterance:
    """Return three to five words with one key word, which is never the first; the tone is independent of the words."""
    rise = bool(rng.random() < 0.5)
    ambiguous = bool(rng.random() < 0.5)
    tone = "change" if rise else "sustain"
    label = tone if ambiguous else str(rng.choice(LABELS))
    words = [str(word) for word in rng.choice(FILLERS, rng.integers(2, 5))]
    words.insert(int(rng.integers(1, len(words) + 1)), str(rng.choice(KEYS["ambiguous" if ambiguous else label])))
    return Utterance(words=tuple(words), label=label, ambiguous=ambiguous, rise=rise)


def speak(spoken: Utterance, voice: Voice, rng: np.random.Generator) -> Clip:
    """Synthesise a clip: a train of glottal pulses at the pitch, each excites the formants of the current word."""
    words = np.array([_ID[word] for word in spoken.words])
    samples = (rng.uniform(0.16, 0.2, len(words)) * SAMPLE_RATE).astype(int)
    words_at = np.repeat(words, samples)
    total = len(words_at)
    tone = np.linspace(-0.5, 0.5, total) * (1 if spoken.rise else -1)
    f0 = voice.pitch * CONTOUR**tone
    pulses = np.flatnonzero(np.diff(np.floor(np.cumsum(f0) / SAMPLE_RATE), prepend=0.0))
    rings = voice.kernels[words_at[pulses]]
    landing = pulses[:, None] + np.arange(rings.shape[1])
    voiced = np.bincount(landing.ravel(), rings.ravel(), minlength=total)[:total]
    # Every word fades in and out, so that boundaries are audible even between equal words.
    envelope = np.concatenate([np.hanning(length) ** 0.3 for length in samples]) * CONTOUR ** (2 * tone)
    noise = rng.standard_normal(total, dtype=np.float32) * 0.02
    wave = voice.gain * (voiced * envelope + noise)
    audio = np.round(np.clip(wave, -1, 1) * 32767).astype(np.int16)
    return Clip(audio=audio, words_at=words_at, f0=f0, rise=spoken.rise)


def _conversation(session: int, turns: int, seed: int) -> Conversation:
    rng = np.random.default_rng((seed, _CORPUS_STREAM, session))
    name = f"c{session:03d}"
    voice = _voice(rng)
    quality = str(rng.choice(QUALITIES))
    dialogue: list[Turn] = []
    clock = 0.0
    for index in range(turns):
        identity = f"{name}/{index}"
        if index % 2:
            turn = _client(identity, index, voice, rng)
        else:
            label = dialogue[-1].label if dialogue and quality == "high" else None
            turn = _therapist(identity, index, label, rng)
        seconds = THERAPIST_SECONDS if turn.audio is None else len(turn.audio) / SAMPLE_RATE
        turn.start, turn.end = round(clock, 3), round(clock + seconds, 3)
        clock += seconds
        dialogue.append(turn)
    return Conversation(id=name, group=name, turns=dialogue, quality=quality)


def _therapist(name: str, index: int, client_label: str | None, rng: np.random.Generator) -> Turn:
    text = str(rng.choice(POOR_REPLIES)) if client_label is None else REPLIES[client_label]
    return Turn(id=name, index=index, speaker="therapist", text=text)


def _client(name: str, index: int, voice: Voice, rng: np.random.Generator) -> Turn:
    spoken = utterance(rng)
    return Turn(
        id=name,
        index=index,
        speaker="client",
        text=" ".join(spoken.words),
        label=spoken.label,
        subset="ambiguous" if spoken.ambiguous else "clear",
        audio=speak(spoken, voice, rng).audio,
    )


def _voice(rng: np.random.Generator) -> Voice:
    """Return a random speaker; the length of the vocal tract scales all formants."""
    formants = _FORMANTS * rng.uniform(0.97, 1.03)
    time = np.arange(int(_KERNEL_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    amplitudes, bandwidths = np.array([1.0, 0.7, 0.4]), np.array([80.0, 100.0, 140.0])  # bandwidths in Hz
    ringing = amplitudes[:, None] * np.exp(-np.pi * bandwidths[:, None] * time)
    kernels = np.einsum("fk,wfk->wk", ringing, np.sin(2 * np.pi * formants[:, :, None] * time))
    return Voice(pitch=float(rng.uniform(100, 190)), gain=float(rng.uniform(0.08, 0.25)), kernels=kernels)


def _formants() -> np.ndarray:
    """Return formant frequencies (Hz) [n_words, 3] on a logarithmic grid, which keeps all words apart."""
    index = np.arange(len(WORDS))
    first, second = np.geomspace(270, 850, 5), np.geomspace(1050, 2500, 6)
    return np.stack([first[index % 5], second[index // 5], np.where(index % 2, 3600.0, 3000.0)], axis=1)


_FORMANTS = _formants()
