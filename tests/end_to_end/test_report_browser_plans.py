"""Plans in a real browser: squares, shades, the readout by pointer and arrow keys, and the tables on paper."""

from __future__ import annotations

import re

import pytest
from report_page import By, Page, webdriver
from sample_plans import planned_row, sample_plan_results
from sample_results import LINEARS, sample_with
from selenium.webdriver.common.keys import Keys

from quern.advisor.recommend import recommend

CARDS = "#plan-grids .grid-card"


@pytest.fixture
def plans(page: Page) -> Page:
    """The report of a comparison with planned recipes."""
    page.open(sample_plan_results())
    return page


def shade(page: Page, place: int) -> str:
    classes = page.one(f'{CARDS} [data-place="{place}"]').get_attribute("class") or ""
    return classes.split()[1]


def test_results_without_plans_have_no_such_section(page: Page):
    assert page.all("#plans, .plan-table") == []
    assert "Bits" not in page.one(".top nav").text.split()


def test_every_matrix_is_a_square_with_its_shade_and_bits(plans: Page):
    cards = plans.all(CARDS)
    assert [card.find_element(By.TAG_NAME, "h3").text for card in cards] == ["auto", "plan-3bits"]
    labels = [text.text for text in cards[0].find_elements(By.CSS_SELECTOR, "svg.squares .tick")]
    short = [linear.rpartition(".")[2] for linear in LINEARS]
    assert labels == ["embed_tokens", *short, "lm_head", "0", "1", "2", "3"]
    layers = planned_row().layers
    assert len(cards[0].find_elements(By.CSS_SELECTOR, "rect[data-place]")) == len(layers) == 4 * 7 + 2
    by_bits = {layer.bits_per_weight: shade(plans, place) for place, layer in enumerate(layers)}
    assert [by_bits[bits] for bits in sorted(by_bits)] == sorted(by_bits.values()), (
        "more bits never have a lesser shade"
    )
    assert (by_bits[2.0625], by_bits[8.0625]) == ("q0", "q8")
    assert len(set(by_bits.values())) == 4
    legend = [line.text for line in cards[0].find_elements(By.CSS_SELECTOR, ".schemes li")]
    assert sum(int(re.match(r"\d+", line)[0]) for line in legend) == len(layers)
    within = [text.text for text in cards[0].find_elements(By.CSS_SELECTOR, ".within")]
    assert within[0] == "4.1"


def test_pointer_and_arrow_keys_tell_of_each_square(plans: Page):
    card = plans.all(CARDS)[0]
    canvas, readout = (card.find_element(By.CSS_SELECTOR, name) for name in ("svg.squares", ".readout"))
    plans.browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", card)
    plans.browser.execute_script("arguments[0].focus()", canvas)
    assert readout.text.startswith("model.embed_tokens: integer 4 bits")
    keys = plans.browser.switch_to.active_element
    keys.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert readout.text.startswith("block 2, q_proj: trellis 3 bits")
    assert readout.text.endswith("3.06 bits/weight; relative error 0.0156; predicted loss 0.00156 nats/token")
    keys.send_keys(Keys.ARROW_UP, Keys.ARROW_DOWN)
    assert readout.text.startswith("block 2, q_proj"), "what stands for all blocks is passed in one line"
    keys.send_keys(*[Keys.ARROW_DOWN] * 9)
    assert readout.text.startswith("lm_head: integer 8 bits")
    square = card.find_element(By.CSS_SELECTOR, '[data-place="3"]')
    webdriver.ActionChains(plans.browser).move_to_element(square).perform()
    assert readout.text.startswith("block 0, v_proj: integer 8 bits")
    plans.browser.execute_script("arguments[0].focus()", plans.all(f"{CARDS} svg.squares")[1])
    assert "predicted" not in plans.all(f"{CARDS} .readout")[1].text


def test_tables_say_the_same_and_are_open_on_paper(plans: Page):
    table = plans.all(".plan-table")[0]
    rows = table.find_elements(By.CSS_SELECTOR, "tbody tr")
    assert len(rows) == 30
    assert not rows[0].is_displayed()
    plans.browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert rows[0].is_displayed()
    cells = [cell.text for cell in rows[3].find_elements(By.CSS_SELECTOR, "th, td")]
    assert cells == [
        "model.layers.0.self_attn.v_proj",
        "integer 8 bits, granularity channel",
        "8.06",
        "1.5e-05",
        "1.5e-06",
    ]
    plans.browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert not rows[0].is_displayed()


@pytest.mark.parametrize("width", [360, 1280])
def test_eighty_blocks_fit(page: Page, width: int):
    row = planned_row("large", blocks=80)
    page.resize(width, 800)
    page.open(sample_with([row], recommend([row], "storage")))
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
    page.browser.execute_script("document.querySelector('.plan-table').open = true")
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
