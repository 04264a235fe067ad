"""The report of a prepared corpus: correct tables, a self-contained and safe page, and deterministic output."""

import base64
import io
import re
from collections import Counter
from functools import partial
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
from data.report import charts
from data.report.page import CLIP_SECONDS, CLIPS, EXAMPLES, corpus_html
from data.report.summary import finding_rows, read_findings, split_rows, split_summaries
from data.report.timeline import TIMELINES
from data.shards.dataset import Shards
from tests.data.common import corpus

DIALOGUE = "T:question C:change! T:reflection C:neutral! C T:other C:neutral!"
VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text without that of style and SVG."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
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
            self.pieces.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.pieces).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(shards: Shards) -> str:
    return corpus_html(shards, read_findings(shards))


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not draw charts, which takes most of the time of a report."""
    for name in ("histogram", "waveform_and_spectrogram"):
        monkeypatch.setattr(charts, name, lambda *_, **__: "<svg></svg>")


def flagged_corpus() -> Corpus:
    """Six sessions with findings of several codes, and a clip that is longer than the report plays."""
    made = corpus([DIALOGUE] * 6, ("high", "low"))
    turns = [conversation.turns[1] for conversation in made.conversations]
    turns[0].audio = np.full(4000, 32767, np.int16)
    turns[1].audio = np.zeros(4000, np.int16)
    turns[2].audio = np.random.default_rng(0).integers(-500, 500, 31 * SAMPLE_RATE).astype(np.int16)
    for turn, code in zip(turns, ("W_CLIPPED", "W_SILENT", "W_TOO_LONG"), strict=False):
        turn.flags += (code,)
        made.findings.append(Finding(code, turn.where or "a.csv:2", turn.id, f"{code} was planted"))
    for number, turn in enumerate(conversation.turns[3] for conversation in made.conversations):
        turn.where = f"a.csv:{number}"
        turn.start, turn.end = 2.0, 1.0
    made.conversations[0].turns[5].label = "chnage"
    return made


LENIENT = CorpusConfig(max_rejected=0.5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return prepare(flagged_corpus(), tmp_path_factory.mktemp("report") / "flagged", LENIENT)


@pytest.fixture(scope="module")
def html(shards: Shards) -> str:
    return report(shards)


def test_tables_have_the_numbers_of_the_manifest(shards: Shards, html: str) -> None:
    manifest, text = shards.manifest, Page(html).text
    header, rows = split_rows(shards)
    assert header == ["split", "sessions", "turns", "with audio", "hours", *manifest.labels]
    for row, (split, turns) in zip(rows, manifest.turns.items(), strict=False):
        counts = [str(manifest.label_counts[split][label]) for label in manifest.labels]
        assert row[:3] == [split, str(manifest.sessions[split]), str(turns)]
        assert row[4:] == [f"{manifest.hours[split]:.2f}", *counts]
    assert rows[-1][:3] == ["all", "6", str(sum(manifest.turns.values()))]
    for part in split_summaries(shards):
        sizes = (part.name, part.sessions, part.groups, part.turns, part.with_audio, f"{part.hours:.2f}", part.labelled)
        assert " ".join(map(str, sizes)) in text
        cells = " ".join(f"{count} {100 * count / part.labelled:.1f} %" for count in part.labels.values())
        assert f"{part.name} {cells}" in text
    assert manifest.fingerprint in text
    assert f"rejected turns {manifest.rejected}" in text


def test_split_summaries_count_the_index(shards: Shards) -> None:
    columns = shards.columns
    for part in split_summaries(shards)[:-1]:
        rows = [row for row, split in enumerate(columns["split"]) if split == part.name]
        assert part.with_audio == sum(columns["n_samples"][row] > 0 for row in rows)
        assert part.labelled == sum(columns["label"][row] is not None for row in rows)
        assert part.groups == len({columns["group"][row] for row in rows})
        sessions = {columns["conversation"][row]: columns["quality"][row] for row in rows}
        assert part.qualities == {name: list(sessions.values()).count(name) for name in ("high", "low")}


def test_findings_are_listed_by_code_with_examples(shards: Shards, html: str) -> None:
    text, findings = Page(html).text, read_findings(shards)
    assert Counter(finding.code for finding in findings) == Counter(shards.manifest.findings)
    assert {"E_TS_END", "E_LABEL", "W_CLIPPED", "W_SILENT", "W_TOO_LONG"} <= set(shards.manifest.findings)
    for code, count in shards.manifest.findings.items():
        kind = {"E": "rejected", "W": "kept"}[code[0]]
        assert f"{count} {kind} {code} {CODES[code][0]} → {CODES[code][1]}" in text
        for index, finding in enumerate(finding for finding in findings if finding.code == code):
            row = " ".join(f"{finding.where} {finding.utterance} {finding.message}".split())
            assert (row in text) == (index < EXAMPLES)
    assert "2.00 to 1.00 s" in text
    assert "and 1 more" in text
    header, rows = finding_rows(findings)
    assert header == ["code", "count", "consequence", "example"]
    assert [(row[0], int(row[1])) for row in rows] == list(shards.manifest.findings.items())
    example = next(row for row in rows if row[0] == "E_TS_END")
    assert example[2] == CODES["E_TS_END"][1]
    assert re.fullmatch(r"a\.csv:0, 0/3: ends before it starts .*", example[3])


def test_damaged_findings_are_refused(tmp_path: Path) -> None:
    made = prepare(corpus([DIALOGUE] * 6), tmp_path / "corpus")
    path = tmp_path / "corpus" / FINDINGS
    for content in ("{", "[]", '{"code": "W_DC"}'):
        path.write_text(content)
        with pytest.raises(DataError, match=r"findings\.jsonl: not a list of findings; prepare"):
            read_findings(made)
    path.unlink()
    with pytest.raises(DataError, match=r"findings\.jsonl: the file is missing"):
        read_findings(made)


@pytest.mark.usefixtures("no_charts")
def test_text_of_a_corpus_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&$\\frac{$"
    made = corpus([DIALOGUE] * 6, (evil,))
    made.labels, made.qualities = tuple(evil if label == "change" else label for label in made.labels), (evil,)
    made.roles = {**made.roles, "client": (evil, "neutral")}
    made.name = evil
    for conversation in made.conversations:
        conversation.id = f"{evil}{conversation.id}"
        for turn in conversation.turns:
            turn.text, turn.label = evil, evil if turn.label == "change" else turn.label
            turn.subset, turn.where, turn.id = evil, evil, f"{evil}{turn.id}"
    made.findings = [Finding("W_DC", evil, evil, evil, (0.0, 1.0), (0.0, 2.0))]
    html = report(prepare(made, tmp_path / "corpus"))
    page = Page(html)
    assert "<script" not in html
    assert evil in page.text
    assert {name for _, attributes in page.elements for name in attributes if name.startswith("on")} == set()


def test_page_is_self_contained(html: str) -> None:
    page = Page(html)
    assert not page.open
    names = ("src", "href", "xlink:href", "srcset", "data")
    links = [value for _, attributes in page.elements for name, value in attributes.items() if name in names]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?(.)", html))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert "@import" not in html


def test_charts_are_well_formed_and_have_only_numbers(html: str) -> None:
    pictures = [svg for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL) if "<title>" not in svg]
    assert len(pictures) == 5 + CLIPS
    for svg in pictures:
        texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]
        assert all(re.fullmatch(r"\N{MINUS SIGN}?[\d.]+", text or "") for text in texts), texts


def test_charts_are_deterministic() -> None:
    noise = np.random.default_rng(0).integers(-500, 500, SAMPLE_RATE).astype(np.int16)
    for draw in (partial(charts.histogram, [("#111", [1, 2, 2])]), partial(charts.waveform_and_spectrogram, noise)):
        assert draw() == draw()


@pytest.mark.usefixtures("no_charts")
def test_same_content_makes_the_same_page(shards: Shards, tmp_path: Path) -> None:
    assert report(prepare(flagged_corpus(), tmp_path / "again", LENIENT)) == report(shards)


def test_clips_are_those_of_the_named_turns(shards: Shards, html: str) -> None:
    """They cover all splits, several labels and the flagged clips."""
    columns, names = shards.columns, re.findall(r'<article class="clip">\s*<header><code>(.*?)</code>', html)
    urls = [attributes["src"] or "" for attributes in Page(html).all("audio")]
    assert len(set(names)) == len(urls) == CLIPS
    rows = [columns["id"].index(name) for name in names]
    for row, url in zip(rows, urls, strict=True):
        content = base64.b64decode(url.removeprefix("data:audio/flac;base64,"))
        pcm, rate = soundfile.read(io.BytesIO(content), dtype="int16")
        expected = shards.pcm(row)
        assert rate == SAMPLE_RATE
        assert expected is not None
        assert np.array_equal(pcm, expected[: int(CLIP_SECONDS * SAMPLE_RATE)])
    assert {columns["split"][row] for row in rows} == {"train", "val", "test"}
    assert {columns["label"][row] for row in rows} >= {"change", "neutral"}
    assert {"W_CLIPPED", "W_SILENT", "W_TOO_LONG"} <= {code for row in rows for code in columns["flags"][row].split()}
    assert f"first {CLIP_SECONDS:g} of 31.0 s" in Page(html).text


def timelines_of(html: str) -> list[str]:
    return re.findall(r'<div class="timeline">.*?</div>', html, re.DOTALL)


@pytest.mark.usefixtures("no_charts")
def test_timelines_have_a_mark_for_every_timed_turn(tmp_path: Path) -> None:
    made = corpus([DIALOGUE] * 6)
    for turn in (turn for conversation in made.conversations for turn in conversation.turns[:-1]):
        turn.start, turn.end = 2.0 * turn.index, 2.0 * turn.index + 1
    html = report(prepare(made, tmp_path / "corpus"))
    assert len(timelines_of(html)) == 6
    for timeline in timelines_of(html):
        rects = re.findall(r"<rect[^>]*><title>.*?</rect>", timeline, re.DOTALL)
        marks = [ElementTree.fromstring(rect) for rect in rects]
        assert [round(float(mark.get("x", "")) * 11 / 1000) for mark in marks] == [0, 2, 4, 6, 8, 10]
        assert len({mark.get("y") for mark in marks}) == 2  # lanes
        assert len({mark.get("fill") for mark in marks}) == 6  # five labels and none
        assert "1 without times" in timeline
    assert "0/0 therapist: question\n0.00 to 1.00 s\nsession 0 turn 0" in html


@pytest.mark.usefixtures("no_charts")
def test_session_with_a_wrong_time_is_shown_in_red(tmp_path: Path) -> None:
    made = synthetic.corpus(sessions=2 * TIMELINES, turns=4)
    wrong = made.conversations[TIMELINES].turns[3]
    assert wrong.start is not None
    wrong.end = wrong.start - 1
    timelines = timelines_of(report(prepare(made, tmp_path / "corpus", LENIENT)))
    assert len(timelines) == TIMELINES
    red = [timeline for timeline in timelines if re.search(r'fill="#d64545"><title>', timeline)]
    assert [wrong.id in timeline for timeline in red] == [True]


@pytest.mark.usefixtures("no_charts")
def test_corpus_without_audio_has_no_clips(tmp_path: Path) -> None:
    page = Page(report(prepare(corpus([DIALOGUE.replace("!", "")] * 6), tmp_path / "corpus")))
    for text in ("hours of audio text only", "No findings", "Share of words per session", "turn has the same width"):
        assert text in page.text
    assert "Level" not in page.text
    assert not page.all("audio")


@pytest.mark.usefixtures("no_charts")
def test_folds_are_reported_independent_of_the_test_fold(tmp_path: Path) -> None:
    made = prepare(corpus([DIALOGUE] * 6), tmp_path / "corpus", CorpusConfig(split=SplitConfig(folds=3)))
    folds = [[f"fold {fold}", "2", "14"] for fold in range(3)]
    assert [row[:3] for row in split_rows(made)[1]] == [*folds, ["all", "6", "42"]]
    assert report(made) == report(Shards(tmp_path / "corpus", fold=1))


@pytest.mark.usefixtures("no_charts")
def test_corpus_without_labels_and_quality_has_a_page(tmp_path: Path) -> None:
    made = prepare(Corpus("plain", (), {}, corpus(["T C"] * 3).conversations), tmp_path / "corpus")
    text = Page(report(made)).text
    assert split_rows(made)[0] == ["split", "sessions", "turns", "with audio", "hours"]
    assert "labelled 0" in text
    assert "Labels of" not in text


@pytest.mark.usefixtures("no_charts")
def test_alignment_and_annotators_are_reported(tmp_path: Path, html: str) -> None:
    made = corpus([DIALOGUE] * 6)
    for conversation in made.conversations:
        first, second, third = conversation.turns[:3]
        first.start, first.end, first.given, first.confidence = 1.5, 2.0, (1.0, 2.0), 0.9
        second.start, second.end, second.given, second.confidence = 3.0, 4.0, (3.0, 4.0), 0.2
        first.votes, second.votes, third.votes = {"question": 3}, {"change": 2, "neutral": 1}, {"reflection": 1}
        second.flags += ("W_ALIGN_LOW", "W_LABEL_TIE")
    text = Page(report(prepare(made, tmp_path / "corpus"))).text
    assert "12 turns were aligned and 6 of them moved. For 6 turns the confidence was too low" in text
    assert "Shift of the start, s median 0.25 s (absolute)" in text
    assert "12 turns have 3.0 annotators on average. They agree on 6 turns (50.0 %)" in text
    assert "agree with probability 0.67. 6 turns have no majority" in text  # (1 + 1/3) / 2
    assert "all together all 12 3.0 0.833" in text  # where the others tie, the declared order decides
    assert "client 6 3.0 0.667 0.400 0.000 -0.500" in text
    assert "therapist 6 3.0 1.000 1.000" in text
    assert not {"Alignment", "Annotators"} & set(re.findall("<h2>(.*?)</h2>", html))
