"""Corpus → shards: cut the clips, check them, split by group, write, and publish the folder in one rename."""

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from data import audio
from data.errors import DataError
from data.schema import (
    JOIN,
    SAMPLE_RATE,
    SCHEMA_VERSION,
    SPLITS,
    Conversation,
    Corpus,
    Finding,
    Turn,
    flag,
    split_label,
)
from data.shards import Manifest, Shards, ShardWriter
from data.split import split_groups

Track = Callable[[list[Conversation]], Iterable[Conversation]]


def prepare(
    corpus: Corpus,
    out: Path,
    *,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    track: Track = lambda conversations: conversations,
) -> Shards:
    """Write a corpus as shards into the new folder `out`; it appears complete or not at all.

    Args:
        corpus: what an importer returned.
        out: must not exist yet, or be empty.
        fractions: shares of train, val and test, of the labelled turns.
        seed: of the split.
        track: wraps the list of conversations, to show progress.

    Raises:
        DataError: `out` is taken, a split would be empty, or a recording cannot be used.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists already; remove it, or choose another folder with --out")
    conversations = list(corpus.conversations)
    sizes: Counter[str] = Counter()
    for conversation in conversations:
        sizes[conversation.group] += sum(turn.label is not None for turn in conversation.turns)
    if not sizes.total():  # nothing to classify: replies or sessions may still be learnt
        for conversation in conversations:
            sizes[conversation.group] += len(conversation.turns)
    splits = split_groups(sizes, fractions, seed)
    _check_labels(corpus, conversations)

    unfinished = out.with_name(f"{out.name}.unfinished-{os.getpid()}")
    unfinished.mkdir(parents=True)
    try:
        _write(corpus, conversations, splits, unfinished, fractions, seed, track)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return Shards(out)


def _check_labels(corpus: Corpus, conversations: Iterable[Conversation]) -> None:
    """Labels are declared; those of a turn stand in the order of the declaration."""
    known = {label: place for place, label in enumerate(corpus.labels)}
    for label in known:
        if JOIN in label:
            raise DataError(f"label {label!r} contains {JOIN!r}, which joins the labels of one turn; rename it")
    for turn in (turn for conversation in conversations for turn in conversation.turns if turn.label is not None):
        own = split_label(turn.label or "")
        if not set(own) <= known.keys():
            raise DataError(
                f"{turn.where or turn.id}: utterance {turn.id} has the label {turn.label!r}; known: {', '.join(known)}"
            )
        turn.label = JOIN.join(sorted(set(own), key=lambda label: known[label]))


def _write(
    corpus: Corpus,
    conversations: list[Conversation],
    splits: dict[str, str],
    folder: Path,
    fractions: tuple[float, float, float],
    seed: int,
    track: Track,
) -> None:
    writer = ShardWriter(folder)
    turns: Counter[str] = Counter()
    seconds: dict[str, float] = dict.fromkeys(SPLITS, 0.0)
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for conversation in track(conversations):
        split = splits[conversation.group]
        if conversation.recording is not None:
            cut_clips(conversation, corpus.findings)
        writer.write([_row(turn, conversation, split) for turn in conversation.turns])
        for turn in conversation.turns:
            turns[split] += 1
            seconds[split] += len(turn.audio) / SAMPLE_RATE if turn.audio is not None else 0.0
            if turn.label is not None:
                labels[split].update(split_label(turn.label))
            turn.audio = None  # written: a long corpus must not stay in memory
    shards, content = writer.close()
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        corpus=corpus.name,
        fingerprint=content[:16],
        sample_rate=SAMPLE_RATE,
        labels=corpus.labels,
        roles=corpus.roles,
        qualities=corpus.qualities,
        split_seed=seed,
        split_fractions=fractions,
        shards=shards,
        turns={split: turns[split] for split in SPLITS},
        hours={split: seconds[split] / 3600 for split in SPLITS},
        label_counts={split: {label: labels[split][label] for label in corpus.labels} for split in SPLITS},
        findings=dict(sorted(Counter(finding.code for finding in corpus.findings).items())),
    )
    with (folder / "findings.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(finding)) + "\n" for finding in corpus.findings)
    (folder / "manifest.json").write_text(manifest.model_dump_json(indent=1), encoding="utf-8")


def cut_clips(conversation: Conversation, findings: list[Finding]) -> None:
    """Give every turn with a start and an end its samples, and note what is odd about them."""
    assert conversation.recording is not None
    recording = audio.read_recording(conversation.recording)
    name = conversation.recording.name
    if recording.source_channels > 1:
        message = f"{recording.source_channels} channels mixed down to one"
        findings.append(Finding("W_STEREO", name, conversation.id, message))
    if recording.source_rate != SAMPLE_RATE:
        message = f"resampled from {recording.source_rate} Hz to {SAMPLE_RATE} Hz"
        findings.append(Finding("W_RESAMPLED", name, conversation.id, message))
    for turn in conversation.turns:
        if turn.start is not None and turn.end is not None:
            _cut(turn, recording, findings)


def _cut(turn: Turn, recording: audio.Recording, findings: list[Finding]) -> None:
    assert turn.start is not None
    assert turn.end is not None
    span = f"{turn.start:.2f}-{turn.end:.2f} s, recording {recording.duration:.2f} s"
    late = turn.end - recording.duration
    if late > audio.TOLERANCE:
        flag(turn, findings, "E_TS_RANGE", f"ends after the recording ({span}); kept as text, without sound")
        return
    if late > 0:
        flag(turn, findings, "W_TS_CLAMPED", f"ends just after the recording ({span}); cut at its end")
    clip = recording.pcm[audio.samples(turn.start) : audio.samples(turn.end)]
    if len(clip) < audio.MIN_SAMPLES:
        flag(turn, findings, "E_TOO_SHORT", f"shorter than 0.1 s ({span}); kept as text, without sound")
        return
    if not np.any(clip):
        flag(turn, findings, "W_SILENT", f"digital silence ({span}); kept")
    turn.audio = clip


def _row(turn: Turn, conversation: Conversation, split: str) -> dict[str, Any]:
    peak, rms_db = (None, None) if turn.audio is None else audio.level(turn.audio)
    return {
        "id": turn.id,
        "conversation": conversation.id,
        "group": conversation.group,
        "index": turn.index,
        "split": split,
        "speaker": turn.speaker,
        "text": turn.text,
        "label": turn.label,
        "subset": turn.subset,
        "quality": conversation.quality,
        "t_start": turn.start,
        "t_end": turn.end,
        "n_samples": 0 if turn.audio is None else len(turn.audio),
        "audio": None if turn.audio is None else turn.audio.astype("<i2").tobytes(),
        "peak": peak,
        "rms_db": rms_db,
        "flags": " ".join(turn.flags),
    }
