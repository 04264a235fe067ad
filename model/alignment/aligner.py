"""Forced alignment: each turn's start and end, found in the recording by a CTC model.

Any model that `AutoModelForCTC` loads will do, with characters, word pieces or words as its tokens. A turn is searched
around its given times, between the last words before it and the first ones after it: one "yeah" among many is told by
its neighbours. A wildcard stands between turns, for pauses and for speech that nobody wrote down.

Shapes: T frames, C tokens of the model and, as the last one, the wildcard.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import TokenSpan, forced_align, merge_tokens

from data.corpus.audio import MIN_SAMPLES, samples
from data.corpus.config import AlignConfig
from data.corpus.issues import Finding, Span
from data.corpus.schema import SAMPLE_RATE, Turn, flag, is_rejected
from data.errors import ConfigError
from model.alignment.ctc import CTCModel, identity, load_ctc

VERSION = "1"  # part of the key: raise it when the same model would give other times
CONTEXT_RATE = 1.5  # words of the neighbours per second of window: about half of what fits
OPEN_SECONDS = 30.0  # searched after the start of a turn whose end nobody knows, if no other turn starts before
WILDCARD_COST = 0.1  # nats a frame, below the model's best token: words that are known explain more
MARGIN = 0.02  # s on both sides: a model names a sound a little after its onset and stops before it has faded
TIE = 1e-6  # nats

_NOT_SPOKEN = re.compile(r"\[[^\]]*\]")  # "[laughs]", "[inaudible 00:02:46]"
_BETWEEN_WORDS = re.compile(r"[\s/\u2013\u2014-]+")  # dashes are pauses
_ANYTHING: tuple[int, ...] = ()  # in place of a word: the wildcard

Word = tuple[int, ...]  # its tokens
Tokens = list[int]


class CTCAligner:
    """Refines the times of a conversation's turns; pickles as its settings, and loads the model once a process."""

    def __init__(self, config: AlignConfig) -> None:
        if config.model is None:
            raise ConfigError("align.model: none is given; name a CTC model by Hugging Face id or folder")
        self.config = config
        self.model = config.model

    @property
    def key(self) -> str:
        """Names the model, its weights and the settings: equal keys give equal times.

        Raises:
            ConfigError: nothing can be loaded from there, or it is no CTC model.
        """
        settings = f"{VERSION} {self.config.window} {self.config.min_confidence}"
        return hashlib.sha256(f"{identity(self.model)} {settings}".encode()).hexdigest()

    def __call__(self, pcm: np.ndarray, turns: list[Turn], findings: list[Finding]) -> None:
        """Set start, end, given and confidence of the turns that are found; flag the others, whose times stay.

        Turns without a start, rejected ones, and ones that end before they start are left alone.

        Args:
            pcm: int16 [n_samples] at SAMPLE_RATE, the whole recording.
            turns: of one conversation, in order.
            findings: where those that are not found are noted.

        Raises:
            ConfigError: see `load_ctc`.
        """
        ctc, window = load_ctc(self.model), self.config.window
        log_probs_TC = ctc.log_probs(pcm)
        words = [spoken(turn.text, ctc) for turn in turns]
        context = max(1, round(CONTEXT_RATE * window))
        spans = [_span(turn, turns) for turn in turns]  # before any time changes
        for place, (turn, span) in enumerate(zip(turns, spans, strict=True)):
            if span is None:
                continue
            area = max(0.0, span[0] - window), min(len(pcm) / SAMPLE_RATE, span[1] + window)
            first, last = (samples(time) // ctc.frame for time in area)
            # Words that were said elsewhere would push the turn's own aside.
            near = [own if _overlap(area, other) else [] for own, other in zip(words, spans, strict=True)]
            try:
                targets = _targets(words[place], near[:place], near[place + 1 :], context, ctc)
                found = _find(targets, with_wildcard(log_probs_TC[first:last]), ctc.blank)
                self._set(turn, found, first, ctc, len(pcm) / SAMPLE_RATE)
            except _NotFoundError as error:
                flag(turn, findings, "W_ALIGN_LOW", f"{error}; the given times stay")

    def _set(self, turn: Turn, spans: list[TokenSpan], first: int, ctc: CTCModel, duration: float) -> None:
        """Raises _NotFoundError: the spans are not to be trusted."""
        turn.confidence = float(np.mean([span.score for span in spans if span.token != ctc.size]))
        if turn.confidence < self.config.min_confidence:
            raise _NotFoundError(f"confidence {turn.confidence:.2f} is below {self.config.min_confidence:g}")
        start, end = ((first + frame) * ctc.frame / SAMPLE_RATE for frame in (spans[0].start, spans[-1].end))
        if samples(end - start) < MIN_SAMPLES:
            raise _NotFoundError(f"its words were found within {end - start:.2f} s")
        turn.given = (turn.start, turn.end)
        turn.start, turn.end = max(0.0, start - MARGIN), min(duration, end + MARGIN)


class _NotFoundError(Exception):
    """Why a turn keeps its times."""


def _span(turn: Turn, turns: list[Turn]) -> Span | None:
    """The given times, with an end if there is none; None: the turn is not aligned."""
    if turn.start is None or is_rejected(turn.flags) or (turn.end is not None and turn.end < turn.start):
        return None
    if turn.end is not None:
        return turn.start, turn.end
    later = (other.start for other in turns if other.start is not None and other.start > turn.start)
    return turn.start, min(later, default=turn.start + OPEN_SECONDS)


def _overlap(area: Span, other: Span | None) -> bool:
    return other is not None and other[0] <= area[1] and other[1] >= area[0]


def with_wildcard(log_probs_TC: Tensor) -> Tensor:
    """Append the wildcard, which fits any frame nearly as well as the model's best token does; float64.

    `forced_align` leaves the best path where two ways into a token are equal to the last bit, as they are around a
    wildcard in silence: a little noise, always the same, keeps them apart.
    """
    all_TC = torch.cat([log_probs_TC, log_probs_TC.amax(dim=-1, keepdim=True) - WILDCARD_COST], dim=-1).double()
    return all_TC - TIE * torch.rand(all_TC.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def spoken(text: str, ctc: CTCModel) -> list[Word]:
    """The tokens of each word, in upper or lower case as the model has them.

    Characters that it lacks are left out. What it cannot spell at all, and figures (nobody knows how they were read),
    are the empty word; remarks in square brackets and loose punctuation are no words.
    """
    text = _NOT_SPOKEN.sub(" ", text.replace("\u2019", "'"))
    words = [word for word in _BETWEEN_WORDS.split(text) if any(map(str.isalnum, word))]
    return [_ANYTHING if any(map(str.isdigit, word)) else ctc.spell(word) for word in words]


def _targets(
    own: list[Word], before: list[list[Word]], after: list[list[Word]], count: int, ctc: CTCModel
) -> tuple[Tokens, Tokens, Tokens]:
    """The tokens of the last `count` words before a turn, its own, and those of the first words after it.

    Raises:
        _NotFoundError: nothing of the turn can be heard for, or not where it begins or ends.
    """
    if not any(own):
        raise _NotFoundError("no word of it can be spelled with the model's tokens")
    if not (own[0] and own[-1]):
        raise _NotFoundError("it begins or ends with a word that the model's tokens cannot spell, like a figure")
    past = [word for turn in before[-count:] for word in (_ANYTHING, *turn)]
    future = [word for turn in after[:count] for word in (*turn, _ANYTHING)]
    return (
        _tokens([_ANYTHING, *past[-count:], _ANYTHING], ctc),
        _tokens(own, ctc),
        _tokens([_ANYTHING, *future[:count], _ANYTHING], ctc),
    )


def _tokens(words: Sequence[Word], ctc: CTCModel) -> list[int]:
    """Words one after the other, the model's delimiter between them; one wildcard for unknown ones in a row."""
    tokens: list[int] = []
    for word in words:
        if word == _ANYTHING:
            tokens += [] if tokens[-1:] == [ctc.size] else [ctc.size]
        else:
            tokens += [] if not tokens or tokens[-1] == ctc.size else ctc.delimiter
            tokens += word
    return tokens


def _find(targets: tuple[Tokens, Tokens, Tokens], log_probs_TC: Tensor, blank: int) -> list[TokenSpan]:
    """The frames of a turn's own tokens, with their mean probabilities.

    Raises:
        _NotFoundError: the window has fewer frames than the tokens need.
    """
    before, own, after = targets
    tokens = torch.tensor([*before, *own, *after], dtype=torch.int32)
    needed = len(tokens) + int((tokens[1:] == tokens[:-1]).sum())  # a blank has to part equal ones
    if len(log_probs_TC) < needed:
        raise _NotFoundError(f"its words need {needed} frames of the model, and {len(log_probs_TC)} are searched")
    path, scores = forced_align(log_probs_TC[None], tokens[None], blank=blank)
    spans: list[TokenSpan] = merge_tokens(path[0], scores[0].exp(), blank=blank)
    return spans[len(before) : len(before) + len(own)]
