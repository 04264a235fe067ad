"""Pages in a browser: MLflow's, with the trials by the objective and what the best one did, and the report."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from model.evaluation.metrics import summarise
from sweep.config.files import dump
from sweep.config.paths import trial_folder
from sweep.search.study import StudyStore
from sweep.search.study_storage import sweep_id
from sweep.tracking.tracker import mlflow_run_id
from sweep.tracking.views import trials_link
from tests.conftest import LABELS
from tests.sweep import searched
from tests.sweep.common import report, sweep
from tests.sweep.mlflow_server import Server
from tests.sweep.tracked import CONFIG, append, runs, track

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
BEST = searched.said(searched.REFERENCE, 0)
BEST_F1 = float(summarise(BEST, {"classify": LABELS}, {})["macro_f1"])
PAGE = 60_000  # milliseconds that a page of a busy machine may take
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=str(CHROMIUM), args=[*FLAGS, "--no-proxy-server"])
        try:
            yield opened
        finally:
            opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": 1900, "height": 1000})
    opened.set_default_timeout(PAGE)
    playwright.expect.set_options(timeout=PAGE)
    yield opened
    opened.close()


@pytest.fixture
def runs_page(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the runs of a finished sweep, of which trial 3 is the best."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    append(folder, 3, (48, 1005.0, 0.3))
    trial = trial_folder(folder, 3)
    with (trial / "metrics.jsonl").open("a") as file:
        values = {"system/cpu_utilization_percentage": 50.0}
        file.write(json.dumps({"time": 1005.0, "step": 48, "values": values}) + "\n")
    searched.write(trial, BEST)
    (trial / "checkpoint.pt").write_bytes(b"weights")
    report(study := StudyStore.open(folder, CONFIG), 3, 0.95, 0.97, BEST_F1)
    study.complete(3)
    track(folder, seconds=240)
    experiment = MlflowClient(server.uri).get_experiment_by_name(CONFIG.name).experiment_id
    return f"{server.uri}/#/experiments/{experiment}/runs"


def test_report_fits_1280_pixels(page: Any, tmp_path: Path) -> None:
    """Nothing scrolls sideways, neither the page nor a table."""
    paths = ["encoders/of-a-long-name/base", "encoders/of-another-long-name/large"]
    parts = ["encoder+adapter+lora+tokens", "adapter+lora+tokens"]
    axes = {"model.encoder.path": paths, "model.trainable": parts, "model.cls": ["none", "after"]}
    axes |= {"data.history": [2, 4], "train.epochs": [2, 3], "train.class_weights": ["equal", "balanced"]}
    space = searched.SPACE | axes
    searched.played(searched.settings(space=space, trials=4), folder := tmp_path / "searched")
    study = StudyStore.of(folder)
    asked = study.ask([], 9)
    assert asked is not None
    study.fail(asked[0], f"{folder}/of-a-path/that/is/long/and/breaks/nowhere: " + "no such file, " * 9)
    assert sweep("report", folder).code == 0
    page.set_viewport_size({"width": 1280, "height": 1000})
    page.goto((folder / "report" / "report.html").as_uri())
    playwright.expect(page.locator(".js-plotly-plot").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    wide = "[...document.querySelectorAll('.scroll, table')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert page.evaluate(wide) == 0


def test_printed_link_leads_to_the_best_trial(page: Any, runs_page: str, folder: Path) -> None:
    """One click from the link to the configuration of the best trial."""
    (folder / "config.yaml").write_text(dump(CONFIG), encoding="utf-8")
    done = sweep("run", folder / "config.yaml", "--out", folder)
    links = dict(re.findall(r"^(trials|charts): +(http\S+)$", done.out, flags=re.MULTILINE))
    page.goto(links["trials"])
    for index, texts in enumerate([("trial-0003", f"{BEST_F1}"[:8]), ("trial-0000", "0.8"), ("trial-0001", "0.1")]):
        for text in texts:  # the left part of a row, with the name, is an element of its own
            playwright.expect(page.locator(f"[row-index='{index}']", has_text=text)).to_be_visible()
    columns = page.locator(".ag-header-cell")
    for name in ("objective", "objective_lower", "objective_upper", *CONFIG.search.space):
        playwright.expect(columns.filter(has_text=name).first).to_be_attached()
    assert page.locator("[row-index='4']").count() == 0, "the sweep's own run is no trial"
    page.get_by_role("link", name="trial-0003").click()
    page.wait_for_url(f"{runs_page}/{mlflow_run_id(folder, 3)}**")
    playwright.expect(page.get_by_role("heading", name="trial-0003")).to_be_visible()
    for text in ("best_macro_f1", "synthetic (f00d)", "model.lora.rank", "Registered models"):
        playwright.expect(page.get_by_text(text, exact=True).first).to_be_visible()
    look_at_curves_and_files(page)
    look_at_charts(page, links["charts"])
    follow_the_links_of_the_note(page, runs_page, folder)


def look_at_curves_and_files(page: Any) -> None:
    page.get_by_role("link", name="loss", exact=True).click()
    page.wait_for_url("**/model-metrics**")
    playwright.expect(page.locator(".scatterlayer .trace path.js-line").first).to_be_attached()
    page.get_by_role("tab", name="System metrics").click()
    playwright.expect(page.get_by_text("cpu_utilization_percentage").first).to_be_visible()
    page.get_by_role("tab", name="Artifacts").click()
    files = page.get_by_test_id("artifact-tree-node")
    files.filter(has_text="confusion_matrix.png").click()
    picture = page.locator("img[src^='blob:']").first
    playwright.expect(picture).to_be_visible()
    assert picture.evaluate("picture => picture.decode().then(() => picture.naturalWidth)") > 100
    files.filter(has_text="config.yaml").click()
    playwright.expect(page.get_by_text("name: trial 3")).to_be_visible()
    files.filter(has_text=re.compile("^model$")).click()
    playwright.expect(files.filter(has_text="checkpoint.pt")).to_be_visible()


def look_at_charts(page: Any, address: str) -> None:
    page.goto(address)
    area = page.get_by_test_id("experiment-view-compare-runs-chart-area")
    for title in ("Parallel Coordinates", "objective", "model.lora.rank vs. objective"):
        playwright.expect(area.get_by_text(title, exact=True).first).to_be_visible()
    playwright.expect(area.locator(".barlayer .trace").first).to_be_attached()


def follow_the_links_of_the_note(page: Any, runs_page: str, folder: Path) -> None:
    page.goto(f"{runs_page}/{runs(folder)[0].info.run_id}")
    link = page.get_by_role("link", name="All trials by macro_f1")
    assert link.get_attribute("href").endswith(trials_link(runs_page.split("/")[-2], sweep_id(folder)))
    link = page.get_by_role("table").get_by_role("link", name="3", exact=True)
    address = link.get_attribute("href")
    page.goto(f"{runs_page.partition('#')[0]}{address}" if address.startswith("#") else address)
    playwright.expect(page.get_by_role("heading", name="trial-0003")).to_be_visible()
    page.goto(f"{runs_page.partition('#')[0]}#/models/{CONFIG.name}")
    playwright.expect(page.get_by_text("@ best")).to_be_visible()
    playwright.expect(page.get_by_role("link", name="Version 1")).to_be_visible()
