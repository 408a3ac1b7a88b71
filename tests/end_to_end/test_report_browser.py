"""The page in a real browser: filters, sorting, tabs, axes, tips, downloads, theme, narrow screens, a silent console.

Needs Chromium and chromedriver (``tools/install_browser.sh``); skips with the reason where they are missing.
"""

from __future__ import annotations

import csv
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sample_results import (
    LLAMA,
    make_reference,
    make_row,
    sample_results,
    sample_rows,
    sample_tool_results,
    sample_tool_rows,
    sample_with,
)

from quern.advisor.recommend import recommend
from quern.core.results import Results
from quern.report.html import render

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install '.[dev]')")

from selenium.common.exceptions import WebDriverException  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import Select  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("Chromium and chromedriver are not installed; tools/install_browser.sh installs them")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    try:
        chrome = webdriver.Chrome(options=options, service=Service(driver))
    except WebDriverException as error:
        pytest.skip(f"Chromium does not start here: {error.msg}")
    yield chrome
    chrome.quit()


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


@pytest.fixture
def page(browser: webdriver.Chrome, tmp_path: Path) -> Iterator[Page]:
    """The sample report, and afterwards the check that every one of these tests ends with: a silent console."""
    shown = Page(browser, tmp_path)
    shown.resize(1280, 900)
    shown.open(sample_results())
    yield shown
    assert browser.get_log("browser") == []


def test_filter_chips_and_search_rule_table_and_chart(page: Page):
    everything = {row.name for row in sample_rows()}
    assert set(page.names()) == page.points() == everything
    page.click('[data-tag="front"]')
    assert "rtn4" not in page.names()
    assert set(page.names()) == page.points() == everything - {"rtn4"}
    assert page.one("#count").text == "6 of 7 shown"
    page.click('[data-tag="quantized"]')
    assert set(page.names()) == page.points() == everything - {"rtn4", "reference"}
    page.click('[data-tag="front"]')
    assert set(page.names()) == everything - {"reference"}
    page.one("#search").send_keys("W8")
    assert page.names() == ["w8a16"]
    page.one("#search").send_keys("x")
    assert page.names() == []
    assert page.one("#empty").is_displayed()
    assert page.points() == set()


def test_click_on_a_column_head_sorts_and_a_second_click_reverses(page: Page):
    assert page.names() == [row.name for row in sample_rows()]
    by_size = [row.name for row in sorted(sample_rows(), key=lambda row: row.bytes)]
    page.click('th[data-key="size"] button')
    assert page.names() == by_size
    assert page.one('th[data-key="size"]').get_attribute("aria-sort") == "ascending"
    page.click('th[data-key="size"] button')
    assert page.names() == by_size[::-1]
    page.click('th[data-key="decode"] button')
    assert page.names()[0] == "tiny2", "the first click puts the best on top, and for a speed that is the greatest"
    assert page.one('th[data-key="size"]').get_attribute("aria-sort") is None


def test_rows_without_a_number_are_sorted_last_both_ways_and_named_under_the_chart(page: Page):
    rows = [make_row("none", kl_mean=None), make_row("much", kl_mean=0.05), make_row("little", kl_mean=0.001)]
    page.open(sample_with(rows, recommend(rows, "storage")))
    assert page.points() == {"much", "little"}
    assert "Not shown, because not measured: none." in page.one("#chart-note").text
    page.click('th[data-key="kl"] button')
    assert page.names() == ["little", "much", "none"]
    page.click('th[data-key="kl"] button')
    assert page.names() == ["much", "little", "none"]


def test_scenario_tabs_show_one_panel_each(page: Page):
    shown = [panel.get_attribute("id") for panel in page.all(".panel") if panel.is_displayed()]
    assert shown == ["panel-overall"]
    page.click("#tab-storage")
    assert not page.one("#panel-overall").is_displayed()
    assert page.one("#panel-storage h3").text == "compact"
    assert "80.2 % smaller" in page.one("#panel-storage .why").text
    page.one("#tab-storage").send_keys(Keys.ARROW_RIGHT)
    assert page.one("#panel-speed").is_displayed()
    assert page.one("#panel-speed h3").text == "fast"
    assert page.browser.switch_to.active_element.get_attribute("id") == "tab-speed"


def test_axes_can_be_chosen(page: Page):
    assert "MB" in page.ticks()
    Select(page.one("#axis-x")).select_by_visible_text("Decode")
    assert "MB" not in page.ticks()
    titles = [title.text for title in page.all("#scatter .axis")]
    assert titles == ["Decode (tokens/s)", "KL divergence (nats/token)"]
    assert "0.001" in page.ticks().split()
    page.click("#log-label")
    assert "0.001" not in page.ticks().split(), "a linear axis has no powers of ten"
    Select(page.one("#axis-y")).select_by_visible_text("Peak memory")
    assert not page.one("#log-label").is_displayed(), "the switch is for KL"
    labels = [option.text for option in Select(page.one("#axis-x")).options]
    assert {"Size", "Bits per weight", "KL divergence", "Perplexity", "Decode", "Prefill", "Peak memory"} <= set(labels)


def test_no_loss_at_all_has_its_place_on_a_log_scale(page: Page):
    rows = [make_reference(kl_mean=0.0), make_row("half"), make_row("third", bytes=333, kl_mean=0.03)]
    page.open(sample_with(rows, recommend(rows, "storage")))
    assert page.points() == {"reference", "half", "third"}
    assert "0" in page.ticks().split()
    assert "Zero has no place on a log scale" in page.one("#chart-note").text


def test_best_row_stands_where_the_arrow_points(page: Page):
    """Less KL is lower and fewer bytes are further left; a swapped axis would show the opposite."""
    place = {
        (point.get_attribute("aria-label") or "").partition(":")[0]: point.rect for point in page.all("#scatter .point")
    }
    assert place["compact"]["x"] < place["fast"]["x"] < place["reference"]["x"]
    assert place["tiny2"]["y"] < place["balanced"]["y"] < place["w8a16"]["y"] < place["reference"]["y"]


def test_line_of_the_best_trade_offs_leaves_out_what_is_beaten(page: Page):
    line = page.one("#scatter .front-line").get_attribute("d") or ""
    heights = {float(number) for number in re.findall(r"[0-9.]+", line)}

    def height(name: str) -> float:
        mark = page.one(f'.point[aria-label^="{name}:"] circle.dot')
        return float(mark.get_attribute("cy") or "nan")

    assert {height(name) for name in ("tiny2", "compact", "balanced", "fast", "w8a16")} <= heights
    assert height("rtn4") not in heights


def test_focus_shows_the_figures_of_a_point_and_escape_hides_them(page: Page):
    tip = page.one("#tip")
    assert not tip.is_displayed()
    page.browser.execute_script("document.querySelector('.point[aria-label^=balanced]').focus()")
    assert tip.is_displayed()
    assert tip.text.splitlines()[0] == "balanced"
    assert "3.99 MB" in tip.text
    page.browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


def test_layer_grids_answer_to_the_arrow_keys(page: Page):
    cards = page.all(".grid-card")
    assert [card.find_element(By.TAG_NAME, "h3").text for card in cards] == [row.name for row in sample_rows()[1:]]
    assert len(cards[0].find_elements(By.CSS_SELECTOR, ".cell")) == 8 * 7
    page.browser.execute_script("arguments[0].focus()", cards[0].find_element(By.TAG_NAME, "svg"))
    page.browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert cards[0].find_element(By.CSS_SELECTOR, ".readout").text.startswith("block 1, k_proj: ")


def test_theme_follows_the_system_and_the_button(page: Page):
    def background() -> str:
        return page.browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    def prefer(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    prefer("light")
    light = background()
    prefer("dark")
    dark = background()
    assert light != dark
    page.click("#theme")
    assert background() == light
    page.click("#theme")
    assert background() == dark
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_recipes_unfold(page: Page):
    recipe = page.all("details")[2]
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", recipe)
    assert not recipe.find_element(By.TAG_NAME, "pre").is_displayed()
    recipe.find_element(By.TAG_NAME, "summary").click()
    assert '"group_size": 64' in recipe.find_element(By.TAG_NAME, "pre").text


@pytest.mark.parametrize("width", [360, 390, 768, 1024, 1280])
def test_page_never_scrolls_sideways(page: Page, width: int):
    rows = sample_rows()
    rows[1] = rows[1].model_copy(update={"name": "a-name-without-any-space-that-is-" + "far-too-long-" * 6})
    page.resize(width, 800)
    page.open(sample_with(rows, recommend(rows, "speed")))
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
    if width < 720:
        page.one("#sort").send_keys("Size")
        assert page.names()[0] == "tiny2"


@pytest.mark.parametrize("width", [1200, 1280, 1600])
@pytest.mark.parametrize("results", [sample_results(), sample_tool_results()], ids=["one tool", "several tools"])
def test_no_column_hides_behind_a_scroll_bar(page: Page, results: Results, width: int):
    page.resize(width, 900)
    page.open(results)
    room, taken = page.browser.execute_script(
        "const card = document.querySelector('#rows').closest('.table-card'); return [card.clientWidth, card.scrollWidth]"
    )
    assert taken <= room


OVERLAPS = """
const boxes = (selector) => [...document.querySelectorAll(selector)].map((found) => found.getBoundingClientRect());
const meet = (one, other) =>
  one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom;
const ticks = boxes("#scatter .tick");
const others = [...boxes("#scatter .axis"), ...ticks];
return ticks.flatMap((tick) => others.filter((other) => other !== tick && meet(tick, other))).length;
"""


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize(("across", "up"), [("size", "kl"), ("kl", "size"), ("kl", "decode")])
def test_labels_of_axes_cover_nothing_however_long_they_are(page: Page, across: str, up: str, width: int):
    """A KL of 5e-8 gives labels such as 0.0000001."""
    tiny = make_row("tiny", kl_mean=5e-8, kl_ci95=None, bytes=900)
    rows = [make_reference(), tiny, make_row("half", bytes=500), make_row("quarter", bytes=250, kl_mean=0.3)]
    page.resize(width, 900)
    page.open(sample_with(rows, recommend(rows, "overall")))
    Select(page.one("#axis-x")).select_by_value(across)
    Select(page.one("#axis-y")).select_by_value(up)
    if up == "kl":
        assert "0.0000001" in page.ticks().split()
    assert len(page.ticks().split()) > 4
    assert "e-" not in page.ticks()
    assert page.browser.execute_script(OVERLAPS) == 0
    page.browser.execute_script(
        "const [one, other] = document.querySelectorAll('#scatter .tick');"
        "for (const name of ['x', 'y']) one.setAttribute(name, other.getAttribute(name))"
    )
    assert page.browser.execute_script(OVERLAPS) > 0, "the measure can fail"


def test_hostile_names_do_not_run(page: Page):
    rows = sample_rows()
    rows[2] = rows[2].model_copy(
        update={"name": "<img src=x onerror=document.title='broken'></script><script>1</script>"}
    )
    page.open(sample_with(rows, recommend(rows, "overall")))
    page.browser.execute_script("document.querySelector('.point[data-id=\"2\"]').focus()")
    assert "<img src=x" in page.one("#tip").text
    assert page.browser.title == "python-7m: quantized side by side"
    assert page.all("main img") == []


@pytest.fixture
def tools(page: Page) -> Page:
    """The report of a comparison with other tools."""
    page.open(sample_tool_results())
    return page


def test_results_without_other_tools_have_no_tools_view(page: Page):
    for selector in ("[data-filter]", "#export", "#about-tip", "#failures", ".about", '[data-key="place"]'):
        assert page.all(selector) == []


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [
        ("tool", "llama.cpp", lambda row: row.tool is not None and row.tool.name == "llama.cpp"),
        ("tool", "quern", lambda row: row.tool is None and row.recipe is not None),
        ("target", "onnxruntime", lambda row: row.tool is not None and "onnxruntime" in row.tool.targets),
        ("licence", "MIT", lambda row: row.recipe is None or (row.tool is not None and row.tool.licence == "MIT")),
    ],
)
def test_filters_by_tool_runtime_and_licence_rule_table_and_chart(tools: Page, key, value, fits):
    Select(tools.one(f'[data-filter="{key}"]')).select_by_visible_text(value)
    wanted = [row for row in sample_tool_rows() if fits(row)]
    assert wanted
    assert tools.names() == [row.name for row in wanted]
    assert tools.points() == {row.name for row in wanted if row.kl_mean is not None}
    assert tools.one("#count").text == f"{len(wanted)} of 21 shown"


def test_filters_add_up(tools: Page):
    Select(tools.one('[data-filter="licence"]')).select_by_visible_text("Apache-2.0")
    Select(tools.one('[data-filter="target"]')).select_by_visible_text("vllm")
    assert {name.split("-")[0] for name in tools.names()} == {"reference", "gptqmodel", "auto", "hqq"}
    tools.click('[data-tag="quantized"]')
    assert "reference" not in tools.names()
    Select(tools.one('[data-filter="tool"]')).select_by_visible_text("HQQ")
    assert tools.names() == ["hqq-int4-g64", "hqq-int2-g64"]


def test_places_can_be_sorted_and_name_what_dominates(tools: Page):
    tools.click('th[data-key="place"] button')
    kinds = [cell.text.split("\n")[0] for cell in tools.all("#rows tbody td.placed")]
    assert [kind for place, kind in enumerate(kinds) if place == 0 or kinds[place - 1] != kind] == (
        ["A", "B", "C", "dominated", "unquantized", "not placed"]
    )
    cell = tools.one('#rows tbody tr[data-id="8"] td.placed')
    assert cell.text == "dominated\nby balanced"


def test_provenance_of_a_row_shows_on_focus_and_on_hover_and_goes_again(tools: Page):
    tip, place = tools.one("#about-tip"), [row.name for row in sample_tool_rows()].index("gptqmodel-int3-g64")
    button = tools.one(f'[data-about="{place}"]')
    assert not tip.is_displayed()
    tools.browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button)
    tools.browser.execute_script("arguments[0].focus()", button)
    assert tip.is_displayed()
    assert button.get_attribute("aria-describedby") == "about-tip"
    row = sample_tool_rows()[place]
    for expected in ("GPTQModel 7.6.0", "Apache-2.0", "transformers, vllm", "group_size", "1 min 36 s", "900 MB",
                     row.artifact_sha256, "the embedding stayed in bf16", "dominated by balanced"):  # fmt: skip
        assert expected in tip.text
    button.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()
    assert button.get_attribute("aria-describedby") is None
    head = tools.one(f'#rows tbody tr[data-id="{place}"] th')
    webdriver.ActionChains(tools.browser).move_to_element(head).perform()
    assert tip.is_displayed()
    webdriver.ActionChains(tools.browser).move_to_element(tools.one(".top .brand")).perform()
    assert not tip.is_displayed()


def test_table_as_shown_is_saved_as_csv(tools: Page):
    Select(tools.one('[data-filter="tool"]')).select_by_visible_text("llama.cpp")
    tools.click('th[data-key="kl"] button')
    lines = list(csv.DictReader(tools.download("#export-csv").splitlines()))
    rows = [row for row in sample_tool_rows() if row.tool == LLAMA]
    assert [line["Contender"] for line in lines] == [row.name for row in rows], "in the order of KL, which is theirs"
    for line, row in zip(lines, rows, strict=True):
        assert (line["Tool"], line["Licence"], line["Loads in"]) == ("llama.cpp 0.3.36", "MIT", "llama.cpp")
        assert int(line["Size (bytes)"]) == row.bytes
        assert float(line["KL divergence (nats/token)"]) == row.kl_mean
        assert (float(line["KL divergence, low"]), float(line["KL divergence, high"])) == row.kl_ci95
        assert float(line["Top-1 agreement (fraction)"]) == row.top1_agreement
        assert float(line["Time to quantize (s)"]) == row.quantize_seconds
        assert line["Place"].startswith("dominated by ")
        assert line["Reason for the place"]


def test_table_as_shown_is_saved_as_markdown(tools: Page):
    tools.one("#search").send_keys("int8")
    lines = tools.download("#export-markdown").splitlines()
    assert lines[0].startswith("| Contender | Tool | Place |")
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| onnxruntime-int8", "| openvino-int8"]
    assert "| ONNX Runtime 1.31.1 | B | MIT | onnxruntime | onnxruntime | 8.32 MB |" in lines[2]
    assert len({line.count("|") for line in lines}) == 1


def test_what_is_saved_is_no_formula_and_keeps_its_cells(tools: Page):
    rows = sample_tool_rows()
    rows[7] = rows[7].model_copy(update={"name": '=HYPERLINK("x"), a|b\nc <b>'})
    tools.open(sample_with(rows, recommend(rows, "speed")))
    Select(tools.one('[data-filter="tool"]')).select_by_visible_text("llama.cpp")
    text = tools.download("#export-csv")
    assert '\r\n"\'=HYPERLINK(""x""), a|b\nc <b>",' in text
    assert "=HYPERLINK(" in tools.download("#export-markdown").splitlines()[2]
    assert "a\\|b c &lt;b>" in tools.download("#export-markdown")


def test_failures_stand_in_their_own_table(tools: Page):
    cells = [
        [cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")] for row in tools.all(".failures tbody tr")
    ]
    assert cells == [
        ["torchao-int4-g64", "torchao", "quantizing", "ImportError: requires mslk >= 1.0.0 | which needs a GPU"],
        ["llm-compressor", "llm-compressor", "installing it", "pip found no matching version"],
    ]


def thirty_rows() -> Results:
    rows = sample_tool_rows()
    rows += [
        row.model_copy(
            update={
                "name": f"{row.name}-second-variant-of-a-very-long-name",
                "bytes": round(row.bytes * 1.02),
                "kl_mean": (row.kl_mean or 0.0) * 1.1,
            }
        )
        for row in rows[7:16]
    ]
    return sample_with(rows, recommend(rows, "mix", weights={"size": 1, "speed": 2, "loss": 1}))


@pytest.mark.parametrize("width", [390, 1280])
def test_names_in_a_chart_of_thirty_rows_cover_neither_each_other_nor_a_mark(page: Page, width: int):
    page.resize(width, 900)
    page.open(thirty_rows())
    assert len(page.points()) == 30
    boxes = page.browser.execute_script(
        "return [...document.querySelectorAll('#scatter .label, #scatter .point .dot')].map((shape) => {"
        " const box = shape.getBoundingClientRect();"
        " return [shape.classList.contains('label'), box.left + 1, box.right - 1, box.top + 4, box.bottom - 4,"
        " shape.textContent] })"
    )
    labels = [box for box in boxes if box[0]]
    for label in labels:
        for other in boxes:
            apart = label[1] >= other[2] or other[1] >= label[2] or label[3] >= other[4] or other[3] >= label[4]
            assert other is label or apart, (label, other)
    named = {label[5] for label in labels}
    assert {"compact", "balanced"} <= named
    nameless = re.search(r"(\d+) marks? ha(?:s|ve) no room", page.one("#chart-note").text)
    assert len(labels) + (int(nameless[1]) if nameless else 0) == 30
    if width == 1280:
        front = {
            row.name for row in sample_tool_rows() if row.name in ("tiny2", "compact", "balanced", "fast", "w8a16")
        }
        assert front <= named
        assert len(labels) >= 24


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_tools_view_never_scrolls_sideways(page: Page, width: int):
    page.resize(width, 800)
    page.open(thirty_rows().model_copy(update={"failures": sample_tool_results().failures}))
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
    page.browser.execute_script("document.querySelector('[data-about=\"9\"]').focus()")
    assert page.one("#about-tip").is_displayed()
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_a_mix_has_its_own_tab(page: Page):
    page.open(thirty_rows())
    assert page.one("#panel-mix").is_displayed()
    assert page.one("#tab-mix").text.splitlines()[1] == "Size 25.0 %, speed 50.0 %, loss 25.0 %"
    assert len(page.all('[role="tab"]')) == 4
