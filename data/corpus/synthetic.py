"""The embedded corpus: seeded counselling-like dialogues whose client turns are synthetic speech, made in memory.

Half of the client turns can be labelled from their words. In the other half, the subset "ambiguous", the key word says
nothing and the label is the tone of voice: pitch and loudness rise over the clip for "change" and fall for "sustain".
Clear turns have a contour too, at random, so a model has to hear the word before it may trust the tone. Ceilings by
construction: words alone 0.75 of all turns and 0.50 of the ambiguous ones; speech 1.0 of both.

A good therapist's reply follows from the label of the client's turn, a poor one's from nothing; who uses which replies
tells the quality of the session.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.corpus.schema import SAMPLE_RATE, Conversation, Corpus, Turn

VERSION = "2"  # part of every cache key: raise it when a clip, a word or a text changes
NAME = "synthetic"
LABELS = ("change", "sustain", "neutral")

KEYS: dict[str, tuple[str, ...]] = {
    "change": ("quit", "stop", "ready", "reduce"),
    "sustain": ("keep", "enjoy", "refuse", "cannot"),
    "neutral": ("weather", "lunch", "bus", "tuesday"),
    "ambiguous": ("maybe", "might", "guess", "suppose"),
}
FILLERS = ("i", "it", "well", "so", "really", "now", "then", "just", "you", "okay")
WORDS = (*(word for words in KEYS.values() for word in words), *FILLERS)  # a word's index names it in `Clip.words_at`
PROMPTS = (
    "how are you today",
    "tell me more",
    "what do you think about it",
    "how was the week",
    "what would help you",
    "go on",
)

QUALITIES = ("high", "low")
REPLIES = {"change": PROMPTS[1], "sustain": PROMPTS[4], "neutral": PROMPTS[2]}  # of a good therapist
POOR_REPLIES = (PROMPTS[0], PROMPTS[3], PROMPTS[5])

CONTOUR = 1.6  # pitch at the end over pitch at the start of a rising clip, amplitude its square; falling: the inverse
RISING = {"change": True, "sustain": False}  # the tone that decides an ambiguous turn
THERAPIST_SECONDS = 1.5  # what a therapist's turn takes on the clock; it has no sound

_ID = {word: index for index, word in enumerate(WORDS)}
_KERNEL_SECONDS = 0.016  # a formant's ringing after a glottal pulse, cut where it is below 2 %
_PRETRAINING_STREAM, _CORPUS_STREAM = 1, 2  # pre-training clips must never be corpus clips, whatever the seeds


@dataclass(frozen=True, slots=True)
class Utterance:
    """What a client says and how."""

    words: tuple[str, ...]
    label: str
    ambiguous: bool
    rise: bool


@dataclass(frozen=True, slots=True)
class Clip:
    """An utterance as sound, with its alignment: what each of the N samples is."""

    audio: np.ndarray  # int16 at SAMPLE_RATE
    words_at: np.ndarray  # index into WORDS
    f0: np.ndarray  # Hz
    rise: bool


@dataclass(frozen=True, slots=True)
class Voice:
    """A speaker: mean pitch (Hz), gain, and the response (word, sample) of his vocal tract to one glottal pulse."""

    pitch: float
    gain: float
    kernels: np.ndarray


def corpus(*, sessions: int = 48, turns: int = 60, seed: int = 0) -> Corpus:
    """`sessions` dialogues of `turns` turns each, every second one a labelled client turn with its clip.

    Any session is the same whatever the number of others: its randomness comes from (seed, session) only.
    """
    conversations = [_conversation(session, turns, seed) for session in range(sessions)]
    return Corpus(NAME, LABELS, {"client": LABELS}, conversations, qualities=QUALITIES)


def clips(count: int, *, seed: int = 0) -> Iterator[Clip]:
    """Unlabelled aligned clips, each from a voice of its own, for pre-training an encoder. None is in any corpus."""
    rng = np.random.default_rng((seed, _PRETRAINING_STREAM))
    for _ in range(count):
        yield speak(utterance(rng), _voice(rng), rng)


def utterance(rng: np.random.Generator) -> Utterance:
    """Three to five words, one of them a key word and never the first; the tone is independent of the words."""
    rise = bool(rng.random() < 0.5)
    ambiguous = bool(rng.random() < 0.5)
    tone = "change" if rise else "sustain"
    label = tone if ambiguous else str(rng.choice(LABELS))
    words = [str(word) for word in rng.choice(FILLERS, rng.integers(2, 5))]
    words.insert(int(rng.integers(1, len(words) + 1)), str(rng.choice(KEYS["ambiguous" if ambiguous else label])))
    return Utterance(words=tuple(words), label=label, ambiguous=ambiguous, rise=rise)


def speak(said: Utterance, voice: Voice, rng: np.random.Generator) -> Clip:
    """Formant synthesis: a train of glottal pulses at the pitch, each ringing the formants of the word it falls in."""
    words = np.array([_ID[word] for word in said.words])
    samples = (rng.uniform(0.16, 0.2, len(words)) * SAMPLE_RATE).astype(int)
    words_at = np.repeat(words, samples)
    total = len(words_at)
    tone = np.linspace(-0.5, 0.5, total) * (1 if said.rise else -1)
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
    return Clip(audio=audio, words_at=words_at, f0=f0, rise=said.rise)


def _conversation(session: int, turns: int, seed: int) -> Conversation:
    rng = np.random.default_rng((seed, _CORPUS_STREAM, session))
    name = f"c{session:03d}"
    voice = _voice(rng)
    quality = str(rng.choice(QUALITIES))
    spoken: list[Turn] = []
    clock = 0.0
    for index in range(turns):
        identity = f"{name}/{index}"
        if index % 2:
            turn = _client(identity, index, voice, rng)
        else:
            asked = spoken[-1].label if spoken and quality == "high" else None
            turn = _therapist(identity, index, asked, rng)
        seconds = THERAPIST_SECONDS if turn.audio is None else len(turn.audio) / SAMPLE_RATE
        turn.start, turn.end = round(clock, 3), round(clock + seconds, 3)
        clock += seconds
        spoken.append(turn)
    return Conversation(id=name, group=name, turns=spoken, quality=quality)


def _therapist(name: str, index: int, heard: str | None, rng: np.random.Generator) -> Turn:
    text = str(rng.choice(POOR_REPLIES)) if heard is None else REPLIES[heard]
    return Turn(id=name, index=index, speaker="therapist", text=text)


def _client(name: str, index: int, voice: Voice, rng: np.random.Generator) -> Turn:
    said = utterance(rng)
    return Turn(
        id=name,
        index=index,
        speaker="client",
        text=" ".join(said.words),
        label=said.label,
        subset="ambiguous" if said.ambiguous else "clear",
        audio=speak(said, voice, rng).audio,
    )


def _voice(rng: np.random.Generator) -> Voice:
    """A random speaker; the length of the vocal tract scales all formants."""
    formants = _FORMANTS * rng.uniform(0.97, 1.03)
    time = np.arange(int(_KERNEL_SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    amplitudes, bandwidths = np.array([1.0, 0.7, 0.4]), np.array([80.0, 100.0, 140.0])  # bandwidths in Hz
    ringing = amplitudes[:, None] * np.exp(-np.pi * bandwidths[:, None] * time)
    kernels = np.einsum("fk,wfk->wk", ringing, np.sin(2 * np.pi * formants[:, :, None] * time))
    return Voice(pitch=float(rng.uniform(100, 190)), gain=float(rng.uniform(0.08, 0.25)), kernels=kernels)


def _formants() -> np.ndarray:
    """(word, 3) formant frequencies in Hz: a grid in log frequency, so that no two words are close by chance."""
    index = np.arange(len(WORDS))
    first, second = np.geomspace(270, 850, 5), np.geomspace(1050, 2500, 6)
    return np.stack([first[index % 5], second[index // 5], np.where(index % 2, 3600.0, 3000.0)], axis=1)


_FORMANTS = _formants()
