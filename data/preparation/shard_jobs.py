"""Shard jobs: group sessions into shards, name the shards, and write them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.corpus import audio
from data.corpus.config import CorpusConfig
from data.corpus.decoding import StoredClip
from data.corpus.issues import Finding
from data.corpus.schema import SCHEMA_VERSION, Conversation, Turn, TurnRow, is_rejected
from data.errors import DataError
from data.preparation.validate import Aligner, check_order, cut, read_clip, recording_of
from data.shards.format import ClipStore, ShardFile, encoded_shard
from data.shards.store import Store

SHARD_BYTES = 64 << 20
_HASHED = 1 << 22  # samples that are hashed at a time
ALIGNED_BYTES = SHARD_BYTES // 8  # alignment is slow; smaller jobs keep all CPUs busy and lose less to a kill


@dataclass(frozen=True)
class ShardJob:
    """A shard to be written, with all that the process needs that writes it."""

    store: Store
    name: str
    conversations: Sequence[Conversation]
    keys: dict[str, str]  # `conversation_key` by conversation id
    config: CorpusConfig
    align: Aligner | None

    def __call__(self) -> ShardFile:
        """Cut the clips, write the shard, and return its description."""
        rows: list[TurnRow] = []
        findings: list[Finding] = []
        with ClipStore() as clips:
            for conversation in self.conversations:
                self._refuse_unseen(conversation)
                recordings = cut(conversation, self.config.channels, findings, self.align)
                if self.align is not None:
                    check_order(conversation.turns, findings)
                hashes = {path: _hash(recording.pcm) for path, recording in recordings.items()}
                for turn in conversation.turns:
                    read_clip(turn, findings)
                    path = recording_of(turn, conversation)
                    recording = recordings.get(path) if path is not None else None
                    digest = hashes.get(path, "") if path is not None else ""
                    row, encoded = _row(turn, conversation, recording, digest, self.config.codec)
                    rows.append(row)
                    clips.append(encoded)
                    turn.audio = None  # it is encoded now; free the samples
            with encoded_shard(self.name, rows, clips, self.keys, findings) as (buffer, file):
                self.store.write(self.name, buffer)
            return file

    def to_arrow(self) -> pa.Table:
        """Run the job and return its result as a table, which Ray Data can send to another process."""
        return self().to_arrow()

    def _refuse_unseen(self, conversation: Conversation) -> None:
        """Raise a DataError if this node does not see a recording that existed when the jobs were made."""
        turns = [turn for turn in conversation.turns if not is_rejected(turn.flags)]
        sources = [conversation.recording if turns else None, *(turn.recording for turn in turns)]
        for source in (*sources, *(turn.clip for turn in turns)):
            if source is None or audio.exists(source):
                continue
            raise DataError(f"{source}: the recording is not visible on this node; use a folder that all nodes share")


def serially(jobs: Sequence[ShardJob]) -> Iterator[ShardFile]:
    """Run the jobs one after the other in this process."""
    return (job() for job in jobs)


def conversation_key(conversation: Conversation, config: CorpusConfig, align: str | None) -> str:
    """Return a hash of everything that determines the rows of a conversation.

    Args:
        conversation: a checked conversation; a recording counts with its name, size and time of modification.
        config: settings of the corpus.
        align: key of the alignment.
    """
    content: list[object] = [SCHEMA_VERSION, config.codec, config.channels, align]
    content += [conversation.id, conversation.quality, _stamp(conversation.recording)]
    for turn in conversation.turns:
        fields = {field.name: getattr(turn, field.name) for field in dataclasses.fields(turn)}
        if fields.pop("recording") is not None:  # corpora from before have keys without it
            fields["recording"] = _stamp(turn.recording)
        samples = None if turn.audio is None else hashlib.sha256(turn.audio.tobytes()).hexdigest()
        # The line is left out, because a row that is inserted above moves all others.
        content.append({**fields, "audio": samples, "clip": _stamp(turn.clip), "where": None})
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _stamp(source: Path | StoredClip | None) -> tuple[str, int, int] | None:
    if source is None or not audio.exists(source):
        return None
    status = (source.path if isinstance(source, StoredClip) else source).stat()
    return (source.name, status.st_size, status.st_mtime_ns)


def shard_jobs(
    conversations: Sequence[Conversation],
    store: Store,
    keys: Mapping[str, str],
    config: CorpusConfig,
    align: Aligner | None,
) -> list[ShardJob]:
    """Group whole conversations in their order into shards of about SHARD_BYTES."""
    for conversation in conversations:  # workers have another working directory
        conversation.recording = conversation.recording and conversation.recording.absolute()
        for turn in conversation.turns:
            turn.clip = turn.clip and turn.clip.absolute()
            turn.recording = turn.recording and turn.recording.absolute()
    parts: list[list[Conversation]] = []
    size, limit = 0, SHARD_BYTES if align is None else ALIGNED_BYTES
    for conversation in conversations:
        added = _bytes(conversation)
        if not parts or size + added > limit:
            parts.append([])
            size = 0
        parts[-1].append(conversation)
        size += added
    jobs = []
    for part in parts:
        part_keys = {conversation.id: keys[conversation.id] for conversation in part}
        name = hashlib.sha256(json.dumps(part_keys).encode()).hexdigest()[:16]
        jobs.append(ShardJob(store, f"shard-{name}.arrow", part, part_keys, config, align))
    return jobs


def _bytes(conversation: Conversation) -> int:
    """Estimate the bytes of audio of a conversation."""
    total = 0
    for turn in conversation.turns:
        if turn.audio is not None:
            total += turn.audio.nbytes
        elif isinstance(turn.clip, StoredClip):
            total += turn.clip.mean_bytes()
        elif turn.clip is not None and audio.exists(turn.clip):
            total += turn.clip.stat().st_size
        elif turn.span is not None and recording_of(turn, conversation) is not None:
            total += max(0, 2 * audio.samples(turn.span[1] - turn.span[0]))
    return total


def _row(
    turn: Turn, conversation: Conversation, recording: audio.Recording | None, digest: str, codec: str
) -> tuple[TurnRow, bytes | None]:
    """Return the row of a turn without its audio, and its audio.

    Args:
        turn: the turn.
        conversation: its session.
        recording: that the turn is in; None: it has a clip of its own, or no audio.
        digest: of the recording.
        codec: of the audio.
    """
    pcm = turn.audio.astype("<i2") if turn.audio is not None else None
    peak, rms_db = (None, None) if pcm is None else audio.level(pcm)
    given = turn.given or (None, None)
    encoded = None if pcm is None else audio.encode(pcm, codec)
    row: TurnRow = {
        "id": turn.id,
        "conversation": conversation.id,
        "index": turn.index,
        "speaker": turn.speaker,
        "text": turn.text,
        "label": turn.label,
        "votes": list(turn.votes.items()) or None,
        "subset": turn.subset,
        "quality": conversation.quality,
        "t_start": turn.start,
        "t_end": turn.end,
        "given_start": given[0],
        "given_end": given[1],
        "confidence": turn.confidence,
        "n_samples": 0 if pcm is None else len(pcm),
        "audio_hash": "" if pcm is None else hashlib.sha256(pcm.tobytes()).hexdigest()[:32],
        "crc32": 0 if encoded is None else audio.checksum(encoded),
        "peak": peak,
        "rms_db": rms_db,
        "flags": " ".join(dict.fromkeys(turn.flags)),
        "source_rate": recording.source_rate if recording and pcm is not None else None,
        "source_channels": recording.source_channels if recording and pcm is not None else None,
        "recording_hash": digest,
    }
    return row, encoded


def _hash(pcm: np.ndarray) -> str:
    """Return the hash of all samples, a channel after the other; a long recording is read in parts."""
    digest = hashlib.sha256()
    for channel in pcm:
        for start in range(0, len(channel), _HASHED):
            digest.update(np.ascontiguousarray(channel[start : start + _HASHED]).data)
    return digest.hexdigest()[:32]
