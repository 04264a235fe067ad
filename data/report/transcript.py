"""Coded sessions as CSV and as an HTML page: speaker, text, predicted code and clip of every turn."""

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
from data.report import charts
from data.shards.dataset import Shards

COLUMNS = ("session", "turn", "speaker", "start", "end", "text", "task", "code", "probability", "reply", "not_coded")
UNSURE = 0.5  # codes with a lower probability are highlighted


@dataclass(frozen=True, slots=True)
class Coding:
    """A turn or a session with the predicted code, or with the reason why it has none."""

    row: int  # of the turn, or of the last turn of the session
    session: str
    turn: str  # id in the session; empty: the coding is about the whole session
    speaker: str
    start: float | None  # s
    end: float | None  # s
    text: str
    task: str = ""
    code: str = ""
    probabilities: dict[str, float] = field(default_factory=dict)  # by label; they sum to 1
    reply: str | None = None  # generated reply, if that is the task
    reason: str = ""  # why there is neither code nor reply

    @property
    def is_coded(self) -> bool:
        """Return whether there is a code or a reply."""
        return bool(self.code) or self.reply is not None

    @property
    def probability(self) -> float:
        """Return the probability of the predicted code."""
        return self.probabilities[self.code]

    @property
    def ranked(self) -> list[tuple[str, float]]:
        """Return labels and probabilities, the most probable label first."""
        return sorted(self.probabilities.items(), key=lambda pair: -pair[1])


def codings_csv(codings: Sequence[Coding]) -> str:
    """Return a CSV with one row per coding and a column `p_<label>` for every label; missing values are empty."""
    labels = list(dict.fromkeys(label for coding in codings for label in coding.probabilities))
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"p_{label}" for label in labels)])
    for coding in codings:
        times = ["" if time is None else f"{time:.3f}" for time in (coding.start, coding.end)]
        source = map(escape_formula, (coding.session, coding.turn, coding.speaker))
        probability = f"{coding.probability:.7g}" if coding.code else ""
        prediction = [
            coding.task,
            escape_formula(coding.code),
            probability,
            escape_formula(coding.reply or ""),
            escape_formula(coding.reason),
        ]
        probabilities = [
            f"{coding.probabilities[label]:.7g}" if label in coding.probabilities else "" for label in labels
        ]
        writer.writerow([*source, *times, escape_formula(coding.text), *prediction, *probabilities])
    return sink.getvalue()


def escape_formula(text: str) -> str:
    """Return a cell that spreadsheets do not evaluate as a formula, which could send other cells to a server."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def transcript_html(codings: Sequence[Coding], model: str, shards: Shards) -> str:
    """Return a self-contained HTML page.

    Args:
        codings: codings of all turns, in order.
        model: name of the model.
        shards: the corpus with the clips.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["clock"] = format_clock
    template = environment.from_string((files("data.report") / "transcript.html.j2").read_text(encoding="utf-8"))
    turns = [coding for coding in codings if coding.turn]
    labels = [label for coding in codings for code in coding.probabilities for label in split_label(code)]
    sessions: dict[str, list[Coding]] = {}
    for coding in turns:
        sessions.setdefault(coding.session, []).append(coding)
    return template.render(
        model=model,
        sessions=sessions,
        ratings={coding.session: coding for coding in codings if not coding.turn},
        turns=len({coding.row for coding in turns}),
        coded=len({coding.row for coding in turns if coding.is_coded}),
        several=len({coding.task for coding in turns if coding.is_coded}) > 1,
        reasons=Counter(coding.reason for coding in codings if coding.reason).most_common(),
        counts={name: _counts(turns) for name, turns in sessions.items()},
        labels=charts.colours_of(list(dict.fromkeys(labels))),
        roles=charts.colours_of(sorted({coding.speaker for coding in turns}), charts.ROLE_COLOURS),
        split=split_label,
        clip_url=lambda coding: _clip_url(shards.pcm(coding.row)),
        unsure=UNSURE,
    )


def _counts(codings: Sequence[Coding]) -> list[tuple[str, int]]:
    """Return the predicted labels with their counts, the most frequent first."""
    return Counter(label for coding in codings if coding.code for label in split_label(coding.code)).most_common()


def _clip_url(pcm: np.ndarray | None) -> str:
    """Return a clip as a data URL, "" without one. MP3 if it can be written, because FLAC makes the page too large."""
    import soundfile

    if pcm is None:
        return ""
    if "MP3" not in soundfile.available_formats():
        return "data:audio/flac;base64," + base64.b64encode(audio.encode(pcm, "flac")).decode()
    soundfile.write(sink := io.BytesIO(), pcm, SAMPLE_RATE, format="MP3", subtype="MPEG_LAYER_III")
    return "data:audio/mpeg;base64," + base64.b64encode(sink.getvalue()).decode()


def format_clock(seconds: float | None) -> str:
    """Return a time as [h:]mm:ss; "" for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes:02}:{rest:02}"
