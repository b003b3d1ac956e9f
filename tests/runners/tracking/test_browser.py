"""A sweep on a shared MLflow server, and its pages in a browser."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from app import SMALL, WORLD, Ended, run
from mirror import assert_mirrored, only_run
from mlflow import MlflowClient
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from servers import Server, needed

from runners.tracking.record import Record

PASSWORD, TOKEN, KEY = "hunter2hunter2", "hunter3hunter3", "hunter4hunter4"
LAYERS = 4
OPTIONS = (
    "--headless=new --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    " --disable-sync --no-first-run --window-size=1600,1300"
).split()
Result = TypeVar("Result")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def sweep(home: Path, server: Server) -> Ended:
    """Two runs under one parent; the URI holds a password, the environment a token, a tag a key."""
    small = [
        override.replace("layers=2", f"layers={LAYERS}") for override in SMALL if "behaviour" not in override
    ]
    return run(
        home,
        *(*small, *WORLD, "probe=[rsf]", "name=seen", "objective=ce,dpo", f"+tags.api_key={KEY}", "-m"),
        MLFLOW_TRACKING_URI=server.uri.replace("://", f"://me:{PASSWORD}@"),
        HF_TOKEN=TOKEN,
    )


@pytest.fixture(scope="module")
def records(sweep: Ended) -> list[Record]:
    """The record of the sweep, and those of its runs."""
    assert sweep.code == 0, sweep.out + sweep.err
    jobs = next(Path(line[7:]) for line in sweep.out.splitlines() if line.startswith("sweep: "))
    return [Record(jobs / "record"), Record(jobs / "0/record"), Record(jobs / "1/record")]


def test_a_sweep_on_a_server_is_complete_and_its_runs_are_named_by_their_own_overrides(
    server: Server, sweep: Ended, records: list[Record]
):
    assert "could not publish" not in sweep.out
    client = MlflowClient(server.uri)
    parent, *children = [only_run(client, record) for record in records]
    assert [child.info.run_name for child in children] == ["ce", "dpo"]
    assert parent.info.run_name == "sweep objective=ce,dpo"
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert all(len(child.data.metrics) <= 50 for child in children)
    note = parent.data.tags["mlflow.note.content"].splitlines()
    assert note[0] == "**sweep objective=ce,dpo**: 2 runs." and note[1] == "2 of 2 finished."
    assert {line.split(":")[0] for line in note if line.startswith("- **")} == {
        "- **ce** (1 run)",
        "- **dpo** (1 run)",
    }
    for record, child in zip(records[1:], children, strict=True):
        # The profile over layers is a separate curve with one point per layer.
        profile = client.get_metric_history(child.info.run_id, "rsf_by_layer/o")
        assert sorted(point.step for point in profile) == list(range(LAYERS))
        assert record.status()["status"] == child.info.status == "FINISHED"
    files = {str(path.relative_to(records[0].directory)) for path in records[0].directory.rglob("*.*")}
    assert {"artifacts/tables/sweep.csv", "artifacts/figures/ratio_by_run.png"} <= files
    assert_mirrored(server.uri, *records[1:])


def test_no_secret_of_the_environment_the_uri_or_the_configuration_is_stored_anywhere(
    home: Path, server: Server, database: str, sweep: Ended, records: list[Record]
):
    host = database.partition("host=")[2]
    dump = ["pg_dump", "-h", host, "-U", "tester", "mlflow"]
    kept = subprocess.run(dump, capture_output=True, check=True).stdout
    assert records[0].description()["id"].encode() in kept
    files = [path for root in (home, server.directory) for path in root.rglob("*") if path.is_file()]
    # The descriptions of jobs hold the server's URI with its password, so only the owner may read them.
    private = {path for path in files if path.name in ("job.json", "sweep.json")}
    assert private and all(path.stat().st_mode & 0o077 == 0 for path in private)
    texts = {str(path): path.read_bytes() for path in files if path not in private}
    texts["the database"] = kept
    # Hydra prints the overrides of each job before any code of the project runs.
    output = "".join(line for line in sweep.out.splitlines(keepends=True) if "[HYDRA]" not in line)
    texts["the log"] = (output + sweep.err).encode()
    for secret in (PASSWORD, TOKEN, KEY):
        assert [name for name, text in texts.items() if secret.encode() in text] == []


class Browser:
    """Chromium, with waiting; `screenshot` saves a picture of the page."""

    def __init__(self, driver: webdriver.Chrome, pictures: Path) -> None:
        self.driver, self.pictures = driver, pictures

    def until(self, claim: Callable[[], Result], seconds: float = 60) -> Result:
        """Wait until the result of `claim` is truthy, and return it."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                if result := claim():
                    return result
            except WebDriverException:  # the page is being drawn
                pass
            if time.monotonic() > deadline:
                self.screenshot("failure")
                raise AssertionError(f"the claim never held; the page is in {self.pictures / 'failure.png'}")
            time.sleep(0.2)

    def all(self, selector: str) -> list[WebElement]:
        """The visible elements of a CSS selector."""
        elements = self.driver.find_elements(By.CSS_SELECTOR, selector)
        return [element for element in elements if element.is_displayed()]

    def click(self, selector: str) -> None:
        """Click the first visible element of a CSS selector."""
        self.until(lambda: _clicked(self.all(selector)))

    def click_text(self, text: str) -> None:
        """Click the first visible element whose whole text is `text`."""
        path = f"//*[normalize-space(text())='{text}']"

        def clicked() -> bool:
            elements = self.driver.find_elements(By.XPATH, path)
            return _clicked([element for element in elements if element.is_displayed()])

        self.until(clicked)

    def screenshot(self, name: str) -> None:
        self.driver.save_screenshot(str(self.pictures / f"{name}.png"))


def _clicked(elements: list[WebElement]) -> bool:
    """Click the first of the elements, if there are any."""
    for element in elements[:1]:
        element.click()
    return bool(elements)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    driver, chromium = "/usr/bin/chromedriver", shutil.which("chromium")
    needed(chromium and Path(driver).exists(), "Chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(chromium)
    for option in [*OPTIONS, f"--user-data-dir={tmp_path}/profile"]:
        options.add_argument(option)
    opened = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield Browser(opened, tmp_path)
    finally:
        opened.quit()


def test_a_finished_sweep_can_be_compared_in_the_browser(
    server: Server, records: list[Record], browser: Browser
):
    client = MlflowClient(server.uri)
    parent, *children = [only_run(client, record).info.run_id for record in records]
    experiment = only_run(client, records[0]).info.experiment_id
    page = f"{server.uri}/#/experiments/{experiment}/runs"
    browser.driver.get(page)
    browser.until(lambda: browser.all(f"[row-id='{parent}']"))
    # Once per browser, a user closes the chat and chooses the workflow of training.
    for key, value in {"assistant.panelOpen": "false", "workflowType": '"machine_learning"'}.items():
        browser.driver.execute_script(f"localStorage.setItem('mlflow.{key}_v1', '{value}')")
    browser.driver.refresh()

    # The sweep is one row; unfolded, it shows its runs.
    browser.click(f"[row-id='{parent}'] button")
    for child in children:
        browser.click(f"[row-id='{child}'] .ag-checkbox-input-wrapper")
    names = {link.text for child in children for link in browser.all(f"[row-id='{child}'] a")}
    assert {"ce", "dpo"} <= names
    browser.screenshot("1 runs")

    browser.click("[data-testid='runs-compare-button']")
    browser.until(lambda: "Comparing 2 Runs" in browser.driver.page_source)
    browser.until(lambda: browser.all(".js-plotly-plot"))
    browser.screenshot("2 compared")

    browser.driver.get(f"{page}?compareRunsMode=CHART")
    header = "[data-testid='experiment-view-compare-runs-section-header']"
    browser.until(lambda: len(browser.all(header)) > 2)
    browser.screenshot("3 charts")
    sections = [section.text.splitlines()[0] for section in browser.all(header)]
    assert sections[:4] == ["pretraining", "rsf", "rsf_by_layer", "rsf_pretraining"]

    def searched() -> bool:
        (box,) = browser.all("input[placeholder*='metric charts']")
        if box.get_property("value") != "rsf_by_layer":  # the page may have been redrawn since
            box.clear()
            box.send_keys("rsf_by_layer")
        return [section.text.splitlines()[0] for section in browser.all(header)] == ["rsf_by_layer"]

    browser.until(searched)
    # Each of the six matrices has a chart with a line per run and a point per layer.
    drawn = (
        "return [...document.querySelectorAll('.js-plotly-plot .scatterlayer .trace')]"
        ".map(line => line.querySelectorAll('.points path').length).filter(count => count)"
    )
    browser.until(lambda: browser.driver.execute_script(drawn) == [LAYERS] * 6 * 2)
    time.sleep(1)  # until the animation has ended
    browser.screenshot("4 profiles over layers")

    for number, (identity, figure) in enumerate(
        [(children[1], "ratio_by_layer.png"), (parent, "ratio_by_run.png")], 5
    ):
        browser.driver.get(f"{server.uri}/#/experiments/{experiment}/runs/{identity}/artifacts")
        for name in ("figures", figure):
            browser.click_text(name)
        wide = "return [...document.images].some(image => image.naturalWidth > 500)"
        browser.until(lambda wide=wide: browser.driver.execute_script(wide))
        browser.screenshot(f"{number} {figure.removesuffix('.png')}")

    browser.driver.get(f"{server.uri}/#/experiments/{experiment}/runs/{parent}")
    browser.click_text("Show more")
    browser.until(lambda: any("side is lowest in" in item.text for item in browser.all("li")))
    browser.screenshot("7 note")
