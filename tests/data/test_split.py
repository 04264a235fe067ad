"""Splits: whole groups, dealt by seed and by strata, never a leak, and no part without turns."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np
import pytest

from data.corpus.config import SplitConfig
from data.corpus.schema import SPLITS, Conversation
from data.errors import DataError
from data.preparation.split import groups, split_conversations, strata, stratified_assignment
from data.shards.format import fold_split
from tests.data.sessions import part, parts, session

SHARES = (0.7, 0.15, 0.15)
FOLDS = (0.2,) * 5
LABELS = ("change", "neutral", "sustain", "question", "reflection", "other", "rare")
USUAL = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01])


def skewed(n_groups: int, seed: int) -> dict[str, Counter[str]]:
    """Groups of one session, of very different sizes; a fifth are of low quality and have other labels."""
    rng = np.random.default_rng(seed)
    made = {}
    for number in range(n_groups):
        size, low = int(rng.lognormal(4, 0.8)) + 3, rng.random() < 0.2
        chances = rng.dirichlet(4 * (USUAL[::-1] if low else USUAL))
        labels = zip(LABELS, rng.multinomial(size, chances).tolist(), strict=True)
        made[f"g{number}"] = Counter({f"label:{label}": count for label, count in labels})
        made[f"g{number}"].update({"turns": size, f"quality:{'low' if low else 'high'}": 1})
    return made


def random_corpus(rng: np.random.Generator, *, named: bool) -> list[Conversation]:
    """A few sessions that share videos and people now and then; some have no label at all."""
    n_sessions = int(rng.integers(6, 25))
    return [
        session(
            f"s{number}",
            f"v{rng.integers(2 * n_sessions)}",
            [(*LABELS, None)[rng.integers(8)] for _ in range(rng.integers(1, 9))],
            people=tuple(
                {f"p{person}" for person in rng.integers(4 * n_sessions, size=rng.integers(1, 3))} if named else ()
            ),
            quality=("high", "low", None)[rng.integers(3)],
        )
        for number in range(n_sessions)
    ]


def random_cases(count: int) -> Iterator[tuple[list[Conversation], SplitConfig, list[tuple[str, str]]]]:
    """Corpora with settings under which they can be split."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        by = ["video", "speaker"] if rng.random() < 0.5 else ["video"]
        corpus = random_corpus(rng, named="speaker" in by)
        config = SplitConfig(by=by, seed=seed, folds=3 if rng.random() < 0.3 else None)
        one, other = (corpus[place].id for place in rng.choice(len(corpus), 2, replace=False))
        shared = [(one, other)] if seed % 2 else []
        named = groups(corpus, config, shared)
        if len({named[each.id] for each in corpus if any(turn.label for turn in each.turns)}) >= 3:
            yield corpus, config, shared


def share_by_part(dealt: Mapping[str, int], corpus: Mapping[str, Counter[str]], kind: str, n_parts: int) -> np.ndarray:
    """[n_parts]: how much of a stratum each part has."""
    counts = np.zeros(n_parts)
    for group, number in dealt.items():
        counts[number] += corpus[group][kind]
    return np.asarray(counts / counts.sum())


def deviation(dealt: Mapping[str, int], corpus: Mapping[str, Counter[str]], shares: Sequence[float], of: str) -> float:
    """Mean over the strata whose name begins with `of`: the largest distance of a part's share from the wanted one."""
    kinds = {kind for counts in corpus.values() for kind in counts if kind.startswith(of)}
    own = [np.abs(share_by_part(dealt, corpus, kind, len(shares)) - shares).max() for kind in sorted(kinds)]
    return float(np.mean(own))


def by_size_alone(corpus: Mapping[str, Counter[str]], shares: Sequence[float], seed: int) -> dict[str, int]:
    order = np.random.default_rng(seed).permutation(sorted(corpus)).tolist()
    missing = np.array(shares) * sum(counts["turns"] for counts in corpus.values())
    dealt = {}
    for group in sorted(order, key=lambda name: -corpus[name]["turns"]):
        dealt[group] = int(np.argmax(missing))
        missing[dealt[group]] -= corpus[group]["turns"]
    return dealt


def at_random(corpus: Mapping[str, Counter[str]], shares: Sequence[float], seed: int) -> dict[str, int]:
    numbers = np.random.default_rng(seed).choice(len(shares), len(corpus), p=shares).tolist()
    return dict(zip(sorted(corpus), numbers, strict=True))


# Any corpus


def test_no_conversation_group_person_or_sound_is_ever_cut() -> None:
    seen = 0
    for corpus, config, shared in random_cases(300):
        seen += 1
        places = split_conversations(corpus, config, shared=shared)
        assert list(places) == [one.id for one in corpus]
        assert set(parts(places).values()) == set(range(3) if config.folds else SPLITS)
        assert all((place.split is None) == bool(config.folds) != (place.fold is None) for place in places.values())
        for one, other in combinations(corpus, 2):
            joined = one.group == other.group or (one.id, other.id) in shared or (other.id, one.id) in shared
            if joined or ("speaker" in config.by and set(one.people) & set(other.people)):
                assert places[one.id] == places[other.id]
    assert seen > 200


def test_the_result_does_not_depend_on_the_order_of_the_conversations() -> None:
    for corpus, config, shared in random_cases(100):
        mixed = [corpus[place] for place in np.random.default_rng(config.seed).permutation(len(corpus))]
        swapped = [(other, one) for one, other in shared]
        assert split_conversations(corpus, config, shared=shared) == split_conversations(mixed, config, shared=swapped)


def test_sessions_that_are_added_move_nobody() -> None:
    added = 0
    for corpus, config, shared in random_cases(100):
        before = parts(split_conversations(corpus, config, shared=shared))
        people = [(f"n{number}",) if "speaker" in config.by else () for number in range(7)]
        more = [session(f"new{number}", f"w{number // 2}", LABELS, people=people[number]) for number in range(6)]
        more.append(session("joins", corpus[0].group, people=people[6]))
        places = split_conversations([*more, *corpus], config, before=before, shared=shared)
        assert {name: part(places[name]) for name in before} == before
        assert part(places["joins"]) == before[corpus[0].id]
        assert len(places) == len(corpus) + len(more)
        added += len({part(places[one.id]) for one in more[:-1]}) > 1
    assert added > 50  # what is new is dealt, not put in one place


def test_added_sessions_fill_what_lacks_most() -> None:
    before = dict.fromkeys(["a", "b", "c", "d", "e"], "val") | {"f": "train", "g": "test"}
    old = [session(name, labels=["change"] * 10) for name in before]
    more = [session(f"n{number}", labels=["change"] * 10) for number in range(33)]
    counts = Counter(parts(split_conversations(old + more, SplitConfig(), before=before)).values())
    assert counts == {"train": 28, "val": 6, "test": 6}


def test_each_seed_gives_another_split_that_is_as_good() -> None:
    corpus = skewed(60, 0)
    found = {tuple(stratified_assignment(corpus, SHARES, seed).items()) for seed in range(20)}
    assert len(found) == 20
    assert all(deviation(dict(dealt), corpus, SHARES, "turns") < 0.02 for dealt in found)


def test_dealing_does_not_depend_on_the_order_of_the_mapping() -> None:
    corpus = skewed(40, 1)
    assert stratified_assignment(corpus, SHARES, 3) == stratified_assignment(dict(reversed(corpus.items())), SHARES, 3)


# How well


@pytest.mark.parametrize("shares", [SHARES, FOLDS])
@pytest.mark.parametrize(("n_groups", "size", "label", "quality"), [(119, 0.004, 0.03, 0.03), (48, 0.02, 0.08, 0.08)])
def test_parts_have_the_same_labels_and_qualities_and_the_wanted_sizes(
    n_groups: int, size: float, label: float, quality: float, shares: Sequence[float]
) -> None:
    wanted = {"turns": size, "label:": label, "quality:": quality}
    own, plain, random = (
        {of: np.mean([deviation(way(corpus, shares, 0), corpus, shares, of) for corpus in corpora]) for of in wanted}
        for corpora in [[skewed(n_groups, seed) for seed in range(10)]]
        for way in (stratified_assignment, by_size_alone, at_random)
    )
    for of, bound in wanted.items():
        assert own[of] < bound
        assert own[of] < random[of] * 0.6
    assert own["label:"] < plain["label:"] / 2
    assert own["quality:"] < plain["quality:"] / 2


def test_many_equal_groups_meet_the_fractions() -> None:
    for n_groups in (48, 100, 119):
        equal = {f"g{number}": Counter({"turns": 10, "label:change": 5}) for number in range(n_groups)}
        for shares in (SHARES, FOLDS, (0.8, 0.1, 0.1)):
            counts = Counter(stratified_assignment(equal, shares, 0).values())
            assert all(abs(counts[number] - share * n_groups) < 1 for number, share in enumerate(shares))


def test_six_equal_groups_go_four_one_one() -> None:
    for seed in range(10):
        counts = Counter(
            stratified_assignment({f"g{n}": Counter({"turns": 7}) for n in range(6)}, SHARES, seed).values()
        )
        assert counts == {0: 4, 1: 1, 2: 1}


def test_a_huge_group_goes_to_train_and_the_others_share_the_rest() -> None:
    corpus = {"huge": Counter({"turns": 600})} | {f"g{number}": Counter({"turns": 10}) for number in range(40)}
    dealt = stratified_assignment(corpus, SHARES, 0)
    assert dealt["huge"] == 0
    assert deviation(dealt, corpus, SHARES, "turns") < 0.011
    swallowing = {"huge": Counter({"turns": 6000}), "a": Counter({"turns": 1}), "b": Counter({"turns": 1})}
    assert stratified_assignment(swallowing, SHARES, 0)["huge"] == 0


@pytest.mark.parametrize("sizes", [(1, 1, 1), (100, 1, 1), (100, 90, 1), (50, 30, 20)])
def test_three_groups_fill_three_parts(sizes: tuple[int, ...]) -> None:
    for seed in range(5):
        corpus = {f"g{number}": Counter({"turns": size}) for number, size in enumerate(sizes)}
        empty = {f"empty{number}": Counter({"turns": 0, "quality:low": 5}) for number in range(5)}
        assert sorted(stratified_assignment(corpus, SHARES, seed).values()) == [0, 1, 2]
        dealt = stratified_assignment(corpus | empty, SHARES, seed)
        assert sorted(dealt[name] for name in corpus) == [0, 1, 2]


def test_a_part_never_stays_without_turns_where_groups_are_enough() -> None:
    for seed in range(300):
        rng = np.random.default_rng(seed)
        shares = (SHARES, FOLDS)[seed % 2]
        corpus = skewed(int(rng.integers(len(shares), 9)), seed) | {"none": Counter({"turns": 0, "quality:low": 1})}
        fixed = {name: int(rng.integers(len(shares))) for name in sorted(corpus)[: seed % 3]}
        missing = len(shares) - len({number for name, number in fixed.items() if corpus[name]["turns"]})
        dealt = stratified_assignment(corpus, shares, seed, fixed)
        assert fixed.items() <= dealt.items()
        if sum(counts["turns"] > 0 for name, counts in corpus.items() if name not in fixed) >= missing:
            assert {number for name, number in dealt.items() if corpus[name]["turns"]} == set(range(len(shares)))


def test_a_stratum_of_a_single_group_disturbs_neither_the_sizes_nor_the_others() -> None:
    corpus = skewed(80, 2)
    corpus["g7"].update({f"label:only here {number}": 1 for number in range(3)})
    dealt = stratified_assignment(corpus, SHARES, 0)
    assert deviation(dealt, corpus, SHARES, "turns") < 0.01
    assert deviation(dealt, corpus, SHARES, "label:change") < 0.02


def test_the_sizes_weigh_more_than_all_else() -> None:
    corpus = {"huge": Counter({"turns": 600})} | {f"g{number}": Counter({"turns": 10}) for number in range(40)}
    for number, counts in enumerate(corpus.values()):
        counts.update({f"quality:{number % 4}": 1})
    assert deviation(stratified_assignment(corpus, SHARES, 0), corpus, SHARES, "turns") < 0.1  # else 0.14


def test_sessions_without_labels_are_spread_too() -> None:
    corpus = {f"g{n}": Counter({"turns": 10}) for n in range(20)} | {f"none{n}": Counter() for n in range(20)}
    dealt = stratified_assignment(corpus, FOLDS, 0)
    assert Counter(number for name, number in dealt.items() if "none" in name) == dict.fromkeys(range(5), 4)


# What is counted


def test_strata_count_labelled_turns_every_label_and_the_quality_of_the_session() -> None:
    one = session("a", labels=["change", "change|question", None], quality="high")
    counts = {"turns": 2, "label:change": 2, "label:question": 1, "quality:high": 1}
    assert strata(one, SplitConfig()) == counts
    assert strata(one, SplitConfig(stratify=())) == {"turns": 2}
    assert strata(one, SplitConfig(stratify=("quality",))) == {"turns": 2, "quality:high": 1}
    assert strata(session("b", labels=[None, None]), SplitConfig(), labelled=False) == {"turns": 2}


def test_a_corpus_without_labels_is_split_by_its_turns() -> None:
    corpus = [session(f"s{n}", labels=[None] * size) for n, size in enumerate([70, *[3] * 10])]
    places = split_conversations(corpus, SplitConfig())
    assert Counter(parts(places).values()) == {"train": 1, "val": 5, "test": 5}


# Too few groups, and folds


def test_too_few_groups_are_refused() -> None:
    corpus = [session(f"s{number}", f"v{number % 2}") for number in range(8)]
    with pytest.raises(DataError, match=r"split has no labelled turns: the 8 session.s. form 2 group.s.*add sessions"):
        split_conversations(corpus, SplitConfig())
    with pytest.raises(DataError, match=r"fold \d has no labelled turns.*2 group.*5 folds.*or lower split.folds"):
        split_conversations(corpus, SplitConfig(folds=5))
    with pytest.raises(DataError, match="0 session"):
        split_conversations([], SplitConfig())
    unlabelled = [session(f"u{number}", labels=[None]) for number in range(5)]
    with pytest.raises(DataError, match="needs at least one group with labelled turns"):
        split_conversations([*corpus, *unlabelled], SplitConfig())


def test_every_fold_is_for_test_once_and_for_val_once() -> None:
    for folds in (3, 5):
        table = [[fold_split(fold, test, folds) for fold in range(folds)] for test in range(folds)]
        wanted = {"test": 1, "val": 1} | {"train": folds - 2}
        assert all(Counter(line) == wanted for line in (*table, *zip(*table, strict=True)))
    assert [fold_split(fold, 4, 5) for fold in range(5)] == ["val", "train", "train", "train", "test"]
