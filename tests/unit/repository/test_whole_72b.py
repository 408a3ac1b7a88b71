"""The script that makes a whole model of few true blocks, at a width at which that takes seconds."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from repository_tools import load_tool
from tiny_model import tiny_config

import quern
from quern.checkpoint.checkpoint import open_checkpoint
from quern.checkpoint.safetensors_file import read_tensors
from quern.core.recipe import load_recipe
from quern.engines.cpu import cache_sizes
from quern.pipeline.forecasting.counted import bytes_of, case_of
from quern.pipeline.forecasting.subject import open_subject

ROOT = Path(__file__).resolve().parents[3]
LAYERS, TRUE = 5, 2


@pytest.fixture(scope="module")
def script():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "benchmarks"))
    found = importlib.import_module("whole_72b")
    found.PROMPT, found.CONTEXT, found.BUFFER_BYTES = 32, 64, 1 << 22
    yield found
    patch.undo()


@pytest.fixture(scope="module")
def made(script, tmp_path_factory):
    """The folder after quantize, repeat and decode."""
    folder = tmp_path_factory.mktemp("whole")
    shape = folder / "tiny.json"
    config = tiny_config(num_hidden_layers=LAYERS, tie_word_embeddings=False, initializer_range=0.02)
    shape.write_text(json.dumps(config), "utf-8")
    patch = pytest.MonkeyPatch()
    for words in (["quantize"], ["repeat", "decode"]):
        run(script, patch, folder, "--only", *words)
    patch.undo()
    return folder / "work"


def run(script, patch, folder, *words, blocks=TRUE):
    shape, work = folder / "tiny.json", folder / "work"
    own = ["--shape", shape, "--recipe", "rtn4", "--blocks", blocks, "--tokens", 256, "--threads", 2, "--new", 4]
    patch.setattr(sys, "argv", ["whole_72b.py", str(work), *map(str, own), *words])
    script.main()


def test_true_blocks_are_those_of_the_whole_model(made):
    """The first blocks have the weights that the whole has."""
    whole, part = open_checkpoint(made / "shape"), open_checkpoint(made / "model")
    assert part.config["num_hidden_layers"] == TRUE
    assert all(part.read(name).equal(whole.read(name)) for name in part.names())


def test_the_whole_has_the_layout_of_a_quantized_one(made):
    """Names, shapes and modules are those of the model quantized whole; repeated blocks are those that they repeat."""
    quern.quantize(made / "shape", made / "true", recipe="rtn4")
    true, whole = (json.loads((made / name / "config.json").read_text("utf-8")) for name in ("true", "whole"))
    assert whole == true
    for file in sorted(path.name for path in (made / "true").glob("*.safetensors")):
        here, there = read_tensors(made / "whole" / file), read_tensors(made / "true" / file)
        assert {n: (t.shape, t.dtype) for n, t in here.items()} == {n: (t.shape, t.dtype) for n, t in there.items()}
    second = read_tensors(made / "whole" / f"model-00003-of-{LAYERS + 2:05d}.safetensors")
    fourth = read_tensors(made / "whole" / f"model-00005-of-{LAYERS + 2:05d}.safetensors")
    assert all(tensor.equal(fourth[name.replace("layers.1.", "layers.3.")]) for name, tensor in second.items())
    said = json.loads((made / "whole" / "quern.json").read_text("utf-8"))["notes"][-1]
    assert said.startswith("blocks 2 to 4 repeat blocks 0 to 1")


def test_the_journal_and_its_report(made, script):
    report = importlib.import_module("whole_report")
    lines = script.Journal(made / "journal.jsonl").lines
    found = report.summary(lines, LAYERS, TRUE)
    assert found["quantized"]
    assert len(found["steps"]["rounding"]) == TRUE
    assert found["repeat"]["repeated"] == LAYERS - TRUE
    decode = found["decode"]
    assert decode["peak_with_context_bytes"] - decode["peak_rss_bytes"] == decode["cache_bytes_per_token"] * (64 - 36)
    result = {**found, "date": "2026-01-01", "command": "c", "recipe": {"name": "rtn4"}}
    texts = report.sections({**result, "hardware": {"cpu_model": "a processor", "usable_cores": 2}})
    values = [[line.rsplit("|", 2)[1] for line in text.splitlines() if line.startswith("|")] for text in texts.values()]
    assert values[0] == values[1]
    assert f"| {TRUE} / {LAYERS} |" in texts["en"]


def test_a_projection_is_so_many_blocks_and_one_head(script):
    report = importlib.import_module("whole_report")
    begin = {"step": "begin", "shape": "s", "recipe": "r", "blocks": 2, "tokens": 8, "compute_dtype": "auto"}
    times = [("token weights", place, seconds) for place, seconds in enumerate((1.0, 3.0, 10.0, 5.0, 7.0))]
    times += [("quantizing blocks", 0, 20.0), ("quantizing blocks", 1, 30.0)]
    lines = [
        {"step": "time", "task": task, "place": place, "seconds": seconds, "peak_rss_bytes": 7}
        for task, place, seconds in times
    ]
    found = report.summary([begin, *lines], 80, 2)
    assert found["projected_seconds"] == 80 * (2 + 6 + 25) + 10
    assert "projected_seconds" not in report.summary([begin, *lines[:4]], 80, 2)
    assert not found["quantized"]


def test_another_job_in_the_same_folder_is_refused(made, script, monkeypatch):
    with pytest.raises(SystemExit, match=r"was begun with blocks 2, now 3"):
        run(script, monkeypatch, made.parent, "--only", "report", blocks=3)


def test_a_step_says_what_it_needs(script, monkeypatch, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config(num_hidden_layers=3)), "utf-8")
    with pytest.raises(SystemExit, match="run the step repeat first"):
        run(script, monkeypatch, tmp_path, "--only", "decode")


def test_no_more_blocks_than_the_model_has(script, monkeypatch, tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config(num_hidden_layers=3)), "utf-8")
    with pytest.raises(SystemExit, match="--blocks is 4, and the model has 3"):
        run(script, monkeypatch, tmp_path, "--only", "report", blocks=4)
    assert script.Journal(tmp_path / "work" / "journal.jsonl").lines == [], "the former values are asked for no more"
    with pytest.raises(SystemExit, match="'no-such' is neither"):
        run(script, monkeypatch, tmp_path, "--shape", "no-such")


def test_the_recipe_fits_22_gb_with_4_k_of_context(tmp_path):
    """Weights, keys and values in float16, counted: what the page says of the plan."""
    config = load_tool("make_synthetic_checkpoint").KNOWN["qwen2.5-72b"]
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    subject = open_subject(tmp_path)
    size = bytes_of(case_of(subject, load_recipe(ROOT / "benchmarks" / "recipes" / "qwen-72b-24gb.yaml")))
    assert 19e9 < size.files.value < 20.5e9
    assert size.files.value + 4096 * cache_sizes(subject.architecture)["float16"] < 21.5e9
