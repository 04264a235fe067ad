"""Fonts of this machine that can draw a text: matplotlib's own font has no Chinese, Japanese or Korean characters."""

import functools
from collections.abc import Iterable

PLACEHOLDERS = "Last Resort"  # a font of matplotlib that draws a box for every character


def font_families(texts: Iterable[str]) -> list[str] | None:
    """Return font families that have every character of some texts, for `font.family`; None where no font has them.

    The first family is matplotlib's default; the others are asked only for the characters that it lacks.
    """
    from matplotlib import rcParams
    from matplotlib.font_manager import FontProperties, findfont

    missing = {ord(character) for text in texts for character in text if not character.isspace()}
    families = list(rcParams["font.family"])
    missing -= _characters(findfont(FontProperties(family=families)))
    while missing:
        family, covered = _best_family(frozenset(missing))
        if not covered:
            return None
        families.append(family)
        missing -= covered
    return families


def _best_family(wanted: frozenset[int]) -> tuple[str, frozenset[int]]:
    """Return the installed family that has most of some characters, and those that it has."""
    from matplotlib.font_manager import fontManager

    best: tuple[str, frozenset[int]] = ("", frozenset())
    for font in fontManager.ttflist:
        if not font.name.startswith(PLACEHOLDERS):
            covered = wanted & _characters(font.fname)
            if len(covered) > len(best[1]):
                best = font.name, covered
    return best


@functools.lru_cache(maxsize=512)
def _characters(path: str) -> frozenset[int]:
    """Return the characters of a font file; none of a file that cannot be read."""
    from matplotlib.font_manager import get_font

    try:
        return frozenset(get_font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
