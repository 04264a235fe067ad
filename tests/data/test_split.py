"""Splits: whole groups, stratified by seed, never a leak, and no part without turns."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from data.corpus.config import SplitConfig
from data.corpus.issues import BuildError
from data.corpus.schema import SPLITS, Conversation, Turn
from data.errors import DataError
from data.preparation.split import Assignment, groups, split_conversations, strata, stratified_assignment
from data.shards.format import fold_split

SHARES = (0.7, 0.15, 0.15)
FOLDS = (0.2,) * 5
LABELS = ("change", "neutral", "sustain", "question", "reflection", "other", "rare")
USUAL = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.03, 0.01])
Strata = Mapping[str, Counter[str]]


def session(
    name: str, group: str | None = None, labels: Sequence[str | None] = ("change",), **more: Any
) -> Conversation:
    turns = [
        Turn(f"{name}/{index}", index, "client", "words", label, where=f"corpus.csv:{name}-{index}")
        for index, label in enumerate(labels)
    ]
    return Conversation(name, group or f"video {name}", turns, **more)


def part(assignment: Assignment) -> str | int:
    found = assignment.split if assignment.fold is None else assignment.fold
    assert found is not None
    return found


def parts(assignments: Mapping[str, Assignment]) -> dict[str, str | int]:
    return {name: part(assignment) for name, assignment in assignments.items()}


def equal_groups(count: int, turns: int = 10) -> dict[str, Counter[str]]:
    return {f"g{number}": Counter({"turns": turns}) for number in range(count)}


def skewed(n_groups: int, seed: int) -> dict[str, Counter[str]]:
    """Groups of one session with very different sizes; a fifth are of low quality and have other labels."""
    rng = np.random.default_rng(seed)
    made = {}
    for number in range(n_groups):
        size, low = int(rng.lognormal(4, 0.8)) + 3, rng.random() < 0.2
        chances = rng.dirichlet(4 * (USUAL[::-1] if low else USUAL))
        labels = zip(LABELS, rng.multinomial(size, chances).tolist(), strict=True)
        made[f"g{number}"] = Counter({f"label:{label}": count for label, count in labels})
        made[f"g{number}"].update({"turns": size, f"quality:{'low' if low else 'high'}": 1})
    return made


def random_session(number: int, n_sessions: int, named: bool, rng: np.random.Generator) -> Conversation:
    """A session that may share its video or people with others; it may have no label at all."""
    labels = [(*LABELS, None)[rng.integers(8)] for _ in range(rng.integers(1, 9))]
    people = {f"p{person}" for person in rng.integers(4 * n_sessions, size=rng.integers(1, 3))} if named else ()
    quality = ("high", "low", None)[rng.integers(3)]
    return session(f"s{number}", f"v{rng.integers(2 * n_sessions)}", labels, people=tuple(people), quality=quality)


def random_cases(count: int) -> Iterator[tuple[list[Conversation], SplitConfig, list[tuple[str, str]]]]:
    """Corpora with settings under which they can be split."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        by = ["video", "speaker"] if rng.random() < 0.5 else ["video"]
        size = int(rng.integers(6, 25))
        corpus = [random_session(number, size, "speaker" in by, rng) for number in range(size)]
        config = SplitConfig(by=by, seed=seed, folds=3 if rng.random() < 0.3 else None)
        first, second = (corpus[index].id for index in rng.choice(size, 2, replace=False))
        shared = [(first, second)] if seed % 2 else []
        named = groups(corpus, config, shared)
        if len({named[each.id] for each in corpus if any(turn.label for turn in each.turns)}) >= 3:
            yield corpus, config, shared


def deviation(assigned: Mapping[str, int], corpus: Strata, shares: Sequence[float], prefix: str) -> float:
    """Mean over the strata with this prefix of the largest difference between a part's share and the expected one."""
    differences = []
    for kind in sorted({kind for counts in corpus.values() for kind in counts if kind.startswith(prefix)}):
        counts = np.zeros(len(shares))
        for group, number in assigned.items():
            counts[number] += corpus[group][kind]
        differences.append(np.abs(counts / counts.sum() - shares).max())
    return float(np.mean(differences))


def at_random(corpus: Strata, shares: Sequence[float], seed: int) -> dict[str, int]:
    numbers = np.random.default_rng(seed).choice(len(shares), len(corpus), p=shares).tolist()
    return dict(zip(sorted(corpus), numbers, strict=True))


# Invariants


def test_linked_sessions_stay_together_in_any_corpus() -> None:
    """The result does not depend on the order of the sessions, and added sessions do not move others."""
    seen = spread = 0
    for corpus, config, shared in random_cases(120):
        seen += 1
        assigned = split_conversations(corpus, config, shared=shared)
        assert list(assigned) == [each.id for each in corpus]
        assert set(parts(assigned).values()) == set(range(3) if config.folds else SPLITS)
        assert all((each.split is None) == bool(config.folds) != (each.fold is None) for each in assigned.values())
        for first, second in combinations(corpus, 2):
            linked = first.group == second.group or {(first.id, second.id), (second.id, first.id)} & set(shared)
            if linked or ("speaker" in config.by and set(first.people) & set(second.people)):
                assert assigned[first.id] == assigned[second.id]
        mixed = [corpus[index] for index in np.random.default_rng(config.seed).permutation(len(corpus))]
        assert split_conversations(mixed, config, shared=[(b, a) for a, b in shared]) == assigned
        people = [(f"n{number}",) if "speaker" in config.by else () for number in range(7)]
        more = [session(f"new{number}", f"w{number // 2}", LABELS, people=people[number]) for number in range(6)]
        more.append(session("joins", corpus[0].group, people=people[6]))
        grown = parts(split_conversations([*more, *corpus], config, before=parts(assigned)))
        assert {name: grown[name] for name in assigned} == parts(assigned)
        assert grown["joins"] == part(assigned[corpus[0].id])
        spread += len({grown[each.id] for each in more[:-1]}) > 1
    assert seen > 80
    assert spread > 50  # new groups are spread over parts


def test_added_sessions_fill_the_smallest_part() -> None:
    before = dict.fromkeys(["a", "b", "c", "d", "e"], "val") | {"f": "train", "g": "test"}
    old = [session(name, labels=["change"] * 10) for name in before]
    more = [session(f"n{number}", labels=["change"] * 10) for number in range(33)]
    counts = Counter(parts(split_conversations(old + more, SplitConfig(), before=before)).values())
    assert counts == {"train": 28, "val": 6, "test": 6}


def test_every_seed_gives_a_different_good_split() -> None:
    corpus = skewed(60, 0)
    found = {tuple(stratified_assignment(corpus, SHARES, seed).items()) for seed in range(20)}
    assert len(found) == 20
    assert all(deviation(dict(assigned), corpus, SHARES, "turns") < 0.02 for assigned in found)
    reverse = dict(reversed(corpus.items()))
    assert stratified_assignment(corpus, SHARES, 3) == stratified_assignment(reverse, SHARES, 3)


# Quality of the stratification


@pytest.mark.parametrize("shares", [SHARES, FOLDS])
@pytest.mark.parametrize(("n_groups", "size", "label", "quality"), [(119, 0.004, 0.03, 0.03), (48, 0.02, 0.08, 0.08)])
def test_parts_have_the_same_labels_and_the_wanted_sizes(
    n_groups: int, size: float, label: float, quality: float, shares: Sequence[float]
) -> None:
    corpora = [skewed(n_groups, seed) for seed in range(10)]
    for prefix, limit in {"turns": size, "label:": label, "quality:": quality}.items():
        ours, random = (
            np.mean([deviation(assign(corpus, shares, 0), corpus, shares, prefix) for corpus in corpora])
            for assign in (stratified_assignment, at_random)
        )
        assert ours < limit
        assert ours < random * 0.6


@pytest.mark.parametrize("shares", [SHARES, FOLDS, (0.8, 0.1, 0.1)])
@pytest.mark.parametrize("n_groups", [6, 48, 100, 119])
def test_equal_groups_meet_the_fractions(n_groups: int, shares: Sequence[float]) -> None:
    for seed in range(3):
        counts = Counter(stratified_assignment(equal_groups(n_groups), shares, seed).values())
        assert all(counts[number] > 0 for number in range(len(shares)))
        assert all(abs(counts[number] - share * n_groups) <= 1 for number, share in enumerate(shares))


def test_huge_group_goes_to_train() -> None:
    corpus = {"huge": Counter({"turns": 600})} | equal_groups(40)
    assigned = stratified_assignment(corpus, SHARES, 0)
    assert assigned["huge"] == 0
    assert deviation(assigned, corpus, SHARES, "turns") < 0.011
    assert stratified_assignment({"huge": Counter({"turns": 6000})} | equal_groups(2, 1), SHARES, 0)["huge"] == 0
    for number, counts in enumerate(corpus.values()):
        counts.update({f"quality:{number % 4}": 1})
    assert deviation(stratified_assignment(corpus, SHARES, 0), corpus, SHARES, "turns") < 0.1  # unweighted: 0.14


@pytest.mark.parametrize("sizes", [(1, 1, 1), (100, 1, 1), (100, 90, 1), (50, 30, 20)])
def test_three_groups_fill_three_parts(sizes: tuple[int, ...]) -> None:
    corpus = {f"g{number}": Counter({"turns": size}) for number, size in enumerate(sizes)}
    empty = {f"empty{number}": Counter({"turns": 0, "quality:low": 5}) for number in range(5)}
    for seed in range(5):
        assert sorted(stratified_assignment(corpus, SHARES, seed).values()) == [0, 1, 2]
        assigned = stratified_assignment(corpus | empty, SHARES, seed)
        assert sorted(assigned[name] for name in corpus) == [0, 1, 2]


def test_every_part_gets_turns_if_there_are_enough_groups() -> None:
    for seed in range(150):
        rng = np.random.default_rng(seed)
        shares = (SHARES, FOLDS)[seed % 2]
        corpus = skewed(int(rng.integers(len(shares), 9)), seed) | {"none": Counter({"turns": 0, "quality:low": 1})}
        fixed = {name: int(rng.integers(len(shares))) for name in sorted(corpus)[: seed % 3]}
        missing = len(shares) - len({number for name, number in fixed.items() if corpus[name]["turns"]})
        assigned = stratified_assignment(corpus, shares, seed, fixed)
        assert fixed.items() <= assigned.items()
        if sum(counts["turns"] > 0 for name, counts in corpus.items() if name not in fixed) >= missing:
            assert {number for name, number in assigned.items() if corpus[name]["turns"]} == set(range(len(shares)))


def test_rare_strata_and_unlabelled_groups_are_no_problem() -> None:
    corpus = skewed(80, 2)
    corpus["g7"].update({f"label:only here {number}": 1 for number in range(3)})
    assigned = stratified_assignment(corpus, SHARES, 0)
    assert deviation(assigned, corpus, SHARES, "turns") < 0.01
    assert deviation(assigned, corpus, SHARES, "label:change") < 0.02
    unlabelled = equal_groups(20) | {f"none{number}": Counter() for number in range(20)}
    spread = Counter(number for name, number in stratified_assignment(unlabelled, FOLDS, 0).items() if "none" in name)
    assert spread == dict.fromkeys(range(5), 4)


def test_strata_count_turns_labels_and_quality() -> None:
    rated = session("a", labels=["change", "change|question", None], quality="high")
    assert strata(rated, SplitConfig()) == {"turns": 2, "label:change": 2, "label:question": 1, "quality:high": 1}
    assert strata(rated, SplitConfig(stratify=())) == {"turns": 2}
    assert strata(rated, SplitConfig(stratify=("quality",))) == {"turns": 2, "quality:high": 1}
    assert strata(session("b", labels=[None, None]), SplitConfig(), labelled=False) == {"turns": 2}
    corpus = [session(f"s{n}", labels=[None] * size) for n, size in enumerate([70, *[3] * 10])]
    assigned = split_conversations(corpus, SplitConfig())
    assert Counter(parts(assigned).values()) == {"train": 1, "val": 5, "test": 5}


def test_too_few_groups_are_refused() -> None:
    corpus = [session(f"s{number}", f"v{number % 2}") for number in range(8)]
    unlabelled = [session(f"u{number}", labels=[None]) for number in range(5)]
    for sessions, folds, message in (
        (corpus, None, r"split has no labelled turns: the 8 session.s. form 2 group.s.*add sessions"),
        (corpus, 5, r"fold \d has no labelled turns.*2 group.*5 folds.*or lower split.folds"),
        ([], None, "0 session"),
        ([*corpus, *unlabelled], None, "needs at least one group with labelled turns"),
    ):
        with pytest.raises(DataError, match=message):
            split_conversations(sessions, SplitConfig(folds=folds))


def test_every_fold_is_test_once_and_val_once() -> None:
    for folds in (3, 5):
        table = [[fold_split(fold, test, folds) for fold in range(folds)] for test in range(folds)]
        expected = {"test": 1, "val": 1} | {"train": folds - 2}
        assert all(Counter(line) == expected for line in (*table, *zip(*table, strict=True)))
    assert [fold_split(fold, 4, 5) for fold in range(5)] == ["val", "train", "train", "train", "test"]


# Groups and leaks


def test_groups_have_the_name_of_their_first_member() -> None:
    corpus = [
        session("1", "c", people=("ann",)),
        session("2", "b", people=("ann", "bob")),
        session("3", "b", people=("cid",)),
        session("4", "a", people=("bob",)),
        session("5", "e", people=("dan",)),
    ]
    for by, shared, names in (
        (("video",), [], "cbbae"),
        (("video",), [("5", "1")], "cbbac"),
        (("video", "speaker"), [], "aaaae"),
        (("speaker",), [], "11315"),
        (("conversation",), [("2", "4")], "12325"),
    ):
        assert groups(corpus, SplitConfig(by=by), shared) == dict(zip("12345", names, strict=True))


def test_split_by_speaker_needs_identities() -> None:
    with pytest.raises(DataError, match="has no speaker identities"):
        groups([session("a"), session("b")], SplitConfig(by=("speaker",)))
    some = [session("a", people=("ann",)), session("b"), session("c")]
    with pytest.raises(DataError, match=r"2 session\(s\) have no speaker identity \(b, c\) and might leak"):
        groups(some, SplitConfig(by=("video", "speaker")))


@pytest.mark.parametrize("name", ["row", "turn", "utterance", "random"])
def test_split_by_row_is_refused(name: str) -> None:
    with pytest.raises(ValidationError, match=f"a split by {name} puts turns of one.*measure memorisation"):
        SplitConfig.model_validate({"by": name})


def leaks(corpus: Sequence[Conversation], config: SplitConfig, advice: str, **more: Any) -> list[tuple[str, str, str]]:
    with pytest.raises(BuildError) as caught:
        split_conversations(corpus, config, **more)
    findings = caught.value.findings
    assert advice in str(caught.value)
    assert all(finding.message in str(caught.value) for finding in findings[:5])
    assert all(finding.where.startswith(f"corpus.csv:{finding.utterance}-0") for finding in findings)
    return [(finding.code, finding.utterance, finding.message) for finding in findings]


@pytest.mark.parametrize(
    ("video", "person", "by", "advice"),
    [
        ("the video", None, "conversation", "use split.by=video"),
        ("the video", "p{}", "speaker", "use split.by=[video, speaker]"),
        (None, "ann", "video", "use split.by=[video, speaker]"),
    ],
)
def test_split_that_cuts_video_or_person_fails(video: str | None, person: str | None, by: str, advice: str) -> None:
    corpus = [session(f"s{n}", video, people=(person.format(n),) if person else ()) for n in range(6)]
    found = leaks(corpus, SplitConfig(by=(by,)), advice)
    assert {code for code, *_ in found} == {"F_LEAK_GROUP"}
    assert found[0][2].startswith("video the video: conversation s0 is in " if video else "person ann: conv")


def test_predefined_split_is_used_and_checked() -> None:
    corpus = [session(name, split=split) for name, split in zip("abc", SPLITS, strict=True)]
    assert parts(split_conversations(corpus, SplitConfig())) == {"a": "train", "b": "val", "c": "test"}
    cut = [*corpus, session("d", "video a", people=("ann",), split="test"), session("e", people=("ann",), split="val")]
    found = leaks(cut, SplitConfig(), "fix the split of the corpus", shared=[("a", "b"), ("c", "d")])
    assert found == [
        ("F_LEAK_GROUP", "d", "video video a: conversation a is in train, conversation d in test"),
        ("F_LEAK_GROUP", "e", "person ann: conversation d is in test, conversation e in val"),
        ("F_LEAK_AUDIO", "a", "the same audio: conversation b is in val, conversation a in train"),
    ]


@pytest.mark.parametrize(
    ("splits", "folds", "message"),
    [
        (("train", "val", None, "test"), None, r"1 of 4 conversations have no split \(c\)"),
        (("dev",), None, r"corpus.csv:a-0: conversation a has split 'dev'; use one of train, val"),
        (("train",), 3, "the corpus has a predefined split"),
        (("train", "val"), None, r"the test split has no labelled turns.*fix the split of the corpus"),
    ],
)
def test_invalid_predefined_split_is_refused(splits: tuple[str | None, ...], folds: int | None, message: str) -> None:
    corpus = [session(name, split=split) for name, split in zip("abcd", splits, strict=False)]
    with pytest.raises(DataError, match=message):
        split_conversations(corpus, SplitConfig(folds=folds))


def test_added_session_that_connects_two_splits_fails() -> None:
    old = [session(name, f"v{name}", people=(f"p{name}",)) for name in "abcd"]
    before = dict(zip("abcd", (*SPLITS, "test"), strict=True))
    config, advice = SplitConfig(by=("video", "speaker")), "prepare the whole corpus again"
    added = session("e", "va", people=("pb",))
    assert [code for code, *_ in leaks([*old, added], config, advice, before=before)] == ["F_LEAK_GROUP"]
    assert [code for code, *_ in leaks(old, config, advice, before=before, shared=[("a", "c")])] == ["F_LEAK_AUDIO"]
    with pytest.raises(DataError, match="conversation a was in 'train' before, but the parts are now 0, 1, 2"):
        split_conversations([session(name) for name in "abc"], SplitConfig(folds=3), before={"a": "train"})


# A split file


def split_file(folder: Path, text: str, **more: Any) -> SplitConfig:
    path = folder / "splits.csv"
    path.write_text(text, encoding="utf-8")
    return SplitConfig(file=str(path), **more)


def test_split_file_overrides_everything_else(tmp_path: Path) -> None:
    corpus = [session(name, split="train") for name in ("ä", "b", "c,d")]
    config = split_file(tmp_path, '\ufeffsplit,note,conversation\nval,x,a\u0308\ntest,, b \ntrain,"y\n","c,d"\n')
    assert split_conversations(corpus, config, before={"b": "train"}) == {
        "ä": Assignment("video ä", "val"),
        "b": Assignment("video b", "test"),
        "c,d": Assignment("video c,d", "train"),
    }
    folds = split_file(tmp_path, "conversation,split\na,2\nb,0\nc,1\n", folds=3)
    assert parts(split_conversations([session(name) for name in "abc"], folds)) == {"a": 2, "b": 0, "c": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conversation,split\na,train\nb,dev\nc,test\n", "splits.csv:3: conversation b has split 'dev'; use one of"),
        ("conversation,split\na,train\nb\nc,test\n", "splits.csv:3: conversation b has split ''"),
        ("conversation,split\na,train\nz,val\n", "splits.csv:3: the corpus has no conversation 'z'"),
        ("conversation,split\nb,train\n", r"2 conversation\(s\) are not listed \(a, c\)"),
        ("conversation,part\na,train\n", "splits.csv:1: the first line must name the columns"),
        ("", "splits.csv:1: the first line must name the columns"),
        ("conversation,split\na,train\nb,train\nc,val\n", "the test split has no labelled turns.*fix .*splits.csv"),
    ],
)
def test_invalid_split_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_conversations([session(name) for name in "abc"], split_file(tmp_path, text))


def test_split_file_that_leaks_is_refused(tmp_path: Path) -> None:
    corpus = [session("a", "v"), session("b", "v"), session("c")]
    config = split_file(tmp_path, "conversation,split\na,train\nb,val\nc,test\nc,train\n")
    found = leaks(corpus, config, f"fix {config.file}", shared=[("a", "c")])
    assert [(code, message) for code, _, message in found][:2] == [
        ("F_LEAK_GROUP", "video v: conversation a is in train, conversation b in val"),
        ("F_LEAK_CONVERSATION", "conversation c is in test and in train"),
    ]


def test_unreadable_split_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("conversation,split\nä,train\n".encode("cp1252"))
    for name, message in (("nowhere.csv", r"cannot read .*nowhere.csv"), ("latin.csv", "not a CSV in UTF-8")):
        with pytest.raises(DataError, match=message):
            split_conversations([session(name) for name in "abc"], SplitConfig(file=str(tmp_path / name)))
