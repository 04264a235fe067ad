"""Codebooks from the command line: a corpus with 36 codes, trained with seven classes, and back."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.corpus.codebook import Codebook, shipped
from data.shards.dataset import Shards
from sweep.analysis.report.page import _classes
from sweep.config.schema import Config
from sweep.search.corpus_notes import read_classes, read_corpus_notes, save_corpus_notes
from tests.sweep.common import Outcome, refused, sweep

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("### Codebooks")[2].partition("\n**Order.**")[0]
COMMANDS = re.findall(r"```bash\n(.*?)```", SECTION, flags=re.DOTALL)[0].splitlines()


def type_command(line: str, *more: object) -> Outcome:
    program, *words = shlex.split(line, comments=True)
    assert program == "sweep"
    outcome = sweep(*words, *more)
    assert outcome.code == 0, outcome.err  # where weights are loaded, there is also their progress bar
    return outcome


@pytest.fixture(scope="module")
def typed(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Outcome]]:
    """Type the commands of the docs in a folder with a table of all codes of MISC 2.5."""
    folder = tmp_path_factory.mktemp("misc")
    book = Codebook.model_validate(yaml.safe_load(shipped()["misc-2.5"].read_text(encoding="utf-8")))
    pairs = [(role, code) for role, codes in book.codes.items() for code in codes]
    rows = [f"s{number},{role},words of {number},{code}" for number in range(6) for role, code in pairs]
    (folder / "turns.csv").write_text("\n".join(["conversation,speaker,text,code", *rows]), encoding="utf-8")
    model = {"llm": {"path": str(models / "llm")}, "modality": "text"}
    train = {"epochs": 1, "batch_size": 16, "token_budget": 4096}
    trial = {"name": "codes", "model": model, "data": {"reader": "local", "history": 0}, "train": train}
    (folder / "trial.yaml").write_text(json.dumps(trial), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, [type_command(line) for line in COMMANDS]


def test_documented_commands_train_seven_classes(typed: tuple[Path, list[Outcome]]) -> None:
    folder, outcomes = typed
    assert len(outcomes) == 4
    assert "emphasize control" in outcomes[0].out
    assert len(Shards(folder / "misc").manifest.labels) == 36
    table = outcomes[3].out
    assert re.search(r"^ *oq +question +1 +\d", table, flags=re.MULTILINE)


def test_predictions_are_mapped_back_to_the_codes(
    typed: tuple[Path, list[Outcome]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = typed
    monkeypatch.chdir(folder)
    outcome = sweep("evaluate", folder / "seven", "--split", "val", "--json")
    assert outcome.code == 0
    result: dict[str, Any] = json.loads(outcome.out)
    stored = dict(zip(*(Shards(folder / "misc").columns[name] for name in ("id", "label")), strict=True))
    view = Shards(folder / "misc", codes="annomi")
    merged = dict(zip(*(view.columns[name] for name in ("id", "label")), strict=True))
    for row in result["predictions"]:
        assert (row["code"], row["label"]) == (stored[row["id"]], merged[row["id"]])
        assert tuple(row["scores"]) == view.manifest.labels
    per_code = result["per_code"]["classify"]
    assert len(per_code) == 36
    assert sum(sum(row.values()) for row in per_code.values()) == result["n"]
    predicted = Counter(row["prediction"] for row in result["predictions"] if row["code"] == "oq")
    assert per_code["oq"] == predicted


def test_other_level_needs_no_other_preparation(
    typed: tuple[Path, list[Outcome]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = typed
    monkeypatch.chdir(folder)
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "misc").iterdir()}
    level = ["--set=data.shards=misc", "--set=data.codes=names", "--set=train.epochs=1"]
    assert sweep("train", "trial.yaml", *level, "--out", "names").code == 0
    result = json.loads(sweep("evaluate", "names", "--split", "val", "--json").out)
    assert "commitment to change" in result["per_label"]["classify"]
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "misc").iterdir()} == before
    assert "trained on the corpus" in refused(
        folder, "evaluate", "names", "--split", "val", "--set", "data.codes=annomi"
    )


def test_exported_card_names_the_codes_of_each_label(
    typed: tuple[Path, list[Outcome]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = typed
    monkeypatch.chdir(folder)
    assert sweep("export", "seven", "--out", "card").code == 0
    card = (folder / "card" / "README.md").read_text(encoding="utf-8")
    assert "question = oq, cq; reflection = sr, cr, rf" in card
    (folder / "new.csv").write_text("conversation,speaker,text\nx,client,words of 1\nx,therapist,words of 2\n")
    assert sweep("predict", "card", "--csv", "new.csv", "--out", "coded").code == 0
    assert "change" in (folder / "coded" / "predictions.csv").read_text(encoding="utf-8")


def test_card_lies_beside_the_manifest_and_takes_a_licence(
    typed: tuple[Path, list[Outcome]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, outcomes = typed
    monkeypatch.chdir(folder)
    before = (folder / "misc" / "README.md").read_text(encoding="utf-8")
    assert "card:     misc/README.md" in outcomes[1].out
    assert "| licence | not stated |" in before
    line = re.findall(r"```bash\n(sweep prepare .*license=.*)\n```", PAGE)[0]
    shards = {path.name: path.stat().st_mtime_ns for path in (folder / "misc").glob("shard-*")}
    type_command(line)
    after = (folder / "misc" / "README.md").read_text(encoding="utf-8")
    assert "license: cc-by-4.0" in after
    assert "codebook: misc-2.5" in after
    assert str(folder) not in after
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "misc").glob("shard-*")} == shards


def test_level_is_no_axis_of_a_search(typed: tuple[Path, list[Outcome]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = typed
    monkeypatch.chdir(folder)
    message = refused(folder, "run", "trial.yaml", "--set", "search.space.data.codes=[names, annomi]")
    assert "search.space.data.codes: no setting that a search may vary" in message


def test_report_of_a_sweep_lists_the_classes(tmp_path: Path) -> None:
    config = Config.model_validate({"name": "x", "data": {"codes": "few"}})
    assert (read_classes(tmp_path), _classes(config, tmp_path)) == ("", [])
    save_corpus_notes(tmp_path, [], "talk = c+, c-")
    assert read_corpus_notes(tmp_path) == []
    assert _classes(config, tmp_path) == ["classes (data.codes few): talk = c+, c-"]


def test_codebook_of_the_docs_is_valid(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", SECTION, flags=re.DOTALL)
    (tmp_path / "my.yaml").write_text(block, encoding="utf-8")
    outcome = sweep("codebooks", tmp_path / "my.yaml")
    assert (outcome.code, outcome.err) == (0, "")
    assert "not coded" in outcome.out


def test_codebooks_lists_the_shipped_ones_with_levels() -> None:
    lines = sweep("codebooks").out.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == sorted(shipped())
    assert all("levels names, " in line for line in lines[:-1])


@pytest.mark.parametrize(
    ("content", "problems"),
    [
        ("codes: {client: {A: a}}", ["name: missing; add it"]),
        ("name: x\ncode: {client: {A: a}}", ["code: unknown key; did you mean 'codes'?", "codes: missing"]),
        ("name: x\ncodes: {client: {A: a, A: b}}", ["my.yaml:2: not valid YAML (found duplicate key A)"]),
        ("name: x\ncodes: {client: {NO: b}}", ["codes: ", "write such a code in quotes"]),
        (
            "name: x\ncodes: {client: {A: {title: b}}}",
            ["A.title: unknown key; known here: name, about"],
        ),
        (
            "name: x\ncodes: {client: {A: a, a: b}}\nlevels: {l: {classes: {client: {x: [B]}}}}",
            [
                "my.yaml: 3 problems",
                "'a': is also a spelling of 'A'",
                "'B' is no code",
                "l.classes.client: a: in no class",
            ],
        ),
    ],
)
def test_all_faults_of_a_codebook_file_are_named(content: str, problems: list[str], tmp_path: Path) -> None:
    (path := tmp_path / "my.yaml").write_text(content, encoding="utf-8")
    for words in (["codebooks", path], ["prepare", "synthetic", "--out", tmp_path / "o", f"--set=codebook={path}"]):
        message = refused(tmp_path, *words)
        for problem in problems:
            assert problem in message


def test_unknown_codebook_gets_a_hint(tmp_path: Path) -> None:
    message = refused(tmp_path, "prepare", "synthetic", "--out", tmp_path / "x", "--set", "codebook=misc-2-5")
    assert "codebook: 'misc-2-5': no codebook of this name, and no file; did you mean 'misc-2.5'?" in message
