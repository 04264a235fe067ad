"""MLflow's pages in a browser: the trials sorted by the objective, and of the best one what people look for."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from sweep.config.paths import trial_folder
from sweep.search.study import StudyStore
from sweep.tracking.tracker import mlflow_run_id
from tests.sweep.common import PREDICTIONS, report
from tests.sweep.mlflow_server import Server
from tests.sweep.tracked import CONFIG, append, runs, track

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
PAGE = 60_000  # milliseconds that a page of a busy machine may take
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}"),
]


@pytest.fixture
def page() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=[*FLAGS, "--no-proxy-server"])
        try:
            found = browser.new_page(viewport={"width": 1900, "height": 1000})
            found.set_default_timeout(PAGE)
            playwright.expect.set_options(timeout=PAGE)
            yield found
        finally:
            browser.close()


@pytest.fixture
def shown(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the runs of a finished sweep are, of which trial 3 is the best."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    append(folder, 3, (48, 1005.0, 0.3))
    own = trial_folder(folder, 3)
    with (own / "metrics.jsonl").open("a") as file:
        values = {"system/cpu_utilization_percentage": 50.0}
        file.write(json.dumps({"time": 1005.0, "step": 48, "values": values}) + "\n")
    (own / "predictions.json").write_text(json.dumps(PREDICTIONS))
    (own / "checkpoint.pt").write_bytes(b"weights")
    report(study := StudyStore.open(folder, CONFIG), 3, 0.95, 0.97, 0.93)
    study.complete(3)
    track(folder, seconds=240)
    experiment = MlflowClient(server.uri).get_experiment_by_name(CONFIG.name).experiment_id
    return f"{server.uri}/#/experiments/{experiment}/runs"


def test_the_best_trial_is_found_and_shows_what_it_did(page: Any, shown: str, folder: Path) -> None:
    page.goto(shown)
    page.get_by_test_id("sort-select-dropdown").click()
    page.get_by_text("objective", exact=True).first.click()
    page.wait_for_url(re.compile("orderByKey=metrics.*objective.*orderByAsc=false"))
    for place, told in enumerate([("trial-0003", "0.93"), ("trial-0000", "0.8"), ("trial-0001", "0.1")]):
        for text in told:  # the left part of a row, with the name, is an element of its own
            playwright.expect(page.locator(f"[row-index='{place}']", has_text=text)).to_be_visible()
    page.get_by_role("link", name="trial-0003").click()
    page.wait_for_url(f"{shown}/{mlflow_run_id(folder, 3)}**")
    playwright.expect(page.get_by_role("heading", name="trial-0003")).to_be_visible()
    for told in ("best_macro_f1", "synthetic (f00d)", "model.lora.rank", "Registered models"):
        playwright.expect(page.get_by_text(told, exact=True).first).to_be_visible()
    look_at_curves_and_files(page)
    follow_the_links_of_the_note(page, shown, folder)


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


def follow_the_links_of_the_note(page: Any, shown: str, folder: Path) -> None:
    page.goto(f"{shown}/{runs(folder)[0].info.run_id}")
    link = page.get_by_role("table").get_by_role("link", name="3", exact=True)
    place = link.get_attribute("href")
    page.goto(f"{shown.partition('#')[0]}{place}" if place.startswith("#") else place)
    playwright.expect(page.get_by_role("heading", name="trial-0003")).to_be_visible()
    page.goto(f"{shown.partition('#')[0]}#/models/{CONFIG.name}")
    playwright.expect(page.get_by_text("@ best")).to_be_visible()
    playwright.expect(page.get_by_role("link", name="Version 1")).to_be_visible()
