"""Targets on the command line: handed on as they are meant, and refused with exit code 2 before any model is read."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from quern.cli import targets
from quern.cli.main import app
from quern.cli.views import plan as render_plan
from quern.core.allocation import Target
from quern.core.errors import UserError
from quern.core.recipe import load_recipe, parse_recipe


def run(*words: str):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})


REFUSED = [
    (["--context", "100"], ["--context", "--fit"]),
    (["--bits", "0"], ["--bits is 0", "above 0"]),
    (["--bits", "nan"], ["--bits is nan"]),
    (["--max-loss", "-1"], ["--max-loss is -1"]),
    (["--min-speed", "inf"], ["--min-speed is inf"]),
    (["--fit", "24"], ["--fit '24' has no unit"]),
    (["--bits", "3", "--recipe", "balanced"], ["'balanced' has no allocation", "auto"]),
    (["--bits", "3", "--recipe", "nothing"], ["no recipe 'nothing'"]),
]


@pytest.mark.parametrize("verb", [("plan",), ("quantize", "-o", "out")])
@pytest.mark.parametrize(("words", "told"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_refused_before_the_model_is_looked_for(verb, words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run(verb[0], "no/such/model/anywhere", *verb[1:], *words)
    assert ended.exit_code == 2
    assert all(one in ended.stderr for one in told), ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_recipe_without_an_allocation_is_no_plan(tiny_model, tmp_path):
    ended = run("plan", str(tiny_model), "--recipe", "rtn4", "--cache", str(tmp_path))
    assert ended.exit_code == 2
    assert "nothing is left to plan" in ended.stderr


@pytest.mark.parametrize(
    ("given", "target"),
    [
        ((3.0, None, None, None, None), Target(bits=3.0)),
        ((None, "24GiB", 8192, None, None), Target(memory=24 << 30, context=8192)),
        ((2.5, "1GB", None, 0.05, 10.0), Target(bits=2.5, memory=10**9, max_loss=0.05, min_speed=10)),
        ((None, None, None, None, None), None),
    ],
)
def test_options_become_a_target(given, target):
    assert targets.target_of(*given) == target


def test_the_recipe_that_a_target_is_for():
    assert targets.recipe_for(None, None, "balanced") == load_recipe("balanced")
    assert targets.recipe_for("compact", None, "balanced") == load_recipe("compact")
    chosen = targets.recipe_for(None, Target(bits=3), "balanced")
    assert (chosen.name, chosen.allocation.target) == ("auto-bits-3", Target(bits=3))
    assert chosen.allocation.candidates == load_recipe("auto").allocation.candidates
    assert Target(memory=1000, max_loss=0.05).label == "memory-1000-loss-0.05"


ALLOCATION = {"candidates": [{"bits": 4}], "target": {"bits": 5}}


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"target": {}}, "names no limit"),
        ({"target": {"bits": 3, "bytes": 100}}, "bits and bytes both say the size"),
        ({"target": {"bits": 3, "context": 100}}, "context goes with memory"),
        ({"target": {"bits": 3, "bandwidth_gb_s": 10}}, "bandwidth_gb_s goes with min_speed"),
        ({"target": {"bits": 3, "size": 3}}, "known keys here: bits, bytes, memory"),
        ({"target": {"bits": 0}}, "greater than 0"),
        ({"candidates": []}, "at least 1 item"),
        ({"candidates": [{"bits": 4, "groups": 3}]}, "known keys here: rotated, codec, bits"),
        ({"candidates": [{"codec": "trelis"}]}, "trellis"),
        ({"candidates": [{"bits": 4, "rotated": True}]}, "no transform that rotates"),
        ({"outer": [{"window": 3}]}, "known keys here: codec, bits"),
        ({"budget": 3}, "known keys here: candidates, outer, target, joined, rows"),
    ],
)
def test_what_a_recipe_may_not_say(choices, told):
    with pytest.raises(UserError, match="mine") as raised:
        parse_recipe({"name": "mine", "allocation": {**ALLOCATION, **choices}}, "mine")
    assert told in str(raised.value)


@pytest.mark.parametrize(
    ("choices", "told"),
    [
        ({"transforms": [{"method": "awq"}]}, "transform awq would change"),
        ({"calibration": {"token_weight": "norm"}}, "token_weight: fisher"),
        (
            {"activations": {"mode": "dynamic"}, "allocation": {**ALLOCATION, "candidates": [{"codec": "trellis"}]}},
            "int8 activations need symmetric integer weights",
        ),
    ],
)
def test_what_does_not_go_with_an_allocation(choices, told):
    with pytest.raises(UserError) as raised:
        parse_recipe(
            {"name": "mine", "weights": {"bits": 8, "granularity": "channel"}, "allocation": ALLOCATION} | choices,
            "mine",
        )
    assert told in " ".join(str(raised.value).split())


def test_an_allocation_reads_back_and_others_do_not_name_it():
    recipe = load_recipe("auto")
    assert parse_recipe(recipe.to_json(), "auto") == recipe
    assert recipe.needs_calibration
    assert "allocation" not in load_recipe("balanced").to_json()
    assert "allocation" not in load_recipe("balanced").model_dump()


def test_what_is_shown_of_limits():
    found = render_plan.limits(Target(bits=3, memory=24 << 30, context=100, max_loss=0.05, min_speed=10))
    assert found == [
        "bits 3 bits per weight", "memory 25.8 GB", "context 100", "max_loss 0.05 nats a token", "min_speed 10 tokens/s",
    ]  # fmt: skip


def shown(report) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_plan.plan_report(report))
    return console.export_text()


def test_a_plan_is_shown_with_its_sums():
    item = SimpleNamespace(
        name="model.layers.0.mlp.up_proj", choice="trellis 3 bits", rotated=True, bytes=12345, loss=1.5e-4
    )
    report = SimpleNamespace(
        matrices=[item], target=Target(bits=3), limit="bits", bytes=3_141_752, smallest_bytes=2_000_000, compression=0.8,
        bits_per_weight=2.9999, predicted_loss=0.0123, memory_bytes=5_000_000, context=4096, tokens_per_s=None,
        notes=["[a]"], path=None,
    )  # fmt: skip
    text = shown(report)
    for words in ("trellis 3 bits (rotated)", "12,345", "1.50e-04", "3.14 MB (3,141,752 bytes)", "2 MB", "80.0 %", "3.000",
                  "0.0123 nats a token", "5 MB with a cache of 4096 tokens", "note: [a]", "-o plan.yaml"):  # fmt: skip
        assert words in text, words
    report.limit, report.path, report.tokens_per_s = None, "my plan.yaml", 12.34
    text = shown(report)
    assert "nothing: every matrix has the candidate that loses least" in text
    assert "--recipe 'my plan.yaml'" in text
    assert "12.3 tokens/s" in text
