"""The report's section on stacking: from results alone, every reason once, absent where nothing is known."""

from __future__ import annotations

from sample_results import sample_results

from quern.core.recipe import load_recipe
from quern.core.results import Results, StackedPair, Stacking
from quern.pipeline.stacking.matrix import stacking_of
from quern.report.html import render
from quern.report.stacking import stacking_view

PAIRS = [
    StackedPair(first="transform awq", second="runtime vllm", label="refuses", reason="<b>no</b>"),
    StackedPair(first="runtime vllm", second="transform awq", label="refuses", reason="<b>no</b>"),
    StackedPair(first="codec log", second="transform awq", label="degrades", reason="it loses"),
]


def results() -> Results:
    stacking = Stacking(parts=["transform awq", "codec log", "runtime vllm"], pairs=PAIRS)
    return sample_results().model_copy(update={"stacking": stacking})


def test_a_sign_for_every_ordered_pair_and_every_reason_once():
    view = stacking_view(results())
    assert view is not None
    signs = ["".join(cell["sign"] or "." for cell in row["cells"]) for row in view["rows"]]
    assert signs == [".+\N{MULTIPLICATION SIGN}", "~.+", "\N{MULTIPLICATION SIGN}+."]
    assert [(item["label"], item["pairs"]) for item in view["reasons"]] == [
        ("degrades", ["codec log with transform awq"]),
        ("refuses", ["transform awq with runtime vllm"]),
    ]


def test_the_page_shows_it_and_nothing_of_it_is_markup():
    page = render(results())
    assert 'id="stacking"' in page
    assert "&lt;b&gt;no&lt;/b&gt;" in page
    assert "<b>no</b>" not in page


def test_results_from_before_have_no_such_section():
    assert stacking_view(sample_results()) is None
    assert 'id="stacking"' not in render(sample_results())


def test_a_comparison_knows_its_own_parts_and_every_runtime():
    found = stacking_of([load_recipe("fast"), load_recipe("balanced")], ["int8"])
    assert {"transform smoothquant", "codec trellis", "cache int8", "runtime llama.cpp"} <= set(found.parts)
    assert "codec nf4" not in found.parts
    assert ("transform smoothquant", "codec trellis", "degrades") in {(p.first, p.second, p.label) for p in found.pairs}
    assert Results.model_validate_json(results().model_dump_json()).stacking == results().stacking
