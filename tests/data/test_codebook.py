"""Codebooks: the shipped ones, what a codebook file may hold, how cells are read, and levels of a prepared corpus."""

import copy
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.corpus.codebook import NAMES, Codebook, shipped
from data.corpus.config import ColumnConfig, CorpusConfig
from data.corpus.issues import BuildError
from data.corpus.schema import Corpus, split_label
from data.errors import ConfigError, DataError
from data.importers import IMPORTERS
from data.loading.tasks import answer_sets, items
from data.preparation.build import prepare
from data.shards.dataset import Shards

SEVEN = ("change", "neutral", "sustain", "other", "question", "reflection", "therapist_input")
SMALL: dict[str, Any] = {
    "name": "small",
    "separator": ";",
    "modifiers": {"strength": ["1", "2"]},
    "codes": {
        "client": {"C+": "commitment", "C-": {"name": "refusal", "also": ["no"]}, "FN": "neutral"},
        "therapist": {"OQ": "open question", "CQ": "closed question", "GI": "information"},
    },
    "levels": {
        "few": {
            "classes": {
                "client": {"talk": ["C+", "C-"], "neutral": ["FN"]},
                "therapist": {"question": ["OQ", "CQ"]},
            },
            "unused": ["GI"],
        }
    },
}


def book(name: str) -> Codebook:
    return Codebook.model_validate(yaml.safe_load(shipped()[name].read_text(encoding="utf-8")))


def changed(*path: str, value: object) -> dict[str, Any]:
    """Return the small codebook with one value changed."""
    tree = copy.deepcopy(SMALL)
    section = tree
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    return tree


def settings(codebook: Mapping[str, Any] | Codebook = SMALL, **more: Any) -> CorpusConfig:
    columns = ColumnConfig(label="code", annotator=more.pop("annotator", None), index=more.pop("index", None))
    return CorpusConfig(codebook=codebook, columns=columns, max_rejected=more.pop("max_rejected", 0.01), **more)


def table(folder: Path, turns: list[tuple[str, str]], sessions: int = 4) -> Path:
    """Write a table with the same turns, (role, cell), in each session."""
    path = folder / "turns.csv"
    rows = [f"s{number},{role},words,{cell}" for number in range(sessions) for role, cell in turns]
    path.write_text("\n".join(["conversation,speaker,text,code", *rows]), encoding="utf-8")
    return path


def read(folder: Path, turns: list[tuple[str, str]], config: CorpusConfig) -> Corpus:
    return IMPORTERS["table"].read(table(folder, turns), None, config)


@pytest.mark.parametrize("name", sorted(shipped()))
def test_shipped_codebook_reaches_every_code_and_class(name: str, tmp_path: Path) -> None:
    codebook = book(name)
    assert codebook.problems() == []
    assert codebook.source
    assert all(entry.about for codes in codebook.codes.values() for entry in codes.values())
    for role, codes in codebook.codes.items():
        for code, entry in codes.items():
            for text in (code, code.lower(), entry.name.upper(), *entry.also):
                assert codebook.read(role, text) == (codebook.read(role, code)[0], "")
    turns = [(role, code) for role, codes in codebook.codes.items() for code in codes]
    shards = prepare(read(tmp_path, turns, settings(codebook)), tmp_path / "corpus", settings(codebook))
    assert shards.manifest.roles == codebook.labels
    assert "W_LABEL_ABSENT" not in shards.manifest.findings
    for level in (NAMES, *codebook.levels):
        view = Shards(shards.folder, codes=level)
        seen = {label for label in view.columns["label"] if label is not None}
        assert seen == set(view.manifest.labels)
        assert {code for classes in view.merge.codes().values() for codes in classes.values() for code in codes} <= {
            code for codes in codebook.labels.values() for code in codes
        }


@pytest.mark.parametrize(
    ("name", "role", "text", "code"),
    [
        ("misc-2.5", "client", "C+3", "c+"),  # strength, as in MISC 2.0
        ("misc-2.5", "client", "R\N{MINUS SIGN}", "r-"),
        ("misc-2.5", "client", "Ｒ＋", "r+"),  # noqa: RUF001  full width
        ("misc-2.5", "client", "FN", "fn"),
        ("misc-2.5", "client", "N", "fn"),
        ("misc-2.5", "client", "N-", "n-"),
        ("misc-2.5", "therapist", "QUO", "oq"),
        ("misc-2.5", "therapist", "OQ+", "oq"),
        ("misc-2.5", "therapist", "Simple Reflection", "sr"),
        ("miti-4.2.1", "therapist", "Emphasizing Autonomy", "emphasize"),
        ("miti-4.2.1", "therapist", "Persuade with Permission", "persuade with"),
        ("bimisc", "therapist", "ADW", "adv"),
        ("bimisc", "client", "CM-2", "cm-"),
        ("annomi", "therapist", "Therapist Input", "therapist_input"),
    ],
)
def test_spelling_is_read_as_the_code_of_the_manual(name: str, role: str, text: str, code: str) -> None:
    assert book(name).read(role, text)[0] == code


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        (("codes",), {}, "codes: {}: a codebook needs codes"),
        (("codes", "client"), {}, "codes.client: {}: the role has no codes"),
        (("codes", "counsellor"), {"X": "x"}, "'counsellor' is not a role; did you mean 'therapist'?"),
        (("codes", "clients"), {"X": "x"}, "'clients' is not a role; did you mean 'client'?"),
        (("codes", "client", "c+"), "other", "codes.client.c+: 'c+': is also a spelling of 'C+', written 'C+' there"),
        (("codes", "client", "Ｃ＋"), "other", "is also a spelling of 'C+'"),  # noqa: RUF001
        (("codes", "client", "X"), "Commitment", "codes.client.X.name: 'Commitment': is also a spelling of 'C+'"),
        (("codes", "client", "a|b"), "x", "codes.client.a|b: 'a|b': contains '|', which separates codes"),
        (("codes", "client", "a;b"), "x", "contains ';', which separates codes"),
        (("codes", "client", "X"), "", "codes.client.X.name: '': is empty"),
        (("modifiers", "strength"), [], "modifiers.strength: []: needs marks"),
        (("levels", "names"), SMALL["levels"]["few"], "levels.names: 'names': every codebook has this level"),
        (("levels", "few", "unused"), ["GI", "GQ"], "levels.few.unused: 'GQ' is no code; did you mean"),
        (("levels", "few", "unused"), [], "levels.few.classes.therapist: gi: in no class; add it"),
        (("levels", "few", "unused"), ["GI", "OQ"], "levels.few.unused: 'oq' is also in the class 'question'"),
        (("levels", "few", "classes", "cleint"), {"x": ["C+"]}, "'cleint' is not a role; did you mean 'client'?"),
        (("levels", "few", "classes", "client", "empty"), [], "levels.few.classes.client.empty: []: the class has no"),
        (("levels", "few", "classes", "client", "two"), ["C+"], "client.two: 'C+' is also in the class 'talk'"),
        (("levels", "few", "classes", "client", "Talk"), ["FN"], "client.Talk: 'Talk': is the class 'talk' in another"),
        (("levels", "few", "classes", "client", "x"), ["C*"], "client.x: 'C*' is no code of the client; did you mean"),
        (("levels", "few", "classes", "client", "talk"), ["C+", "c+", "C-"], "client.talk: 'C+' is listed twice"),
    ],
)
def test_codebook_fault_names_key_value_and_fix(path: tuple[str, ...], value: object, problem: str) -> None:
    problems = Codebook.model_validate(changed(*path, value=value)).problems()
    assert any(problem in line for line in problems), problems


def test_all_faults_of_a_codebook_are_listed_together() -> None:
    tree = changed("levels", "few", "unused", value=[])
    tree["codes"]["client"]["c+"] = "twin"
    tree["modifiers"]["strength"] = []
    assert len(Codebook.model_validate(tree).problems()) >= 3
    with pytest.raises(ValueError, match=r"codebook: codes.*modifiers|codebook: modifiers.*codes"):
        settings(tree)


def test_yaml_words_as_codes_must_be_quoted() -> None:
    for tree in ({"client": {False: "x"}}, {"client": {"C": {"name": "x", "also": [True]}}}):
        with pytest.raises(ValueError, match="write such a code in quotes"):
            Codebook.model_validate({"name": "x", "codes": tree})


def test_codebook_beside_labels_is_refused() -> None:
    with pytest.raises(ValueError, match="remove labels, or codebook"):
        settings(labels={"client": ["a"]})


def test_several_codes_and_modifiers_of_a_cell_are_read(tmp_path: Path) -> None:
    turns = [("client", "C+2"), ("therapist", "OQ;GI"), ("client", "no"), ("therapist", "Closed Question")]
    turns += [("client", "C+1/FN"), ("client", "C+2;C-1")]
    corpus = read(tmp_path, turns, settings())
    labels = ["c+", "oq|gi", "c-", "cq", "c+|fn", "c+|c-"]
    assert [turn.label for turn in corpus.conversations[0].turns] == labels
    [finding] = [finding for finding in corpus.findings if finding.utterance == "s0/0"]
    assert finding.code == "W_LABEL_MODIFIER"
    assert finding.message == "'C+2' is read as 'c+'; '2' is a modifier of small"
    assert corpus.conversations[0].turns[0].flags == ("W_LABEL_MODIFIER",)


def test_unknown_code_is_counted_with_places_and_a_hint(tmp_path: Path) -> None:
    turns = [("client", "C+"), ("therapist", "OQQ"), ("client", "OQ"), ("therapist", "GI")]
    with pytest.raises(BuildError) as raised:
        prepare(read(tmp_path, turns, settings()), tmp_path / "corpus", settings())
    message = str(raised.value)
    assert "label 'oqq' is unknown; did you mean 'oq'? expected: oq, cq, gi (4 x, also at turns.csv:7, " in message
    assert "label 'oq' belongs to therapist, but the speaker is the client (4 x" in message


def test_codes_and_classes_that_never_occur_are_findings(tmp_path: Path) -> None:
    corpus = read(tmp_path, [("client", "C+"), ("therapist", "GI")], settings())
    prepare(corpus, tmp_path / "corpus", settings())
    found = {finding.utterance: finding.message for finding in corpus.findings if finding.code == "W_LABEL_ABSENT"}
    assert found["small"] == "4 of 6 codes never occur: c-, fn, oq, cq"
    absent = [finding.message for finding in corpus.findings if finding.utterance == "small, level few"]
    assert absent == [
        "the class 'neutral' of the client never occurs; its codes are fn",
        "the class 'question' of the therapist never occurs; its codes are oq, cq",
    ]


def test_format_with_other_labels_refuses_the_codebook(tmp_path: Path) -> None:
    corpus = read(tmp_path, [("client", "C+"), ("therapist", "GI")], settings())
    corpus.roles = {"client": ("a",)}
    with pytest.raises(ConfigError, match="codebook: small has other codes of the client than the format"):
        prepare(corpus, tmp_path / "corpus", settings())


TURNS = [("client", "C+"), ("therapist", "OQ;GI"), ("client", "C-"), ("therapist", "GI"), ("client", "FN")]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("codebook")
    return prepare(read(folder, TURNS, settings()), folder / "corpus", settings())


def test_level_merges_codes_and_keeps_what_is_stored(prepared: Shards) -> None:
    view = Shards(prepared.folder, codes="few")
    assert prepared.columns["label"][:5] == ["c+", "oq|gi", "c-", "gi", "fn"]
    assert view.columns["label"][:5] == ["talk", "question", "talk", None, "neutral"]
    assert view.manifest.labels == ("talk", "neutral", "question")
    assert view.manifest.roles == {"client": ("talk", "neutral"), "therapist": ("question",)}
    assert sum(sum(counts.values()) for counts in view.manifest.label_counts.values()) == 16
    assert view.stored_codes["s0/1"] == "oq|gi"
    assert view.merge.describe() == "talk = c+, c-; neutral = fn; question = oq, cq"
    names = Shards(prepared.folder, codes=NAMES).columns["label"]
    assert names[:4] == ["commitment", "open question|information", "refusal", "information"]


def test_level_changes_tasks_and_fingerprint_but_not_the_shards(prepared: Shards) -> None:
    view, again = Shards(prepared.folder, codes="few"), Shards(prepared.folder, codes="few")
    assert view.fingerprint == again.fingerprint != prepared.fingerprint
    assert view.stored_fingerprint == prepared.fingerprint
    assert view.manifest.shards == prepared.manifest.shards
    assert answer_sets(view, ["classify"])["classify"].labels == ("talk", "neutral", "question")
    assert len(items(view, "classify", "train")) < len(items(prepared, "classify", "train"))
    opened, arguments = view.__reduce__()
    assert opened(*arguments).columns["label"] == view.columns["label"]


def test_unknown_level_names_the_levels(prepared: Shards, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'fwe' is no level of small; did you mean 'few'"):
        Shards(prepared.folder, codes="fwe")
    plain = prepare(IMPORTERS["table"].read(table(tmp_path, TURNS[:1]), None, CorpusConfig()), tmp_path / "plain")
    with pytest.raises(DataError, match="the corpus has no codebook"):
        Shards(plain.folder, codes="few")


def test_changed_level_writes_no_shard_again(tmp_path: Path) -> None:
    shards = prepare(read(tmp_path, TURNS, settings()), tmp_path / "corpus", settings())
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "corpus").glob("shard-*")}
    tree = changed("levels", "few", "unused", value=[])
    tree["levels"]["few"]["classes"]["therapist"]["gi"] = ["GI"]
    other = settings(tree)
    again = prepare(read(tmp_path, TURNS, other), tmp_path / "corpus", other)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "corpus").glob("shard-*")} == written
    assert again.fingerprint == shards.fingerprint
    assert Shards(again.folder, codes="few").columns["label"][:4] == ["talk", "question|gi", "talk", "gi"]
    assert Shards(again.folder, codes="few").fingerprint != Shards(tmp_path / "corpus", codes=NAMES).fingerprint


def test_corpus_of_an_older_version_is_read_and_extended(tmp_path: Path) -> None:
    """Manifests of versions without codebooks lack the settings."""
    config = CorpusConfig(columns=ColumnConfig(label="code"), labels={"client": ("a",), "therapist": ("b",)})
    turns = [("client", "a"), ("therapist", "b")]
    shards = prepare(read(tmp_path, turns, config), tmp_path / "corpus", config)
    path = tmp_path / "corpus" / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for key in ("codebook", "license"):
        del content["config"][key]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert Shards(tmp_path / "corpus").fingerprint == shards.fingerprint
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "corpus").glob("shard-*")}
    prepare(read(tmp_path, turns, config), tmp_path / "corpus", config)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "corpus").glob("shard-*")} == written


def test_votes_are_counted_again_for_the_classes(tmp_path: Path) -> None:
    """Open and closed questions have no majority each, but questions have one; unused codes vote for no class."""
    path = tmp_path / "votes.csv"
    cells = {"0": "OQ OQ CQ CQ GI GI GI".split(), "1": "GI GI GI OQ".split(), "2": "OQ;GI OQ;CQ GI".split()}
    rows = [
        f"s{session},{index},therapist,words,{rater},{cell}"
        for session, index in itertools.product(range(4), cells)
        for rater, cell in enumerate(cells[index])
    ]
    path.write_text("\n".join(["conversation,index,speaker,text,rater,code", *rows]), encoding="utf-8")
    config = settings(annotator="rater", index="index")
    shards = prepare(IMPORTERS["table"].read(path, None, config), tmp_path / "corpus", config)
    assert shards.columns["label"][:3] == ["gi", "gi", "oq|gi"]
    view = Shards(shards.folder, codes="few")
    assert view.columns["label"][:3] == ["question", None, "question"]
    assert view.columns["votes"][:3] == [[("question", 4)], [("question", 1)], [("question", 2)]]


def test_codebook_of_a_format_keeps_its_fingerprint(tmp_path: Path) -> None:
    """The codebook of AnnoMI declares what the importer declares, so nothing else changes."""
    roles = {role: tuple(codes) for role, codes in book("annomi").labels.items()}
    turns = [(role, label) for role, labels in roles.items() for label in labels]
    plain = CorpusConfig(labels=roles, columns=ColumnConfig(label="code"))
    coded = settings(book("annomi"))
    first = prepare(read(tmp_path, turns, plain), tmp_path / "plain", plain)
    second = prepare(read(tmp_path, turns, coded), tmp_path / "coded", coded)
    assert first.fingerprint == second.fingerprint
    assert first.manifest.shards[0].conversations == second.manifest.shards[0].conversations


def test_thirty_six_codes_become_seven_classes(tmp_path: Path) -> None:
    misc = book("misc-2.5")
    turns = [(role, code) for role, codes in misc.codes.items() for code in codes]
    assert len(turns) > 30
    prepare(read(tmp_path, turns, settings(misc)), tmp_path / "corpus", settings(misc))
    view = Shards(tmp_path / "corpus", codes="annomi")
    assert view.manifest.labels == SEVEN
    assert {label for label in view.columns["label"] for label in split_label(label)} == set(SEVEN)
