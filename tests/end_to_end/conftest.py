"""What tests in a browser share; tests without one import nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sample_results import sample_results


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """Chromium, or a skip with the reason."""
    from report_page import open_browser

    chrome = open_browser(tmp_path_factory.mktemp("profile"))
    yield chrome
    chrome.quit()


@pytest.fixture
def page(browser, tmp_path: Path) -> Iterator:
    """The sample report, and afterwards the check that every one of these tests ends with: a silent console."""
    from report_page import Page

    shown = Page(browser, tmp_path)
    shown.resize(1280, 900)
    shown.open(sample_results())
    yield shown
    assert browser.get_log("browser") == []
