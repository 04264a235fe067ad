"""Shards that are still to be made: which sessions go together, what names them, and the work itself."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.corpus import audio
from data.corpus.config import CorpusConfig
from data.corpus.issues import Finding
from data.corpus.schema import SCHEMA_VERSION, Conversation, Turn, is_rejected
from data.errors import DataError
from data.preparation.validate import Aligner, check_order, cut
from data.shards.format import ShardFile, encode_shard
from data.shards.store import Store

SHARD_BYTES = 64 << 20
ALIGNED_BYTES = SHARD_BYTES // 8  # alignment takes its time: smaller jobs keep all CPUs busy and lose less to a kill


@dataclass(frozen=True)
class Job:
    """A shard to be made: travels to the process that makes it."""

    store: Store
    name: str
    conversations: Sequence[Conversation]
    keys: dict[str, str]  # of the conversations
    config: CorpusConfig
    align: Aligner | None

    def __call__(self) -> ShardFile:
        """Cut the clips, write the shard, and return what there is to know about it."""
        rows: list[dict[str, Any]] = []
        findings: list[Finding] = []
        for conversation in self.conversations:
            self._refuse_unseen(conversation)
            recording = cut(conversation, self.config.channels, findings, self.align)
            if self.align is not None:
                check_order(conversation.turns, findings)
            rows += [_row(turn, conversation, recording, self.config.codec) for turn in conversation.turns]
            for turn in conversation.turns:
                turn.audio = None  # encoded: the samples would be held twice
        buffer, made = encode_shard(self.name, rows, self.keys, findings)
        self.store.write(self.name, buffer)
        return made

    def to_arrow(self) -> pa.Table:
        """The same, in a form that crosses processes."""
        return self().to_arrow()

    def _refuse_unseen(self, conversation: Conversation) -> None:
        """Raise a DataError where a recording that was there a moment ago cannot be seen from here."""
        own = [turn for turn in conversation.turns if not is_rejected(turn.flags)]
        paths = [conversation.recording if own else None, *(turn.clip for turn in own)]
        for path in (path for path in paths if path is not None and not audio.exists(path)):
            raise DataError(
                f"{path}: the recording is gone, or this node does not see it; share the folder with all nodes"
            )


def serially(jobs: Sequence[Job]) -> Iterator[ShardFile]:
    """Make the shards one after the other in this process."""
    return (job() for job in jobs)


def conversation_key(conversation: Conversation, config: CorpusConfig, align: str | None) -> str:
    """Names all that a conversation's rows are made from; a recording by its size and time of change.

    Args:
        conversation: as checked.
        config: how it is stored.
        align: key of the alignment.
    """
    content: list[Any] = [SCHEMA_VERSION, config.codec, config.channels, align]
    content += [conversation.id, conversation.quality, _stamp(conversation.recording)]
    for turn in conversation.turns:
        own = {field.name: getattr(turn, field.name) for field in dataclasses.fields(turn)}
        sound = None if turn.audio is None else hashlib.sha256(turn.audio.tobytes()).hexdigest()
        # Not the line: a row that is put in above moves all others.
        content.append({**own, "audio": sound, "clip": _stamp(turn.clip), "where": None})
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _stamp(path: Path | None) -> list[Any] | None:
    if path is None or not audio.exists(path):
        return None
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


def shard_jobs(
    conversations: Sequence[Conversation],
    store: Store,
    keys: Mapping[str, str],
    config: CorpusConfig,
    align: Aligner | None,
) -> list[Job]:
    """Shards of about SHARD_BYTES, of whole conversations in their order."""
    for conversation in conversations:  # a worker has another current folder
        conversation.recording = conversation.recording and conversation.recording.absolute()
        for turn in conversation.turns:
            turn.clip = turn.clip and turn.clip.absolute()
    parts: list[list[Conversation]] = []
    size, limit = 0, SHARD_BYTES if align is None else ALIGNED_BYTES
    for conversation in conversations:
        own = _bytes(conversation)
        if not parts or size + own > limit:
            parts.append([])
            size = 0
        parts[-1].append(conversation)
        size += own
    jobs = []
    for part in parts:
        own_keys = {one.id: keys[one.id] for one in part}
        name = hashlib.sha256(json.dumps(own_keys).encode()).hexdigest()[:16]
        jobs.append(Job(store, f"shard-{name}.arrow", part, own_keys, config, align))
    return jobs


def _bytes(conversation: Conversation) -> int:
    """About how many bytes of sound a conversation has."""
    total = 0
    for turn in conversation.turns:
        if turn.audio is not None:
            total += turn.audio.nbytes
        elif turn.clip is not None and audio.exists(turn.clip):
            total += turn.clip.stat().st_size
        elif turn.span is not None and conversation.recording is not None:
            total += max(0, 2 * audio.samples(turn.span[1] - turn.span[0]))
    return total


def _row(turn: Turn, conversation: Conversation, recording: audio.Recording | None, codec: str) -> dict[str, Any]:
    heard = turn.audio is not None
    pcm = turn.audio.astype("<i2") if turn.audio is not None else None
    peak, rms_db = (None, None) if pcm is None else audio.level(pcm)
    given = turn.given or (None, None)
    encoded = None if pcm is None else audio.encode(pcm, codec)
    return {
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
        "audio": encoded,
        "audio_hash": "" if pcm is None else hashlib.sha256(pcm.tobytes()).hexdigest()[:32],
        "crc32": 0 if encoded is None else audio.checksum(encoded),
        "peak": peak,
        "rms_db": rms_db,
        "flags": " ".join(dict.fromkeys(turn.flags)),
        "source_rate": recording.source_rate if recording and heard else None,
        "source_channels": recording.source_channels if recording and heard else None,
        "recording_hash": "" if recording is None else hashlib.sha256(recording.pcm.tobytes()).hexdigest()[:32],
    }
