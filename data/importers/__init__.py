"""Importers of corpus formats: one small module each with the same interface, and the registry of the command line.

An importer reads a source (file or folder), optionally a folder with recordings, and the settings. It returns a
`data.corpus.schema.Corpus`: every row becomes a turn with its position in the source and its label as written, in lower
case. `data.preparation.validate` checks labels, times, ids and recordings for all formats. An importer only reports
what it alone can know: times that cannot be parsed, speakers without a role, annotators without a majority.

A new format needs a module with such a function and one that recognises a source, an entry here, and a maker in
tests/data/makers.py. A format with one file per session is a function from a file to its segments: see
data/importers/base/sessions.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus
from data.errors import DataError, listed
from data.importers.annotation_tools.chat import is_chat, read_chat
from data.importers.annotation_tools.elan import is_elan, read_elan
from data.importers.annotation_tools.praat import is_praat, read_praat
from data.importers.base.tabular import OTHER
from data.importers.speech_corpora.huggingface import is_huggingface, read_huggingface
from data.importers.speech_corpora.kaldi import is_kaldi, read_kaldi
from data.importers.speech_corpora.lhotse import is_lhotse, read_lhotse
from data.importers.tables.annomi import is_annomi, read_annomi
from data.importers.tables.daic import is_daic, read_daic
from data.importers.tables.mi_tags import is_mi_tags, read_mi_tags
from data.importers.tables.table import is_table, read_table
from data.importers.transcripts.dialogue import is_dialogue, read_dialogue
from data.importers.transcripts.recognisers import is_recogniser, is_whisperx, read_recogniser, read_whisperx
from data.importers.transcripts.subtitles import is_subtitles, read_subtitles

Importer = Callable[[Path, Path | None, CorpusConfig], Corpus]  # source, folder of recordings or None, settings


@dataclass(frozen=True, slots=True)
class Format:
    """A corpus format."""

    read: Importer  # raises DataError for a source that cannot be used
    recognises: Callable[[Path], bool]  # whether a source looks like this format; reads no more than its beginning
    description: str  # one sentence for the command line
    example: str  # SOURCE and options of `sweep prepare`


IMPORTERS: Mapping[str, Format] = MappingProxyType(
    {  # in the order in which `guess_format` asks: the general ones come last
        "annomi": Format(
            read_annomi,
            is_annomi,
            "AnnoMI-simple or AnnoMI-full: one CSV; recordings are <transcript_id>.wav.",
            "AnnoMI-full.csv --audio recordings",
        ),
        "kaldi": Format(
            read_kaldi,
            is_kaldi,
            "A Kaldi data directory with text, utt2spk and segments; a recording is a session.",
            "data/train --audio recordings --set roles.spk01=therapist",
        ),
        "lhotse": Format(
            read_lhotse,
            is_lhotse,
            "lhotse manifests of supervisions or cuts (JSONL); a recording is a session.",
            "manifests --audio recordings --set roles.spk01=therapist",
        ),
        "whisperx": Format(
            read_whisperx,
            is_whisperx,
            "WhisperX output with speakers: one JSON file per session.",
            "transcripts --audio recordings --set roles.SPEAKER_00=therapist --set roles.SPEAKER_01=client",
        ),
        "recogniser": Format(
            read_recogniser,
            is_recogniser,
            "JSON of a recogniser, one file per session: OpenAI, whisper.cpp, Transformers, AWS, Deepgram, AssemblyAI, "
            "Azure, Google, ElevenLabs, Gladia, Rev AI, Speechmatics; or a manifest of NeMo.",
            "transcripts --audio recordings --set roles.A=therapist --set roles.B=client",
        ),
        "subtitles": Format(
            read_subtitles,
            is_subtitles,
            "WebVTT or SRT with speakers, as Zoom and Teams export them: one file per session.",
            "transcripts --audio recordings --set 'roles={Dr Lee: therapist, Sam: client}'",
        ),
        "elan": Format(
            read_elan,
            is_elan,
            "ELAN: .eaf files, or tab-delimited text exported from it; a tier per speaker, and perhaps one with codes.",
            "annotations --audio recordings --set roles.Anna=therapist",
        ),
        "praat": Format(
            read_praat,
            is_praat,
            "Praat: one TextGrid per session; a tier per speaker, and perhaps one with codes.",
            "annotations --audio recordings --set 'tiers.code=\"{tier}_code\"'",
        ),
        "chat": Format(
            read_chat,
            is_chat,
            "CHAT, as in TalkBank: one .cha file per session; codes are on %cod lines.",
            "transcripts --audio recordings --set roles.INV=therapist",
        ),
        "dialogue": Format(
            read_dialogue,
            is_dialogue,
            "Plain text or Word with the speaker before each turn (T: …, C: …): one file per session.",
            "transcripts --set roles.Interviewer=therapist",
        ),
        "daic": Format(
            read_daic,
            is_daic,
            "A folder like DAIC-WOZ or E-DAIC: <id>_TRANSCRIPT.csv and <id>_AUDIO.wav.",
            "daic-woz",
        ),
        "mi-tags": Format(
            read_mi_tags,
            is_mi_tags,
            "CSV with turn, speaker, text, code and annotator: one file, or a folder of them.",
            "utterances.csv",
        ),
        "huggingface": Format(
            read_huggingface,
            is_huggingface,
            "A Hugging Face dataset with audio, in Parquet or as save_to_disk writes it: one row per turn.",
            "dataset --set columns.conversation=session --set columns.label=label",
        ),
        "table": Format(
            read_table,
            is_table,
            "Any CSV, TSV, Excel, JSON, JSON Lines or Parquet file, or a folder of them; columns.* name the columns.",
            "turns.csv --audio recordings --set columns.label=code",
        ),
    }
)


def guess_format(source: Path) -> str:
    """Return the name of the format that a source looks like.

    Raises:
        DataError: there is no such source, or no format recognises it.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; check the path of the source")
    for name, known in IMPORTERS.items():
        try:
            if known.recognises(source):
                return name
        except DataError:
            continue  # not readable in this format; another one may read it
    if source.suffix.lower() == ".rttm":
        raise DataError(
            f"{source}: says who speaks when, but not what; give a transcript, such as {source.stem}.json or "
            f"{source.stem}.vtt, and leave {source.name} beside it"
        )
    if source.suffix.lower() in OTHER:
        raise DataError(f"{source}: {source.suffix} is not read; save it as {OTHER[source.suffix.lower()]}")
    inside = f" ({listed(path.name for path in source.iterdir())})" if source.is_dir() else ""
    raise DataError(
        f"{source}: no format recognises it{inside}; `sweep formats` lists the formats, and what each expects"
    )
