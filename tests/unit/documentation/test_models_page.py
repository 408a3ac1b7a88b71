"""docs/models.md says of each family what is true of it."""

from pathlib import Path

import pytest
from tiny_model import tiny_config, write_model

from quern.architectures.base import ARCHITECTURES, architecture_of
from quern.checkpoint.gguf.writing.metadata import FAMILIES
from quern.engines.cpu import CpuEngine
from quern.engines.reference import load
from quern.formats.base import FORMATS
from quern.formats.writing.refusals import misnamed
from quern.loading.fitting import open_model
from quern.quantization.calibration.experts import COLUMNS_PER_TOKEN

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/models.md").read_text("utf-8")
YES, NO = "yes", "not yet"


def rows() -> dict[str, list[str]]:
    lines = [line for line in PAGE.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells if len(rest) == 6 and first != "`model_type`"}


def test_the_table_has_every_family_once_and_no_other():
    assert list(rows()) == ARCHITECTURES.names()


@pytest.mark.parametrize("family", ARCHITECTURES.names())
def test_what_the_table_says_of_a_family(family, tmp_path):
    """That it is quantized, and that transformers loads it, its contract and end-to-end tests say."""
    folder = write_model(tmp_path / "model", tiny_config(family, num_hidden_layers=1), tokenizer=False)
    cpu = YES if CpuEngine().runs(open_model(folder)) is None else NO
    gguf = YES if family in FAMILIES else NO
    assert rows()[family][1:] == [YES, YES, cpu, YES, gguf]
    assert load(folder).model.config.model_type == family
    assert "transformers" in FORMATS.get("quern").runtimes


def test_mixtral_is_the_one_that_is_called_otherwise():
    assert [f for f in ARCHITECTURES.names() if misnamed(architecture_of(tiny_config(f)))] == ["mixtral"]
    assert "all but `mixtral`" in " ".join(PAGE.split())


def test_figures_of_the_page():
    assert COLUMNS_PER_TOKEN == 8
    assert "fewer than one for eight of its inputs" in " ".join(PAGE.split())


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_points_to_it_and_knows_the_families(name):
    text = (ROOT / name).read_text("utf-8")
    assert "(docs/models.md)" in text
    for family in ("Qwen2", "Qwen3", "Llama", "Mistral", "Mixtral"):
        assert family in text
