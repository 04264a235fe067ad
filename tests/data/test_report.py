"""The report of a prepared corpus, and its tables: right, self-contained, safe, and the same for the same content."""

import base64
import io
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile

from data.corpus import synthetic
from data.corpus.config import CorpusConfig, SplitConfig
from data.corpus.issues import CODES, Finding
from data.corpus.schema import SAMPLE_RATE, Corpus
from data.errors import DataError
from data.preparation.build import FINDINGS, prepare
from data.report.page import CLIP_SECONDS, CLIPS, EXAMPLES, corpus_html
from data.report.summary import finding_rows, read_findings, split_rows, split_summaries
from data.report.timeline import TIMELINES
from data.shards.dataset import Shards
from tests.data.common import corpus

DIALOGUE = "T:question C:change! T:reflection C:neutral! C T:other C:neutral!"
VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """What a browser would find: the elements with their attributes, and the text without that of style and SVG."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and "svg" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(shards: Shards) -> str:
    return corpus_html(shards, read_findings(shards))


def odd() -> Corpus:
    """Six sessions with a finding of many kinds, and a clip that is longer than can be heard."""
    found = corpus([DIALOGUE] * 6, ("high", "low"))
    turns = [conversation.turns[1] for conversation in found.conversations]
    turns[0].audio = np.full(4000, 32767, np.int16)
    turns[1].audio = np.zeros(4000, np.int16)
    turns[2].audio = np.random.default_rng(0).integers(-500, 500, 31 * SAMPLE_RATE).astype(np.int16)
    for turn, code in zip(turns, ("W_CLIPPED", "W_SILENT", "W_TOO_LONG"), strict=False):
        turn.flags += (code,)
        found.findings.append(Finding(code, turn.where or "a.csv:2", turn.id, f"{code} was planted"))
    for number, turn in enumerate(one.turns[3] for one in found.conversations):
        turn.where = f"a.csv:{number}"
        turn.start, turn.end = 2.0, 1.0
    found.conversations[0].turns[5].label = "chnage"
    return found


LENIENT = CorpusConfig(max_rejected=0.5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return prepare(odd(), tmp_path_factory.mktemp("report") / "odd", LENIENT)


@pytest.fixture(scope="module")
def html(shards: Shards) -> str:
    return report(shards)


def test_the_tables_hold_the_numbers_of_the_manifest(shards: Shards, html: str) -> None:
    manifest, text = shards.manifest, Page(html).text
    header, rows = split_rows(shards)
    assert header == ["split", "sessions", "turns", "with audio", "hours", *manifest.labels]
    for row, (split, turns) in zip(rows, manifest.turns.items(), strict=False):
        assert row[:3] == [split, str(manifest.sessions[split]), str(turns)]
        assert row[4:] == [
            f"{manifest.hours[split]:.2f}",
            *(str(manifest.label_counts[split][label]) for label in manifest.labels),
        ]
    assert rows[-1][:3] == ["all", "6", str(sum(manifest.turns.values()))]
    for part in split_summaries(shards):
        sizes = (part.name, part.sessions, part.groups, part.turns, part.with_audio, f"{part.hours:.2f}", part.labelled)
        assert " ".join(map(str, sizes)) in text
        cells = " ".join(f"{count} {100 * count / part.labelled:.1f} %" for count in part.labels.values())
        assert f"{part.name} {cells}" in text
    assert manifest.fingerprint in text
    assert f"rejected turns {manifest.rejected}" in text


def test_parts_are_counted_from_the_index(shards: Shards) -> None:
    columns = shards.columns
    for part in split_summaries(shards)[:-1]:
        rows = [row for row, split in enumerate(columns["split"]) if split == part.name]
        assert part.with_audio == sum(columns["n_samples"][row] > 0 for row in rows)
        assert part.labelled == sum(columns["label"][row] is not None for row in rows)
        assert part.groups == len({columns["group"][row] for row in rows})
        sessions = {columns["conversation"][row]: columns["quality"][row] for row in rows}
        assert part.qualities == {name: list(sessions.values()).count(name) for name in ("high", "low")}


def test_every_code_appears_with_its_count_its_meaning_and_its_first_examples(shards: Shards, html: str) -> None:
    text, findings = Page(html).text, read_findings(shards)
    assert Counter(finding.code for finding in findings) == Counter(shards.manifest.findings)
    assert {"E_TS_END", "E_LABEL", "W_CLIPPED", "W_SILENT", "W_TOO_LONG"} <= set(shards.manifest.findings)
    for code, count in shards.manifest.findings.items():
        kind = {"E": "rejected", "W": "kept"}[code[0]]
        assert f"{count} {kind} {code} {CODES[code][0]} → {CODES[code][1]}" in text
        own = [finding for finding in findings if finding.code == code]
        for place, finding in enumerate(own):
            shown = " ".join(f"{finding.where} {finding.utterance} {finding.message}".split())
            assert (shown in text) == (place < EXAMPLES)
    assert "2.00 to 1.00 s" in text
    assert "and 1 more" in text


def test_the_table_of_findings_says_what_was_done(shards: Shards) -> None:
    header, rows = finding_rows(read_findings(shards))
    assert header == ["code", "count", "consequence", "example"]
    assert [(row[0], int(row[1])) for row in rows] == list(shards.manifest.findings.items())
    example = next(row for row in rows if row[0] == "E_TS_END")
    assert example[2] == CODES["E_TS_END"][1]
    assert re.fullmatch(r"a\.csv:0, 0/3: ends before it starts .*", example[3])


def test_a_list_of_findings_that_is_damaged_or_missing_is_named(tmp_path: Path) -> None:
    made = prepare(corpus([DIALOGUE] * 6), tmp_path / "corpus")
    path = tmp_path / "corpus" / FINDINGS
    for content in ("{", "[]", '{"code": "W_DC"}'):
        path.write_text(content)
        with pytest.raises(DataError, match=r"findings\.jsonl: not a list of findings; prepare"):
            read_findings(made)
    path.unlink()
    with pytest.raises(DataError, match=r"findings\.jsonl: the file is missing"):
        read_findings(made)


def test_texts_and_names_of_a_corpus_are_never_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&$\\frac{$"
    found = corpus([DIALOGUE] * 6, (evil,))
    found.labels, found.qualities = tuple(evil if label == "change" else label for label in found.labels), (evil,)
    found.roles = {**found.roles, "client": (evil, "neutral")}
    found.name = evil
    for one in found.conversations:
        one.id = f"{evil}{one.id}"
        for turn in one.turns:
            turn.text, turn.label = evil, evil if turn.label == "change" else turn.label
            turn.subset, turn.where, turn.id = evil, evil, f"{evil}{turn.id}"
    found.findings = [Finding("W_DC", evil, evil, evil, (0.0, 1.0), (0.0, 2.0))]
    html = report(prepare(found, tmp_path / "corpus"))
    page = Page(html)
    assert "<script" not in html
    assert evil in page.text
    assert {name for _, attributes in page.elements for name in attributes if name.startswith("on")} == set()


def test_the_page_needs_nothing_from_outside(html: str) -> None:
    page = Page(html)
    assert not page.open
    links = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "data")
    ]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", html))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert "@import" not in html


def test_pictures_are_well_formed_and_have_no_words(html: str) -> None:
    pictures = [svg for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if "<title>" not in svg]
    assert len(pictures) == 5 + CLIPS  # charts and clips
    for svg in pictures:
        texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]
        assert all(re.fullmatch(r"\N{MINUS SIGN}?[\d.]+", text or "") for text in texts), texts


def test_the_same_content_makes_the_same_page(shards: Shards, html: str, tmp_path: Path) -> None:
    assert report(shards) == html
    assert report(prepare(odd(), tmp_path / "again", LENIENT)) == html


def test_clips_hold_the_samples_of_the_turns_that_they_name(shards: Shards, html: str) -> None:
    names = re.findall(r'<article class="clip">\s*<header><code>(.*?)</code>', html)
    sounds = [attributes["src"] or "" for attributes in Page(html).all("audio")]
    assert len(set(names)) == len(sounds) == CLIPS
    for name, sound in zip(names, sounds, strict=True):
        pcm, rate = soundfile.read(
            io.BytesIO(base64.b64decode(sound.removeprefix("data:audio/flac;base64,"))), dtype="int16"
        )
        expected = shards.pcm(shards.columns["id"].index(name))
        assert rate == SAMPLE_RATE
        assert expected is not None
        assert np.array_equal(pcm, expected[: int(CLIP_SECONDS * SAMPLE_RATE)])


def test_clips_are_spread_over_splits_and_labels_and_hold_the_odd_ones(shards: Shards, html: str) -> None:
    columns = shards.columns
    shown = [columns["id"].index(name) for name in re.findall(r'"clip">\s*<header><code>(.*?)</code>', html)]
    assert {columns["split"][row] for row in shown} == {"train", "val", "test"}
    assert {columns["label"][row] for row in shown} >= {"change", "neutral"}
    assert {"W_CLIPPED", "W_SILENT", "W_TOO_LONG"} <= {code for row in shown for code in columns["flags"][row].split()}
    assert f"first {CLIP_SECONDS:g} of 31.0 s" in Page(html).text


def test_sessions_are_drawn_in_time_with_a_mark_for_every_turn_that_has_one(tmp_path: Path) -> None:
    found = corpus([DIALOGUE] * 6)
    for one in found.conversations:
        for turn in one.turns[:-1]:
            turn.start, turn.end = 2.0 * turn.index, 2.0 * turn.index + 1
    made = prepare(found, tmp_path / "corpus")
    html = report(made)
    strips = re.findall(r'<div class="timeline">.*?</div>', html, re.DOTALL)
    assert len(strips) == 6
    for strip in strips:
        marks = [ElementTree.fromstring(mark) for mark in re.findall(r"<rect[^>]*><title>.*?</rect>", strip, re.DOTALL)]
        assert [round(float(mark.get("x", "")) * 11 / 1000) for mark in marks] == [0, 2, 4, 6, 8, 10]
        assert len({mark.get("y") for mark in marks}) == 2  # lanes
        assert len({mark.get("fill") for mark in marks}) == 6  # five labels and none
        assert "1 without times" in strip
    assert "0/0 therapist: question\n0.00 to 1.00 s\nsession 0 turn 0" in html


def test_a_time_that_is_wrong_is_red_and_the_session_is_shown_first_of_many(tmp_path: Path) -> None:
    found = synthetic.corpus(sessions=2 * TIMELINES, turns=8)
    wrong = found.conversations[TIMELINES].turns[3]
    assert wrong.start is not None
    wrong.end = wrong.start - 1
    html = report(prepare(found, tmp_path / "corpus"))
    strips = re.findall(r'<div class="timeline">.*?</div>', html, re.DOTALL)
    assert len(strips) == TIMELINES
    red = [strip for strip in strips if re.search(r'fill="#d64545"><title>', strip)]
    assert [wrong.id in strip for strip in red] == [True]


def test_a_corpus_of_text_alone_has_neither_clips_nor_charts_of_sound(tmp_path: Path) -> None:
    made = prepare(corpus([DIALOGUE.replace("!", "")] * 6), tmp_path / "corpus")
    page = Page(report(made))
    assert "hours of audio text only" in page.text
    assert "No findings" in page.text
    assert "Share of words per session" in page.text
    assert "every turn has the same width" in page.text
    assert "Level" not in page.text
    assert not page.all("audio")


def test_folds_are_shown_as_they_are_whichever_is_for_test(tmp_path: Path) -> None:
    config = CorpusConfig(split=SplitConfig(folds=3))
    made = prepare(corpus([DIALOGUE] * 6), tmp_path / "corpus", config)
    assert [row[:3] for row in split_rows(made)[1]] == [
        *([f"fold {fold}", "2", "14"] for fold in range(3)),
        ["all", "6", "42"],
    ]
    assert report(made) == report(Shards(tmp_path / "corpus", fold=1))


def test_a_corpus_with_one_session_a_split_and_no_labels_and_no_quality_has_a_page(tmp_path: Path) -> None:
    found = corpus(["T C"] * 3)
    made = prepare(Corpus("plain", (), {}, found.conversations), tmp_path / "corpus")
    page = Page(report(made))
    assert split_rows(made)[0] == ["split", "sessions", "turns", "with audio", "hours"]
    assert "labelled 0" in page.text
    assert "Labels of" not in page.text


def test_alignment_and_annotators_are_shown_where_there_are_any(tmp_path: Path) -> None:
    found = corpus([DIALOGUE] * 6)
    for one in found.conversations:
        first, second, third = one.turns[0], one.turns[1], one.turns[2]
        first.start, first.end, first.given, first.confidence = 1.5, 2.0, (1.0, 2.0), 0.9
        second.start, second.end, second.given, second.confidence = 3.0, 4.0, (3.0, 4.0), 0.2
        first.votes, second.votes, third.votes = {"question": 3}, {"change": 2, "neutral": 1}, {"reflection": 1}
        second.flags += ("W_ALIGN_LOW", "W_LABEL_TIE")
    text = Page(report(prepare(found, tmp_path / "corpus"))).text
    assert "12 turns were aligned and 6 of them moved. For 6 turns the confidence was too low" in text
    assert "Shift of the start, s median 0.25 s (absolute)" in text
    assert "12 turns have 3.0 annotators on average. They agree on 6 turns (50.0 %)" in text
    assert "agree with probability 0.67. 6 turns have no majority" in text  # (1 + 1/3) / 2


def test_alignment_and_annotators_are_left_out_where_there_are_none(html: str) -> None:
    assert not {"Alignment", "Annotators"} & set(re.findall("<h2>(.*?)</h2>", html))
