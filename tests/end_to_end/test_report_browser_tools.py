"""The view of other tools in a real browser: filters, places, tips, downloads, failures, charts of many rows."""

from __future__ import annotations

import csv
import re

import pytest
from report_page import By, Page, webdriver
from sample_results import LLAMA, sample_tool_results, sample_tool_rows, sample_with
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from quern.advisor.recommend import recommend
from quern.core.results import Results


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
