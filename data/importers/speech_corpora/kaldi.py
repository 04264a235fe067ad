"""Importer for Kaldi data directories: text, utt2spk, segments and wav.scp. A recording is a session.

Commands in wav.scp (`sph2pipe … |`) are never run.
"""

from pathlib import Path

from data.corpus.config import CorpusConfig
from data.corpus.schema import Corpus, is_rejected
from data.errors import DataError
from data.importers.base.builder import UNKNOWN, TurnBuilder, refuse_no_turns
from data.importers.base.cells import speaker_key
from data.importers.base.recordings import refuse_missing_folder, refuse_no_recordings, set_recordings
from data.importers.base.sessions import Segment, conversation
from data.importers.base.tabular import read_text
from data.importers.speech_corpora.files import named_file


def read_kaldi(source: Path, audio: Path | None, config: CorpusConfig) -> Corpus:
    """Read a data directory.

    Args:
        source: the directory. Without segments, every utterance is a recording, and a session of one turn.
        audio: folder of the recordings; files of wav.scp are found in it by the end of their path, or else by the
            name of the recording. None: text only.
        config: settings; `columns.label` names a file of the directory with codes, such as utt2code.

    Raises:
        DataError: a file cannot be read or misses an utterance, or wav.scp has a command.
    """
    if not (source / "text").is_file():
        raise DataError(f"{source}: no file text; give a Kaldi data directory, with text, utt2spk and segments")
    builder, encoding = TurnBuilder("kaldi", config), config.encoding
    texts = _table(source / "text", encoding)
    speakers = _table(source / "utt2spk", encoding)
    times = _table(source / "segments", encoding) if (source / "segments").is_file() else None
    scripts = _table(source / "wav.scp", encoding) if (source / "wav.scp").is_file() else {}
    codes = _table(source / config.columns.label, encoding) if config.columns.label else {}
    said: dict[str, list[Segment]] = {}
    for utterance, (where, text) in texts.items():
        recording, start, end = _place(utterance, where, times, scripts)
        if utterance not in speakers:
            raise DataError(f"{where}: {utterance!r} is not in utt2spk, which names its speaker; add it")
        speaker = _own_name(speakers[utterance][1], recording, builder)
        code = codes.get(utterance, ("", ""))[1]
        said.setdefault(recording, []).append(Segment(where, speaker, text, start, end, code))
    builder.codes.learn(segment.code for segments in said.values() for segment in segments)
    timed = times is not None or audio is not None
    sessions = [conversation(name, segments, builder, timed and times is not None) for name, segments in said.items()]
    refuse_no_turns(sessions, source)
    if audio is not None:
        refuse_missing_folder(audio)
        named = {name: found for name in said if (found := _named(name, scripts, audio)) is not None}
        if times is not None:
            set_recordings(sessions, audio, builder, named)
        else:
            for session in sessions:
                for turn in session.turns:
                    turn.clip = None if is_rejected(turn.flags) else audio / named.get(session.id, f"{session.id}.wav")
            refuse_no_recordings((turn.clip for session in sessions for turn in session.turns), audio)
    return builder.corpus(sessions)


def is_kaldi(source: Path) -> bool:
    """Return whether a source is a Kaldi data directory."""
    return (source / "text").is_file() and any((source / name).is_file() for name in ("wav.scp", "utt2spk", "segments"))


def _table(path: Path, encoding: str) -> dict[str, tuple[str, str]]:
    """Return what each line of a file says about its first word, with its place.

    Raises:
        DataError: the file cannot be read or is empty, or a word is there twice.
    """
    if not path.is_file():
        raise DataError(f"{path.parent}: no file {path.name}; write it, e.g. <utterance> <speaker> in each line")
    rows: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(read_text(path, encoding).split("\n"), start=1):
        key, _, rest = line.strip().replace("\t", " ", 1).partition(" ")
        if not key:
            continue
        where = f"{path.name}:{number}"
        if key in rows:
            raise DataError(f"{where}: {key!r} is already at {rows[key][0]}; remove one of the lines")
        rows[key] = (where, rest.strip())
    if not rows:
        raise DataError(f"{path.name}: the file is empty; check the path of the source")
    return rows


def _place(
    utterance: str, where: str, times: dict[str, tuple[str, str]] | None, scripts: dict[str, tuple[str, str]]
) -> tuple[str, str, str]:
    """Return the recording of an utterance, and its start and end as written."""
    if times is None:
        if scripts and utterance not in scripts:
            raise DataError(
                f"{where}: {utterance!r} is no recording of wav.scp, and there is no file segments; write it, with "
                "<utterance> <recording> <start> <end> in each line"
            )
        return utterance, "", ""
    if utterance not in times:
        raise DataError(f"{where}: {utterance!r} is not in segments, which has its times; add it")
    place, rest = times[utterance]
    cells = rest.split()
    if len(cells) < 3:
        raise DataError(f"{place}: not <utterance> <recording> <start> <end>; fix the line")
    return cells[0], cells[1], "" if cells[2] == "-1" else cells[2]  # -1: the end of the recording


def _own_name(speaker: str, recording: str, builder: TurnBuilder) -> str:
    """Return a speaker without the name of the recording: s1-therapist is the therapist of s1."""
    if builder.role(speaker, recording) != UNKNOWN:
        return speaker
    name, session = speaker_key(speaker), speaker_key(recording)
    own = name.removeprefix(session).removesuffix(session).strip("-_.")
    return own if own and builder.role(own, recording) != UNKNOWN else speaker


def _named(recording: str, scripts: dict[str, tuple[str, str]], audio: Path) -> str | None:
    where, script = scripts.get(recording, ("", ""))
    if script.endswith("|") or script.startswith("|"):
        raise DataError(
            f"{where}: {script.split(maxsplit=1)[0]!r} is a command, which is not run; write its output to a file "
            f"({recording}.wav) and name that file, or name the .sph, .flac or .mp3 file itself, which is read"
        )
    if ".ark:" in script:
        raise DataError(f"{where}: Kaldi archives are not read; write {recording}.wav (wav-copy) and name that file")
    return named_file(script, audio)
