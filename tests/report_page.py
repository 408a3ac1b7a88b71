"""The report of some results in a real browser: Chromium and chromedriver (``tools/install_browser.sh``)."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from quern.core.results import Results
from quern.report.html import render

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install '.[dev]')")

from selenium.common.exceptions import WebDriverException  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
)  # fmt: skip


def open_browser(profile: Path) -> webdriver.Chrome:
    """A browser with ``profile``, an empty folder; skips the test, with the reason, where none is there."""
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("Chromium and chromedriver are not installed; tools/install_browser.sh installs them")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        return webdriver.Chrome(options=options, service=Service(driver))
    except WebDriverException as error:
        pytest.skip(f"Chromium does not start here: {error.msg}")


class Page:
    """The report of some results, open in the browser."""

    def __init__(self, browser: webdriver.Chrome, folder: Path) -> None:
        self.browser = browser
        self.folder = folder

    def open(self, results: Results) -> None:
        file = self.folder / "report.html"
        file.write_text(render(results), "utf-8")
        self.browser.get_log("browser")
        self.browser.get(file.as_uri())

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def click(self, selector: str) -> None:
        found = self.one(selector)
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", found)
        found.click()

    def names(self) -> list[str]:
        """Names in the table, in the order and as far as they are shown."""
        return [row.text for row in self.all("#rows tbody tr:not([hidden]) th .name")]

    def points(self) -> set[str]:
        """Names of the rows that the chart shows."""
        return {(point.get_attribute("aria-label") or "").partition(":")[0] for point in self.all("#scatter .point")}

    def ticks(self) -> str:
        return " ".join(tick.text for tick in self.all("#scatter .tick"))

    def download(self, selector: str) -> str:
        """The file that a button makes the browser save."""
        folder = self.folder / "downloads"
        shutil.rmtree(folder, ignore_errors=True)
        self.browser.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder), "eventsEnabled": False}
        )
        self.click(selector)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            found = [file for file in folder.glob("*") if file.suffix in (".csv", ".md") and file.stat().st_size]
            if found:
                return found[0].read_bytes().decode()
            time.sleep(0.05)
        raise AssertionError(f"nothing was saved in {folder}")

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
