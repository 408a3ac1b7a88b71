"""docs/tools.md comes from committed results and from nothing else."""

import importlib.util
import sys
from pathlib import Path

import pytest
from sample_results import make_reference, make_row, sample_results, sample_tool_results, sample_with

from quern.advisor.recommend import recommend
from quern.core.results import Failure, load_results

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("update_tools_page", ROOT / "tools" / "update_tools_page.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["update_tools_page"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "tools.json").write_text(sample_tool_results().model_dump_json(), "utf-8")
    (tmp_path / "results" / "quick.json").write_text(sample_tool_results(quick=True).model_dump_json(), "utf-8")
    return tmp_path


def test_the_committed_page_is_what_the_committed_results_give(tool):
    page = ROOT / tool.PAGE
    if not page.is_file():
        assert not list((ROOT / "benchmarks" / "results").glob("tools_*.json")), "run tools/update_tools_page.py"
        pytest.skip("no results of other tools are committed, so there is no page to check")
    text = page.read_text("utf-8")
    sources = tool.sources_of(text)
    assert text == tool.page([(source, load_results(ROOT / source)) for source in sources])


def test_page_names_its_sources_and_can_be_made_again(tool, folder, capsys):
    assert tool.main(["results/tools.json", "results/quick.json"], folder) == 0
    text = (folder / tool.PAGE).read_text("utf-8")
    assert tool.sources_of(text) == ["results/tools.json", "results/quick.json"]
    assert text == tool.page([(source, load_results(folder / source)) for source in tool.sources_of(text)])
    assert text.count("## python-7m") == 2
    assert "](../results/tools.json)" in text
    assert "wrote docs/tools.md" in capsys.readouterr().out


def test_every_row_stands_in_the_table_with_its_figures(tool):
    results = sample_tool_results()
    text = tool.page([("x.json", results)])
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    for row in results.rows:
        (line,) = [line for line in lines if line.startswith(f"| {row.name} | ") and line.count("|") == 17]
        assert f"{row.kl_mean:.4f}" in line
        assert row.tool is None or f"{row.tool.name} {row.tool.version}" in line
    assert "| gptqmodel-int3-g64 |" in text
    assert "85.0\\*" in text
    assert "1 min 36 s, 900 MB" in text
    sizes = [row.name for row in sorted(results.rows, key=lambda row: row.bytes)]
    table = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.count("|") == 17]
    assert table == ["name", *sizes]


def test_what_each_tool_is_good_at_is_computed(tool):
    text = tool.page([("x.json", sample_tool_results())])
    (bits,) = [
        line
        for line in text.splitlines()
        if line.startswith("**bitsandbytes 0.50.2** (MIT; loads in transformers, vllm)")
    ]
    assert "First of all quantized rows in time to make (bitsandbytes-nf4, 800 ms)." in bits
    assert "of 5 at 5.5 to 7 bits per weight: size 4, KL 3, decode 5, prefill 5" in bits
    assert "Places: bitsandbytes-nf4 dominated by balanced." in bits
    (ours,) = [line for line in text.splitlines() if line.startswith("**quern 0.1.0**")]
    assert "6 rows, 2.23 MB to 7.31 MB, KL 0.0009 to 0.811" in ours
    assert (
        "| 4.5 to 5.5 | 5 | rtn4 (3.99 MB) | balanced (0.0284) | balanced (418 tokens/s) | rtn4 (8660 tokens/s) |"
        in text
    )


def test_better_figures_move_a_tool_up(tool):
    results = sample_tool_results()
    rows = [
        row.model_copy(update={"kl_mean": 0.001, "decode_tokens_per_s": 999.0})
        if row.name == "bitsandbytes-nf4"
        else row
        for row in results.rows
    ]
    text = tool.page([("x.json", results.model_copy(update={"rows": rows}))])
    assert "of 5 at 5.5 to 7 bits per weight: size 4, KL 1, decode 1, prefill 5" in text


def test_failures_are_told_and_cannot_break_the_page(tool):
    assert (
        "| torchao-int4-g64 | torchao | quantizing | ImportError: requires mslk >= 1.0.0 \\| which needs a GPU |"
        in (tool.page([("x.json", sample_tool_results())]))
    )
    hostile = Failure(name="a|b", tool="<script>", stage="load", reason="line\n\n# heading | <img>")
    text = tool.page([("x.json", sample_tool_results().model_copy(update={"failures": [hostile]}))])
    assert "| a\\|b | &lt;script> | loading the artifact | line # heading \\| &lt;img> |" in text
    assert "What failed" not in tool.page([("x.json", sample_results())])


def test_rows_without_figures(tool):
    nothing = dict.fromkeys(
        ("kl_mean", "perplexity", "top1_agreement", "decode_tokens_per_s", "prefill_tokens_per_s", "quantize_seconds",
         "peak_rss_bytes", "choice_accuracy")
    )  # fmt: skip
    rows = [make_reference(), make_row("bare", **nothing, recipe={"peer": "x", "name": "y", "bits": 6.5})]
    text = tool.page([("x.json", sample_with(rows, recommend(rows, "storage")))])
    assert "| bare | quern 0.1.0 | not placed | 500 bytes | 50.0 % | 8.00 | - | - | - | - | - | - | - | - | - |" in text
    assert "| 7 to 9 | 1 | bare (500 bytes) | - | - | - |" in text


def test_rows_are_compared_by_their_real_bits(tool):
    """A tool's 2-bit row that fell back to almost 5 bits is compared with rows of almost 5 bits."""
    fell_back = make_row("iq2", bits_per_weight=4.94, recipe={"peer": "x", "name": "y", "bits": 2})
    rows = [make_reference(), fell_back, make_row("edge", bits_per_weight=4.5), make_row("below", bits_per_weight=4.49)]
    text = tool.page([("x.json", sample_with(rows, recommend(rows, "storage")))])
    assert "| 4.5 to 5.5 | 2 | iq2 (500 bytes) |" in text
    assert "| 3.5 to 4.5 | 1 | below (500 bytes) |" in text
    assert "| below 3.5 |" not in text
    assert "in one run" not in text


def test_bad_results_are_refused_and_nothing_is_written(tool, folder, tmp_path_factory, capsys):
    outside = tmp_path_factory.mktemp("outside") / "tools.json"
    outside.write_text(sample_results().model_dump_json(), "utf-8")
    for name, said in (("results/none.json", "cannot be read"), (str(outside), "must lie in the repository")):
        assert tool.main([name], folder) == 2
        assert said in capsys.readouterr().err
    assert not (folder / tool.PAGE).exists()


def test_a_page_that_does_not_name_its_sources_is_refused(tool):
    with pytest.raises(ValueError, match="write it again"):
        tool.sources_of("# The tools side by side")
