"""The report's tools view: complete, safe against what tools say, and absent where no other tool took part."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from sample_results import HQQ, make_row, sample_results, sample_tool_results, sample_tool_rows, sample_with
from test_report import HOSTILE, Page

from quern.advisor.placement import placements
from quern.advisor.recommend import recommend
from quern.core.results import Failure, Tool
from quern.report.html import render
from quern.report.tools import tool_rows, tools_view
from quern.report.view import page_view
from quern.report.wording import STAGES, protocol_text, scale_text


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(sample_tool_results()))


def data_of(page: Page) -> dict:
    (data,) = [json.loads(raw) for tag, raw in page.raw if tag == "script" and raw.startswith("{")]
    return data


def test_no_other_tool_no_tools_view():
    assert tools_view(sample_results()) is None
    shown = Page(render(sample_results())).text
    assert "Loads in" not in shown
    assert "Memory to quantize" not in shown
    assert "Download" not in shown
    alone = sample_results().model_copy(update={"failures": sample_tool_results().failures})
    assert tools_view(alone) is not None, "a tool that failed took part"


def test_rows_carry_maker_runtime_licence_and_place(page: Page):
    rows = data_of(page)["rows"]
    for shown, row, place in zip(rows, sample_tool_rows(), placements(sample_tool_rows()), strict=True):
        assert shown["place"] == place.label
        assert shown["reason"] == place.reason
        if row.tool is not None:
            assert (shown["tool"], shown["version"], shown["licence"]) == (
                row.tool.name,
                row.tool.version,
                row.tool.licence,
            )
            assert (shown["runtime"], shown["targets"]) == (row.tool.runtime, row.tool.targets)
    assert (rows[0]["tool"], rows[0]["licence"]) == ("", "")
    assert (rows[1]["tool"], rows[1]["version"], rows[1]["licence"]) == ("quern", "0.1.0", "Apache-2.0")


def test_provenance_of_a_row_is_complete():
    rows = {
        row.name: dict(made["provenance"]) for row, made in zip(sample_tool_rows(), tool_rows(sample_tool_results()))
    }
    facts = rows["auto-round-int4-g64"]
    assert facts["Made by"] == "AutoRound 0.16.1"
    assert facts["Ran in"] == "transformers with AutoRound's kernels"
    assert facts["Loads in"] == "transformers, vllm"
    assert facts["Settings"] == '{"bits": 4, "group_size": 64}'
    assert facts["Quantized in"] == "6 min 50 s, 900 MB of memory at the peak"
    assert facts["Note"] == "the embedding stayed in bf16"
    assert facts["Place"].startswith("dominated by balanced: ")
    assert len(facts["Artifact SHA-256"]) == 64
    assert rows["reference"]["Made by"] == "nobody: the checkpoint as it is"
    assert rows["balanced"]["Settings"] == "4-bit GPTQ, group 64"


def test_every_filter_has_every_value():
    view = tools_view(sample_tool_results())
    assert view is not None
    values = {entry["key"]: entry["values"] for entry in view["filters"]}
    assert set(values["tool"]) == {"quern", *(row.tool.name for row in sample_tool_rows() if row.tool)}
    assert values["licence"] == ["Apache-2.0", "MIT"]
    assert set(values["target"]) == {"llama.cpp", "onnxruntime", "openvino", "quern", "transformers", "vllm"}
    assert view["file_name"] == "quern-python-7m"


def test_what_was_measured_and_what_failed_is_told(page: Page):
    assert "Scored 4,096 tokens; timed a prompt of 512 tokens and 64 more" in page.text
    assert "quick run" not in page.text
    assert "about 2 times as wide" in Page(render(sample_tool_results(quick=True))).text
    assert "requires mslk >= 1.0.0" in page.text
    assert "foreign load" in page.text
    assert "Memory to quantize" in page.text
    assert scale_text(sample_tool_rows()) in page.text.replace("\u00a0", " ")


def test_nothing_is_loaded_although_tools_have_home_pages(page: Page):
    assert "https://example.org/hqq" in page.text
    for _, attributes in page.elements:
        assert "src" not in attributes
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        target = attributes.get("href")
        assert target is None or target.startswith("#") or target == "data:,"


def test_what_a_tool_says_never_becomes_markup():
    rows = sample_tool_rows()
    tool = Tool(name=HOSTILE, version=HOSTILE, licence=HOSTILE, runtime=HOSTILE, targets=[HOSTILE], homepage=HOSTILE)
    recipe = {"peer": HOSTILE, "name": HOSTILE, "bits": 4, "settings": {HOSTILE: HOSTILE}}
    rows[9] = rows[9].model_copy(update={"name": HOSTILE, "tool": tool, "recipe": recipe, "notes": [HOSTILE]})
    results = sample_with(rows, recommend(rows, "overall"))
    failure = Failure(name=HOSTILE, tool=HOSTILE, stage="load", reason=HOSTILE)
    text = render(results.model_copy(update={"failures": [failure]}))
    clean, hostile = Page(render(sample_tool_results())), Page(text)
    assert "<script>alert" not in text
    assert {tag for tag, _ in hostile.elements} <= {tag for tag, _ in clean.elements}
    assert sum(tag == "script" for tag, _ in hostile.elements) == 2
    assert data_of(hostile)["rows"][9]["tool"] == HOSTILE


def test_same_results_give_the_same_page():
    assert render(sample_tool_results()) == render(sample_tool_results())


def test_rows_of_nothing_but_a_tool_render():
    tool = Tool(name="x", version="1", licence="MIT", runtime="y", targets=[])
    bare = make_row("bare", tool=tool, recipe={"peer": "x"}, kl_mean=None, quantize_seconds=None, perplexity=None)
    page = Page(render(sample_with([bare], recommend([bare], "storage"))))
    assert "bare" in page.text
    assert "nothing that is known" in json.dumps(data_of(page))


def test_every_stage_has_words():
    assert set(STAGES) == set(get_args(Failure.model_fields["stage"].annotation))
    protocol = sample_tool_results().protocol
    assert protocol is not None
    assert "1 thread." in protocol_text(protocol.model_copy(update={"threads": 1}), [])


def test_what_fractions_refer_to_can_be_traced():
    rows = [
        make_row("ours", prefill_limit_fraction=0.4, limit_read_gb_s=34.9, limit_gemm_gop_s=1691.0,
                 limit_gemm_dtype="bfloat16"),
        make_row("other", tool=HQQ, prefill_limit_fraction=None, limit_read_gb_s=31.2),
        make_row("old", tool=HQQ, prefill_limit_fraction=7.46),
        make_row("disturbed", prefill_limit_fraction=2.52),
    ]  # fmt: skip
    results = sample_with(rows, recommend(rows, "storage"))
    limits = {row.name: dict(made["provenance"]).get("Limits") for row, made in zip(rows, tool_rows(results))}
    probed = "probed in the start of the run that timed this row"
    assert limits == {
        "ours": "decode 50 % of limit: reading 34.9 GB/s; prefill 40 % of limit: 1691 x 10^9 operations/s in bfloat16; "
        + probed,
        "other": "decode 50 % of limit: reading 31.2 GB/s; prefill: no limit, because the tool does not declare its "
        "arithmetic; " + probed,
        "old": "prefill: no limit, because the tool does not declare its arithmetic",
        "disturbed": None,
    }
    shown = {
        row["name"]: next(cell["detail"] for cell in row["cells"] if cell["key"] == "prefill")
        for row in page_view(results)["rows"]
    }
    assert shown == {
        "ours": ["40 % of limit"],
        "other": ["- of limit"],
        "old": ["- of limit"],
        "disturbed": ["2.5 times the probed rate, which was no limit"],
    }
    text = Page(render(results)).text
    assert "746 %" not in text
    assert "252 %" not in text
    assert "Limits: decode 50 % of limit: reading 34.9 GB/s" in text
