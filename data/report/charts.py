"""Charts of the report as inline SVG. Their only text is numbers; its colour follows the page."""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from data.corpus import audio
from data.corpus.schema import SAMPLE_RATE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#4c86c0", "#f0902f", "#57a55a", "#b279a2", "#d8b72c", "#5fb3b0", "#ee8a94", "#9d755d", "#8d7cc9")
ROLE_COLOURS = ("#5d77a8", "#c9a45c", "#7fa38a", "#a0708c")
RED, GREY = "#d64545", "#8c8c8c"  # red is only for findings
BINS = 32
_WINDOW, _HOP = 512, 128  # of the spectrogram, samples
_COLUMNS = 400  # of the waveform


def colours_of(names: Sequence[str], colours: Sequence[str] = COLOURS) -> dict[str, str]:
    """Return the colour of every name; colours repeat if there are too many names."""
    return {name: colours[index % len(colours)] for index, name in enumerate(names)}


def histogram(
    series: Sequence[tuple[str, Sequence[float]]], *, log: bool = False, counts: bool = False, mark: float | None = None
) -> str:
    """Return a stacked histogram.

    Args:
        series: colour and values of each series.
        log: use a logarithmic axis if the values, which must be positive, span a decade.
        counts: the values are whole numbers; bins end between them.
        mark: a value that is marked with a dashed line.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(3.4, 1.9), layout="constrained")
    axes = figure.add_subplot()
    values = np.concatenate([np.asarray(part, float) for _, part in series])
    log = log and values.max() >= 10 * values.min()  # within a decade a logarithmic axis would have no numbers
    edges = _edges(values, log=log, counts=counts)
    axes.hist(
        [values for _, values in series],
        edges.tolist(),
        stacked=True,
        color=[colour for colour, _ in series],
        linewidth=0,
    )
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter("")
    elif counts:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    if mark is not None:
        axes.axvline(mark, color=RED, linewidth=1, linestyle="--")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    _style(axes)
    return _svg(figure)


def _edges(values: np.ndarray, *, log: bool, counts: bool) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if counts:
        step = max(1, round((high - low) / BINS))
        edges = np.unique(np.geomspace(low, high + 1, BINS).round()) if log else np.arange(low, high + step + 1, step)
        return edges - 0.5
    if low == high:
        low, high = low - 0.5, high + 0.5
    return np.geomspace(low, high, BINS + 1) if log else np.linspace(low, high, BINS + 1)


def waveform_and_spectrogram(pcm: np.ndarray) -> str:
    """Return the waveform above the spectrogram (0-8 kHz, 90 dB) over time in s.

    Args:
        pcm: int16 [n_samples], not empty.
    """
    from matplotlib.figure import Figure
    from matplotlib.mlab import specgram

    wave = audio.waveform(pcm)
    seconds = len(wave) / SAMPLE_RATE
    figure = Figure(figsize=(4.2, 2.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 3))
    pieces = [piece for piece in np.array_split(wave, _COLUMNS) if len(piece)]
    times = np.linspace(0, seconds, len(pieces))
    above.fill_between(
        times, [piece.min() for piece in pieces], [piece.max() for piece in pieces], color=COLOURS[0], linewidth=0.5
    )
    above.set(ylim=(-1.05, 1.05), yticks=(-1, 0, 1), xlim=(0, seconds))
    power = specgram(wave, _WINDOW, SAMPLE_RATE, noverlap=_WINDOW - _HOP)[0]
    decibels = 10 * np.log10(np.maximum(power, 1e-14))
    top = max(float(decibels.max()), -60.0)  # silence stays dark
    extent = (0, seconds, 0, SAMPLE_RATE / 2000)
    below.imshow(decibels, cmap="magma", vmin=top - 90, vmax=top, origin="lower", aspect="auto", extent=extent)
    below.set_yticks((0, 4, 8))
    for axes in (above, below):
        _style(axes)
    above.tick_params(labelbottom=False, bottom=False)
    return _svg(figure)


def _style(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.tick_params(which="both", color=GREY, labelsize=8, width=0.6, length=3)


def _svg(figure: "Figure") -> str:
    """Return the figure as a deterministic <svg> element."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(sink := io.StringIO(), format="svg", transparent=True, dpi=90, metadata={"Date": None})
    svg = sink.getvalue()
    # The remaining ids are hashes of what an element looks like, so equal ids in two charts are the same element.
    return re.sub(r' id="[A-Za-z]+(?:2d)?_\d+"|<metadata>.*?</metadata>', "", svg[svg.index("<svg") :], flags=re.DOTALL)
