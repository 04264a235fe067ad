"""Corpus → shards: check, cut, split by group, write; the manifest comes last and makes the folder a corpus.

Shards are named by what they were made from. So the same command after a kill uses those that are there, and sessions
that are added to a corpus are all that is written.
"""

import dataclasses
import functools
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data.atomic import UNFINISHED
from data.corpus.config import CorpusConfig
from data.corpus.issues import Finding, failure
from data.corpus.schema import SAMPLE_RATE, SCHEMA_VERSION, SPLITS, Corpus, is_rejected, split_label
from data.errors import DataError, UserError, listed
from data.preparation.shard_jobs import Job, conversation_key, serially, shard_jobs
from data.preparation.split import Place, split_conversations
from data.preparation.validate import TIMELESS, Aligner, check, check_channels
from data.shards.dataset import AGAIN, FINDINGS, MANIFEST, Shards
from data.shards.format import INDEX_SCHEMA, Manifest, ShardFile, ShardInfo, describe_shard, to_bytes
from data.shards.store import Store

Run = Callable[[Sequence[Job]], Iterator[ShardFile]]
Dealer = Callable[..., dict[str, Place]]  # as `split_conversations`


def prepare(
    corpus: Corpus,
    out: Path | str,
    config: CorpusConfig | None = None,
    *,
    align: Aligner | None = None,
    run: Run = serially,
    deal: Dealer = split_conversations,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Shards:
    """Write a corpus as shards into `out`, or add to those that an earlier call with the same settings left there.

    Args:
        corpus: what an importer returned; it is used up.
        out: a folder or the URL of a store.
        config: how it is checked, split and stored.
        align: refines the times of turns; has a `key` that names it.
        run: makes the shards, in parallel if you like.
        deal: gives every session its split.
        progress: told the number of sessions that are done, and of all.

    Raises:
        BuildError: the corpus must not become shards: ids that conflict, leaks, too many rejected rows.
        DataError: `out` holds something else, or a split would be empty.
    """
    config, store = config or CorpusConfig(), Store(out)
    with store.locked():
        _prepare(corpus, store, config, align, run, deal, progress)
    return Shards(out)


def _prepare(
    corpus: Corpus,
    store: Store,
    config: CorpusConfig,
    align: Aligner | None,
    run: Run,
    deal: Dealer,
    progress: Callable[[int, int], None],
) -> None:
    earlier = _earlier(store, corpus, config)
    dealt = {} if earlier is None else _dealt(earlier)
    check_channels(corpus, config.channels)
    check(corpus, order=align is None)
    _refuse_rejects(corpus, config)
    deal(corpus.conversations, config.split, before=dealt)  # whether it can be split at all
    before = store.names()
    try:
        key = getattr(align, "key", None)
        keys = {one.id: conversation_key(one, config, key) for one in corpus.conversations}
        files = _reusable(store, earlier, keys)
        done = {name for file in files for name in file.info.conversations}
        total, finished = len(keys), len(done)
        progress(finished, total)
        for made in run(
            shard_jobs([one for one in corpus.conversations if one.id not in done], store, keys, config, align)
        ):
            files.append(made)
            finished += len(made.info.conversations)
            progress(finished, total)
        _publish(store, corpus, config, files, functools.partial(deal, before=dealt))
    except UserError:
        # A corpus that cannot be used leaves nothing; what was there before is not ours, or is used again.
        for name in set(store.names()) - set(before):
            store.delete(name)
        raise


def _earlier(store: Store, corpus: Corpus, config: CorpusConfig) -> Shards | None:
    """What an earlier call left in the folder, if it can be added to.

    Raises:
        DataError: the folder holds something else.
    """
    names = store.names()
    for name in (name for name in names if name.startswith(".") and UNFINISHED in name):
        store.delete(name)  # of a process that was killed: the lock says that it is gone
    if MANIFEST not in names:
        if any(not name.startswith(("shard-", "index-", ".")) for name in names):
            raise DataError(f"{store.place}: exists already and is no corpus; choose another folder with --out")
        return None
    try:
        shards = Shards(store.place)
        _refuse_loss(shards, corpus)
    except DataError as error:
        what = str(error).partition(f"; {AGAIN}")[0].removeprefix(f"{store.place}: ")
        raise DataError(f"{store.place}: cannot be added to ({what}); remove it, or choose another --out") from None
    before, after = (
        json.loads(one.model_dump_json(exclude={"max_rejected"})) for one in (shards.manifest.config, config)
    )
    if shards.manifest.corpus != corpus.name or before != after:
        changed = [f"{key}: {before[key]!r} → {after[key]!r}" for key in after if before[key] != after[key]]
        what = "; ".join(changed) or f"format: {shards.manifest.corpus} → {corpus.name}"
        raise DataError(f"{store.place}: was prepared otherwise ({what}); remove it, or choose another --out")
    return shards


def _refuse_loss(earlier: Shards, corpus: Corpus) -> None:
    """Raise a DataError where sessions or all sound would be gone: the source is the whole corpus."""
    gone = set(earlier.columns["conversation"]) - {one.id for one in corpus.conversations}
    if gone:
        raise DataError(f"{len(gone)} of its sessions are not in the source, which must hold them all: {listed(gone)}")
    turns = (turn for one in corpus.conversations for turn in one.turns)
    sound = any(one.recording for one in corpus.conversations) or any(
        turn.clip is not None or turn.audio is not None for turn in turns
    )
    if any(earlier.manifest.hours.values()) and not sound:
        raise DataError("it has sound, and now there is none: give --audio as before")


def _dealt(earlier: Shards) -> dict[str, str | int]:
    """The split or fold of every conversation."""
    columns = earlier.columns
    which = "fold" if earlier.manifest.config.split.folds else "split"
    return dict(zip(columns["conversation"], columns[which], strict=True))


def _reusable(store: Store, earlier: Shards | None, keys: Mapping[str, str]) -> list[ShardFile]:
    """Shards in the folder all of whose conversations are still as they were."""
    known = {} if earlier is None else {shard.name: place for place, shard in enumerate(earlier.manifest.shards)}
    found: list[ShardFile] = []
    taken: set[str] = set()
    for name in (name for name in store.names() if name.startswith("shard-")):
        file = _described(store, name, earlier, known.get(name))
        own = {} if file is None else file.info.conversations
        if file is not None and not own.keys() & taken and all(keys.get(one) == key for one, key in own.items()):
            found.append(file)
            taken |= own.keys()
    return found


def _described(store: Store, name: str, earlier: Shards | None, place: int | None) -> ShardFile | None:
    """A shard of the folder; one of an earlier manifest is not read again but for its findings."""
    try:
        with store.open(name) as file:
            if earlier is None or place is None:
                return describe_shard(name, file.read_buffer())
            info = earlier.manifest.shards[place]
            if store.local is not None and hashlib.sha256(file.read_buffer()).hexdigest() != info.sha256:
                return None
            return ShardFile.known(info, earlier.index.filter(pc.equal(earlier.index["shard"], place)), file)
    except (DataError, OSError):
        return None  # torn by a kill: it is made again


def _publish(store: Store, corpus: Corpus, config: CorpusConfig, files: Sequence[ShardFile], deal: Dealer) -> None:
    """Put the index together, split, and write the manifest."""
    files = sorted(files, key=lambda file: min(file.info.conversations))  # they arrive as they are done
    lines = {turn.id: turn.where for conversation in corpus.conversations for turn in conversation.turns}
    for finding in (finding for file in files for finding in file.findings):
        corpus.findings.append(dataclasses.replace(finding, where=lines.get(finding.utterance, finding.where)))
    rows = pa.concat_tables([file.index for file in files]).unify_dictionaries()
    _learn(corpus, rows)
    _refuse_rejects(corpus, config)
    places = deal(corpus.conversations, config.split, shared=_shared_sound(corpus, rows))
    conversations = rows["conversation"].to_pylist()
    shard_of = {name: number for number, file in enumerate(files) for name in file.info.conversations}
    for column, values in {
        "group": [places[name].group for name in conversations],
        "split": [places[name].split for name in conversations],
        "fold": [places[name].fold for name in conversations],
        "shard": [shard_of[name] for name in conversations],
        "where": [lines[turn] for turn in rows["id"].to_pylist()],
    }.items():
        field = INDEX_SCHEMA.field(column)
        rows = rows.append_column(field, pa.array(values, field.type))
    # By name, not by place in the files: equal content has equal rows, however it is sharded.
    index = (
        rows.select(INDEX_SCHEMA.names)
        .cast(INDEX_SCHEMA)
        .sort_by([("conversation", "ascending"), ("index", "ascending")])
    )
    manifest = _manifest(corpus, config, index, [file.info for file in files], content := to_bytes(index))
    store.write(manifest.index, content)
    told = "".join(json.dumps(finding.as_dict()) + "\n" for finding in corpus.findings)
    store.write(FINDINGS, told.encode())
    named = {manifest.index, *(shard.name for shard in manifest.shards)}
    if not named <= set(store.names()):
        raise DataError(f"{store.place}: shards vanished while they were made; give the command again, and only once")
    store.write(MANIFEST, manifest.model_dump_json(indent=1).encode())
    for name in store.names():
        if name.startswith(("shard-", "index-")) and name not in named:
            store.delete(name)


def _learn(corpus: Corpus, rows: pa.Table) -> None:
    """Tell the turns here what was found about them where they were cut."""
    found = dict(zip(*(rows[name].to_pylist() for name in ("id", "flags")), strict=True))
    for conversation in corpus.conversations:
        for turn in conversation.turns:
            turn.flags = tuple(found[turn.id].split())
            if is_rejected(turn.flags):
                turn.label = None
    flags = {turn.id: turn.flags for conversation in corpus.conversations for turn in conversation.turns}
    corpus.findings = [
        finding
        for finding in corpus.findings
        if finding.code not in TIMELESS or finding.code in flags.get(finding.utterance, TIMELESS)
    ]


def _refuse_rejects(corpus: Corpus, config: CorpusConfig) -> None:
    """Raise a BuildError where more rows are rejected than is allowed."""
    turns = [turn for conversation in corpus.conversations for turn in conversation.turns]
    rejected = {turn.id for turn in turns if is_rejected(turn.flags)}
    if not turns:
        raise DataError(f"the {corpus.name} corpus has no turns; is this the right source?")
    if len(rejected) > config.max_rejected * len(turns):
        share = f"{len(rejected)} of {len(turns)} rows are rejected ({len(rejected) / len(turns):.1%})"
        own = [
            finding for finding in corpus.findings if finding.utterance in rejected and finding.code.startswith("E_")
        ]
        raise failure(
            own,
            f"{share}, and {config.max_rejected:.1%} are allowed: mend the rows, or raise max_rejected",
            "F_REJECTED",
        )


def _shared_sound(corpus: Corpus, rows: pa.Table) -> list[tuple[str, str]]:
    """Pairs of conversations that hold the same sound; those of different groups are findings."""
    silent = {turn.id for one in corpus.conversations for turn in one.turns if "W_SILENT" in turn.flags}
    owners: dict[str, dict[str, None]] = defaultdict(dict)
    columns = (rows[name].to_pylist() for name in ("id", "conversation", "audio_hash", "recording_hash"))
    for turn, conversation, *hashes in zip(*columns, strict=True):
        for sound in hashes:
            if sound and turn not in silent:
                owners[sound][conversation] = None
    pairs = Counter(pair for known in owners.values() for pair in pairwise(sorted(known)))
    by_id = {one.id: one for one in corpus.conversations}
    for (one, other), count in pairs.items():
        if by_id[one].group != by_id[other].group:
            message = f"{count} clip{'s' if count > 1 else ''} equal to the sample in {other} and {one}"
            where = by_id[other].turns[0].where
            corpus.findings.append(Finding("W_AUDIO_SHARED", where, other, message))
    return list(pairs)


def _manifest(
    corpus: Corpus, config: CorpusConfig, index: pa.Table, shards: Sequence[ShardInfo], content: pa.Buffer
) -> Manifest:
    folds = config.split.folds
    parts: Sequence[str] = SPLITS if folds is None else [str(number) for number in range(folds)]
    columns = {name: index[name].to_pylist() for name in index.column_names}
    places = [str(place) for place in columns["split" if folds is None else "fold"]]
    sessions = dict(zip(columns["conversation"], places, strict=True))
    turns, seconds = Counter(places), Counter[str]()
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for place, samples, label in zip(places, columns["n_samples"], columns["label"], strict=True):
        seconds[place] += samples / SAMPLE_RATE
        labels[place].update(split_label(label) if label is not None else ())
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
        sessions={part: sum(place == part for place in sessions.values()) for part in parts},
        turns={part: turns[part] for part in parts},
        hours={part: seconds[part] / 3600 for part in parts},
        label_counts={part: {label: labels[part][label] for label in corpus.labels} for part in parts},
        rejected=sum(is_rejected(flags.split()) for flags in columns["flags"]),
        findings=dict(sorted(Counter(finding.code for finding in corpus.findings).items())),
    )


CONTENT = (
    "id conversation group index split fold speaker text label votes subset quality t_start t_end audio_hash".split()
)


def _fingerprint(corpus: Corpus, columns: Mapping[str, Sequence[Any]]) -> str:
    """Hash of all that a model or a metric can see of the corpus; the order of labels is part of it."""
    rows = zip(*(columns[name] for name in CONTENT), strict=True)
    digests = sorted(hashlib.sha256(json.dumps(row).encode()).digest() for row in rows)
    head = json.dumps([corpus.labels, corpus.roles, corpus.qualities]).encode()
    return hashlib.sha256(head + b"".join(digests)).hexdigest()[:16]
