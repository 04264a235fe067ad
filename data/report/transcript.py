"""Coded sessions as a table and as a page: who said what, which code the model gave it, and the clip to listen to."""

import base64
import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files

import numpy as np

from data.corpus import audio
from data.corpus.schema import SAMPLE_RATE, split_label
from data.report import pictures
from data.shards.dataset import Shards

COLUMNS = ("session", "turn", "speaker", "start", "end", "text", "task", "code", "probability", "reply", "not_coded")
UNSURE = 0.5  # probability below which a code is marked


@dataclass(frozen=True, slots=True)
class Coding:
    """A turn or a session with the code that a model gave it, or with the reason why it has none."""

    row: int  # of the index; of a session the last one
    session: str
    turn: str  # its id in the session; empty: it is about the session as a whole
    speaker: str
    start: float | None  # s
    end: float | None  # s
    text: str
    task: str = ""
    code: str = ""
    shares: dict[str, float] = field(default_factory=dict)  # probability of each label; they sum to 1
    reply: str | None = None  # what the model would say in its place, where that is the task
    reason: str = ""  # why there is neither

    @property
    def is_coded(self) -> bool:
        """Whether the model said anything."""
        return bool(self.code) or self.reply is not None

    @property
    def probability(self) -> float:
        """Of the code."""
        return self.shares[self.code]

    @property
    def ranked(self) -> list[tuple[str, float]]:
        """Labels with their probabilities, the likeliest first."""
        return sorted(self.shares.items(), key=lambda pair: -pair[1])


def codings_csv(codings: Sequence[Coding]) -> str:
    """A row for every coding, with a column `p_<label>` for every label; what a turn lacks stays empty."""
    labels = list(dict.fromkeys(label for coding in codings for label in coding.shares))
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"p_{label}" for label in labels)])
    for coding in codings:
        times = ["" if time is None else f"{time:.3f}" for time in (coding.start, coding.end)]
        sure = _number(coding.probability) if coding.code else ""
        said = [coding.task, inert(coding.code), sure, inert(coding.reply or ""), inert(coding.reason)]
        shares = [_number(coding.shares[label]) if label in coding.shares else "" for label in labels]
        who = map(inert, (coding.session, coding.turn, coding.speaker))
        writer.writerow([*who, *times, inert(coding.text), *said, *shares])
    return sink.getvalue()


def inert(text: str) -> str:
    """A cell that spreadsheets show as it is: they would compute one that begins like a formula, and some of these send
    other cells away."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _number(share: float) -> str:
    return f"{share:.7g}"


def transcript_html(codings: Sequence[Coding], model: str, shards: Shards) -> str:
    """A page without outside parts.

    Args:
        codings: of all turns, in order.
        model: its name.
        shards: hold the clips.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["clock"] = clock
    template = environment.from_string((files("data.report") / "transcript.html.j2").read_text(encoding="utf-8"))
    turns = [coding for coding in codings if coding.turn]
    labels = [label for coding in codings for code in coding.shares for label in split_label(code)]
    sessions: dict[str, list[Coding]] = {}
    for coding in turns:
        sessions.setdefault(coding.session, []).append(coding)
    return template.render(
        model=model,
        sessions=sessions,
        rated={coding.session: coding for coding in codings if not coding.turn},
        turns=len({coding.row for coding in turns}),
        coded=len({coding.row for coding in turns if coding.is_coded}),
        several=len({coding.task for coding in turns if coding.is_coded}) > 1,
        reasons=Counter(coding.reason for coding in codings if coding.reason).most_common(),
        counts={name: _counts(own) for name, own in sessions.items()},
        labels=pictures.coloured(list(dict.fromkeys(labels))),
        roles=pictures.coloured(sorted({coding.speaker for coding in turns}), pictures.ROLE_COLOURS),
        split=split_label,
        sound=lambda coding: _sound(shards.pcm(coding.row)),
        unsure=UNSURE,
    )


def _counts(codings: Sequence[Coding]) -> list[tuple[str, int]]:
    """Labels by how often they were given."""
    return Counter(label for coding in codings if coding.code for label in split_label(coding.code)).most_common()


def _sound(pcm: np.ndarray | None) -> str:
    """A clip as a data URL; "" without one. MP3 where it can be written: hours of FLAC make too large a page."""
    import soundfile

    if pcm is None:
        return ""
    if "MP3" not in soundfile.available_formats():
        return "data:audio/flac;base64," + base64.b64encode(audio.encode(pcm, "flac")).decode()
    soundfile.write(sink := io.BytesIO(), pcm, SAMPLE_RATE, format="MP3", subtype="MPEG_LAYER_III")
    return "data:audio/mpeg;base64," + base64.b64encode(sink.getvalue()).decode()


def clock(seconds: float | None) -> str:
    """A time for people, [h:]mm:ss; "" where there is none."""
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes:02}:{rest:02}"
