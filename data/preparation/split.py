"""Splits without leaks: whole groups of sessions are assigned to train, val and test, or to folds.

A group consists of all sessions that share a video, a person or audio. A split can come from a file, from the corpus or
from `stratified_assignment`; it is always checked for leaks before it is used.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.corpus.config import SplitConfig
from data.corpus.issues import Finding, build_error
from data.corpus.schema import SPLITS, Conversation, split_label
from data.errors import DataError, listed, reason
from data.importers.base.cells import clean_name

Part = str | int  # name of a split or number of a fold
Pairs = Iterable[tuple[str, str]]  # ids of conversations with the same audio
Placed = Sequence[tuple[Conversation, Part]]

GREW_TOGETHER = (
    "added sessions connect groups that are in two splits already; prepare the whole corpus again in another folder"
)
TURNS = "turns"  # the stratum that counts turns
_SIZE = 5  # weight of TURNS relative to all other strata together, because the settings give fractions of turns
_MOST_SWAPPED = 3000  # groups; with more of them no swaps are needed, and they would take quadratic time


@dataclass(frozen=True, slots=True)
class Assignment:
    """The group of a conversation and its split, or its fold if there are folds."""

    group: str
    split: str | None = None
    fold: int | None = None


def split_conversations(
    conversations: Sequence[Conversation], config: SplitConfig, *, before: Mapping[str, Part] = {}, shared: Pairs = ()
) -> dict[str, Assignment]:
    """Assign every conversation: by `config.file`, else as in the corpus, else by fractions and seed.

    Args:
        conversations: all conversations of the corpus; their order does not matter.
        config: settings of the split.
        before: split or fold of conversations that were assigned earlier; they keep it, only new groups are assigned.
        shared: pairs of conversations with the same audio.

    Raises:
        BuildError: a conversation, a group or a clip would be in two splits.
        DataError: a split or fold would be empty, or the given split cannot be used.
    """
    shared = list(shared)
    parts: Sequence[Part] = range(config.folds) if config.folds else SPLITS
    named = groups(conversations, config, shared)
    placed: Placed
    if config.file is not None:
        placed, advice = list(_from_file(conversations, config.file, parts)), f"fix {config.file}"
    elif any(conversation.split is not None for conversation in conversations):
        placed, advice = _from_corpus(conversations, config), "fix the split of the corpus, or give one with split.file"
    else:
        placed, advice = _by_fractions(conversations, config, named, parts, before), ""
    if leaks := _leaks(placed, shared):
        by = "[video, speaker]" if any(conversation.people for conversation in conversations) else "video"
        raise build_error(leaks, advice or (GREW_TOGETHER if before else f"use split.by={by}"))
    _refuse_empty(placed, named, parts, advice)
    return {
        conversation.id: Assignment(named[conversation.id], part)
        if isinstance(part, str)
        else Assignment(named[conversation.id], fold=part)
        for conversation, part in placed
    }


def groups(conversations: Sequence[Conversation], config: SplitConfig, shared: Pairs = ()) -> dict[str, str]:
    """Return the group of every conversation: conversations are connected by `config.by` and by the same audio.

    A group has the name of its first video in alphabetical order, or of its first conversation if videos are ignored.

    Raises:
        DataError: the split is by speaker, and a conversation has no speaker identity.
    """
    from scipy.sparse import coo_array  # imported here, because processes that only read shards do not need it
    from scipy.sparse.csgraph import connected_components

    if "speaker" in config.by and not any(conversation.people for conversation in conversations):
        raise DataError(
            "split.by=speaker: the corpus has no speaker identities; name their column (columns.person of a table), or "
            "use split.by=video"
        )
    unknown = [conversation.id for conversation in conversations if "speaker" in config.by and not conversation.people]
    if unknown:
        raise DataError(
            f"split.by=speaker: {len(unknown)} session(s) have no speaker identity ({listed(unknown)}) and might leak; "
            "add the identities, or use split.by=video"
        )
    number = {conversation.id: index for index, conversation in enumerate(conversations)}
    edges = [(number[first], number[second]) for first, second in shared]
    members: dict[tuple[str, str], int] = {}  # link → first conversation with it
    for index, conversation in enumerate(conversations):
        edges += [(members.setdefault(link, index), index) for link in _links(conversation, config.by)]
    rows, columns = np.array(edges, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(conversations), len(conversations)))
    components = connected_components(graph, directed=False)[1].tolist()
    names: dict[int, str] = {}
    for conversation, component in zip(conversations, components, strict=True):
        name = conversation.group if "video" in config.by else conversation.id
        names[component] = min(name, names.get(component, name))
    return {
        conversation.id: names[component] for conversation, component in zip(conversations, components, strict=True)
    }


def strata(conversation: Conversation, config: SplitConfig, *, labelled: bool = True) -> Counter[str]:
    """Return the counts that are balanced between splits: turns, turns of each label, and sessions of each quality.

    Args:
        conversation: an imported and checked conversation.
        config: settings; `stratify` selects the strata besides TURNS.
        labelled: whether TURNS counts only turns with a label; False for a corpus without labels.
    """
    labels = [turn.label for turn in conversation.turns if turn.label]
    counts = Counter({TURNS: len(labels) if labelled else len(conversation.turns)})
    if "label" in config.stratify:
        counts.update(f"label:{single}" for label in labels for single in split_label(label))
    if "quality" in config.stratify and conversation.quality:
        counts[f"quality:{conversation.quality}"] += 1
    return counts


def stratified_assignment(
    strata: Mapping[str, Counter[str]], shares: Sequence[float], seed: int, fixed: Mapping[str, int] = {}
) -> dict[str, int]:
    """Assign whole groups to parts so that every part gets its share of every stratum, as far as possible.

    The assignment minimises chi-squared: the squared difference between actual and expected counts relative to the
    expected ones, summed over parts and strata. Counts are relative to the total of their stratum, so a rare label
    weighs as much as a frequent one; TURNS weighs more than all other strata together. Groups are assigned from the
    largest to the smallest (the seed orders groups of similar size), then pairs are swapped if that helps.

    Args:
        strata: counts by group; the result does not depend on the order of the mapping.
        shares: share of each part; they sum to 1.
        seed: seed of the order in which groups of similar size are assigned.
        fixed: part of groups that were assigned earlier.

    Returns:
        The index of the part by group. Every part has turns unless there are fewer groups with turns than parts.
    """
    names = sorted(strata)
    vectors = _vectors([strata[name] for name in names])
    share = np.asarray(shares)
    part = np.array([fixed.get(name, -1) for name in names], np.int64)
    # Groups within a factor of two are of similar size: strictly by size, every seed would give the same split.
    size = np.round(np.log2(np.maximum((vectors**2).sum(1), 1e-12)))
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-size[order], kind="stable")]
    free = order[part[order] < 0]
    held = np.zeros((len(share), vectors.shape[1]))  # sum of the vectors of each part
    np.add.at(held, part[part >= 0], vectors[part >= 0])
    _assign_in_order(vectors, free, share, part, held)
    if len(free) <= _MOST_SWAPPED:
        _swap(vectors, free, share, part, held)
    return dict(zip(names, part.tolist(), strict=True))


def _vectors(counts: Sequence[Counter[str]]) -> np.ndarray:
    """Return [n_groups, n_strata]: counts relative to the total of their stratum, times the root of its weight.

    With them chi-squared is, up to a constant, the sum over parts of |sum of the vectors of the part|² / its share.
    """
    kinds = sorted({kind for group in counts for kind in group} - {TURNS})
    table = np.array([[*(group[kind] for kind in (TURNS, *kinds)), 1] for group in counts], float)
    table = table.reshape(len(counts), len(kinds) + 2)
    weights = [
        _SIZE * max(len(kinds), 1),
        *[1] * len(kinds),
        1e-3,
    ]  # the number of groups only breaks ties
    return np.asarray(table / np.maximum(table.sum(0), 1) * np.sqrt(weights))


def _assign_in_order(
    vectors: np.ndarray, order: np.ndarray, share: np.ndarray, part: np.ndarray, held: np.ndarray
) -> None:
    """Assign each group to the part where chi-squared grows least; the last groups fill parts without turns."""
    has_turns = vectors[:, 0] > 0
    left = has_turns[order].sum()  # groups
    for group in order:
        vector = vectors[group]
        growth = np.round((2 * held @ vector + vector @ vector) / share, 12)  # same ties on any machine
        empty = held[:, 0] == 0
        if has_turns[group] and left <= empty.sum():
            growth[~empty] = np.inf
        part[group] = np.argmin(growth)
        held[part[group]] += vector
        left -= has_turns[group]


def _swap(vectors: np.ndarray, order: np.ndarray, share: np.ndarray, part: np.ndarray, held: np.ndarray) -> None:
    """Swap each group once with the group of another part that reduces chi-squared most, if there is one."""
    has_turns = vectors[:, 0] > 0
    for group in order:
        here, others = part[group], order[(part[order] != part[group]) & (has_turns[order] == has_turns[group])]
        change = vectors[others] - vectors[group]  # of `held[here]`
        square = (change**2).sum(1)
        there = part[others]
        growth = (square + 2 * change @ held[here]) / share[here]
        growth += (square - 2 * (change * held[there]).sum(1)) / share[there]
        if len(others) and growth.min() < -1e-9:
            best = np.argmin(np.round(growth, 12))
            held[here] += change[best]
            held[there[best]] -= change[best]
            part[group], part[others[best]] = there[best], here


def _links(conversation: Conversation, by: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield what connects a conversation with others: ("video", name) or ("person", name)."""
    if "video" in by:
        yield "video", conversation.group
    if "speaker" in by:
        yield from (("person", person) for person in conversation.people)


def _has_labels(conversations: Iterable[Conversation]) -> bool:
    return any(turn.label for conversation in conversations for turn in conversation.turns)


def _by_fractions(
    conversations: Sequence[Conversation],
    config: SplitConfig,
    named: Mapping[str, str],
    parts: Sequence[Part],
    before: Mapping[str, Part],
) -> Placed:
    labelled = _has_labels(conversations)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    fixed: dict[str, int] = {}
    for conversation in conversations:
        group = named[conversation.id]
        counts[group].update(strata(conversation, config, labelled=labelled))
        if conversation.id in before:
            if before[conversation.id] not in parts:
                raise DataError(
                    f"conversation {conversation.id} was in {before[conversation.id]!r} before, but the parts are now "
                    f"{', '.join(map(str, parts))}; prepare the corpus again in another folder"
                )
            fixed[group] = parts.index(before[conversation.id])
    shares = config.fractions if config.folds is None else [1 / config.folds] * config.folds
    assigned = stratified_assignment(counts, shares, config.seed, fixed)
    return [
        (conversation, before.get(conversation.id, parts[assigned[named[conversation.id]]]))
        for conversation in conversations
    ]


def _from_corpus(conversations: Sequence[Conversation], config: SplitConfig) -> Placed:
    if config.folds is not None:
        raise DataError(
            "split.folds: the corpus has a predefined split; set split.folds=null, or import it without its split"
        )
    placed: list[tuple[Conversation, Part]] = []
    for conversation in conversations:
        if conversation.split is not None and conversation.split not in SPLITS:
            raise DataError(
                f"{_where(conversation)}: conversation {conversation.id} has split {conversation.split!r}; use one of "
                f"{', '.join(SPLITS)}"
            )
        if conversation.split is not None:
            placed.append((conversation, conversation.split))
    without = [conversation.id for conversation in conversations if conversation.split is None]
    if without:
        raise DataError(
            f"{len(without)} of {len(conversations)} conversations have no split ({listed(without)}); give all "
            "of them a split, or none"
        )
    return placed


def _from_file(
    conversations: Sequence[Conversation], file: str, parts: Sequence[Part]
) -> Iterator[tuple[Conversation, Part]]:
    """Yield the conversations of the file with their parts; a conversation that is listed twice is yielded twice."""
    by_id = {clean_name(conversation.id): conversation for conversation in conversations}
    names = {str(part): part for part in parts}
    missing = set(by_id)
    for line, written, part in _rows(file):
        name = clean_name(written)
        if name not in by_id:
            raise DataError(f"{file}:{line}: the corpus has no conversation {name!r}; fix or remove the line")
        if part not in names:
            raise DataError(f"{file}:{line}: conversation {name} has split {part!r}; use one of {', '.join(names)}")
        missing.discard(name)
        yield by_id[name], names[part]
    if missing:
        raise DataError(f"{file}: {len(missing)} conversation(s) are not listed ({listed(missing)}); add them")


def _rows(file: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, conversation, split) of every row of the file."""
    try:
        with Path(file).open(encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened)
            if not {"conversation", "split"} <= set(reader.fieldnames or ()):
                raise DataError(f"{file}:1: the first line must name the columns conversation and split")
            for row in reader:
                yield reader.line_num, (row["conversation"] or "").strip(), (row["split"] or "").strip()
    except OSError as error:
        raise DataError(f"split.file: cannot read {file} ({error.strerror}); give a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{file}: not a CSV in UTF-8 ({reason(error)}); save it as one") from None


def _leaks(placed: Placed, shared: Pairs) -> list[Finding]:
    """Return a finding for every conversation, video, person or clip that is in two parts."""
    leaks: list[Finding] = []
    earlier: dict[tuple[str, str], tuple[Conversation, Part]] = {}

    def add(code: str, conversation: Conversation, message: str) -> None:
        leaks.append(Finding(code, _where(conversation), conversation.id, message))

    for this, part in placed:
        for kind, name in dict.fromkeys([("conversation", this.id), *_links(this, ("video", "speaker"))]):
            other, other_part = earlier.setdefault((kind, name), (this, part))
            if other_part == part:
                continue
            if kind == "conversation":
                add("F_LEAK_CONVERSATION", this, f"conversation {this.id} is in {other_part} and in {part}")
            elif other is not this:
                pair = f"conversation {other.id} is in {other_part}, conversation {this.id} in {part}"
                add("F_LEAK_GROUP", this, f"{kind} {name}: {pair}")
    by_id = {conversation.id: (conversation, part) for conversation, part in placed}
    for (this, part), (other, other_part) in ((by_id[first], by_id[second]) for first, second in shared):
        if part != other_part:
            pair = f"conversation {other.id} is in {other_part}, conversation {this.id} in {part}"
            add("F_LEAK_AUDIO", this, f"the same audio: {pair}")
    return leaks


def _where(conversation: Conversation) -> str:
    return conversation.turns[0].where if conversation.turns else ""


def _refuse_empty(placed: Placed, named: Mapping[str, str], parts: Sequence[Part], advice: str) -> None:
    labelled = _has_labels(conversation for conversation, _ in placed)
    kind = "labelled turns" if labelled else "turns"
    filled = {part for conversation, part in placed if any(turn.label or not labelled for turn in conversation.turns)}
    for part in parts:
        if part not in filled:
            folds = isinstance(part, int)
            name = f"fold {part}" if folds else f"the {part} split"
            raise DataError(
                f"{name} has no {kind}: the {len(named)} session(s) form {len(set(named.values()))} group(s), and each "
                f"of {len(parts)} {'folds' if folds else 'splits'} needs at least one group with {kind}; "
                + (advice or f"add sessions{', or lower split.folds' if folds else ''}")
            )
