"""Importer for Praat: one TextGrid per session, with a tier for each speaker and perhaps another one with codes."""

from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.errors import DataError, reason
from data.importers.annotation_tools.tiers import Annotation, Tier, tier_segments
from data.importers.base.builder import TurnBuilder
from data.importers.base.extras import import_extra
from data.importers.base.sessions import Segment, first_file, read_sessions
from data.importers.base.tabular import read_text

SUFFIXES = (".textgrid",)


def read_praat(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read TextGrids, long or short; see `tier_segments`.

    Args:
        source: a file or a folder of them; the file name is the session id.
        audio: folder with `<session>.<wav|flac|…>`; None: text only.
        config: settings; `roles` maps tiers to roles, `tiers` says which have codes.

    Raises:
        DataError: a file cannot be read, or there are no recordings.
    """
    return read_sessions(TurnBuilder("praat", config), source, audio, SUFFIXES, _parse)


def is_praat(source: Path) -> bool:
    """Return whether a source is a TextGrid, or a folder of them."""
    return first_file(source, SUFFIXES) is not None


def _parse(path: Path, builder: TurnBuilder) -> list[Segment]:
    library = import_extra("praatio.utilities.textgrid_io", "praat", path.name)
    text = read_text(path, builder.config.encoding)  # Praat writes UTF-16 with a byte order mark, or UTF-8
    try:
        content = library.parseTextgridStr(text, False)
    except Exception as error:  # the library raises errors of many kinds for a damaged file
        raise DataError(f"{path.name}: not readable as a TextGrid ({reason(error)}); save it again in Praat") from None
    tiers = []
    for tier in content["tiers"]:
        annotations = []
        for index, (start, *end, label) in enumerate(tier["entries"], start=1):  # a point has no end
            where = f"{path.name}:{tier['name']}[{index}]"
            annotations.append(Annotation(float(start), float(end[0] if end else start), label, where))
        tiers.append(Tier(tier["name"], annotations))
    return tier_segments(tiers, builder, path.name)
