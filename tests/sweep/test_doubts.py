"""Statistics that mean nothing are not shown: equal values, corpora whose labels tell little, labels without a font."""

import json
import warnings
from pathlib import Path

import numpy as np
import optuna
import pytest
from markupsafe import escape
from matplotlib.font_manager import fontManager

from model.evaluation.bootstrap import Interval
from model.evaluation.ceiling import Ceiling
from model.evaluation.metrics import Record
from sweep.analysis.leaderboard import leaderboard
from sweep.analysis.report import figures, fonts, page
from sweep.analysis.report.fonts import font_families
from sweep.analysis.view import TableView, markdown_text
from sweep.config.diff import claim_folder
from sweep.config.paths import trial_folder
from sweep.search.corpus_notes import FILE, read_ceilings, read_corpus_notes, save_corpus_notes
from sweep.search.study import StudyStore
from sweep.tracking.note import note
from sweep.tracking.runs import confusion_picture
from tests.sweep import searched
from tests.sweep.common import report, sweep

NOTE = "classify: all 20 labelled items of the val split have the label 'change', so its metrics tell little"


def equal(folder: Path, *values: float, points: bool = True) -> StudyStore:
    """Return a finished sweep of trials with these values and the same predictions."""
    space = searched.SPACE if points else {"model.lora.rank": [4, 8, 16]}
    config = searched.settings(trials=len(values), space=space, points=searched.POINTS if points else [])
    claim_folder(config, folder)
    study = StudyStore.open(folder, config)
    for value in values:
        asked = study.ask([], len(values))
        assert asked is not None
        (trial := trial_folder(folder, asked[0])).mkdir(parents=True)
        searched.write(trial, searched.said(searched.REFERENCE, 0))
        report(study, asked[0], value)
        study.complete(asked[0])
    return study


def test_equal_values_have_no_order_and_no_importances(tmp_path: Path) -> None:
    study = equal(tmp_path / "equal", *[1 / 3] * 6)
    said = "all 6 complete trials have the same macro_f1 (0.333), so their order means nothing"
    board = leaderboard(study.config, study.folder, study.trials())
    assert (board.doubts, board.table.has_best) == ([said], False)
    out = sweep("status", study.folder).out
    assert out.index(f"warning: {said}") < out.index("trials by macro_f1")
    assert f"**{said}**" in note(study.config, study.folder, study.trials()).splitlines()
    assert page.find_verdict(study.config, study.folder, study.trials()) == [said]
    drawings = {name: draw for name, _, _, draw in figures._optuna_figures(study.config, played(study), 6)}
    with pytest.raises(ValueError, match="all values are equal"):
        drawings["importance"]()


def played(study: StudyStore) -> optuna.Study:
    return figures.in_memory_study(study)


def test_rounding_is_no_difference(tmp_path: Path) -> None:
    study = equal(tmp_path / "rounded", *(0.5 + 1e-12 * index for index in range(4)))
    assert leaderboard(study.config, study.folder, study.trials()).doubts


def test_importances_need_different_configurations(tmp_path: Path) -> None:
    study = equal(tmp_path / "few", 0.1, 0.2, 0.3, points=False)
    with pytest.raises(ValueError, match="too few different configurations"):
        figures.importance_params(played(study))
    assert leaderboard(study.config, study.folder, study.trials()).doubts == []


def test_importances_of_different_values(tmp_path: Path) -> None:
    study = equal(tmp_path / "different", 0.1, 0.2, 0.3, 0.4)
    assert figures.importance_params(played(study)) == ["modality", "rank"], "the rate is constant"


def test_doubts_about_the_corpus_stand_above_the_leaderboard(tmp_path: Path) -> None:
    study = equal(tmp_path / "noted", 0.1, 0.2)
    assert read_corpus_notes(study.folder) == [], "as in a sweep of an older version"
    save_corpus_notes(study.folder, [])
    assert not (study.folder / FILE).exists()
    save_corpus_notes(study.folder, [NOTE])
    out = sweep("status", study.folder).out
    assert out.index(f"warning: {NOTE}") < out.index("trials by macro_f1")
    assert f"**{NOTE}**" in note(study.config, study.folder, study.trials())
    assert escape(NOTE) in page.render(study, study.folder, [], [], TableView([], []), "", None)
    (study.folder / FILE).write_text(json.dumps([NOTE]))
    assert read_corpus_notes(study.folder) == []
    assert read_ceilings(study.folder) == []


def test_human_ceiling_stands_beside_the_figures(tmp_path: Path) -> None:
    """In the terminal and its JSON, in MLflow's note and on the page, where the best trial is measured, too."""
    study = equal(tmp_path / "coded", 0.1, 0.2)
    figures = {"accuracy": Interval(0.8, 0.7, 0.9), "kappa": None, "Fleiss' kappa": Interval(0.5, None, None)}
    human = Ceiling(task="classify", split="val", turns=("a/b",), sessions=1, annotators=(2, 3), figures=figures)
    save_corpus_notes(study.folder, [], ceilings=[human, human.model_copy(update={"split": "test"})])
    assert read_ceilings(study.folder) == [human]
    [line] = human.lines()
    assert line == (
        "human ceiling of classify (val, 1 turn of 1 session with 2 to 3 annotators): one annotator against the "
        "majority of the others accuracy 0.800 [0.700, 0.900], kappa undefined; all of them Fleiss' kappa 0.500"
    )
    shown = " ".join(sweep("status", study.folder).out.split())
    assert shown.count("human ceiling") == 1
    assert line in shown
    content = json.loads(sweep("status", study.folder, "--json").out)["human_ceiling"]
    assert content["classify"]["annotator"]["kappa"] is None
    assert content["classify"]["annotator"]["accuracy"] == {"value": 0.8, "low": 0.7, "high": 0.9}
    assert f"- {markdown_text(line)}" in note(study.config, study.folder, study.trials())
    assert escape(line) in page.render(study, study.folder, [], [], TableView([], []), "", None)


def record(label: str, prediction: str) -> Record:
    scores = (0.0, 0.0)
    return Record(f"{label}/{prediction}", "classify", "c", "client", None, label, prediction, scores, 1.0, 2)


def picture(first: str, second: str) -> tuple[np.ndarray, str]:
    """Draw a confusion matrix of two labels; a character without a glyph is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn, names = confusion_picture([record(first, second), record(second, second)], [first, second], "names.txt")
    return np.asarray(drawn), names


def test_labels_without_a_font_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fonts, "_best_family", lambda wanted: ("", frozenset()))
    pixels, names = picture("变化", "維持")
    assert names == "1  变化\n2  維持\n"
    assert np.array_equal(pixels, picture("改变", "한국어")[0]), "the same numbers"


def test_labels_that_a_font_has_are_drawn() -> None:
    assert picture("да", "Ω")[1] == ""
    assert not np.array_equal(picture("да", "Ω")[0], picture("нет", "Ω")[0])
    assert picture("a$b$", "$c")[1] == "", "and no formula"


def test_fonts_of_the_machine_are_searched() -> None:
    """STIX, which matplotlib brings along, stands for a font of another script."""
    [stix] = [font.fname for font in fontManager.ttflist if font.name == "STIXNonUnicode" and font.weight == 400][:1]
    default = font_families(())
    assert default is not None
    rare = next(chr(code) for code in sorted(fonts._characters(stix), reverse=True) if not covers(default, code))
    families = font_families(["a", rare])
    assert families is not None
    assert families[: len(default)] == default
    assert len(families) == len(default) + 1
    assert font_families(["\U0010fffd"]) is None


def covers(families: list[str], code: int) -> bool:
    from matplotlib.font_manager import FontProperties, findfont

    return code in fonts._characters(findfont(FontProperties(family=families)))
