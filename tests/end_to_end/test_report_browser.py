"""The page in a real browser: filters, sorting, tabs, axes, theme, narrow screens, a silent console."""

from __future__ import annotations

import re

import pytest
from report_page import By, Page
from sample_results import make_reference, make_row, sample_results, sample_rows, sample_tool_results, sample_with
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from quern.advisor.recommend import recommend
from quern.core.results import Results


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
