"""The JSON of speech recognisers: how each of them writes who says what, and when.

A shape tells its JSON by keys that no other one has, because the units differ: 1500 is a second and a half in the
output of AssemblyAI, and 25 minutes in another one with the same names.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import PureWindowsPath
from typing import NamedTuple

from data.importers.base.tabular import as_text
from data.importers.transcripts.words import Spoken, Stamp, Word, by_speaker

Json = Mapping[str, object]
LINES = "lines"  # key of what a file of JSON lines, or with a list, contains
TICKS = 10_000_000  # of Azure, in a second
_DURATION = re.compile(r"P(?:T)?(?:(\d+(?:\.\d+)?)H)?(?:(\d+(?:\.\d+)?)M)?(?:(\d+(?:\.\d+)?)S)?")  # ISO 8601
UNKNOWN_SPEAKERS = ("?", "UU")  # whisper.cpp and Speechmatics write them where they do not know the speaker


class Shape(NamedTuple):
    """How a recogniser writes its result."""

    name: str  # of the recogniser
    matches: Callable[[Json], bool]
    segments: Callable[[Json], Iterable[Spoken | None]]  # None: an entry without text


def _list(content: object, *names: str) -> list[Json]:
    """Return the objects of a list that is nested in objects under these names; [] if there is none."""
    for name in names:
        content = content.get(name) if isinstance(content, Mapping) else None
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []


def _first(content: Json, name: str) -> Json:
    return next(iter(_list(content, name)), {})


def _has(*names: str) -> Callable[[Json], bool]:
    """Return whether objects are in a list under these names, one inside the other."""
    return lambda content: bool(_list(content, *names))


def _any(content: Json, *names: str) -> object:
    """Return the value of the first of these keys that has one."""
    return next((content[name] for name in names if content.get(name) is not None), None)


def _seconds(value: object, divisor: float = 1) -> Stamp:
    """Return seconds: of a number, of text such as "1.5" and "1.500s", or of a duration such as PT1M2.5S."""
    if isinstance(value, Mapping):  # of protocol buffers
        whole, nanos = (_seconds(value.get(name) or 0) for name in ("seconds", "nanos"))
        return whole + nanos / 1e9 if isinstance(whole, float) and isinstance(nanos, float) else ""
    text = as_text(value)
    match = _DURATION.fullmatch(text) if text.startswith("P") else None
    if match is not None:
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
        return hours * 3600 + minutes * 60 + seconds
    try:
        return float(text.removesuffix("s")) / divisor
    except ValueError:
        return ""


def _end(start: Stamp, length: Stamp) -> Stamp:
    return start + length if isinstance(start, float) and isinstance(length, float) else ""


def _who(value: object) -> str:
    """Return the name of a speaker; one that is only a number is speaker_0."""
    name = as_text(value)
    return f"speaker_{name}" if name.isdecimal() else "" if name in UNKNOWN_SPEAKERS else name


def _word(text: object, start: object, end: object, speaker: object = None, divisor: float = 1) -> Word:
    return Word(as_text(text), _seconds(start, divisor), _seconds(end, divisor), _who(speaker))


def _spoken(
    text: object,
    start: object,
    end: object,
    speaker: object = None,
    words: Iterable[Word] = (),
    divisor: float = 1,
) -> Spoken | None:
    if not as_text(text):
        return None
    return Spoken(as_text(text), _seconds(start, divisor), _seconds(end, divisor), _who(speaker), tuple(words))


def _marked(words: list[Word], mark: str) -> None:
    """Add a punctuation mark to the last word."""
    if words and mark:
        words[-1] = words[-1]._replace(text=f"{words[-1].text}{mark}")


def _several(parts: Iterable[Json], key: str) -> bool:
    """Return whether a key has several values: one channel for everybody says nothing about the speaker."""
    return len({as_text(part.get(key)) for part in parts if part.get(key) is not None}) > 1


# WhisperX and the relatives of Whisper


def _of_whisperx(content: Json) -> Iterator[Spoken | None]:
    loose = [] if _words_within(content) else _whisper_words(content)
    segments = content["segments"]
    for part in segments if isinstance(segments, list) else ():
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            yield None
            continue
        start, end = (as_text(part.get(name)) for name in ("start", "end"))  # in the unit of the settings
        words = _whisper_words(part) or [word for word in loose if _begins_within(word, start, end)]
        speaker = as_text(_any(part, "speaker", "speaker_id"))
        yield Spoken(str(part["text"]), start, end, speaker, tuple(words), _code(part))


def _words_within(content: Json) -> bool:
    return any(_list(part, "words") for part in _list(content, "segments"))


def _whisper_words(content: Json) -> list[Word]:
    return [
        Word(
            as_text(_any(word, "word", "text")),
            as_text(word.get("start")),
            as_text(word.get("end")),
            as_text(_any(word, "speaker", "speaker_id")),
        )
        for word in _list(content, "words")
    ]


def _begins_within(word: Word, start: str, end: str) -> bool:
    """Return whether a word of OpenAI's list beside the segments belongs to a segment."""
    times = [_seconds(stamp) for stamp in (start, word.start, end)]
    first, begin, last = (time if isinstance(time, float) else None for time in times)
    return first is not None and begin is not None and last is not None and first <= begin < last


def _code(segment: Json) -> str:
    """Return the label of a segment as a cell; a list of words is several codes."""
    label = segment.get("label")
    if isinstance(label, dict) or (isinstance(label, list) and not all(isinstance(part, str) for part in label)):
        return json.dumps(label)
    return as_text(label)


def _of_openai_words(content: Json) -> list[Spoken]:
    return by_speaker(_word(word.get("word"), word.get("start"), word.get("end")) for word in _list(content, "words"))


def _of_whisper_cpp(content: Json) -> Iterator[Spoken | None]:
    for part in _list(content, "transcription"):
        tokens = [token for token in _list(part, "tokens") if not as_text(token.get("text")).startswith("[_")]
        words = [_word(token.get("text"), *_offsets(token), divisor=1000) for token in tokens]
        # The speaker is the louder channel of a stereo recording (--diarize).
        yield _spoken(part.get("text"), *_offsets(part), part.get("speaker"), words, 1000)


def _offsets(part: Json) -> tuple[object, object]:
    offsets = part.get("offsets")
    return (offsets.get("from"), offsets.get("to")) if isinstance(offsets, Mapping) else (None, None)


def _of_transformers(content: Json) -> Iterator[Spoken | None]:
    """The pipeline of Transformers, and insanely-fast-whisper, which adds speakers."""
    for part in _list(content, "speakers") or _list(content, "chunks"):
        times = part.get("timestamp")
        start, end = times if isinstance(times, list) and len(times) == 2 else (None, None)
        yield _spoken(part.get("text"), start, end, part.get("speaker"))


# Services


def _of_deepgram(content: Json) -> Iterator[Spoken | None]:
    utterances, channels = _list(content, "results", "utterances"), _list(content, "results", "channels")
    by_channel = _several(utterances, "channel")
    for part in utterances:
        speaker = part.get("channel") if by_channel else part.get("speaker")
        words = [_deepgram_word(word, speaker) for word in _list(part, "words")]
        yield _spoken(part.get("transcript"), part.get("start"), part.get("end"), speaker, words)
    for number, channel in enumerate(channels if not utterances else ()):
        speaker = number if len(channels) > 1 else None
        yield from by_speaker(_deepgram_word(word, speaker) for word in _list(_first(channel, "alternatives"), "words"))


def _deepgram_word(word: Json, speaker: object) -> Word:
    who = word.get("speaker", speaker)
    return _word(_any(word, "punctuated_word", "word"), word.get("start"), word.get("end"), who)


def _of_aws(content: Json) -> Iterator[Spoken | None]:
    results = content.get("results")
    label = "channel_label" if _list(results, "channel_labels", "channels") else "speaker_label"
    segments = _list(results, "audio_segments")
    if any(segment.get(label) for segment in segments):
        for segment in segments:
            times = segment.get("start_time"), segment.get("end_time")
            yield _spoken(segment.get("transcript"), *times, segment.get(label))
        return
    speakers = {
        as_text(item.get("start_time")): item.get("speaker_label", segment.get("speaker_label"))
        for segment in _list(results, "speaker_labels", "segments")
        for item in _list(segment, "items")
    }
    by_channel = [
        (channel.get("channel_label"), _list(channel, "items"))
        for channel in _list(results, "channel_labels", "channels")
    ]
    for channel, items in by_channel or [(None, _list(results, "items"))]:
        words: list[Word] = []
        for item in items:
            text = _first(item, "alternatives").get("content")
            if item.get("type") == "punctuation":
                _marked(words, as_text(text))
                continue
            speaker = channel or item.get(label) or speakers.get(as_text(item.get("start_time")))
            words.append(_word(text, item.get("start_time"), item.get("end_time"), speaker))
        yield from by_speaker(words) if channel is None else _phrases(words)


def _phrases(words: list[Word], pause: float = 1.0) -> Iterator[Spoken]:
    """Yield the words of a channel, cut at its silences, in s: all of them would be one turn otherwise."""
    phrase: list[Word] = []
    for word in words:
        last = phrase[-1].end if phrase else ""
        if isinstance(last, float) and isinstance(word.start, float) and word.start - last > pause:
            yield from by_speaker(phrase)
            phrase = []
        phrase.append(word)
    yield from by_speaker(phrase)


def _of_healthscribe(content: Json) -> Iterator[Spoken | None]:
    for part in _list(content, "Conversation", "TranscriptSegments"):
        details = part.get("ParticipantDetails")
        speaker = details.get("ParticipantRole") if isinstance(details, Mapping) else None
        yield _spoken(part.get("Content"), part.get("BeginAudioTime"), part.get("EndAudioTime"), speaker)


def _of_call_analytics(content: Json) -> Iterator[Spoken | None]:
    for part in _list(content, "Transcript"):
        times = part.get("BeginOffsetMillis"), part.get("EndOffsetMillis")
        yield _spoken(part.get("Content"), *times, part.get("ParticipantRole"), divisor=1000)


def _of_speechmatics(content: Json) -> list[Spoken]:
    words: list[Word] = []
    for item in _list(content, "results"):
        best = _first(item, "alternatives")
        if item.get("type") == "punctuation":
            _marked(words, as_text(best.get("content")))
        elif item.get("type") == "word":
            speaker = best.get("speaker", item.get("channel"))
            words.append(_word(best.get("content"), item.get("start_time"), item.get("end_time"), speaker))
    return by_speaker(words)


def _of_assemblyai(content: Json) -> Iterator[Spoken | None]:
    utterances = _list(content, "utterances")
    for part in utterances:
        times = part.get("start"), part.get("end")
        yield _spoken(part.get("text"), *times, part.get("speaker"), _assemblyai_words(part), 1000)
    if not utterances:
        yield from by_speaker(_assemblyai_words(content))


def _assemblyai_words(content: Json) -> list[Word]:
    return [
        _word(word.get("text"), word.get("start"), word.get("end"), word.get("speaker"), 1000)
        for word in _list(content, "words")
    ]


def _of_elevenlabs(content: Json) -> list[Spoken]:
    return by_speaker(
        _word(word.get("text"), word.get("start"), word.get("end"), word.get("speaker_id"))
        for word in _list(content, "words")
        if word.get("type") != "spacing"
    )


def _of_gladia(content: Json) -> Iterator[Spoken | None]:
    parts = _list(content, "result", "transcription", "utterances")
    key = "channel" if _several(parts, "channel") else "speaker"
    for part in parts:
        words = [_word(word.get("word"), word.get("start"), word.get("end")) for word in _list(part, "words")]
        yield _spoken(part.get("text"), part.get("start"), part.get("end"), part.get(key), words)


def _of_rev(content: Json) -> Iterator[Spoken | None]:
    for part in _list(content, "monologues"):
        elements = _list(part, "elements")
        words = [
            _word(item.get("value"), item.get("ts"), item.get("end_ts"), part.get("speaker"))
            for item in elements
            if item.get("type") == "text"
        ]
        text = "".join(str(item.get("value") or "") for item in elements)
        starts, ends = [word.start for word in words], [word.end for word in words]
        yield _spoken(text, (*starts, "")[0], ("", *ends)[-1], part.get("speaker"), words)


def _of_azure(content: Json) -> Iterator[Spoken | None]:
    """Batch and fast transcription, conversations of the Speech SDK, and batch transcription before version 3."""
    files = _list(content, "AudioFileResults") or [content]
    keys = ("recognizedPhrases", "phrases", "SegmentResults", LINES)
    phrases = [phrase for file in files for key in keys for phrase in _list(file, key)]
    parts = [{f"{key[:1].lower()}{key[1:]}": value for key, value in phrase.items()} for phrase in phrases]
    channel = next((key for key in ("channel", "channelNumber") if _several(parts, key)), "")
    for part in parts:
        best = {key.lower(): value for key, value in _first(part, "nBest").items()}
        start = _azure_time(part, "offset")
        text = _any(part, "text", "displayText") or best.get("display")
        speaker = _any(part, "speaker", "speakerId") or (part.get(channel) if channel else None)
        yield _spoken(text, start, _end(start, _azure_time(part, "duration")), speaker)


def _azure_time(part: Json, name: str) -> Stamp:
    if part.get(f"{name}InTicks") is not None:
        return _seconds(part[f"{name}InTicks"], TICKS)
    if part.get(f"{name}Milliseconds") is not None:
        return _seconds(part[f"{name}Milliseconds"], 1000)
    return _seconds(part.get(name), TICKS if isinstance(part.get(name), int | float) else 1)


def _is_azure(content: Json) -> bool:
    lines = _list(content, LINES)
    return any(map(_has("recognizedPhrases"), [content])) or bool(
        _list(content, "phrases")
        or _list(content, "AudioFileResults")
        or any("SpeakerId" in line and "Offset" in line for line in lines)
    )


def _of_google(content: Json) -> Iterator[Spoken | None]:
    results = _google_results(content)
    tagged = [words for words in map(_google_words, results) if any(word.speaker for word in words)]
    # With diarisation, the last result of version 1 repeats all words, now with speakers.
    if tagged and isinstance(tagged[-1][0].start, float) and tagged[-1] is _google_earliest(tagged):
        tagged = tagged[-1:]
    for words in tagged or map(_google_words, results):
        yield from by_speaker(words)


def _google_earliest(results: list[list[Word]]) -> list[Word]:
    """Return the last of the results that begin first."""
    return min(reversed(results), key=lambda words: words[0].start if isinstance(words[0].start, float) else 1e9)


def _google_results(content: Json) -> list[Json]:
    return _list(content, "results") or _list(content, "response", "results")


def _google_words(result: Json) -> list[Word]:
    return [
        _word(
            word.get("word"),
            _any(word, "startTime", "startOffset", "start_time", "start_offset") or 0,
            _any(word, "endTime", "endOffset", "end_time", "end_offset"),
            _any(word, "speakerLabel", "speaker_label", "speakerTag", "speaker_tag") or None,
        )
        for word in _list(_first(result, "alternatives"), "words")
    ]


def _of_nemo(content: Json) -> Iterator[Spoken | None]:
    lines = content[LINES]
    for line in lines if isinstance(lines, list) else ():
        if not isinstance(line, Mapping) or as_text(line.get("text")) == "-":  # of a manifest for diarisation
            yield None
            continue
        start = _seconds(line.get("offset") or 0)
        speaker = _any(line, "speaker", "label")
        speaker = None if speaker == "infer" else speaker
        said = _spoken(line.get("text"), start, _end(start, _seconds(line.get("duration"))), speaker)
        yield said and said._replace(session=PureWindowsPath(as_text(line.get("audio_filepath"))).stem)


def _is_whisperx(content: Json) -> bool:
    return isinstance(content.get("segments"), list)


def _is_deepgram(content: Json) -> bool:
    return bool(_list(content, "results", "channels") or _list(content, "results", "utterances"))


def _is_aws(content: Json) -> bool:
    results = content.get("results")
    return isinstance(results, Mapping) and "transcripts" in results


def _is_speechmatics(content: Json) -> bool:
    return any("type" in part and "alternatives" in part for part in _list(content, "results"))


def _is_assemblyai(content: Json) -> bool:
    return bool(_list(content, "utterances")) or any("text" in word for word in _list(content, "words"))


SHAPES = (  # the first one that matches is read
    Shape("WhisperX or Whisper", _is_whisperx, _of_whisperx),
    Shape("whisper.cpp", _has("transcription"), _of_whisper_cpp),
    Shape("Deepgram", _is_deepgram, _of_deepgram),
    Shape("AWS Transcribe", _is_aws, _of_aws),
    Shape("AWS HealthScribe", _has("Conversation", "TranscriptSegments"), _of_healthscribe),
    Shape("AWS Call Analytics", lambda content: "Content" in _first(content, "Transcript"), _of_call_analytics),
    Shape("OpenAI", lambda content: "word" in _first(content, "words"), _of_openai_words),
    Shape("ElevenLabs", lambda content: "type" in _first(content, "words"), _of_elevenlabs),
    Shape("AssemblyAI", _is_assemblyai, _of_assemblyai),
    Shape("Azure", _is_azure, _of_azure),
    Shape("Speechmatics", _is_speechmatics, _of_speechmatics),
    Shape("Google", lambda content: bool(_google_results(content)), _of_google),
    Shape("Gladia", _has("result", "transcription", "utterances"), _of_gladia),
    Shape("Rev AI", _has("monologues"), _of_rev),
    Shape("Transformers", lambda content: "timestamp" in _first(content, "chunks"), _of_transformers),
    Shape("NeMo", lambda content: any("audio_filepath" in line for line in _list(content, LINES)), _of_nemo),
)
