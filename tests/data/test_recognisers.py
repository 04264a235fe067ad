"""Recognisers: shapes that resemble each other, channels, words without speakers, and RTTM for one or many sessions."""

import json
import random
from pathlib import Path

import pytest

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.errors import DataError
from data.importers import IMPORTERS, guess_format
from data.importers.transcripts.shapes import SHAPES
from tests.security.mutations import changed, outcome

NAMES = {"therapist": "speaker_0 speaker_1 A agent clinician_0 guest-1 s1 ann", "client": "speaker_2 B customer"}
ROLES = {name: role for role, names in NAMES.items() for name in names.split()}
ROLES |= {"patient_0": "client", "guest-2": "client", "s2": "client", "bob": "client"}
ONE = ("why now?", 1.0, 2.0), ("I must.", 2.0, 3.0)
SAID = [("therapist", "why now?", 1.0, 2.0), ("client", "I must.", 2.0, 3.0)]
WORDS = [("why", 1.0), ("now?", 1.5), ("I", 2.0), ("must.", 2.5)]
TAGS = ["1", "1", "2", "2"]


def tagged(tags: list[str], text: str = "word", key: str = "speaker", **more: object) -> list[dict[str, object]]:
    return [
        {text: word, "start": start, "end": start + 0.5, key: tag, **more}
        for (word, start), tag in zip(WORDS, tags, strict=True)
    ]


GOOGLE = [
    {"word": word, "startOffset": f"{start}s", "endOffset": f"{start + 0.5}s", "speakerLabel": tag}
    for (word, start), tag in zip(WORDS, TAGS, strict=True)
]
PROTO = [
    {"word": word, "start_time": {"seconds": int(start), "nanos": int(start % 1 * 1e9)}, "speaker_tag": int(tag)}
    | {"end_time": {"seconds": int(start + 0.5), "nanos": int((start + 0.5) % 1 * 1e9)}}
    for (word, start), tag in zip(WORDS, TAGS, strict=True)
]
AWS = [
    {
        "type": "pronunciation",
        "start_time": str(start),
        "end_time": str(start + 0.5),
        "alternatives": [{"content": word}],
    }
    for word, start in WORDS
]
SPEECHMATICS = [
    {"type": "word", "start_time": 1.0, "end_time": 2.0, "alternatives": [{"content": "why now", "speaker": "S1"}]},
    {"type": "punctuation", "start_time": 2.0, "end_time": 2.0, "alternatives": [{"content": "?", "speaker": "S1"}]},
    {"type": "word", "start_time": 2.0, "end_time": 3.0, "alternatives": [{"content": "I must.", "speaker": "S2"}]},
]
LIKE_AZURE = [
    {"Offset": start * 1e7, "Duration": 1e7, "DisplayText": text, "SpeakerId": f"Guest-{number}"}
    for number, (text, start, _) in enumerate(ONE, 1)
]
SHAPED: dict[str, object] = {
    "elevenlabs": {"words": tagged(["speaker_1", "speaker_1", "B", "B"], "text", "speaker_id", type="word")},
    "google v2": {"results": [{"alternatives": [{"words": part}]} for part in (GOOGLE[:2], GOOGLE[2:])]},
    "google response": {"response": {"results": [{"alternatives": [{"words": PROTO}]}]}},
    "aws channels": {
        "results": {
            "transcripts": [],
            "items": AWS,
            "channel_labels": {
                "channels": [
                    {"channel_label": "ann", "items": AWS[:2]},
                    {"channel_label": "bob", "items": AWS[2:]},
                ]
            },
        }
    },
    "healthscribe": {
        "Conversation": {
            "TranscriptSegments": [
                {
                    "Content": text,
                    "BeginAudioTime": start,
                    "EndAudioTime": end,
                    "ParticipantDetails": {"ParticipantRole": who},
                }
                for (text, start, end), who in zip(ONE, ("CLINICIAN_0", "PATIENT_0"), strict=True)
            ]
        }
    },
    "call analytics": {
        "Transcript": [
            {"Content": text, "BeginOffsetMillis": start * 1000, "EndOffsetMillis": end * 1000, "ParticipantRole": who}
            for (text, start, end), who in zip(ONE, ("AGENT", "CUSTOMER"), strict=True)
        ]
    },
    "speechmatics": {"results": SPEECHMATICS},
    "azure conversation": LIKE_AZURE,
    "azure v2": {"AudioFileResults": [{"SegmentResults": LIKE_AZURE}]},
    "gladia": {
        "result": {
            "transcription": {
                "utterances": [
                    {"text": text, "start": start, "end": end, "speaker": number, "channel": 0}
                    for number, (text, start, end) in enumerate(ONE, 1)
                ]
            }
        }
    },
    "rev": {
        "monologues": [
            {"speaker": number, "elements": [{"type": "text", "value": text, "ts": start, "end_ts": end}]}
            for number, (text, start, end) in enumerate(ONE, 1)
        ]
    },
    "transformers": {
        "speakers": [
            {"text": text, "timestamp": [start, end], "speaker": f"SPEAKER_{number}"}
            for number, (text, start, end) in enumerate(ONE, 1)
        ],
        "chunks": [{"text": "x", "timestamp": [0, 1]}],
    },
    "deepgram utterances": {
        "results": {"utterances": [{"start": 1.0, "end": 3.0, "transcript": "why now? I must.", "words": tagged(TAGS)}]}
    },
}


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read(path: Path, audio: Path | None = None) -> Corpus:
    return IMPORTERS[guess_format(path)].read(path, audio, CorpusConfig(roles=ROLES))


def rows(corpus: Corpus) -> list[tuple[str, str, float | None, float | None]]:
    return [(turn.speaker, turn.text, turn.start, turn.end) for one in corpus.conversations for turn in one.turns]


@pytest.mark.parametrize("name", SHAPED)
def test_shapes_that_resemble_each_other_are_told_apart(name: str, tmp_path: Path) -> None:
    assert rows(read(write(tmp_path / "a.json", SHAPED[name]))) == SAID


ALONE: dict[str, object] = {  # no speakers were asked for; all is on the first channel
    "Deepgram": {"results": {"utterances": [{"start": 1.0, "end": 2.0, "transcript": "hi", "channel": 0}]}},
    "Azure": {"recognizedPhrases": [{"channel": 0, "offset": "PT1S", "nBest": [{"display": "hi"}]}]},
    "OpenAI": {"text": "hi", "words": [{"word": "hi", "start": 1.0, "end": 2.0}]},
    "AssemblyAI": {"utterances": None, "words": [{"text": "hi", "start": 1000, "end": 2000, "speaker": None}]},
    "NeMo": [{"audio_filepath": "x/a.wav", "text": "hi", "duration": 2.0, "label": "infer"}],
}


@pytest.mark.parametrize("name", ALONE)
def test_single_channel_is_no_speaker(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", ALONE[name])
    with pytest.raises(DataError, match=rf"^a\.json: output of {name} without speakers; .* a\.rttm, or transcribe"):
        read(path)
    write(tmp_path / "a.rttm", "SPEAKER a 1 0 3 <NA> <NA> bob <NA> <NA>\n")
    assert [row[:2] for row in rows(read(path))] == [("client", "hi")]


RTTM = "SPEAKER a 1 0.9 1.1 <NA> <NA> ann <NA> <NA>\nSPEAKER a 1 2.0 5 <NA> <NA> bob <NA> <NA>\n"


@pytest.mark.parametrize("name", ["assemblyai", "openai", "whisper-timestamped", "whisper.cpp", "openai segments"])
def test_words_without_speakers_are_split_by_rttm(name: str, tmp_path: Path) -> None:
    """Otherwise the whole session would be one turn of one speaker."""
    plain = [{"word": word, "start": start, "end": start + 0.5} for word, start in WORDS]
    whole = {"text": " why now? I must.", "start": 1.0, "end": 3.0}
    tokens = [{"text": f" {word}", "offsets": {"from": at * 1000, "to": at * 1000 + 500}} for word, at in WORDS]
    contents: dict[str, object] = {
        "assemblyai": {"words": [{"text": w, "start": t * 1000, "end": t * 1000 + 500} for w, t in WORDS]},
        "openai": {"words": plain},
        "openai segments": {"segments": [whole], "words": plain},
        "whisper-timestamped": {"segments": [whole | {"words": [{"text": w["word"], **w} for w in plain]}]},
        "whisper.cpp": {
            "transcription": [{"text": whole["text"], "offsets": {"from": 1000, "to": 3000}, "tokens": tokens}]
        },
    }
    path = write(tmp_path / "a.json", contents[name])
    write(tmp_path / "a.rttm", RTTM)
    assert rows(read(path)) == SAID


def test_text_is_kept_where_words_differ_from_it(tmp_path: Path) -> None:
    """A word of the text was once cut off, and what was said before it was written twice."""
    words = [{"word": "what", "speaker": "ann"}, {"word": "2014,"}, {"word": "in", "speaker": "bob"}, {"word": "today"}]
    segment = {"text": "what happened in today", "start": 0.0, "end": 1.0, "words": words}
    other = {"text": "quite another text", "start": 1.0, "end": 2.0, "words": words}
    corpus = read(write(tmp_path / "a.json", {"segments": [segment, other]}))
    assert [row[1] for row in rows(corpus)] == ["what happened", "in today", "what 2014,", "in today"]


def test_manifest_of_nemo_has_a_session_per_recording(tmp_path: Path) -> None:
    lines = [
        {"audio_filepath": f"/data/{name}.wav", "offset": 1.0, "duration": 2.0, "text": text, "speaker": "ann"}
        for name, text in (("a", "hi"), ("b", "yo"), ("b", "so"))
    ]
    path = write(tmp_path / "manifest.jsonl", "\n\n".join(map(json.dumps, lines)))
    assert guess_format(path) == "recogniser"
    corpus = read(path)
    assert [(one.id, len(one.turns)) for one in corpus.conversations] == [("a", 1), ("b", 2)]
    assert [turn.where for turn in corpus.conversations[1].turns] == ["manifest.jsonl:3", "manifest.jsonl:5"]


def test_files_of_folders_are_named_like_these(tmp_path: Path) -> None:
    """Also beside a file that is something else, and with a hidden copy; a recording is found by its name within."""
    for name in ("a", "b"):
        content = {
            "utterances": [{"text": "hi", "start": 0, "end": 900, "speaker": "ann"}],
            "audio_url": f"https://x/r{name}.wav?k=1",
        }
        write(tmp_path / "x" / name / "transcript.json", content)
    write(tmp_path / "x" / ".cache" / "transcript.json", {"utterances": 1})
    write(tmp_path / "x" / "0meta.json", {"model": "large"})
    (tmp_path / "audio").mkdir()
    for name in ("a", "rb"):
        (tmp_path / "audio" / f"{name}.wav").touch()
    corpus = read(tmp_path / "x", tmp_path / "audio")
    found = [(one.id, one.recording and one.recording.name) for one in corpus.conversations]
    assert found == [("a", "a.wav"), ("b", "rb.wav")]


def test_one_rttm_file_may_have_many_sessions(tmp_path: Path) -> None:
    """Names may contain spaces. Alone it has no text."""
    for name in ("a 1", "b"):
        write(tmp_path / f"{name}.json", {"segments": [{"text": "hi", "start": 0.0, "end": 1.0}]})
    rttm = "SPEAKER a 1 1 0 1 <NA> <NA> ann <NA> <NA>\n;; note\nSPEAKER b 1 0 1 <NA> <NA> bob <NA>\n"
    path = write(tmp_path / "all.rttm", rttm)
    assert [row[0] for row in rows(read(tmp_path))] == ["therapist", "client"]
    with pytest.raises(DataError, match=r"says who speaks when, but not what; give a transcript, such as all\.json"):
        guess_format(path)
    write(tmp_path / "b.rttm", rttm.replace("SPEAKER b", "SPEAKER c"))
    with pytest.raises(DataError, match=r"^b\.rttm: no rows of b; it has a 1, c"):
        read(tmp_path / "b.json")


def test_changed_outputs_are_read_or_refused(tmp_path: Path) -> None:
    """Values of other types and missing keys, in every shape."""
    contents, outcomes = [*SHAPED.values(), *ALONE.values()], []
    for seed in range(150):
        content = changed(random.Random(seed).choice(contents), seed)
        path = write(tmp_path / "a.json", content)
        outcomes.append(outcome(lambda path=path: IMPORTERS["recogniser"].read(path, None, CorpusConfig())))
    assert any(outcomes)
    assert not all(outcomes)
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
