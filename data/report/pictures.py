"""Pictures of the report as inline SVG. Their only words are numbers; colours of text follow the page around them."""

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
RED, GREY = "#d64545", "#8c8c8c"  # red is for findings alone
BINS = 32
_WINDOW, _HOP = 512, 128  # samples of the spectrogram
_COLUMNS = 400  # of the waveform


def coloured(names: Sequence[str], colours: Sequence[str] = COLOURS) -> dict[str, str]:
    """The colour of every name; colours repeat where there are many."""
    return {name: colours[place % len(colours)] for place, name in enumerate(names)}


def histogram(
    series: Sequence[tuple[str, Sequence[float]]], *, log: bool = False, counts: bool = False, mark: float | None = None
) -> str:
    """Stacked bars.

    Args:
        series: colour and values of each.
        log: bins and axis are logarithmic where the values, all positive, span a decade.
        counts: the values are whole numbers, and no bin ends on one.
        mark: a value to be marked by a line.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(3.4, 1.9), layout="constrained")
    axes = figure.add_subplot()
    values = np.concatenate([np.asarray(own, float) for _, own in series])
    log = log and values.max() >= 10 * values.min()  # within a decade the axis would have no numbers
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
    _sober(axes)
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


def sound(pcm: np.ndarray) -> str:
    """Waveform above spectrogram (0-8 kHz, 90 dB) over time in s.

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
    place = (0, seconds, 0, SAMPLE_RATE / 2000)
    below.imshow(decibels, cmap="magma", vmin=top - 90, vmax=top, origin="lower", aspect="auto", extent=place)
    below.set_yticks((0, 4, 8))
    for axes in (above, below):
        _sober(axes)
    above.tick_params(labelbottom=False, bottom=False)
    return _svg(figure)


def _sober(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.tick_params(which="both", color=GREY, labelsize=8, width=0.6, length=3)


def _svg(figure: "Figure") -> str:
    """The figure as an <svg> element, the same for the same figure."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(sink := io.StringIO(), format="svg", transparent=True, dpi=90, metadata={"Date": None})
    svg = sink.getvalue()
    # What is left of ids names what an element looks like, so elements of one id in two pictures are the same.
    return re.sub(r' id="[A-Za-z]+(?:2d)?_\d+"|<metadata>.*?</metadata>', "", svg[svg.index("<svg") :], flags=re.DOTALL)
