"""The page: self-contained, safe against what a results file may hold, the same every time, and true to the results."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_results import make_reference, make_row, sample_results, sample_rows, sample_with

from quern.advisor.recommend import recommend
from quern.core.errors import BadFileError, UserError
from quern.core.results import LayerError, Results, TextSource
from quern.report.columns import columns_of
from quern.report.html import embedded_json, render, write_report
from quern.report.provenance import flatten, parameters_text
from quern.report.view import best_places, layer_grid, page_view, unbroken

HOSTILE = "<script>alert(1)</script>\"'&{{ 7*7 }}</style><img src=x onerror=alert(2)><!--"

COLUMNS = columns_of(sample_results())


class Page(HTMLParser):
    """Elements with their attributes, the text of scripts and styles, and all text that is shown."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self.shown: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.raw.append((self._inside, data))
        else:
            self.shown.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[\s\u00a0]+", " ", "".join(self.shown))


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(sample_results()))


def test_same_results_give_the_same_page():
    assert render(sample_results()) == render(sample_results())


def test_page_starts_with_its_doctype():
    assert render(sample_results()).startswith("<!doctype html>")


def test_nothing_is_loaded_from_anywhere(page: Page):
    text = render(sample_results())
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text
    for tag, attributes in page.elements:
        assert tag not in ("iframe", "img", "object", "embed", "base", "form")
        assert "src" not in attributes
        assert "style" not in attributes, "the policy forbids it"
        assert not any(name.startswith("on") for name in attributes)
        target = attributes.get("href")
        assert target is None or target.startswith("#") or target == "data:,"


def test_policy_names_exactly_the_one_style_and_the_one_script(page: Page):
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert "default-src 'none'" in policy
    (style,) = [text for tag, text in page.raw if tag == "style"]
    scripts = [text for tag, text in page.raw if tag == "script"]
    assert len(scripts) == 2, "the data and the program"
    for kind, text in (("style-src", style), ("script-src", scripts[1])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy


def test_hostile_text_is_shown_and_never_becomes_markup():
    rows = sample_rows()
    rows[2] = rows[2].model_copy(
        update={
            "name": HOSTILE,
            "recipe": {"name": HOSTILE, "description": HOSTILE, HOSTILE: [HOSTILE]},
            "notes": [HOSTILE],
            "engine": HOSTILE,
            "artifact_sha256": HOSTILE,
            "layers": [LayerError(linear=f"model.layers.0.{HOSTILE}", bits_per_weight=4, relative_error=0.1)],
        }
    )
    results = sample_with(rows, recommend(rows, "overall"))
    results = results.model_copy(
        update={
            "hardware": {HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}, "cpu_model": HOSTILE},
            "versions": {HOSTILE: HOSTILE},
            "texts": [TextSource(name=HOSTILE, sha256=HOSTILE, tokens=1)],
            "model": results.model.model_copy(update={"path": HOSTILE, "architecture": HOSTILE}),
            "created": HOSTILE,
        }
    )
    text = render(results)
    clean, hostile = Page(render(sample_results())), Page(text)
    assert "<script>alert" not in text
    assert "<img" not in text
    allowed = {tag for tag, _ in clean.elements}
    assert {tag for tag, _ in hostile.elements} <= allowed
    assert sum(tag == "script" for tag, _ in hostile.elements) == 2
    assert re.sub(r"\s+", " ", HOSTILE) in hostile.text
    (data,) = [json.loads(raw) for tag, raw in hostile.raw if tag == "script" and raw.startswith("{")]
    assert data["rows"][2]["name"] == HOSTILE


def test_embedded_json_cannot_end_its_element():
    text = embedded_json({"a": "</script><!-- & >"})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": "</script><!-- & >"}


def test_verdict_names_the_choice_with_its_figures(page: Page):
    assert "Use balanced: 71.9 % smaller than bf16, 1.60 times the decode speed, KL 0.0284." in page.text


def test_verdict_when_nothing_fits_and_when_the_reference_wins():
    nothing = Page(render(sample_results("storage", max_size=10)))
    assert "Nothing that was measured keeps within the limits." in nothing.text
    assert "comes nearest" in nothing.text
    assert "Stay with the unquantized model" in Page(render(sample_results("storage", max_loss=0.0))).text


def test_stored_recommendation_is_shown_as_it_is():
    results = sample_results()
    stored = results.recommendation.model_copy(update={"choice": "tiny2", "reasons": ["Because I say so."]})
    text = Page(render(results.model_copy(update={"recommendation": stored}))).text
    assert "Use tiny2" in text
    assert "Because I say so." in text
    assert "compact has the best score for the storage scenario" in text, "the other scenarios are ranked here"


def test_every_figure_of_the_table_comes_from_its_row():
    results = sample_results()
    for row, shown in zip(results.rows, page_view(results)["rows"], strict=True):
        for column, cell in zip([c for c in columns_of(results) if c.name != "energy"], shown["cells"], strict=True):
            assert cell["value"] == column.value(row)
            assert (cell["text"] is None) == (cell["value"] is None)


def test_what_no_row_has_is_named_instead_of_shown_as_a_column(page: Page):
    assert "Not measured: energy." in page.text
    assert not any(attributes.get("data-key") == "energy" for _, attributes in page.elements)


def test_best_of_a_column():
    rows = sample_rows()
    best = {column.name: {rows[place].name for place in best_places(column, rows)} for column in COLUMNS}
    assert best["size"] == {"tiny2"}
    assert best["decode"] == {"tiny2"}
    assert best["prefill"] == {"fast"}
    assert best["kl"] == {"w8a16"}, "the reference does not compete with itself"
    assert best["top1"] == {"w8a16"}
    assert best["perplexity"] == {"reference"}
    assert best["energy"] == set()
    same = [make_row("a"), make_row("b")]
    assert all(not best_places(column, same) for column in COLUMNS), "nobody is best where all are equal"


def test_column_directions_are_those_of_the_quantities():
    better = {column.name: column.better for column in COLUMNS}
    high = {"top1", "choice", "decode", "prefill"}
    assert {key for key, direction in better.items() if direction == "high"} == high


def test_uncertainty_is_shown(page: Page):
    assert "0.027 to 0.0301" in page.text
    assert "Noise floor of the KL divergence (the unquantized model against itself): 0.00038" in page.text
    assert "-0.8 points" in page.text
    assert "-2.0 to +0.4" in page.text
    assert "% of limit" in page.text


def test_provenance_is_complete(page: Page):
    results = sample_results()
    assert results.model.sha256 in page.text
    for row in results.rows:
        assert row.artifact_sha256 is None or row.artifact_sha256 in page.text
    for text in results.texts:
        assert text.name in page.text
        assert text.sha256 in page.text
    for expected in ("AMD EPYC", "torch", "2.13.0", results.created, '"group_size": 64', "Seed", "1 thread: 22.4"):
        assert expected in page.text


def test_rows_without_numbers_and_single_rows_render():
    nothing = {
        "kl_mean": None, "perplexity": None, "top1_agreement": None, "choice_accuracy": None, "kl_noise_floor": None,
        "prefill_tokens_per_s": None, "decode_tokens_per_s": None, "time_to_first_token_s": None,
        "decode_limit_fraction": None, "peak_rss_bytes": None, "quantize_seconds": None,
    }  # fmt: skip
    rows = [make_row("bare", **nothing)]
    text = Page(render(sample_with(rows, recommend(rows, "storage")))).text
    assert "KL was not measured" in text
    alone = [make_reference()]
    assert "1 contender measured" in Page(render(sample_with(alone, recommend(alone, "speed")))).text


def test_layer_grid_sorts_linears_by_role_and_depth():
    names = [
        "model.layers.10.self_attn.q_proj", "model.layers.2.mlp.experts.5.up_proj", "model.layers.2.mlp.up_proj",
        "lm_head", f"model.layers.{'9' * 5000}.mlp.up_proj",
    ]  # fmt: skip
    grid = layer_grid("x", [LayerError(linear=name, bits_per_weight=4, relative_error=0.1) for name in names])
    assert grid["depths"] == 11
    assert grid["roles"] == ["q_proj", "mlp.experts.5.up_proj", "mlp.up_proj"], "short where that is unambiguous"
    assert [(cell["role"], cell["depth"]) for cell in grid["cells"]] == [(0, 10), (1, 2), (2, 2)]
    assert [cell["linear"] for cell in grid["outside"]] == names[3:]


def test_numbers_and_units_do_not_part():
    assert unbroken("80.2 % smaller, 447 tokens/s, 2.81 MB each") == (
        "80.2\u00a0% smaller, 447\u00a0tokens/s, 2.81\u00a0MB each"
    )


def test_hardware_is_written_with_units():
    facts = dict(flatten({"ram_bytes": 25e9, "gpus": [{"name": "A"}], "measured": {"x_gb_s": {"1": 2.5}, "y": None}}))
    assert facts == {
        "ram": "25 GB",
        "gpus 0: name": "A",
        "measured: x (GB/s)": "1 thread: 2.5",
        "measured: y": "not measured",
    }


@pytest.mark.parametrize(("count", "text"), [(999, "999"), (7_083_264, "7.08 M"), (72_700_000_000, "72.7 B")])
def test_parameters(count: int, text: str):
    assert parameters_text(count) == text


def test_written_file_is_the_page(tmp_path: Path):
    source, output = tmp_path / "results.json", tmp_path / "new" / "report.html"
    source.write_text(sample_results().model_dump_json(), "utf-8")
    write_report(source, output)
    assert output.read_text("utf-8") == render(Results.model_validate_json(source.read_text("utf-8")))
    assert [file.name for file in output.parent.iterdir()] == ["report.html"]


def test_bad_results_are_refused_and_leave_nothing(tmp_path: Path):
    source, output = tmp_path / "results.json", tmp_path / "report.html"
    with pytest.raises(BadFileError, match="cannot be read"):
        write_report(source, output)
    for text in ("", "{}", "[1]", '{"metrics_version": 1e999}', sample_results().model_dump_json()[:-40]):
        source.write_text(text, "utf-8")
        with pytest.raises(BadFileError, match="not a results file"):
            write_report(source, output)
    assert not output.exists()


def test_unwritable_place_is_a_message(tmp_path: Path):
    source = tmp_path / "results.json"
    source.write_text(sample_results().model_dump_json(), "utf-8")
    with pytest.raises(UserError):
        write_report(source, tmp_path / "results.json" / "report.html")
