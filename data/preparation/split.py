"""Splits that cannot leak: whole groups of sessions are dealt to train, val and test, or to folds.

A group is all that hangs together by a video, a person or the same sound. However a split comes about (a list, the
corpus's own, or dealt here), it is checked for leaks before anything is made of it.
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.corpus.config import SplitConfig
from data.corpus.issues import Finding, failure
from data.corpus.schema import SPLITS, Conversation, split_label
from data.errors import DataError, listed, reason

Part = str | int  # the name of a split, or the number of a fold
Pairs = Iterable[tuple[str, str]]  # ids of conversations with the same sound
Placed = Sequence[tuple[Conversation, Part]]

TURNS = "turns"  # the stratum of size
_SIZE = 5  # weight of the turns, relative to all other strata together: shares of turns are asked for in so many words
_MOST_SWAPPED = 3000  # groups: with more of them dealing alone is exact enough, and swaps take a time that is squared


@dataclass(frozen=True, slots=True)
class Place:
    """Where a conversation went: its split, or its fold where there are folds."""

    group: str
    split: str | None = None
    fold: int | None = None


def split_conversations(
    conversations: Sequence[Conversation], config: SplitConfig, *, before: Mapping[str, Part] = {}, shared: Pairs = ()
) -> dict[str, Place]:
    """The place of every conversation: by `config.file`, else as the corpus says, else dealt by fractions and seed.

    Args:
        conversations: of the whole corpus; their order does not matter.
        config: how to split.
        before: split or fold of conversations that were dealt earlier: they keep it, and only new groups are dealt.
        shared: pairs of conversations with the same sound.

    Raises:
        BuildError: a conversation, a group or a sound would stand in two splits.
        DataError: a split or fold would be empty, or what is given for the split cannot be used.
    """
    shared = list(shared)
    parts: Sequence[Part] = range(config.folds) if config.folds else SPLITS
    named = groups(conversations, config, shared)
    placed: Placed
    if config.file is not None:
        placed, remedy = list(_from_file(conversations, config.file, parts)), f"mend {config.file}"
    elif any(one.split is not None for one in conversations):
        placed, remedy = _from_corpus(conversations, config), "mend the split of the corpus, or list one in split.file"
    else:
        placed, remedy = _dealt(conversations, config, named, parts, before), ""
    if leaks := _leaks(placed, shared):
        raise failure(leaks, remedy or _cure(any(one.people for one in conversations), before))
    _refuse_empty(placed, named, parts, remedy)
    return {one.id: Place(named[one.id], *_split_and_fold(part)) for one, part in placed}


def groups(conversations: Sequence[Conversation], config: SplitConfig, shared: Pairs = ()) -> dict[str, str]:
    """The name of the group of every conversation: what hangs together by `config.by` or by the same sound.

    A group is named after its smallest video, or its smallest conversation where videos do not matter.

    Raises:
        DataError: a split by speaker is asked for, and no conversation says who speaks.
    """
    from scipy.sparse import coo_array  # here: processes that only read shards do not need it
    from scipy.sparse.csgraph import connected_components

    if "speaker" in config.by and not any(one.people for one in conversations):
        raise DataError(
            "split.by=speaker: the corpus does not say who speaks; name the person (columns.person of a table), or use "
            "split.by=video"
        )
    unknown = [one.id for one in conversations if "speaker" in config.by and not one.people]
    if unknown:
        raise DataError(
            f"split.by=speaker: {len(unknown)} session(s) do not say who speaks ({listed(unknown)}), and might leak; "
            "name the person of each, or use split.by=video"
        )
    number = {one.id: place for place, one in enumerate(conversations)}
    edges = [(number[one], number[other]) for one, other in shared]
    first: dict[tuple[str, str], int] = {}
    for one in conversations:
        edges += [(first.setdefault(bond, number[one.id]), number[one.id]) for bond in _bonds(one, config.by)]
    rows, columns = np.array(edges, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(len(conversations), len(conversations)))
    components = connected_components(graph, directed=False)[1].tolist()
    names: dict[int, str] = {}
    for one, component in zip(conversations, components, strict=True):
        own = one.group if "video" in config.by else one.id
        names[component] = min(own, names.get(component, own))
    return {one.id: names[component] for one, component in zip(conversations, components, strict=True)}


def strata(conversation: Conversation, config: SplitConfig, *, labelled: bool = True) -> Counter[str]:
    """What is counted for a conversation when groups are dealt: turns, each label's turns, and sessions by quality.

    Args:
        conversation: as imported and checked.
        config: says what besides the turns is counted.
        labelled: whether only turns with a label count; False for a corpus without labels.
    """
    labels = [turn.label for turn in conversation.turns if turn.label]
    counts = Counter({TURNS: len(labels) if labelled else len(conversation.turns)})
    if "label" in config.stratify:
        counts.update(f"label:{own}" for label in labels for own in split_label(label))
    if "quality" in config.stratify and conversation.quality:
        counts[f"quality:{conversation.quality}"] += 1
    return counts


def deal(
    strata: Mapping[str, Counter[str]], shares: Sequence[float], seed: int, fixed: Mapping[str, int] = {}
) -> dict[str, int]:
    """Deal whole groups to parts so that every part gets its share of every stratum, as far as that is possible.

    What is made small is chi-squared: over parts and strata, the squared difference between the counts and the wanted
    ones, relative to the latter. Each stratum counts relative to its total, so a rare label weighs as much as a
    frequent one; the turns weigh more than all others together. Groups are dealt largest first (in an order of the
    seed where sizes are alike), then pairs are swapped where that helps.

    Args:
        strata: counts by group; the result does not depend on the mapping's order.
        shares: of the parts; they sum to 1.
        seed: of the order in which groups of similar size are dealt.
        fixed: parts of groups that keep it, and count.

    Returns:
        The number of the part by group. No part is without turns unless there are fewer groups with turns than parts.
    """
    names = sorted(strata)
    vectors = _vectors([strata[name] for name in names])
    share = np.asarray(shares)
    part = np.array([fixed.get(name, -1) for name in names], np.int64)
    # Groups within a factor of two are alike: strictly by size, every seed would give the same split.
    size = np.round(np.log2(np.maximum((vectors**2).sum(1), 1e-12)))
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-size[order], kind="stable")]
    free = order[part[order] < 0]
    held = np.zeros((len(share), vectors.shape[1]))  # what the parts hold
    np.add.at(held, part[part >= 0], vectors[part >= 0])
    _deal_in_order(vectors, free, share, part, held)
    if len(free) <= _MOST_SWAPPED:
        _swap(vectors, free, share, part, held)
    return dict(zip(names, part.tolist(), strict=True))


def _vectors(counts: Sequence[Counter[str]]) -> np.ndarray:
    """[n_groups, n_strata]: shares of the strata's totals, scaled so that squared lengths are the weighted sums.

    With them, chi-squared is, but for a constant, the sum over parts of |sum of the part's vectors|² / its share.
    """
    kinds = sorted({kind for own in counts for kind in own} - {TURNS})
    table = np.array([[*(own[kind] for kind in (TURNS, *kinds)), 1] for own in counts], float)
    table = table.reshape(len(counts), len(kinds) + 2)
    weights = [_SIZE * max(len(kinds), 1), *[1] * len(kinds), 1e-3]  # the last, the number of groups, only breaks ties
    return np.asarray(table / np.maximum(table.sum(0), 1) * np.sqrt(weights))


def _deal_in_order(
    vectors: np.ndarray, order: np.ndarray, share: np.ndarray, part: np.ndarray, held: np.ndarray
) -> None:
    """Give each group to the part where chi-squared grows least; the last groups fill parts that have no turns yet."""
    has_turns = vectors[:, 0] > 0
    left = has_turns[order].sum()  # groups
    for group in order:
        vector = vectors[group]
        growth = np.round((2 * held @ vector + vector @ vector) / share, 12)  # equal parts tie on any machine
        empty = held[:, 0] == 0
        if has_turns[group] and left <= empty.sum():
            growth[~empty] = np.inf
        part[group] = np.argmin(growth)
        held[part[group]] += vector
        left -= has_turns[group]


def _swap(vectors: np.ndarray, order: np.ndarray, share: np.ndarray, part: np.ndarray, held: np.ndarray) -> None:
    """Swap each group once with the one of another part that lowers chi-squared most, if any does."""
    has_turns = vectors[:, 0] > 0
    for group in order:
        own, others = part[group], order[(part[order] != part[group]) & (has_turns[order] == has_turns[group])]
        change = vectors[others] - vectors[group]  # of what the own part holds
        square = (change**2).sum(1)
        theirs = part[others]
        growth = (square + 2 * change @ held[own]) / share[own]
        growth += (square - 2 * (change * held[theirs]).sum(1)) / share[theirs]
        if len(others) and growth.min() < -1e-9:
            best = np.argmin(np.round(growth, 12))
            held[own] += change[best]
            held[theirs[best]] -= change[best]
            part[group], part[others[best]] = theirs[best], own


def _bonds(conversation: Conversation, by: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What the conversation must not be parted from others by: ("video", name) or ("person", name)."""
    if "video" in by:
        yield "video", conversation.group
    if "speaker" in by:
        yield from (("person", person) for person in conversation.people)


def _has_labels(conversations: Iterable[Conversation]) -> bool:
    return any(turn.label for one in conversations for turn in one.turns)


def _dealt(
    conversations: Sequence[Conversation],
    config: SplitConfig,
    named: Mapping[str, str],
    parts: Sequence[Part],
    before: Mapping[str, Part],
) -> Placed:
    labelled = _has_labels(conversations)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    fixed: dict[str, int] = {}
    for one in conversations:
        counts[named[one.id]].update(strata(one, config, labelled=labelled))
        if one.id in before:
            if before[one.id] not in parts:
                raise DataError(
                    f"conversation {one.id} was put into {before[one.id]!r} earlier, and the parts are now "
                    f"{', '.join(map(str, parts))}; prepare the corpus anew in another folder"
                )
            fixed[named[one.id]] = parts.index(before[one.id])
    shares = config.fractions if config.folds is None else [1 / config.folds] * config.folds
    dealt = deal(counts, shares, config.seed, fixed)
    return [(one, before.get(one.id, parts[dealt[named[one.id]]])) for one in conversations]


def _from_corpus(conversations: Sequence[Conversation], config: SplitConfig) -> Placed:
    if config.folds is not None:
        raise DataError(
            "split.folds: the corpus comes with a split of its own; set split.folds=null, or read it without its split"
        )
    placed: list[tuple[Conversation, Part]] = []
    for one in conversations:
        if one.split is not None and one.split not in SPLITS:
            raise DataError(f"{_where(one)}: conversation {one.id} has split {one.split!r}; known: {', '.join(SPLITS)}")
        if one.split is not None:
            placed.append((one, one.split))
    without = [one.id for one in conversations if one.split is None]
    if without:
        raise DataError(
            f"{len(without)} of {len(conversations)} conversations have no split ({listed(without)}), and the others "
            "have one; give it to all, or to none"
        )
    return placed


def _from_file(
    conversations: Sequence[Conversation], file: str, parts: Sequence[Part]
) -> Iterator[tuple[Conversation, Part]]:
    """As the list says; a conversation that stands in it twice comes twice."""
    known = {one.id: one for one in conversations}
    names = {str(part): part for part in parts}
    missing = set(known)
    for line, name, part in _rows(file):
        if name not in known:
            raise DataError(f"{file}:{line}: the corpus has no conversation {name!r}; mend or remove the line")
        if part not in names:
            raise DataError(f"{file}:{line}: conversation {name} has split {part!r}; known: {', '.join(names)}")
        missing.discard(name)
        yield known[name], names[part]
    if missing:
        raise DataError(f"{file}: {len(missing)} conversation(s) are not listed ({listed(missing)}); add them")


def _rows(file: str) -> Iterator[tuple[int, str, str]]:
    """(line, conversation, split) for every row of the list."""
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
    """A finding for everything that stands in two parts."""
    found: list[Finding] = []
    first: dict[tuple[str, str], tuple[Conversation, Part]] = {}
    for one, part in placed:
        for kind, name in dict.fromkeys([("conversation", one.id), *_bonds(one, ("video", "speaker"))]):
            other, place = first.setdefault((kind, name), (one, part))
            if place == part:
                continue
            if kind == "conversation":
                message = f"conversation {one.id} is in {place} and in {part}"
                found.append(Finding("F_LEAK_CONVERSATION", _where(one), one.id, message))
            elif other is not one:
                message = f"{kind} {name}: conversation {other.id} is in {place}, conversation {one.id} in {part}"
                found.append(Finding("F_LEAK_GROUP", _where(one), one.id, message))
    by_id = {one.id: (one, part) for one, part in placed}
    for (one, part), (other, place) in ((by_id[name], by_id[twin]) for name, twin in shared):
        if part != place:
            message = f"the same sound: conversation {other.id} is in {place}, conversation {one.id} in {part}"
            found.append(Finding("F_LEAK_AUDIO", _where(one), one.id, message))
    return found


def _where(conversation: Conversation) -> str:
    return conversation.turns[0].where if conversation.turns else ""


def _cure(people: bool, before: Mapping[str, Part]) -> str:
    if before:
        return "added sessions join what was put into two splits earlier; prepare all anew in another folder"
    return f"use split.by={'[video, speaker]' if people else 'video'}"


def _refuse_empty(placed: Placed, named: Mapping[str, str], parts: Sequence[Part], remedy: str) -> None:
    labelled = _has_labels(one for one, _ in placed)
    kind = "labelled turns" if labelled else "turns"
    filled = {part for one, part in placed if any(turn.label or not labelled for turn in one.turns)}
    for part in parts:
        if part not in filled:
            folds = isinstance(part, int)
            name = f"fold {part}" if folds else f"the {part} split"
            raise DataError(
                f"{name} has no {kind}: the {len(named)} session(s) form {len(set(named.values()))} group(s), and each "
                f"of {len(parts)} {'folds' if folds else 'splits'} needs a group with {kind} of its own; "
                + (remedy or f"add sessions{', or lower split.folds' if folds else ''}")
            )


def _split_and_fold(part: Part) -> tuple[str | None, int | None]:
    return (part, None) if isinstance(part, str) else (None, part)
