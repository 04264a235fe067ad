"""Importer for the JSON of speech recognisers with speakers: one file per session.

`SHAPES` lists the recognisers; each turns its JSON into segments like those of WhisperX: text, start and end in
seconds, speaker, and perhaps words. A segment whose words have several speakers is split where the speaker changes.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from data.corpus.config import CorpusConfig
from data.corpus.issues import Finding
from data.corpus.schema import Corpus
from data.errors import DataError, reason
from data.importers.base.builder import TurnBuilder
from data.importers.base.sessions import OtherFormatError, Segment, first_file, read_sessions
from data.importers.base.tabular import as_text, read_text
from data.importers.transcripts.speakers import Interval, no_speakers, rttm_beside, speaker_of

SUFFIXES = (".json",)
Json = Mapping[str, object]
_DURATION = re.compile(r"P(?:T)?(?:(\d+(?:\.\d+)?)H)?(?:(\d+(?:\.\d+)?)M)?(?:(\d+(?:\.\d+)?)S)?")  # ISO 8601
TICKS = 10_000_000  # of Azure, in a second


class Shape(NamedTuple):
    """How a recogniser writes its result."""

    name: str  # of the recogniser
    matches: Callable[[Json], bool]
    segments: Callable[
        [Json], Iterable[object]
    ]  # objects with text, start and end in seconds or as written, speaker, words, label


def read_whisperx(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read transcripts of WhisperX and its relatives; a segment may also have a `label`, one word or a list of words.

    Args:
        source: a JSON file or a folder of them; the file name is the session id. A file `<session>.rttm` beside one
            without speakers says who speaks.
        audio: folder with `<session>.<wav|flac|…>`; None: text only.
        config: settings; `roles` maps SPEAKER_00 to a role.

    Raises:
        DataError: a file cannot be read or has no segments or no speakers, or there are no recordings.
    """
    return read_sessions(TurnBuilder("whisperx", config), source, audio, SUFFIXES, _parse)


def read_recogniser(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read transcripts of any recogniser of `SHAPES`; see `read_whisperx`."""
    return read_sessions(TurnBuilder("recogniser", config), source, audio, SUFFIXES, _parse)


def is_whisperx(source: Path) -> bool:
    """Return whether a source is a JSON file with segments, or a folder of such files."""
    return _shape_at(source) is SHAPES[0]


def is_recogniser(source: Path) -> bool:
    """Return whether a source is a JSON file of a recogniser, or a folder of such files."""
    return _shape_at(source) is not None


def _shape_at(source: Path) -> Shape | None:
    path = first_file(source, SUFFIXES)
    return None if path is None else _shape(_content(path, "utf-8"))


def _shape(content: Json) -> Shape | None:
    return next((shape for shape in SHAPES if shape.matches(content)), None)


def _parse(path: Path, builder: TurnBuilder) -> list[Segment]:
    content = _content(path, builder.config.encoding)
    shape = _shape(content)
    if shape is None:
        known = ", ".join(dict.fromkeys(shape.name for shape in SHAPES))
        has = ", ".join(list(content)[:6]) or "nothing"
        raise OtherFormatError(
            f"{path.name}:1: no segments of a recogniser that is known ({known}); it has {has}; give transcripts, and "
            "remove other files and those without speech"
        )
    found: list[object] = list(shape.segments(content))
    segments = [_checked(segment, f"{path.name}:segments[{index}]") for index, segment in enumerate(found)]
    if not segments and shape is not SHAPES[0]:
        raise OtherFormatError(f"{path.name}:1: output of {shape.name} without words; export it with its words")
    if segments and not any(_has_speaker(segment) for segment in segments):
        intervals = rttm_beside(path, builder)
        if not intervals:
            raise no_speakers(path, f"output of {shape.name}")
        segments = [_with_speaker(segment, intervals) for segment in segments]
    parts = [
        part
        for index, segment in enumerate(segments)
        for part in _parts(segment, f"{path.name}:segments[{index}]", path.stem, builder)
    ]
    if shape is SHAPES[0]:  # many programs write this one, not all of them in seconds: see `time_unit`
        parts = [part._replace(start=as_text(part.start), end=as_text(part.end)) for part in parts]
    return parts


def _content(path: Path, encoding: str) -> Json:
    """Return the JSON of a file; lines of JSON are `lines`.

    Raises:
        DataError: it is no JSON object, list or lines of them.
    """
    text = read_text(path, encoding)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        lines = _json_lines(text) if error.msg == "Extra data" else None
        if lines is None:
            raise DataError(
                f"{path.name}:{error.lineno}: not readable as JSON (column {error.colno}: {error.msg}); export it again"
            ) from None
        return {"lines": lines}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path.name}:1: not readable as JSON ({reason(error)}); export it again") from None
    return content if isinstance(content, dict) else {"lines": content} if isinstance(content, list) else {}


def _json_lines(text: str) -> list[object] | None:
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError):
        return None


# The shapes


def _list(content: object, *names: str) -> list[Json]:
    """Return the objects of a list that is nested in objects under these names; [] if there is none."""
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []


def _first(content: Json, name: str) -> Json:
    return next(iter(_list(content, name)), {})


def _number(value: object, divisor: float = 1) -> float | None:
    """Return seconds: of a number, of text such as "1.5" and "1.500s", or of a duration such as PT1M2.5S."""
    if isinstance(value, int | float):
        return float(value) / divisor
    text = as_text(value)
    match = _DURATION.fullmatch(text) if text.startswith("P") else None
    if match is not None:
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
        return hours * 3600 + minutes * 60 + seconds
    try:
        return float(text.removesuffix("s")) / divisor
    except ValueError:
        return None


def _word(text: object, start: object, end: object, speaker: object, divisor: float = 1) -> Json:
    return {
        "word": as_text(text),
        "start": _number(start, divisor),
        "end": _number(end, divisor),
        "speaker": as_text(speaker),
    }


def _said(words: list[Json]) -> Iterator[Json]:
    """Yield a segment for each run of words of one speaker."""
    for speaker, said in _runs(words):
        starts = [word["start"] for word in said if word["start"] is not None]
        ends = [word["end"] for word in said if word["end"] is not None]
        yield {
            "text": " ".join(as_text(word["word"]) for word in said),
            "start": starts[0] if starts else None,
            "end": ends[-1] if ends else None,
            "speaker": speaker,
        }


def _of_segments(content: Json) -> Iterable[object]:
    segments = content["segments"]
    return segments if isinstance(segments, list) else ()


def _of_whisper_cpp(content: Json) -> Iterator[Json]:
    for part in _list(content, "transcription"):
        offsets = part.get("offsets")
        start, end = (offsets.get(name) if isinstance(offsets, Mapping) else None for name in ("from", "to"))
        speaker = as_text(part.get("speaker"))  # with --diarize, of a stereo recording: the louder channel
        yield {"text": part.get("text"), "start": _number(start, 1000), "end": _number(end, 1000), "speaker": speaker}


def _of_aws(content: Json) -> Iterator[Json]:
    results = content["results"]
    segments = _list(results, "audio_segments")
    if segments and any(segment.get("speaker_label") for segment in segments):
        for segment in segments:
            yield {
                "text": segment.get("transcript"),
                "start": _number(segment.get("start_time")),
                "end": _number(segment.get("end_time")),
                "speaker": segment.get("speaker_label"),
            }
        return
    speakers = {
        as_text(item.get("start_time")): item.get("speaker_label", segment.get("speaker_label"))
        for segment in _list(results, "speaker_labels", "segments")
        for item in _list(segment, "items")
    }
    words: list[dict[str, object]] = []
    for item in _list(results, "items"):
        text = as_text(_first(item, "alternatives").get("content"))
        if item.get("type") == "punctuation" and words:
            words[-1]["word"] = f"{words[-1]['word']}{text}"
            continue
        speaker = item.get("speaker_label") or speakers.get(as_text(item.get("start_time")))
        words.append(dict(_word(text, item.get("start_time"), item.get("end_time"), speaker)))
    yield from _said(list(words))


def _of_deepgram(content: Json) -> Iterator[Json]:
    results = content["results"]
    utterances = _list(results, "utterances")
    if utterances:
        for part in utterances:
            speaker = part.get("speaker", part.get("channel"))
            yield {
                "text": part.get("transcript"),
                "start": _number(part.get("start")),
                "end": _number(part.get("end")),
                "speaker": f"speaker_{as_text(speaker)}",
            }
        return
    channels = _list(results, "channels")
    for number, channel in enumerate(channels):
        words = [
            _word(word.get("punctuated_word", word.get("word")), word.get("start"), word.get("end"), speaker)
            for word in _list(_first(channel, "alternatives"), "words")
            if (speaker := f"speaker_{as_text(word.get('speaker', number if len(channels) > 1 else ''))}")
        ]
        yield from _said([word if word["speaker"] != "speaker_" else {**word, "speaker": ""} for word in words])


def _of_assemblyai(content: Json) -> Iterator[Json]:
    utterances = _list(content, "utterances")
    if not utterances:
        yield from _said(
            [
                _word(word.get("text"), word.get("start"), word.get("end"), word.get("speaker"), 1000)
                for word in _list(content, "words")
            ]
        )
    for part in utterances:
        start, end = (_number(part.get(name), 1000) for name in ("start", "end"))
        yield {"text": part.get("text"), "start": start, "end": end, "speaker": part.get("speaker")}


def _of_azure(content: Json) -> Iterator[Json]:
    for part in _list(content, "recognizedPhrases"):
        ticks = part.get("offsetInTicks"), part.get("durationInTicks")
        start, length = (
            _number(ticks[0], TICKS) if ticks[0] is not None else _number(part.get("offset")),
            _number(ticks[1], TICKS) if ticks[1] is not None else _number(part.get("duration")),
        )
        end = None if start is None or length is None else start + length
        yield {"text": _first(part, "nBest").get("display"), "start": start, "end": end, "speaker": _speaker(part)}
    for part in _list(content, "phrases"):
        start, length = (_number(part.get(f"{name}Milliseconds"), 1000) for name in ("offset", "duration"))
        end = None if start is None or length is None else start + length
        yield {"text": part.get("text"), "start": start, "end": end, "speaker": _speaker(part)}


def _speaker(part: Json) -> str:
    """Return the speaker that Azure numbers, or the channel of a recording that has one for each speaker."""
    number = as_text(part.get("speaker", part.get("channel")))
    return f"speaker_{number}" if number.isdecimal() else number


def _of_google(content: Json) -> Iterator[Json]:
    results = _list(content, "results")
    tagged = [result for result in results if any(_tag(word) for word in _google_words(result))]
    # With diarisation the last result repeats all words, now with speakers.
    for result in tagged[-1:] or results:
        words = []
        for word in _google_words(result):
            start, end = (word.get(f"{name}Time", word.get(f"{name}Offset")) for name in ("start", "end"))
            words.append(_word(word.get("word"), start, end, _tag(word)))
        yield from _said(words)


def _google_words(result: Json) -> list[Json]:
    return _list(_first(result, "alternatives"), "words")


def _tag(word: Json) -> str:
    tag = as_text(word.get("speakerLabel", word.get("speakerTag")))
    return f"speaker_{tag}" if tag not in ("", "0") else ""


def _of_nemo(content: Json) -> Iterator[Json]:
    for line in _list(content, "lines"):
        start, length = _number(line.get("offset", 0)), _number(line.get("duration"))
        end = None if start is None or length is None else start + length
        yield {"text": line.get("text"), "start": start, "end": end, "speaker": line.get("speaker", line.get("label"))}


def _has(*names: str) -> Callable[[Json], bool]:
    """Return whether objects are in a list under these names, one inside the other."""
    return lambda content: bool(_list(content, *names))


def _is_whisper(content: Json) -> bool:
    return isinstance(content.get("segments"), list)


def _is_deepgram(content: Json) -> bool:
    return bool(_list(content, "results", "channels") or _list(content, "results", "utterances"))


def _is_aws(content: Json) -> bool:
    results = content.get("results")
    return isinstance(results, Mapping) and "transcripts" in results


def _is_nemo(content: Json) -> bool:
    return any("audio_filepath" in line for line in _list(content, "lines"))


SHAPES = (  # the first one that matches is read
    Shape("WhisperX or Whisper", _is_whisper, _of_segments),
    Shape("whisper.cpp", _has("transcription"), _of_whisper_cpp),
    Shape("Deepgram", _is_deepgram, _of_deepgram),
    Shape("AWS Transcribe", _is_aws, _of_aws),
    Shape("AssemblyAI", lambda content: bool(_list(content, "utterances") or _list(content, "words")), _of_assemblyai),
    Shape("Azure", lambda content: bool(_list(content, "recognizedPhrases") or _list(content, "phrases")), _of_azure),
    Shape("Google", _has("results"), _of_google),
    Shape("NeMo", _is_nemo, _of_nemo),
)


# Speakers


def _checked(segment: object, where: str) -> dict[str, object]:
    if not isinstance(segment, Mapping) or not isinstance(segment.get("text"), str):
        raise DataError(f"{where}: the segment has no text; export the file again, or remove the segment")
    return dict(segment)


def _words(segment: Json) -> list[Json]:
    return _list(segment, "words")


def _has_speaker(segment: Json) -> bool:
    return bool(as_text(segment.get("speaker"))) or any(as_text(word.get("speaker")) for word in _words(segment))


def _with_speaker(segment: Json, intervals: list[Interval]) -> dict[str, object]:
    """Return a segment with who speaks most of it, and of each of its words that has times."""

    def speaker(part: Json) -> str:
        start, end = _number(part.get("start")), _number(part.get("end"))
        return "" if start is None or end is None else speaker_of(start, end, intervals)

    words = [{**word, "speaker": speaker(word)} for word in _words(segment)]
    return {**segment, "speaker": speaker(segment), "words": words}


def _parts(segment: Json, where: str, conversation: str, builder: TurnBuilder) -> list[Segment]:
    """Return a segment, split where the speaker of its words changes.

    A code of the segment belongs to the longest part of the segment's own speaker.
    """
    runs = _runs(_words(segment))
    if len(runs) == 1 and not as_text(segment.get("speaker")):
        return [_segment({**segment, "speaker": runs[0][0]}, where)]
    if len(runs) < 2:
        return [_segment(segment, where)]
    own = [run for run in runs if run[0] == as_text(segment.get("speaker"))] or runs
    coded = max(own, key=lambda run: len(run[1]))
    contents: list[dict[str, object]] = []
    rest = as_text(segment["text"])
    for number, run in enumerate(runs):
        speaker, said = run
        last = number == len(runs) - 1
        text, rest = (rest, "") if last else _cut_text(rest, [as_text(word.get("word")) for word in said])
        starts = [word["start"] for word in said if word.get("start") is not None]
        ends = [word["end"] for word in said if word.get("end") is not None]
        start = segment.get("start") if number == 0 else next(iter(starts), contents[-1]["end"])
        end = segment.get("end") if last else (ends or [start])[-1]
        code = segment.get("label") if run is coded else None
        contents.append({"start": start, "end": end, "text": text, "speaker": speaker, "label": code})
    speakers = ", ".join(dict.fromkeys(speaker for speaker, _ in runs))
    message = f"its words are of {speakers}; it becomes {len(runs)} turns"
    builder.findings.append(Finding("W_SPEAKERS_SPLIT", where, conversation, message))
    return [_segment(content, where) for content in contents]


def _runs(words: list[Json]) -> list[tuple[str, list[Json]]]:
    """Return the words in runs of one speaker; a word without speaker belongs to the one before it."""
    runs: list[tuple[str, list[Json]]] = []
    waiting: list[Json] = []  # before the first word with a speaker
    for word in words:
        speaker = as_text(word.get("speaker"))
        if not speaker and not runs:
            waiting.append(word)
        elif not speaker or (runs and runs[-1][0] == speaker):
            runs[-1][1].append(word)
        else:
            runs.append((speaker, [*waiting, word]))
            waiting = []
    return runs or ([("", waiting)] if waiting else [])


def _cut_text(text: str, words: list[str]) -> tuple[str, str]:
    """Return the text up to the last of the words, and the rest; only the words if the text does not contain them."""
    place = 0
    for word in words:
        found = text.find(word.strip(), place)
        if found < 0:
            return " ".join(words), text
        place = found + len(word.strip())
    return text[:place], text[place:]


def _code(segment: Json) -> str:
    """Return the label of a segment as a cell; a list of words is several codes."""
    label = segment.get("label")
    if isinstance(label, dict) or (isinstance(label, list) and not all(isinstance(part, str) for part in label)):
        return json.dumps(label)
    return as_text(label)


def _segment(content: Json, where: str) -> Segment:
    start, end = (_stamp(content.get(name)) for name in ("start", "end"))
    return Segment(where, as_text(content.get("speaker")), as_text(content["text"]), start, end, _code(content))


def _stamp(value: object) -> str | float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else as_text(value)
