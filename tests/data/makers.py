"""The same dialogues in every format."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from data.corpus.config import ColumnConfig, CorpusConfig


class Said(NamedTuple):
    speaker: str
    text: str  # its first word is unique
    label: str
    start: int  # s
    end: int  # s, the start of the next turn


Dialogues = dict[str, list[Said]]
Files = dict[str, str]  # name → content

DIALOGUES: Dialogues = {
    "12": [
        Said("therapist", "What brings you here today?", "question", 0, 2),
        Said("client", 'Well, my wife says "stop", olé', "neutral", 2, 5),
        Said("therapist", "She worries\nabout you.", "reflection", 5, 6),
        Said("client", "Smoking costs me too much; I want to stop.", "change", 6, 65),
        Said("therapist", "Fine.", "other", 65, 66),
    ],
    "7": [
        Said("client", "Beer helps me sleep.", "sustain", 1, 3),
        Said("therapist", "Go on.", "other", 3, 4),
    ],
}


def separated(header: str, rows: list[list[object]], mark: str = ",") -> str:
    sink = io.StringIO()
    csv.writer(sink, delimiter=mark, lineterminator="\n").writerows([header.split(), *rows])
    return sink.getvalue()


def clock(seconds: int) -> str:
    return f"00:{seconds // 60:02}:{seconds % 60:02}"


def annomi(dialogues: Dialogues, annotators: int = 0) -> Files:
    header = "transcript_id mi_quality video_title video_url topic utterance_id interlocutor timestamp utterance_text"
    rows: list[list[object]] = []
    for name, said in dialogues.items():
        for number, turn in enumerate(said):
            codes = [turn.label, "n/a"] if turn.speaker == "therapist" else ["n/a", turn.label]
            row = [name, "high", "t", f"video{name}", "x", number, turn.speaker, clock(turn.start), turn.text]
            rows += [[*row, *who, *codes] for who in ([[place] for place in range(annotators)] or [[]])]
    who = " annotator_id" if annotators else ""
    return {"annomi.csv": separated(f"{header}{who} main_therapist_behaviour client_talk_type", rows)}


def annomi_full(dialogues: Dialogues) -> Files:
    return annomi(dialogues, annotators=3)


def whisperx(dialogues: Dialogues) -> Files:
    speakers = {"therapist": "SPEAKER_00", "client": "SPEAKER_01"}
    files = {}
    for name, said in dialogues.items():
        segments = [
            {"start": float(turn.start), "end": float(turn.end), "text": f" {turn.text}", "words": [{"word": "x"}]}
            | {"speaker": speakers.get(turn.speaker, turn.speaker)}
            for turn in said
        ]
        files[f"{name}.json"] = json.dumps({"segments": segments, "language": "en"}, ensure_ascii=False, indent=1)
    return files


def assemblyai(dialogues: Dialogues) -> Files:
    return {
        f"{name}.json": json.dumps(
            {
                "utterances": [
                    {"speaker": turn.speaker, "text": turn.text, "start": turn.start * 1000, "end": turn.end * 1000}
                    for turn in said
                ]
            },
            ensure_ascii=False,
        )
        for name, said in dialogues.items()
    }


def azure(dialogues: Dialogues) -> Files:
    return {
        f"{name}.json": json.dumps(
            {
                "recognizedPhrases": [
                    {"channel": turn.speaker, "offset": f"PT{turn.start // 60}M{turn.start % 60}S"}
                    | {"duration": f"PT{turn.end - turn.start}S", "nBest": [{"display": turn.text}]}
                    for turn in said
                ]
            },
            ensure_ascii=False,
        )
        for name, said in dialogues.items()
    }


def web_vtt(dialogues: Dialogues) -> Files:
    """Teams names the speaker by markup, here with an identifier and a setting in every cue."""
    files = {}
    for name, said in dialogues.items():
        cues = [
            f"{name}-{number}\n{clock(turn.start)}.000 --> {clock(turn.end)}.000 align:start\n"
            f"<v {turn.speaker}>{turn.text}</v>"
            for number, turn in enumerate(said)
        ]
        files[f"{name}.vtt"] = "\n\n".join(["WEBVTT", "NOTE 1 --> 2", *cues]) + "\n"
    return files


def sub_rip(dialogues: Dialogues) -> Files:
    """Zoom writes the speaker before the text."""
    files = {}
    for name, said in dialogues.items():
        cues = [
            f"{number}\n{clock(turn.start)},000 --> {clock(turn.end)},000\n{turn.speaker}: {turn.text}\n"
            for number, turn in enumerate(said, start=1)
        ]
        files[f"{name}.srt"] = "\n".join(cues)
    return files


def typed(dialogues: Dialogues) -> Files:
    return {
        f"{name}.txt": "".join(f"[{clock(turn.start)}] {turn.speaker}: {turn.text}\n" for turn in said)
        for name, said in dialogues.items()
    }


def eaf(dialogues: Dialogues) -> Files:
    """A tier for each speaker, and a tier of codes that depends on it."""
    files = {}
    for name, said in dialogues.items():
        slots = "".join(
            f'<TIME_SLOT TIME_SLOT_ID="{edge}{number}" TIME_VALUE="{getattr(turn, edge) * 1000}"/>'
            for number, turn in enumerate(said)
            for edge in ("start", "end")
        )
        tiers = []
        for speaker in dict.fromkeys(turn.speaker for turn in said):
            own = [(number, turn) for number, turn in enumerate(said) if turn.speaker == speaker]
            texts = [
                f'<ANNOTATION><ALIGNABLE_ANNOTATION ANNOTATION_ID="a{number}" TIME_SLOT_REF1="start{number}" '
                f'TIME_SLOT_REF2="end{number}"><ANNOTATION_VALUE>{escape(turn.text)}</ANNOTATION_VALUE>'
                "</ALIGNABLE_ANNOTATION></ANNOTATION>"
                for number, turn in own
            ]
            codes = [
                f'<ANNOTATION><REF_ANNOTATION ANNOTATION_ID="c{number}" ANNOTATION_REF="a{number}">'
                f"<ANNOTATION_VALUE>{turn.label}</ANNOTATION_VALUE></REF_ANNOTATION></ANNOTATION>"
                for number, turn in own
            ]
            tiers.append(f'<TIER TIER_ID="{speaker}">{"".join(texts)}</TIER>')
            tiers.append(f'<TIER TIER_ID="{speaker} code" PARENT_REF="{speaker}">{"".join(codes)}</TIER>')
        body = f"<TIME_ORDER>{slots}</TIME_ORDER>{''.join(tiers)}"
        files[f"{name}.eaf"] = f'<?xml version="1.0"?>\n<ANNOTATION_DOCUMENT>{body}</ANNOTATION_DOCUMENT>'
    return files


def text_grid(dialogues: Dialogues) -> Files:
    files = {}
    for name, said in dialogues.items():
        tiers = []
        for speaker in dict.fromkeys(turn.speaker for turn in said):
            for kind in ("", "_code"):
                rows = [
                    f'{turn.start}\n{turn.end}\n"{(turn.label if kind else turn.text).replace(chr(34), chr(34) * 2)}"'
                    for turn in said
                    if turn.speaker == speaker
                ]
                tiers.append("\n".join(['"IntervalTier"', f'"{speaker}{kind}"', "0", "99", str(len(rows)), *rows]))
        head = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "0", "99", "<exists>", str(len(tiers))]
        files[f"{name}.TextGrid"] = "\n".join([*head, *tiers]) + "\n"
    return files


def elan_export(dialogues: Dialogues) -> Files:
    header = ["Tier", "Begin Time - hh:mm:ss.ms", "End Time - hh:mm:ss.ms", "Annotation", "File"]
    lines = ["\t".join(header)]
    for name, said in dialogues.items():
        for speaker in dict.fromkeys(turn.speaker for turn in said):
            for turn in said:
                if turn.speaker == speaker:
                    times = (f"{clock(turn.start)}.000", f"{clock(turn.end)}.000")
                    text = turn.text.replace("\n", " ")
                    lines.append("\t".join([speaker, *times, text, f"{name}.eaf"]))
                    lines.append("\t".join([f"{speaker} code", *times, turn.label, f"{name}.eaf"]))
    return {"export.txt": "\n".join(lines) + "\n"}


def chat(dialogues: Dialogues) -> Files:
    files = {}
    for name, said in dialogues.items():
        lines = ["@UTF8", "@Begin", "@Languages:\teng", "@Participants:\tTHE Therapist, CLI Client"]
        for turn in said:
            code = {"therapist": "THE", "client": "CLI"}.get(turn.speaker, turn.speaker)
            text = turn.text.replace("\n", "\n\t")
            lines += [f"*{code}:\t{text} \x15{turn.start * 1000}_{turn.end * 1000}\x15", f"%cod:\t{turn.label}"]
        files[f"{name}.cha"] = "\n".join([*lines, "@End"]) + "\n"
    return files


def kaldi(dialogues: Dialogues) -> Files:
    files = dict.fromkeys(("text", "utt2spk", "segments", "wav.scp"), "")
    for name, said in dialogues.items():
        files["wav.scp"] += f"{name} /export/corpora/{name}.wav\n"
        for number, turn in enumerate(said):
            utterance = f"{name}-{number:04}"
            files["text"] += f"{utterance} {' '.join(turn.text.split())}\n"
            files["utt2spk"] += f"{utterance} {turn.speaker}\n"
            files["segments"] += f"{utterance} {name} {turn.start}.00 {turn.end}.00\n"
    return files


def lhotse(dialogues: Dialogues) -> Files:
    rows = [
        {"id": f"{name}-{number}", "recording_id": name, "start": float(turn.start), "channel": 0}
        | {"duration": float(turn.end - turn.start), "text": turn.text, "speaker": turn.speaker}
        for name, said in dialogues.items()
        for number, turn in enumerate(said)
    ]
    return {"supervisions.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)}


def daic(dialogues: Dialogues) -> Files:
    speakers = {"therapist": "Ellie", "client": "Participant"}
    files = {}
    for name, said in dialogues.items():
        rows: list[list[object]] = [
            [f"{turn.start}.000", f"{turn.end}.0", speakers.get(turn.speaker, turn.speaker), turn.text] for turn in said
        ]
        files[f"{name}_TRANSCRIPT.csv"] = separated("start_time stop_time speaker value", rows, "\t")
    return files


def mi_tags(dialogues: Dialogues) -> Files:
    files = {}
    for name, said in dialogues.items():
        rows: list[list[object]] = []
        for who in ("ann", "bob"):
            for number, turn in enumerate(said):
                speaker = turn.speaker[0].upper() if turn.speaker in SPEAKERS else turn.speaker
                rows.append([number, speaker, turn.text, turn.label.upper(), who])
        files[f"{name}.csv"] = separated("turn speaker text code annotator", rows)
    return files


SPEAKERS = ("therapist", "client")
COLUMNS = "conversation speaker text label start end"


def records(dialogues: Dialogues) -> list[dict[str, object]]:
    rows = [(name, *turn) for name, said in dialogues.items() for turn in said]
    return [dict(zip(COLUMNS.split(), row, strict=True)) for row in rows]


def table(dialogues: Dialogues) -> Files:
    return {"table.csv": separated(COLUMNS, [list(row.values()) for row in records(dialogues)])}


def semicolons(dialogues: Dialogues) -> Files:
    return {"table.csv": separated(COLUMNS, [list(row.values()) for row in records(dialogues)], ";")}


def tabs(dialogues: Dialogues) -> Files:
    return {"table.tsv": separated(COLUMNS, [list(row.values()) for row in records(dialogues)], "\t")}


def json_lines(dialogues: Dialogues) -> Files:
    return {"table.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records(dialogues))}


PLAIN = CorpusConfig()


@dataclass(frozen=True)
class Maker:
    """Writes the dialogues in a format; the other fields say what the format contains."""

    format: str
    files: Callable[[Dialogues], Files]
    column: str = ""  # a required column
    config: CorpusConfig = PLAIN
    folder: bool = False  # whether the source is a folder
    ends: bool = True
    times: bool = True
    labels: bool = True
    audio: str = "{}.wav"
    by_time: bool = False  # whether the format has no order but the times


AS_TABLE = CorpusConfig(columns=ColumnConfig(label="label", start="start", end="end"))
WHISPERX = CorpusConfig(roles={"speaker_00": "therapist", "SPEAKER_01": "client"})
MAKERS = {
    "annomi": Maker("annomi", annomi, "utterance_text", ends=False),
    "annomi-full": Maker("annomi", annomi_full, "client_talk_type", ends=False),
    "whisperx": Maker("whisperx", whisperx, config=WHISPERX, folder=True, labels=False),
    "assemblyai": Maker("recogniser", assemblyai, folder=True, labels=False),
    "azure": Maker("recogniser", azure, folder=True, labels=False),
    "web-vtt": Maker("subtitles", web_vtt, folder=True, labels=False),
    "subrip": Maker("subtitles", sub_rip, folder=True, labels=False),
    "dialogue": Maker("dialogue", typed, folder=True, labels=False, ends=False),
    "eaf": Maker("elan", eaf, folder=True, by_time=True),
    "elan-export": Maker("elan", elan_export, by_time=True),
    "text-grid": Maker("praat", text_grid, folder=True, by_time=True),
    "chat": Maker("chat", chat, folder=True),
    "kaldi": Maker("kaldi", kaldi, folder=True, labels=False),
    "lhotse": Maker("lhotse", lhotse, labels=False),
    "daic": Maker("daic", daic, "stop_time", folder=True, labels=False, audio="{}_AUDIO.wav"),
    "mi-tags": Maker("mi-tags", mi_tags, "speaker", folder=True, times=False),
    "table": Maker("table", table, "conversation", AS_TABLE),
    "table-semicolons": Maker("table", semicolons, "label", AS_TABLE),
    "table-tsv": Maker("table", tabs, "text", AS_TABLE),
    "table-jsonl": Maker("table", json_lines, "speaker", AS_TABLE),
}


def write(maker: Maker, folder: Path, files: Files, *, encoding: str = "utf-8", newline: str = "\n") -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content, encoding=encoding, newline=newline)
    return folder if maker.folder else folder / next(iter(files))
