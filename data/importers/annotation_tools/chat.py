r"""Importer for CHAT, the transcripts of TalkBank: one `.cha` file per session.

The lines are read here: pylangacq refuses the roles of counselling ("invalid role: Client"). The format is described in
MacWhinney, Tools for Analyzing Talk, Part 1: The CHAT Transcription Format (talkbank.org).
"""

import re
from collections.abc import Iterator
from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.schema import JOIN, Corpus
from data.errors import DataError
from data.importers.base.builder import TurnBuilder
from data.importers.base.cells import speaker_key
from data.importers.base.sessions import Segment, first_file, read_sessions
from data.importers.base.tabular import read_text

SUFFIXES = (".cha",)
CODES = ("cod", "spa", "lab")  # dependent tiers with codes, the first one that a turn has; %spa has speech acts
_BULLET = re.compile(r'\x15?(?:%\w+:"[^"]*"_|\b)(\d+)_(\d+)\b\x15?')  # %snd:"file"_0_1500 in old files
_REPLACED = re.compile(r"(\S+)\s*\[::?\s*([^\]]*)\]")  # wanna [: want to]
_RETRACED = re.compile(r"(?:<[^<>]*>|[^\s<>]+)\s*\[/{1,3}\??\]|(?:<[^<>]*>|[^\s<>]+)\s*\[/-\]")
_SCOPE = re.compile(r"<[^<>]*>")
_CODE = re.compile(r"\[[^\]]*\]")
_TONES = "\u2260\u2191\u2193\u21d7\u2197\u2192\u2198\u21d8\u221e\u224b\u224c\u2219\u2308\u2309\u230a\u230b\u201e\u2021"
_MARK = re.compile(rf"[&+]\S*|\b0\S*|\(\.+\)|\(\d*[.:]\d*\)|[{_TONES}]")
_UNKNOWN = re.compile(r"\b(?:xxx|yyy|www)\b")


def read_chat(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read transcripts in CHAT; the codes of a turn are on its %cod or %spa line.

    The text is what was said in the end: without retraced words, fillers (&-uh) and marks of pauses and intonation,
    with replacements ([: want to]) and without brackets around omitted sounds.

    Args:
        source: a .cha file or a folder of them; the file name is the session id.
        audio: folder with `<session>.<wav|flac|…>`; None: text only.
        config: settings; `roles` maps a code (THE) or the role in @Participants to a role.

    Raises:
        DataError: a file cannot be read or has no turns, or there are no recordings.
    """
    return read_sessions(TurnBuilder("chat", config), source, audio, SUFFIXES, _parse)


def is_chat(source: Path) -> bool:
    """Return whether a source is a CHAT transcript, or a folder of them."""
    return first_file(source, SUFFIXES) is not None


def _parse(path: Path, builder: TurnBuilder) -> list[Segment]:
    participants: dict[str, str] = {}
    segments: list[Segment] = []
    tiers = (builder.config.tiers.code.strip().lstrip("%").lower(),) if builder.config.tiers.code else CODES
    media = ""
    codes: list[dict[str, list[str]]] = []  # of each segment: tier → what its lines say
    for number, line in _lines(path, builder.config.encoding):
        name, _, content = line.partition(":")
        if line.startswith("@Participants"):
            for participant in content.split(","):
                words = participant.split()
                participants |= {words[0]: words[-1].replace("_", " ")} if len(words) > 1 else {}
        elif line.startswith("@Media"):
            media = content.partition(",")[0].strip().strip('"')
        elif line.startswith("*"):
            code = name[1:].strip()
            speaker = code if speaker_key(code) in builder.speakers else participants.get(code, code)
            bullets = _BULLET.findall(content)
            start, end = (int(bullets[0][0]) / 1000, int(bullets[-1][1]) / 1000) if bullets else ("", "")
            segments.append(Segment(f"{path.name}:{number}", speaker, _spoken(content), start, end))
            codes.append({})
        elif line.startswith("%") and segments:
            codes[-1].setdefault(name[1:].strip().lower(), []).extend(_codes(content))
    kept = (next((found[tier] for tier in tiers if found.get(tier)), []) for found in codes)
    return [
        segment._replace(code=JOIN.join(dict.fromkeys(own)), recording=media)
        for segment, own in zip(segments, kept, strict=True)
    ]


def _codes(content: str) -> list[str]:
    """Return the codes of a line: what begins with $, each one, or else all of it; <w 1> says what a code is of."""
    words = _SCOPE.sub(" ", _BULLET.sub(" ", content)).split()
    marked = [word[1:] for word in words if word.startswith("$") and len(word) > 1]
    return marked or ([" ".join(words)] if words else [])


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers; a line that begins with a tab continues the one before it.

    Raises:
        DataError: the file is not in CHAT.
    """
    text = read_text(path, encoding)
    if not re.search(r"^@Begin\b", text, re.MULTILINE):
        raise DataError(f"{path.name}:1: no line @Begin, so it is no transcript in CHAT; check the path of the source")
    joined: list[tuple[int, str]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line[:1] in ("\t", " ") and joined:
            joined[-1] = joined[-1][0], f"{joined[-1][1]} {line.strip()}"
        elif line.strip():
            joined.append((number, line.strip()))
    yield from joined


def _spoken(content: str) -> str:
    text = _BULLET.sub(" ", content)
    text = _REPLACED.sub(r"\2", text)
    while text != (shorter := _RETRACED.sub(" ", text)):  # retraces may stand in retraces
        text = shorter
    text = _MARK.sub(" ", _CODE.sub(" ", text))
    text = _UNKNOWN.sub(" ", re.sub(r"[<>()\u201c\u201d]", "", text)).replace("_", " ")
    text = re.sub(r"\s+([.?!,;])", r"\1", " ".join(re.sub(r"@\w+(?::\w+)?", "", text).split())).lstrip(" ,")
    return text if re.search(r"\w", text) else ""  # only a terminator: laughter, or words that were not understood
