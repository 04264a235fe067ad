"""The corpus card: the same bytes for the same inputs, and nothing private in it."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from data.corpus.codebook import Codebook
from data.corpus.config import ColumnConfig, CorpusConfig, SplitConfig
from data.corpus.schema import SAMPLE_RATE
from data.importers import IMPORTERS
from data.preparation.build import prepare
from data.report.card import MOST_FILES, CorpusSource, corpus_card
from data.report.summary import read_findings

CODES = {
    "name": "mine | yours",
    "codes": {"client": {"C": "change"}, "therapist": {"Q": "question"}},
    "modifiers": {"strength": ["1"]},
}


def source(folder: Path, words: str = "secret words") -> Path:
    """Write a table with recordings beside it; a time of the first session is wrong."""
    folder.mkdir(parents=True)
    rows = ["conversation,speaker,text,code,start,end"]
    rng = np.random.default_rng(0)
    (folder / "audio").mkdir()
    for number in range(6):
        rows += [f"s{number},Anna B,{words},C1,0,1", f"s{number},therapist,{words},Q,1,2"]
        soundfile.write(folder / f"audio/s{number}.wav", rng.standard_normal(2 * SAMPLE_RATE) * 0.1, SAMPLE_RATE)
    (folder / "turns.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder / "turns.csv"


def card(path: Path, out: Path, audio: bool = True, **changed: Any) -> str:
    columns = ColumnConfig(label="code", start="start", end="end") if audio else ColumnConfig(label="code")
    settings = {"columns": columns, "codebook": Codebook.model_validate(CODES), "roles": {"Anna B": "client"}}
    config = CorpusConfig(**settings | changed)
    recordings = path.parent / "audio" if audio else None
    corpus = IMPORTERS["table"].read(path, recordings, config)
    origin = CorpusSource.of("table", path, recordings, corpus, "1.0+abc")
    shards = prepare(corpus, out, config)
    return corpus_card(shards, read_findings(shards), origin)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("private")
    return card(source(folder / "source"), folder / "corpus")


def front(text: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return content


def test_card_is_equal_for_equal_inputs_in_other_folders(text: str, tmp_path: Path) -> None:
    path = source(tmp_path / "elsewhere" / "source")
    assert card(path, tmp_path / "one") == card(path, tmp_path / "two") == text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"license": "cc-by-4.0"}, "| licence | cc-by-4.0 |"),
        ({"split": SplitConfig(seed=3)}, "| split seed | 3 |"),
        ({"split": SplitConfig(folds=3)}, "| fold 2 | 2 | 2 | 4 | 4 | 4 | 0.001 |"),
        ({"codec": "flac"}, "16 kHz, mono, flac"),
        ({"codebook": None}, "| codebook | none |"),
    ],
)
def test_card_changes_with_a_setting(change: dict[str, Any], expected: str, text: str, tmp_path: Path) -> None:
    changed = card(source(tmp_path / "source"), tmp_path / "corpus", **change)
    assert expected in changed
    assert changed != text


def test_card_changes_with_the_content_of_the_source(text: str, tmp_path: Path) -> None:
    changed = card(source(tmp_path / "source", "other words"), tmp_path / "corpus")
    lines = [(one, other) for one, other in zip(text.splitlines(), changed.splitlines(), strict=True) if one != other]
    assert [one.partition(" ")[0] for one, _ in lines] == ["Fingerprint", "|"]


def test_card_says_what_the_corpus_holds(text: str) -> None:
    assert "6 sessions in 6 groups, 12 turns, 0.00 hours of audio." in text
    assert re.search(r"\| turns.csv \| \d+ \| `[0-9a-f]{64}` \|", text)
    assert "6 recordings of `audio`, 1 MB." in text
    assert re.search(r"Digest of the decoded audio: `[0-9a-f]{64}`", text)
    assert "| train, client | 4 | 4 | 4 | 0.001 |" in text
    assert "| c | 4 | 1 | 1 | 6 |" in text
    assert "| W_LABEL_MODIFIER | 6 | turns.csv:2 | read as the code without the mark |" in text
    assert "| client | C | change |" in text
    assert "Levels for `data.codes`: names." in text
    assert "program | 1.0+abc, schema 3, numpy " in text
    assert "sweep prepare table turns.csv --audio audio --config settings.yaml --out corpus" in text
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    columns = {"label": "code", "start": "start", "end": "end"}
    assert yaml.safe_load(settings) == {"columns": columns, "codebook": "codebook.yaml"}


def test_card_has_nothing_private(text: str, tmp_path: Path) -> None:
    for private in ("secret", "Anna", "/tmp", "private"):
        assert private not in text
    (tmp_path / "source-list.csv").write_text(
        "conversation,split\n" + "\n".join(f"s{n},{('train', 'val', 'test')[n % 3]}" for n in range(6))
    )
    split = SplitConfig(file=str(tmp_path / "source-list.csv"))
    listed = card(source(tmp_path / "source"), tmp_path / "corpus", split=split)
    assert "assigned by the list source-list.csv." in listed
    assert str(tmp_path) not in listed


def test_front_matter_follows_the_hub(text: str, tmp_path: Path) -> None:
    assert front(text)["license"] == "unknown"
    assert "| licence | not stated |" in text
    assert front(text)["task_categories"] == ["audio-classification", "text-classification"]
    named = card(source(tmp_path / "source"), tmp_path / "corpus", audio=False, license="Ask us: first")
    assert (front(named)["license"], front(named)["license_name"]) == ("other", "Ask us: first")
    assert front(named)["task_categories"] == ["text-classification"]
    assert front(named)["size_categories"] == ["n<1K"]


def test_markup_in_names_stays_text(text: str) -> None:
    assert "| codebook | mine \\| yours |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)


def test_folder_lists_only_files_that_turns_come_from(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(MOST_FILES + 3):
        rows = [f"{turn},{role},words,a" for turn, role in enumerate(("client", "therapist"))]
        (folder / f"s{number:02}.csv").write_text("\n".join(["turn,speaker,text,code", *rows]))
    (folder / "video-features.bin").write_bytes(bytes(1000))
    corpus = IMPORTERS["mi-tags"].read(folder, None, CorpusConfig())
    origin = CorpusSource.of("mi-tags", folder, None, corpus, "")
    assert [file.name for file in origin.files] == [f"s{number:02}.csv" for number in range(MOST_FILES + 3)]
    shards = prepare(corpus, tmp_path / "corpus")
    text = corpus_card(shards, read_findings(shards), origin)
    assert "23 files of `files` have the turns" in text
    assert re.search(r"\| and 3 more \| \d+ \| \|", text)


def test_changed_licence_extends_the_corpus_without_new_shards(tmp_path: Path) -> None:
    path = source(tmp_path / "source")
    card(path, tmp_path / "corpus")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "corpus").glob("shard-*")}
    assert "cc0-1.0" in card(path, tmp_path / "corpus", license="cc0-1.0")
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "corpus").glob("shard-*")} == before
