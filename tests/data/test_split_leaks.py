"""Splits that would leak are refused, however they came about; what hangs together stays so."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data.corpus.config import SplitConfig
from data.corpus.issues import BuildError
from data.corpus.schema import SPLITS, Conversation
from data.errors import DataError
from data.preparation.split import Assignment, groups, split_conversations
from tests.data.sessions import parts, session

# What hangs together


def test_groups_are_what_hangs_together_named_after_the_smallest() -> None:
    corpus = [
        session("1", "c", people=("ann",)),
        session("2", "b", people=("ann", "bob")),
        session("3", "b", people=("cid",)),
        session("4", "a", people=("bob",)),
        session("5", "e", people=("dan",)),
    ]
    video, both, speaker = (SplitConfig(by=by) for by in (("video",), ("video", "speaker"), ("speaker",)))
    assert groups(corpus, video) == {"1": "c", "2": "b", "3": "b", "4": "a", "5": "e"}
    assert groups(corpus, video, [("5", "1")]) == {"1": "c", "2": "b", "3": "b", "4": "a", "5": "c"}
    assert groups(corpus, both) == {"1": "a", "2": "a", "3": "a", "4": "a", "5": "e"}
    assert groups(corpus, speaker) == {"1": "1", "2": "1", "3": "3", "4": "1", "5": "5"}
    assert groups(corpus, SplitConfig(by=("conversation",)), [("2", "4")]) == dict(zip("12345", "12325", strict=True))


def test_a_split_by_speaker_needs_to_know_who_speaks() -> None:
    with pytest.raises(DataError, match="has no speaker identities"):
        groups([session("a"), session("b")], SplitConfig(by=("speaker",)))
    some = [session("a", people=("ann",)), session("b"), session("c")]
    with pytest.raises(DataError, match=r"2 session\(s\) have no speaker identity \(b, c\) and might leak"):
        groups(some, SplitConfig(by=("video", "speaker")))


@pytest.mark.parametrize("name", ["row", "turn", "utterance", "random"])
def test_a_split_by_row_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ValidationError, match=f"a split by {name} puts turns of one.*measure memorisation"):
        SplitConfig.model_validate({"by": name})


# Leaks


def failure_of(corpus: Sequence[Conversation], config: SplitConfig, **more: Any) -> BuildError:
    with pytest.raises(BuildError) as caught:
        split_conversations(corpus, config, **more)
    return caught.value


def test_a_split_by_conversation_that_cuts_a_video_fails_and_says_what_to_do() -> None:
    corpus = [session(f"s{number}", "the video") for number in range(6)]
    error = failure_of(corpus, SplitConfig(by=("conversation",)))
    assert {finding.code for finding in error.findings} == {"F_LEAK_GROUP"}
    assert "use split.by=video" in str(error)
    first = error.findings[0]
    assert first.utterance in first.message
    assert first.where == f"corpus.csv:{first.utterance}-0"
    assert first.message.startswith("video the video: conversation s0 is in ")


def test_a_split_by_speaker_that_cuts_a_video_says_to_use_both() -> None:
    corpus = [session(f"s{number}", "the video", people=(f"p{number}",)) for number in range(6)]
    assert "use split.by=[video, speaker]" in str(failure_of(corpus, SplitConfig(by=("speaker",))))


def test_a_person_in_two_splits_fails_whatever_the_split_is_by() -> None:
    corpus = [session(f"s{number}", people=("ann",)) for number in range(6)]
    error = failure_of(corpus, SplitConfig())
    assert {finding.code for finding in error.findings} == {"F_LEAK_GROUP"}
    assert "use split.by=[video, speaker]" in str(error)


def test_the_corpus_s_own_split_is_taken_and_checked() -> None:
    own = [session(name, split=split) for name, split in zip("abc", SPLITS, strict=True)]
    assert parts(split_conversations(own, SplitConfig())) == {"a": "train", "b": "val", "c": "test"}
    cut = [*own, session("d", "video a", people=("ann",), split="test"), session("e", people=("ann",), split="val")]
    error = failure_of(cut, SplitConfig(), shared=[("a", "b"), ("c", "d")])
    assert [(finding.code, finding.utterance, finding.message) for finding in error.findings] == [
        ("F_LEAK_GROUP", "d", "video video a: conversation a is in train, conversation d in test"),
        ("F_LEAK_GROUP", "e", "person ann: conversation d is in test, conversation e in val"),
        ("F_LEAK_AUDIO", "a", "the same audio: conversation b is in val, conversation a in train"),
    ]
    assert all(finding.message in str(error) for finding in error.findings)
    assert "fix the split of the corpus" in str(error)


def test_a_corpus_that_splits_only_some_sessions_is_refused() -> None:
    own = [session("a", split="train"), session("b", split="val"), session("c"), session("d", split="test")]
    with pytest.raises(DataError, match=r"1 of 4 conversations have no split \(c\)"):
        split_conversations(own, SplitConfig())


def test_a_corpus_s_own_split_has_known_names_no_folds_and_no_empty_part() -> None:
    with pytest.raises(DataError, match=r"corpus.csv:a-0: conversation a has split 'dev'; use one of train, val"):
        split_conversations([session("a", split="dev")], SplitConfig())
    with pytest.raises(DataError, match="the corpus has a predefined split"):
        split_conversations([session("a", split="train")], SplitConfig(folds=3))
    with pytest.raises(DataError, match=r"the test split has no labelled turns.*fix the split of the corpus"):
        split_conversations([session("a", split="train"), session("b", split="val")], SplitConfig())


def test_an_added_session_that_joins_two_splits_fails() -> None:
    old = [session(name, f"v{name}", people=(f"p{name}",)) for name in "abcd"]
    before = dict(zip("abcd", (*SPLITS, "test"), strict=True))
    config = SplitConfig(by=("video", "speaker"))
    error = failure_of([*old, session("e", "va", people=("pb",))], config, before=before)
    assert [finding.code for finding in error.findings] == ["F_LEAK_GROUP"]
    assert "prepare the whole corpus again" in str(error)
    error = failure_of(old, config, before=before, shared=[("a", "c")])
    assert [finding.code for finding in error.findings] == ["F_LEAK_AUDIO"]


def test_an_earlier_place_that_does_not_exist_any_more_is_refused() -> None:
    with pytest.raises(DataError, match="conversation a was in 'train' before, but the parts are now 0, 1, 2"):
        split_conversations([session(name) for name in "abc"], SplitConfig(folds=3), before={"a": "train"})


# A fixed list


def listing(folder: Path, text: str) -> SplitConfig:
    path = folder / "splits.csv"
    path.write_text(text, encoding="utf-8")
    return SplitConfig(file=str(path))


def test_a_list_decides_whatever_the_corpus_says_and_whoever_was_dealt_before(tmp_path: Path) -> None:
    corpus = [session(name, split="train") for name in ("ä", "b", "c,d")]
    config = listing(
        tmp_path, '\ufeffsplit,note,conversation\nval,x,ä\ntest,, b \ntrain,"y\n",  "c,d"\n'.replace("  ", "")
    )
    places = split_conversations(corpus, config, before={"b": "train"})
    assert places == {
        "ä": Assignment("video ä", "val"),
        "b": Assignment("video b", "test"),
        "c,d": Assignment("video c,d", "train"),
    }


def test_a_list_may_name_folds(tmp_path: Path) -> None:
    config = listing(tmp_path, "conversation,split\na,2\nb,0\nc,1\n").model_copy(update={"folds": 3})
    assert parts(split_conversations([session(name) for name in "abc"], config)) == {"a": 2, "b": 0, "c": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "conversation,split\na,train\nb,dev\nc,test\n",
            "splits.csv:3: conversation b has split 'dev'; use one of",
        ),
        ("conversation,split\na,train\nb\nc,test\n", "splits.csv:3: conversation b has split ''"),
        ("conversation,split\na,train\nz,val\n", "splits.csv:3: the corpus has no conversation 'z'"),
        ("conversation,split\nb,train\n", r"2 conversation\(s\) are not listed \(a, c\)"),
        ("conversation,part\na,train\n", "splits.csv:1: the first line must name the columns"),
        ("", "splits.csv:1: the first line must name the columns"),
        ("conversation,split\na,train\nb,train\nc,val\n", "the test split has no labelled turns.*fix .*splits.csv"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_conversations([session(name) for name in "abc"], listing(tmp_path, text))


def test_a_list_that_leaks_is_refused(tmp_path: Path) -> None:
    corpus = [session("a", "v"), session("b", "v"), session("c")]
    config = listing(tmp_path, "conversation,split\na,train\nb,val\nc,test\nc,train\n")
    error = failure_of(corpus, config, shared=[("a", "c")])
    assert [(finding.code, finding.message) for finding in error.findings][:2] == [
        ("F_LEAK_GROUP", "video v: conversation a is in train, conversation b in val"),
        ("F_LEAK_CONVERSATION", "conversation c is in test and in train"),
    ]
    assert f"fix {config.file}" in str(error)


def test_a_list_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    corpus = [session(name) for name in "abc"]
    with pytest.raises(DataError, match=r"cannot read .*nowhere.csv"):
        split_conversations(corpus, SplitConfig(file=str(tmp_path / "nowhere.csv")))
    (tmp_path / "latin.csv").write_bytes("conversation,split\nä,train\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"latin.csv: not a CSV in UTF-8"):
        split_conversations(corpus, SplitConfig(file=str(tmp_path / "latin.csv")))
