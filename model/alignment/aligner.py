"""Forced alignment: find the start and the end of each turn in the recording with a CTC model.

Any model that `AutoModelForCTC` loads works, with characters, word pieces or words as its tokens. A turn is searched
around its given times, between the last words before it and the first words after it: these neighbours identify one
"yeah" among many. A wildcard between turns matches pauses and speech that is not transcribed.

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

VERSION = "1"  # part of the cache key: raise it when the same model gives other times
CONTEXT_RATE = 1.5  # words of the neighbours per second of window: about half of those that fit
OPEN_SECONDS = 30.0  # searched after the start of a turn without an end, if no other turn starts before
WILDCARD_COST = 0.1  # nats per frame below the model's best token: spelled words must explain more
MARGIN = 0.02  # seconds added on both sides: models emit a token after the onset of its sound and end it early
TIE = 1e-6  # nats

_NOT_SPOKEN = re.compile(r"\[[^\]]*\]|<[^<>]*>")  # "[laughs]", "[inaudible 00:02:46]", "<sync>"
_BETWEEN_WORDS = re.compile(r"[\s/\u2013\u2014-]+")  # dashes are pauses
_WILDCARD: tuple[int, ...] = ()  # in place of a word

Word = tuple[int, ...]  # its tokens
Tokens = list[int]


class CTCAligner:
    """Refines the times of a conversation's turns; pickles as its settings, and loads the model once per process."""

    def __init__(self, config: AlignConfig) -> None:
        if config.model is None:
            raise ConfigError("align.model: is missing; name a CTC model by Hugging Face id or folder")
        self.config = config
        self.model = config.model

    @property
    def key(self) -> str:
        """Return the cache key of the model, its weights and the settings: equal keys give equal times.

        Raises:
            ConfigError: the model cannot be loaded, or is no CTC model.
        """
        settings = f"{VERSION} {self.config.window} {self.config.min_confidence}"
        return hashlib.sha256(f"{identity(self.model)} {settings}".encode()).hexdigest()

    def __call__(self, pcm: np.ndarray, turns: list[Turn], findings: list[Finding]) -> None:
        """Set start, end, given and confidence of the turns that are found; flag the others and keep their times.

        Turns that have no start, are rejected, or end before they start are not changed.

        Args:
            pcm: the recording, int16 [n_samples] at SAMPLE_RATE.
            turns: of one conversation, in order.
            findings: gets an entry for each turn that is not found.

        Raises:
            ConfigError: see `load_ctc`.
        """
        ctc, window = load_ctc(self.model), self.config.window
        log_probs_TC = ctc.log_probs(pcm)
        words = [spoken_words(turn.text, ctc) for turn in turns]
        context = max(1, round(CONTEXT_RATE * window))
        spans = [_span(turn, turns) for turn in turns]  # before any time changes
        for index, (turn, span) in enumerate(zip(turns, spans, strict=True)):
            if span is None:
                continue
            area = max(0.0, span[0] - window), min(len(pcm) / SAMPLE_RATE, span[1] + window)
            first, last = (samples(time) // ctc.frame for time in area)
            # Words of turns outside the searched area would displace the turn's words.
            near = [
                turn_words if _overlap(area, turn_span) else []
                for turn_words, turn_span in zip(words, spans, strict=True)
            ]
            try:
                targets = _targets(words[index], near[:index], near[index + 1 :], context, ctc)
                token_spans = _align(targets, with_wildcard(log_probs_TC[first:last]), ctc.blank)
                self._set_times(turn, token_spans, first, ctc, len(pcm) / SAMPLE_RATE)
            except _NotFoundError as error:
                flag(turn, findings, "W_ALIGN_LOW", f"{error}; the given times stay")

    def _set_times(self, turn: Turn, spans: list[TokenSpan], first: int, ctc: CTCModel, duration: float) -> None:
        """Set the times of a turn from the spans of its tokens.

        Raises:
            _NotFoundError: the spans are not reliable.
        """
        turn.confidence = float(np.mean([span.score for span in spans if span.token != ctc.size]))
        if turn.confidence < self.config.min_confidence:
            raise _NotFoundError(f"confidence {turn.confidence:.2f} is below {self.config.min_confidence:g}")
        start, end = ((first + frame) * ctc.frame / SAMPLE_RATE for frame in (spans[0].start, spans[-1].end))
        if samples(end - start) < MIN_SAMPLES:
            raise _NotFoundError(f"its words were found within {end - start:.2f} s")
        turn.given = (turn.start, turn.end)
        turn.start, turn.end = max(0.0, start - MARGIN), min(duration, end + MARGIN)


class _NotFoundError(Exception):
    """A turn keeps its times; the message says why."""


def _span(turn: Turn, turns: list[Turn]) -> Span | None:
    """Return the given times, with an estimate for a missing end; None: the turn is not aligned."""
    if turn.start is None or is_rejected(turn.flags) or (turn.end is not None and turn.end < turn.start):
        return None
    if turn.end is not None:
        return turn.start, turn.end
    later = (start for start in (following.start for following in turns) if start is not None and start > turn.start)
    return turn.start, min(later, default=turn.start + OPEN_SECONDS)


def _overlap(area: Span, span: Span | None) -> bool:
    return span is not None and span[0] <= area[1] and span[1] >= area[0]


def with_wildcard(log_probs_TC: Tensor) -> Tensor:
    """Append the wildcard as the last token: it fits any frame nearly as well as the model's best token.

    `forced_align` loses the best path where two ways into a token are equal to the last bit, as they are around a
    wildcard in silence: a little noise, always the same, makes them differ.

    Args:
        log_probs_TC: of the model's tokens.

    Returns:
        float64 [T, C + 1].
    """
    all_TC = torch.cat([log_probs_TC, log_probs_TC.amax(dim=-1, keepdim=True) - WILDCARD_COST], dim=-1).double()
    return all_TC - TIE * torch.rand(all_TC.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def spoken_words(text: str, ctc: CTCModel) -> list[Word]:
    """Return the tokens of each word, in the case of the model's tokens.

    Characters that the model lacks are left out. Words that it cannot spell at all, and figures (it is not known how
    they were spoken) become wildcards; remarks in brackets and loose punctuation are no words.
    """
    text = _NOT_SPOKEN.sub(" ", text.replace("\u2019", "'"))
    words = [word for word in _BETWEEN_WORDS.split(text) if any(map(str.isalnum, word))]
    return [_WILDCARD if any(map(str.isdigit, word)) else ctc.spell(word) for word in words]


def _targets(
    words: list[Word], before: list[list[Word]], after: list[list[Word]], count: int, ctc: CTCModel
) -> tuple[Tokens, Tokens, Tokens]:
    """Return the tokens of the last `count` words before a turn, of its words, and of the first words after it.

    Raises:
        _NotFoundError: no word of the turn can be spelled, or not the one that begins or ends it.
    """
    if not any(words):
        raise _NotFoundError("no word of it can be spelled with the model's tokens")
    if not (words[0] and words[-1]):
        raise _NotFoundError("it begins or ends with a word that the model's tokens cannot spell, like a figure")
    past = [word for turn in before[-count:] for word in (_WILDCARD, *turn)]
    future = [word for turn in after[:count] for word in (*turn, _WILDCARD)]
    return (
        _tokens([_WILDCARD, *past[-count:], _WILDCARD], ctc),
        _tokens(words, ctc),
        _tokens([_WILDCARD, *future[:count], _WILDCARD], ctc),
    )


def _tokens(words: Sequence[Word], ctc: CTCModel) -> list[int]:
    """Return the tokens of words with the model's delimiter between them; wildcards in a row become one."""
    tokens: list[int] = []
    for word in words:
        if word == _WILDCARD:
            tokens += [] if tokens[-1:] == [ctc.size] else [ctc.size]
        else:
            tokens += [] if not tokens or tokens[-1] == ctc.size else ctc.delimiter
            tokens += word
    return tokens


def _align(targets: tuple[Tokens, Tokens, Tokens], log_probs_TC: Tensor, blank: int) -> list[TokenSpan]:
    """Return the frames of a turn's tokens, with their mean probabilities.

    Raises:
        _NotFoundError: the window has fewer frames than the tokens need.
    """
    before, tokens_of_turn, after = targets
    tokens = torch.tensor([*before, *tokens_of_turn, *after], dtype=torch.int32)
    needed = len(tokens) + int((tokens[1:] == tokens[:-1]).sum())  # a blank must separate equal tokens
    if len(log_probs_TC) < needed:
        raise _NotFoundError(f"its words need {needed} frames of the model, and {len(log_probs_TC)} are searched")
    path, scores = forced_align(log_probs_TC[None], tokens[None], blank=blank)
    spans: list[TokenSpan] = merge_tokens(path[0], scores[0].exp(), blank=blank)
    return spans[len(before) : len(before) + len(tokens_of_turn)]
