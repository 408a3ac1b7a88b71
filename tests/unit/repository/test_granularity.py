"""benchmarks/granularity.py and the parts of pages that scripts write."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "techniques.md"


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def granularity(module) -> ModuleType:
    return module("granularity")


@pytest.fixture
def pages(module) -> ModuleType:
    return module("pages")


def test_recipes_of_a_codec_differ_in_the_granularity_alone(granularity):
    by_codec = {}
    for words, recipe in granularity.recipes():
        data = recipe.to_json()
        step = (data["weights"].pop("granularity"), data["weights"].pop("group_size"))
        del data["name"]
        by_codec.setdefault(words, []).append((step, data))
        assert data["rounding"]["method"] == "gptq"
    assert {words: len(rows) for words, rows in by_codec.items()} == {
        "8-bit integers": 5, "4-bit integers": 5, "k-means, 4 bits": 3,
    }  # fmt: skip
    for rows in by_codec.values():
        steps, others = zip(*rows, strict=True)
        assert len(set(steps)) == len(steps)
        assert all(other == others[0] for other in others)
    names = [recipe.name for _, recipe in granularity.recipes()]
    assert len(set(names)) == len(names)


def test_committed_section_is_made_of_the_committed_figures(granularity, pages, tmp_path):
    (stored,) = (ROOT / "benchmarks" / "results").glob("granularity_python-7m_*.json")
    result = json.loads(stored.read_text("utf-8"))
    assert [row["name"] for row in result["rows"]] == [recipe.name for _, recipe in granularity.recipes()]
    text = granularity.section(result)
    page = PAGE.read_text("utf-8")
    assert text.strip() in page
    copy = tmp_path / "techniques.md"
    copy.write_text(page, "utf-8")
    pages.write_section(copy, text)
    assert copy.read_text("utf-8") == page, "written again, nothing changes"


def test_figures_of_the_section(granularity):
    row = {"codec": "c", "granularity": "tensor", "engine": "cpu", "bytes": 2000, "bits_per_weight": 4.5, "kl": 0.01,
           "interval": [0.009, 0.011]}  # fmt: skip
    result = {
        "model": {"name": "m"},
        "texts": [{"tokens": 1000}, {"tokens": 24}],
        "date": "2026-01-01",
        "noise_floor": 0.0002,
        "rows": [row, {**row, "granularity": "group 32", "kl": 0.0025}],
    }
    text = granularity.section(result)
    assert "Model `m`, 1,024 tokens, cpu engine, 2026-01-01" in text
    assert "| c | tensor | the whole matrix | 4.500 | 2,000 | 0.01 (0.009 to 0.011) | 1.00 |" in text
    assert "| c | group 32 | 32 inputs of a row | 4.500 | 2,000 | 0.0025 (0.009 to 0.011) | 0.25 |" in text


def test_each_script_writes_its_part_of_a_page(pages, tmp_path):
    page = tmp_path / "page.md"
    pages.write_head(page, "# Page\n\nhead\n")
    assert page.read_text("utf-8") == "# Page\n\nhead\n"
    pages.write_section(page, "## One\n\n1\n")
    pages.write_section(page, "## Two\n\n2\n\n### below\n")
    pages.write_section(page, "## One\n\nother\n\n")
    pages.write_head(page, "# Page\n\nnew\n")
    assert page.read_text("utf-8") == "# Page\n\nnew\n\n## One\n\nother\n\n## Two\n\n2\n\n### below\n"
    with pytest.raises(ValueError, match="begins with its heading"):
        pages.write_section(page, "text")
    pages.write_section(tmp_path / "new.md", "## One\n\n1\n")
    assert (tmp_path / "new.md").read_text("utf-8") == "## One\n\n1\n"


def test_the_page_of_techniques_keeps_the_sections_of_others(module, monkeypatch, tmp_path):
    techniques = module("techniques")
    copy = tmp_path / "techniques.md"
    copy.write_text(PAGE.read_text("utf-8"), "utf-8")
    (stored,) = (ROOT / "benchmarks" / "results").glob("techniques_python-7m_*.json")
    (also,) = (ROOT / "benchmarks" / "results").glob("techniques_smollm2_*.json")
    monkeypatch.setattr("sys.argv", ["techniques.py", "--from", str(stored), "--also", str(also), "--page", str(copy)])
    techniques.main()
    assert copy.read_text("utf-8") == PAGE.read_text("utf-8")
