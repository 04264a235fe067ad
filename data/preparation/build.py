"""Prepare a corpus: check it, cut clips, split it by group, and write shards. The manifest is written last.

The name of a shard is a hash of everything it is made from. So a command that is rerun after a kill reuses complete
shards, and when sessions are added to a corpus only these are written.
"""

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from data.atomic import UNFINISHED
from data.corpus.config import CorpusConfig, SplitConfig
from data.corpus.issues import Finding, build_error
from data.corpus.schema import SAMPLE_RATE, SCHEMA_VERSION, SPLITS, Conversation, Corpus, is_rejected, split_label
from data.errors import DataError, UserError, listed
from data.preparation.shard_jobs import ShardJob, conversation_key, serially, shard_jobs
from data.preparation.split import Assignment, Pairs, Part, split_conversations
from data.preparation.validate import TIMELESS, Aligner, check, check_channels, check_codebook, check_split_labels
from data.shards.dataset import AGAIN, FINDINGS, MANIFEST, Shards
from data.shards.format import INDEX_SCHEMA, Manifest, ShardFile, ShardInfo, describe_shard, to_bytes
from data.shards.store import Store

# Settings that may change between calls. The codes that a codebook gives to the turns of a session are part of the
# address of its shard, so a codebook that reads them as before writes nothing again.
REPEATABLE = {"max_rejected", "license", "codebook"}
Run = Callable[[Sequence[ShardJob]], Iterator[ShardFile]]


class Splitter(Protocol):
    """A function like `split_conversations`."""

    def __call__(
        self,
        conversations: Sequence[Conversation],
        config: SplitConfig,
        *,
        before: Mapping[str, Part] = ...,
        shared: Pairs = ...,
    ) -> dict[str, Assignment]: ...


def prepare(
    corpus: Corpus,
    out: Path | str,
    config: CorpusConfig | None = None,
    *,
    align: Aligner | None = None,
    run: Run = serially,
    split: Splitter = split_conversations,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Shards:
    """Write a corpus as shards, or extend the corpus that an earlier call with the same settings wrote.

    Args:
        corpus: the result of an importer; it is consumed.
        out: a folder or the URL of a store.
        config: settings of the corpus.
        align: refines the times of turns; its attribute `key` identifies model and settings.
        run: runs the shard jobs, possibly in parallel.
        split: assigns every session to a split.
        progress: called with the number of finished sessions and of all sessions.

    Raises:
        BuildError: the corpus must not become shards: conflicting ids, leaks, too many rejected rows.
        DataError: `out` contains something else, or a split would be empty.
    """
    config, store = config or CorpusConfig(), Store(out)
    with store.locked():
        _prepare(corpus, store, config, align, run, split, progress)
    return Shards(out)


def _prepare(
    corpus: Corpus,
    store: Store,
    config: CorpusConfig,
    align: Aligner | None,
    run: Run,
    split: Splitter,
    progress: Callable[[int, int], None],
) -> None:
    earlier = _earlier_corpus(store, corpus, config)
    assigned = {} if earlier is None else _assigned(earlier)
    check_channels(corpus, config.channels)
    check(corpus, order=align is None)
    check_codebook(corpus, config)
    _refuse_rejects(corpus, config)
    split(corpus.conversations, config.split, before=assigned)  # fail early if it cannot be split
    names_before = store.names()
    try:
        key = getattr(align, "key", None)
        keys = {conversation.id: conversation_key(conversation, config, key) for conversation in corpus.conversations}
        files = _reusable_shards(store, earlier, keys)
        done = {name for file in files for name in file.info.conversations}
        total, finished = len(keys), len(done)
        progress(finished, total)
        left = [conversation for conversation in corpus.conversations if conversation.id not in done]
        for file in run(shard_jobs(left, store, keys, config, align)):
            files.append(file)
            finished += len(file.info.conversations)
            progress(finished, total)
        index = _index(corpus, config, files, split, assigned)
        _publish(store, corpus, config, files, index)
    except UserError:
        # A corpus that cannot be used leaves no files behind; files from before this call are kept.
        for name in set(store.names()) - set(names_before):
            store.delete(name)
        raise


def _earlier_corpus(store: Store, corpus: Corpus, config: CorpusConfig) -> Shards | None:
    """Return the corpus that an earlier call wrote into the folder, or None if there is none.

    Raises:
        DataError: the folder contains something else, or a corpus that cannot be extended.
    """
    names = store.names()
    for name in (name for name in names if name.startswith(".") and UNFINISHED in name):
        store.delete(name)  # left by a killed process; because of the lock no other one is running
    if MANIFEST not in names:
        if any(not name.startswith(("shard-", "index-", ".")) for name in names):
            raise DataError(f"{store.address}: exists already and is not a corpus; choose another folder with --out")
        return None
    try:
        shards = Shards(store.address)
        _refuse_loss(shards, corpus)
    except DataError as error:
        what = str(error).partition(f"; {AGAIN}")[0].removeprefix(f"{store.address}: ")
        raise DataError(f"{store.address}: cannot be extended ({what}); remove it, or choose another --out") from None
    before, after = (
        json.loads(settings.model_dump_json(exclude=REPEATABLE)) for settings in (shards.manifest.config, config)
    )
    if shards.manifest.corpus != corpus.name or before != after:
        changed = [f"{key}: {before[key]!r} → {after[key]!r}" for key in after if before[key] != after[key]]
        what = "; ".join(changed) or f"format: {shards.manifest.corpus} → {corpus.name}"
        raise DataError(f"{store.address}: has other settings ({what}); remove it, or choose another --out")
    return shards


def _refuse_loss(earlier: Shards, corpus: Corpus) -> None:
    """Raise a DataError if the source lacks sessions of the earlier corpus, or all of its audio."""
    missing = set(earlier.columns["conversation"]) - {conversation.id for conversation in corpus.conversations}
    if missing:
        raise DataError(f"{len(missing)} of its sessions are not in the source, which must have all: {listed(missing)}")
    has_audio = any(
        conversation.recording
        or any(turn.clip or turn.recording or turn.audio is not None for turn in conversation.turns)
        for conversation in corpus.conversations
    )
    if any(earlier.manifest.hours.values()) and not has_audio:
        raise DataError("it has audio, but the source has none; give --audio as before")


def _assigned(earlier: Shards) -> dict[str, Part]:
    """Return the split or fold of every conversation of the earlier corpus."""
    columns = earlier.columns
    which = "fold" if earlier.manifest.config.split.folds else "split"
    return dict(zip(columns["conversation"], columns[which], strict=True))


def _reusable_shards(store: Store, earlier: Shards | None, keys: Mapping[str, str]) -> list[ShardFile]:
    """Return the shards in the folder whose conversations are all unchanged."""
    numbers = {} if earlier is None else {shard.name: number for number, shard in enumerate(earlier.manifest.shards)}
    reusable: list[ShardFile] = []
    done: set[str] = set()
    for name in (name for name in store.names() if name.startswith("shard-")):
        file = _read_description(store, name, earlier, numbers.get(name))
        if file is None or file.info.conversations.keys() & done:
            continue
        if all(keys.get(conversation) == key for conversation, key in file.info.conversations.items()):
            reusable.append(file)
            done |= file.info.conversations.keys()
    return reusable


def _read_description(store: Store, name: str, earlier: Shards | None, number: int | None) -> ShardFile | None:
    """Return the description of a shard, or None if it is damaged.

    Args:
        store: the folder.
        name: file name of the shard.
        earlier: the earlier corpus, if there is one.
        number: of the shard in its manifest; then only the findings are read from the shard.
    """
    try:
        with store.open(name) as file:
            if earlier is None or number is None:
                return describe_shard(name, file.read_buffer())
            info = earlier.manifest.shards[number]
            if store.local is not None and hashlib.sha256(file.read_buffer()).hexdigest() != info.sha256:
                return None
            return ShardFile.from_manifest(info, earlier.index.filter(pc.equal(earlier.index["shard"], number)), file)
    except (DataError, OSError):
        return None  # incomplete after a kill; it is written again


def _index(
    corpus: Corpus, config: CorpusConfig, files: list[ShardFile], split: Splitter, assigned: Mapping[str, Part]
) -> pa.Table:
    """Sort the shards, split the corpus, and return its index; the findings of the shards are added to the corpus."""
    files.sort(key=lambda file: min(file.info.conversations))  # they are in the order in which the jobs finished
    lines = {turn.id: turn.where for conversation in corpus.conversations for turn in conversation.turns}
    for finding in (finding for file in files for finding in file.findings):
        corpus.findings.append(dataclasses.replace(finding, where=lines.get(finding.utterance, finding.where)))
    rows = pa.concat_tables([file.index for file in files]).unify_dictionaries()
    _update_turns(corpus, rows)
    _refuse_rejects(corpus, config)
    shared = _shared_audio(corpus, rows)
    assignments = split(corpus.conversations, config.split, before=assigned, shared=shared)
    parts = {name: part.split if part.fold is None else part.fold for name, part in assignments.items()}
    check_split_labels(corpus, parts, config.split.folds)
    conversations = rows["conversation"].to_pylist()
    shard_of = {name: number for number, file in enumerate(files) for name in file.info.conversations}
    for column, values in {
        "group": [assignments[name].group for name in conversations],
        "split": [assignments[name].split for name in conversations],
        "fold": [assignments[name].fold for name in conversations],
        "shard": [shard_of[name] for name in conversations],
        "where": [lines[turn] for turn in rows["id"].to_pylist()],
    }.items():
        field = INDEX_SCHEMA.field(column)
        rows = rows.append_column(field, pa.array(values, field.type))
    # Sorted by name, so that equal content has equal rows, independent of the shards.
    index = rows.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
    return index.sort_by([("conversation", "ascending"), ("index", "ascending")])


def _publish(store: Store, corpus: Corpus, config: CorpusConfig, files: Sequence[ShardFile], index: pa.Table) -> None:
    """Write index, findings and manifest, and delete files that the manifest does not list."""
    manifest = _manifest(corpus, config, index, [file.info for file in files], content := to_bytes(index))
    store.write(manifest.index, content)
    lines = "".join(json.dumps(finding.as_dict()) + "\n" for finding in corpus.findings)
    store.write(FINDINGS, lines.encode())
    listed_files = {manifest.index, *(shard.name for shard in manifest.shards)}
    if not listed_files <= set(store.names()):
        raise DataError(f"{store.address}: shards were deleted during the preparation; rerun the command, only once")
    store.write(MANIFEST, manifest.model_dump_json(indent=1).encode())
    for name in store.names():
        if name.startswith(("shard-", "index-")) and name not in listed_files:
            store.delete(name)


def _update_turns(corpus: Corpus, rows: pa.Table) -> None:
    """Set the flags of the turns to those of the shards, which may come from other processes."""
    flags_by_id = dict(zip(*(rows[name].to_pylist() for name in ("id", "flags")), strict=True))
    for conversation in corpus.conversations:
        for turn in conversation.turns:
            turn.flags = tuple(flags_by_id[turn.id].split())
            if is_rejected(turn.flags):
                turn.label = None
    flags = {turn.id: turn.flags for conversation in corpus.conversations for turn in conversation.turns}
    corpus.findings = [
        finding
        for finding in corpus.findings
        if finding.code not in TIMELESS or finding.code in flags.get(finding.utterance, TIMELESS)
    ]


def _refuse_rejects(corpus: Corpus, config: CorpusConfig) -> None:
    """Raise a BuildError if more rows are rejected than `config.max_rejected` allows."""
    turns = [turn for conversation in corpus.conversations for turn in conversation.turns]
    rejected = {turn.id for turn in turns if is_rejected(turn.flags)}
    if not turns:
        raise DataError(f"the {corpus.name} corpus has no turns; check the path of the source")
    if len(rejected) > config.max_rejected * len(turns):
        share = f"{len(rejected)} of {len(turns)} rows are rejected ({len(rejected) / len(turns):.1%})"
        errors = [
            finding for finding in corpus.findings if finding.utterance in rejected and finding.code.startswith("E_")
        ]
        advice = f"{share}, but only {config.max_rejected:.1%} are allowed; fix the rows, or increase max_rejected"
        raise build_error(errors, advice, "F_REJECTED")


def _shared_audio(corpus: Corpus, rows: pa.Table) -> list[tuple[str, str]]:
    """Return pairs of conversations with the same audio; add a finding if they are of different groups."""
    by_id = {conversation.id: conversation for conversation in corpus.conversations}
    silent = {turn.id for conversation in by_id.values() for turn in conversation.turns if "W_SILENT" in turn.flags}
    owners: dict[str, dict[str, None]] = defaultdict(dict)  # hash → conversations
    columns = (rows[name].to_pylist() for name in ("id", "conversation", "audio_hash", "recording_hash"))
    for turn, conversation, *hashes in zip(*columns, strict=True):
        for digest in hashes:
            if digest and turn not in silent:
                owners[digest][conversation] = None
    pairs = Counter(pair for conversations in owners.values() for pair in pairwise(sorted(conversations)))
    for (first, second), count in pairs.items():
        if by_id[first].group != by_id[second].group:
            message = f"{count} clip{'s' if count > 1 else ''} with equal samples in {second} and {first}"
            where = by_id[second].turns[0].where
            corpus.findings.append(Finding("W_AUDIO_SHARED", where, second, message))
    return list(pairs)


def _manifest(
    corpus: Corpus, config: CorpusConfig, index: pa.Table, shards: Sequence[ShardInfo], content: pa.Buffer
) -> Manifest:
    folds = config.split.folds
    parts: Sequence[str] = SPLITS if folds is None else [str(number) for number in range(folds)]
    columns = {name: index[name].to_pylist() for name in index.column_names}
    part_of_row = [str(part) for part in columns["split" if folds is None else "fold"]]
    part_of_session = dict(zip(columns["conversation"], part_of_row, strict=True))
    turns, sessions, seconds = Counter(part_of_row), Counter(part_of_session.values()), Counter[str]()
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for part, samples, label in zip(part_of_row, columns["n_samples"], columns["label"], strict=True):
        seconds[part] += samples / SAMPLE_RATE
        labels[part].update(split_label(label) if label is not None else ())
    digest = hashlib.sha256(bytes(content)).hexdigest()
    return Manifest(
        schema_version=SCHEMA_VERSION,
        corpus=corpus.name,
        fingerprint=_fingerprint(corpus, columns),
        sample_rate=SAMPLE_RATE,
        labels=corpus.labels,
        roles=corpus.roles,
        qualities=corpus.qualities,
        config=config,
        index=f"index-{digest[:16]}.arrow",
        index_sha256=digest,
        shards=tuple(shards),
        sessions={part: sessions[part] for part in parts},
        turns={part: turns[part] for part in parts},
        hours={part: seconds[part] / 3600 for part in parts},
        label_counts={part: {label: labels[part][label] for label in corpus.labels} for part in parts},
        rejected=sum(is_rejected(flags.split()) for flags in columns["flags"]),
        findings=dict(sorted(Counter(finding.code for finding in corpus.findings).items())),
    )


CONTENT = (
    "id conversation group index split fold speaker text label votes subset quality t_start t_end audio_hash".split()
)


def _fingerprint(corpus: Corpus, columns: Mapping[str, Sequence[object]]) -> str:
    """Return a hash of all content that affects a model or a metric, including the order of the labels."""
    rows = zip(*(columns[name] for name in CONTENT), strict=True)
    digests = sorted(hashlib.sha256(json.dumps(row).encode()).digest() for row in rows)
    head = json.dumps([corpus.labels, corpus.roles, corpus.qualities]).encode()
    return hashlib.sha256(head + b"".join(digests)).hexdigest()[:16]
