"""What a person reads: every figure where it belongs, and nothing invented where nothing was measured."""

import dataclasses
import shlex
from pathlib import Path

import pytest
from rich.console import Console
from sample_results import sample_results, sample_tool_results, sample_tool_rows

from quern.cli.views import results as render
from quern.cli.views.comparison import Comparison
from quern.core.recipe import Recipe
from quern.core.results import Excluded, LayerError, Ranked, Recommendation, Row
from quern.pipeline.inspect import Inspection, TensorRow

MEASURED = Row(
    name="compact",
    kind="quern",
    recipe={},
    artifact_sha256="0" * 64,
    bytes=3 * 2**20,
    bits_per_weight=3.25,
    compression=0.8125,
    kl_mean=0.0417,
    kl_ci95=(0.0389, 0.0452),
    kl_noise_floor=0.00021,
    perplexity=12.345,
    top1_agreement=0.912,
    choice_accuracy=0.875,
    choice_difference=-0.015,
    choice_difference_ci95=(-0.03, 0.005),
    prefill_tokens_per_s=1234.5,
    decode_tokens_per_s=56.78,
    decode_limit_fraction=0.25,
    time_to_first_token_s=0.0123,
    peak_rss_bytes=512 * 2**20,
    energy_joules_per_token=None,
    quantize_seconds=4.5,
    notes=["a note [with brackets]"],
)
UNMEASURED = MEASURED.model_copy(
    update={
        **dict.fromkeys(("kl_mean", "kl_ci95", "kl_noise_floor", "perplexity", "top1_agreement", "choice_accuracy")),
        **dict.fromkeys(("prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes", "time_to_first_token_s")),
        **dict.fromkeys(("choice_difference", "choice_difference_ci95", "decode_limit_fraction")),
    }
)


def shown(renderable) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def cells(row) -> dict[str, str]:
    return {render.heading(column): column.cell(row) for column in render.comparison_columns()}


def test_cells():
    assert cells(MEASURED) == {
        "name": "compact",
        "size": "3.15 MB",
        "smaller by": "81.2 %",
        "bits/weight": "3.25",
        "KL divergence": "0.0417",
        "95 % interval": "0.0389 to 0.0452",
        "perplexity": "12.35",
        "top-1": "91.2 %",
        "choice": "87.5 %",
        "prefill tok/s": "1234",
        "decode tok/s": "56.8",
        "peak RAM": "537 MB",
    }


def test_cells_of_what_was_not_measured():
    assert list(cells(UNMEASURED).values())[4:] == ["-"] * 8


def printed(results, width) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(Comparison(results), crop=False)
    return capture.get()


@pytest.mark.parametrize("results", [sample_results(), sample_tool_results()], ids=["one tool", "several tools"])
@pytest.mark.parametrize("width", [60, 80, 120, 200, 10_000])
def test_every_column_is_there_at_every_width(width, results):
    """What one table has no room for follows in another, of the same rows."""
    text = printed(results, width)
    assert max(map(len, text.splitlines())) <= width
    shown = text.split()
    for column in (*render.comparison_columns(), "place"):
        words = column.split() if isinstance(column, str) else column.heading.split()
        assert all(word in shown for word in words)
        for row in results.rows:
            cell = [] if isinstance(column, str) or column.heading == "name" else column.cell(row).split()
            assert all(word in shown or f"{word}*" in shown for word in cell)
    lines = text.splitlines()
    tables = sum("name" in line.split()[:1] for line in lines)
    assert tables > 1 or width > 80
    assert tables == 1 or width < 200
    for row in results.rows:
        if len(row.name) <= 36 or width >= 200:
            assert sum(line.split()[:1] == [row.name] for line in lines) == tables, "names stay whole"
        else:
            parts = row.name.replace("-", "- ").split()
            assert all(any(part in line for line in lines) for part in parts), "and break behind hyphens"


def test_words_of_other_tables_stay_whole():
    tensors = [
        TensorRow(f"model.layers.{i}.post_attention_layernorm.weight", (64,), "bf16", "-", 16, 128) for i in (0, 1)
    ]
    console = Console(width=40)
    with console.capture() as capture:
        console.print(render.inspection(Inspection(Path("x"), 128, tensors, 16, 256, None)), crop=False)
    words = capture.get().split()
    assert all(tensor.name in words for tensor in tensors)


def cells_of(text: str, name: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [name])


def test_a_table_of_several_tools_names_tool_version_and_place():
    lines = shown(render.results(sample_tool_results())).splitlines()
    for row in sample_tool_rows():
        place = next(i for i, line in enumerate(lines) if line.split()[:1] == [row.name])
        if row.tool is not None:
            assert lines[place + 1].strip() == f"{row.tool.name} {row.tool.version}"
    text = "\n".join(lines)
    assert cells_of(text, "balanced")[-1] == "C"
    assert cells_of(text, "llama.cpp-q4_k_m")[-1] == "dominated"
    assert cells_of(text, "openvino-int4-g64")[-1] == "-"
    assert (
        "  llama.cpp-q4_k_m: dominated by balanced: 3.99 MB against 4.69 MB; decodes 418 against 340 tokens/s" in text
    )
    assert "  compact: A: 2.81 MB, 80.2 % smaller than bf16" in text
    assert "KL at most 0.0224" in text


def test_failures_and_foreign_load_are_told():
    text = shown(render.results(sample_tool_results()))
    assert "Not made: torchao-int4-g64 (torchao), while quantizing: ImportError: requires mslk" in text
    assert "Not made: llm-compressor (llm-compressor), while installing it: pip found no matching version" in text
    assert "* timed under foreign load: gptqmodel-int3-g64 (0.62 processors kept busy by other programs)" in text
    assert "85.0*" in cells_of(text, "gptqmodel-int3-g64")
    assert text.count("*") == 3, "the mark of two speeds and its explanation"
    assert "*" not in shown(render.results(sample_results()))


def test_a_quick_run_says_what_it_is():
    assert "intervals are about 2 times as wide" in shown(render.results(sample_tool_results(quick=True)))
    usual = shown(render.results(sample_tool_results()))
    assert "Scored 4,096 tokens; timed a prompt of 512 tokens and 64 more, 3 rounds, 2 threads." in usual
    assert "quick" not in usual


def test_a_quick_run_without_intervals_promises_none():
    results = sample_tool_results(quick=True)
    rows = [row.model_copy(update={"kl_ci95": None}) for row in results.rows]
    protocol = results.protocol.model_copy(update={"speed_rounds": 1})
    text = shown(render.results(results.model_copy(update={"rows": rows, "protocol": protocol})))
    assert "too few tokens for intervals" in text
    assert "times as wide" not in text
    assert "64 more, 1 round, 2 threads" in " ".join(text.split())
    unhurried = protocol.model_copy(update={"speed_rounds": 0})
    assert "speed was left out" in shown(render.results(results.model_copy(update={"protocol": unhurried})))


def test_a_row_without_a_reference_is_told_how_to_get_one():
    assert "--reference" in shown(render.row(UNMEASURED))
    assert "--reference" not in shown(render.row(MEASURED))
    assert "--reference" not in shown(render.row(UNMEASURED.model_copy(update={"kind": "unquantized", "recipe": None})))


def test_row():
    text = shown(render.row(MEASURED))
    assert "0.00021" in text
    assert "-0.015" in text
    assert "-0.030 to +0.005" in text
    assert "note: a note [with brackets]" in text
    energy = next(line for line in text.splitlines() if "energy" in line)
    assert energy.split()[-1] == "-"
    assert "nan" not in shown(render.row(UNMEASURED)).lower()


RECOMMENDATION = Recommendation(
    scenario="storage",
    choice="compact",
    reasons=["It is the smallest."],
    excluded=[Excluded(name="rtn4", reason="loses more than compact and is larger")],
    ranking=[Ranked(name="compact", score=1.0, reason="81 % smaller")],
)


def test_recommendation():
    lines = shown(render.recommendation(RECOMMENDATION)).splitlines()
    assert [line.strip() for line in lines] == [
        "Recommended for the scenario storage: compact",
        "It is the smallest.",
        "1. compact: 81 % smaller",
        "Excluded: rtn4: loses more than compact and is larger",
    ]


def test_no_recommendation():
    nothing = RECOMMENDATION.model_copy(update={"choice": None, "reasons": ["compact comes nearest"], "ranking": []})
    text = shown(render.recommendation(nothing))
    assert "Nothing measured meets the constraints (scenario storage)." in text
    assert "compact comes nearest" in text


def test_quantize_report():
    @dataclasses.dataclass
    class Report:
        path = Path("out/[brackets]")
        recipe = Recipe(name="mine")
        seconds = 12.34
        bytes = 3 * 2**20
        bits_per_weight = 3.25
        compression = 0.8125
        peak_rss_bytes = 2**30
        layers = [LayerError(linear=f"layer.{i}", bits_per_weight=3.2, relative_error=i / 1000) for i in range(20)]
        tuning = ()
        resumed = True
        notes = ["scales were small"]

    text = shown(render.quantize_report(Report()))
    for expected in ("out/[brackets]", "mine, format quern", "3.15 MB", "81.2 %", "12.3 s (resumed)", "1.07 GB"):
        assert expected in text
    assert text.index("layer.19") < text.index("layer.18")
    assert "layer.14" not in text
    assert "note: scales were small" in text
    Report.path = Path("my model's/out")
    (hint,) = [line for line in shown(render.quantize_report(Report())).splitlines() if line.startswith("Try it: ")]
    assert shlex.split(hint)[2:5] == ["quern", "generate", "my model's/out"], "it can be pasted"


def test_inspection():
    rows = [
        TensorRow("a.weight", (2, 300), "integer", "group 64", 4, 1300),
        TensorRow("norm.weight", (300,), "bf16", "-", 16.0, 600),
    ]
    text = shown(render.inspection(Inspection(Path("x"), 2**20, rows, 5.5, 900, "balanced")))
    assert "2 x 300" in text
    assert "1,300" in text
    assert "2 tensors, 900 parameters, 5.50 bits/weight, 1.05 MB on disk, recipe balanced" in text


def test_hardware():
    found = {
        "cpu_model": "A CPU",
        "instruction_sets": ["avx2", "avx512f"],
        "ram_bytes": 2**34,
        "last_level_cache_bytes": None,
        "gpus": [],
        "load_average": [0.5, 1.25],
        "measured": {
            "foreign_load": 0.3,
            "read_bandwidth_gb_s": {"1": 21.5, "2": 40.25},
            "gemm_gop_s": {"float32": {"1": 60.0, "2": 120.0}, "int8": None},
        },
        "warnings": [],
    }
    assert "warning: others [were] here" in shown(render.hardware({**found, "warnings": ["others [were] here"]}))
    lines = two_columns(render.hardware(found))
    assert lines == {
        "what": "value",
        "cpu model": "A CPU",
        "instruction sets": "avx2, avx512f",
        "ram bytes": "17.2 GB",
        "last level cache bytes": "not measured",
        "gpus": "none",
        "load average": "0.5, 1.25",
        "foreign load": "0.3",
        "reading memory, GB/s": "21.5 (1 thread), 40.25 (2 threads)",
        "matrix products in float32, Gop/s": "60 (1 thread), 120 (2 threads)",
        "matrix products in int8, Gop/s": "not measured",
    }
    assert "reading memory, GB/s" not in two_columns(render.hardware(found | {"measured": None}))


def two_columns(renderable) -> dict[str, str]:
    rows = (line.strip().split("  ", 1) for line in shown(renderable).splitlines())
    return {row[0]: row[1].strip() for row in rows if len(row) == 2}


def test_experts_that_are_stored_alike_are_one_row():
    def expert(number: int, name: str, codec: str = "int", size: int = 100) -> TensorRow:
        return TensorRow(f"l.0.mlp.experts.{number}.{name}.weight", (8, 16), codec, "channel", 4, size)

    rows = [expert(number, name) for number in range(3) for name in ("up", "down")]
    rows += [expert(3, "up", "nf4"), expert(3, "down", size=50), TensorRow("l.0.gate", (4, 8), "bf16", "-", 16, 64)]
    found = [(count, row.name, row.codec, row.bytes) for count, row in render.alike(rows)]
    assert found == [
        (3, "l.0.mlp.experts.*.up.weight", "int", 300),
        (4, "l.0.mlp.experts.*.down.weight", "int", 350),
        (1, "l.0.mlp.experts.3.up.weight", "nf4", 100),
        (1, "l.0.gate", "bf16", 64),
    ]
    text = shown(render.inspection(Inspection(Path("x"), 2**20, rows, 5.5, 900, "balanced")))
    assert "4 x 8 x 16" in text
    assert "9 tensors" in text
