"""What follows from what components declare; that it is also what happens is tried in tests/end_to_end/test_stacked_pairs.py."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_model import tiny_config, write_model
from typer.testing import CliRunner

import quern
from quern.cli.main import app
from quern.codecs.base import CODECS
from quern.core.recipe import load_recipe, parse_recipe, profile_names
from quern.core.stacking import NO_TRAITS, Part, Traits, conflict, losing
from quern.formats.base import FORMATS
from quern.pipeline.stacking.answer import pairs, together
from quern.pipeline.stacking.matrix import matrix, trials
from quern.pipeline.stacking.parts import all_parts, parts_of
from quern.pipeline.stacking.trial import NOISE, Loss, verdict
from quern.quantization.rounding.base import ROUNDINGS
from quern.quantization.transforms.base import TRANSFORMS

UNEVEN = Part("transform", "smoothquant")
WANTING = Part("codec", "trellis")


def loss(mean: float, documents: int = 40, spread: float = 0.01) -> Loss:
    """Of documents that differ by ``spread`` of ``mean``."""
    shares = 1 + spread * np.linspace(-1, 1, documents)
    return Loss(100 * mean * shares, np.full(documents, 100))


def test_every_registered_component_is_a_part() -> None:
    found = {str(part) for part in all_parts()}
    for kind, registry in {"transform": TRANSFORMS, "rounding": ROUNDINGS, "codec": CODECS, "format": FORMATS}.items():
        expected = {name for name in registry.names() if not getattr(registry.get(name), "keeps_values", False)}
        assert {f"{kind} {name}" for name in expected} == {name for name in found if name.startswith(f"{kind} ")}


def test_one_loses_by_what_the_other_removes_in_either_order() -> None:
    wants, removes = (
        Traits(wants={"even columns": "a row has one scale"}),
        Traits(removes={"even columns": "scales them"}),
    )
    told = "trellis relies on even columns, because a row has one scale; smoothquant scales them"
    found = conflict(WANTING, wants, UNEVEN, removes)
    assert found == conflict(UNEVEN, removes, WANTING, wants) == ("even columns", told)
    assert conflict(WANTING, wants, UNEVEN, NO_TRAITS) is None


def test_what_a_third_part_restores_is_not_lost() -> None:
    wants, removes = (
        Traits(wants={"even columns": "a row has one scale"}),
        Traits(removes={"even columns": "scales them"}),
    )
    parts = {UNEVEN: removes, WANTING: wants}
    assert [(first, second) for first, second, _ in losing(parts)] == [(UNEVEN, WANTING)]
    assert list(losing({**parts, Part("transform", "hadamard"): Traits(restores=frozenset({"even columns"}))})) == []


def test_what_a_codec_wants_depends_on_its_scheme() -> None:
    scaled = {"name": "x", "transforms": [{"method": "smoothquant"}], "rounding": {"method": "nearest"}}
    assert quern.check(parse_recipe({**scaled, "weights": {"bits": 4}}, "x")).label == "degrades"
    assert quern.check(parse_recipe({**scaled, "weights": {"bits": 8, "granularity": "channel"}}, "x")).label == "works"


@pytest.mark.parametrize("name", profile_names())
def test_shipped_recipes_work_as_they_are(name) -> None:
    report = quern.check(name)
    assert (report.label, report.problems) == ("works", [])
    assert set(report.parts) <= set(all_parts())


def test_parts_of_a_recipe() -> None:
    keys = {"transforms": [{"method": "hadamard"}], "weights": {"codec": "trellis"}, "storage": "entropy"}
    override = {"pattern": "*.q_proj", "bits": 8, "granularity": "channel", "activations": {"mode": "static"}}
    recipe = parse_recipe({"name": "x", **keys, "overrides": [override]}, "x")
    assert list(map(str, parts_of(recipe, "int8", "cpu"))) == [
        *("transform hadamard", "rounding gptq", "codec trellis", "codec integer", "activations static"),
        *("storage entropy", "cache int8", "format quern", "runtime cpu"),
    ]
    assert "cache float16" not in map(str, parts_of(recipe, "float16"))
    assert "codec trellis" in map(str, parts_of(load_recipe("auto")))


def test_a_recipe_that_takes_values_over_is_for_quantized_models() -> None:
    recipe = parse_recipe({"name": "x", "rounding": {"method": "stored"}}, "x")
    report = quern.check(recipe)
    assert (report.label, report.notes) == (
        "works",
        [note for note in report.notes if "quantized in its schemes" in note],
    )
    assert "rounding stored" in map(str, report.parts)
    assert Part("rounding", "stored") not in all_parts()
    report = quern.check(recipe.model_copy(update={"transforms": load_recipe("balanced").transforms}))
    assert (report.label, len(report.problems)) == ("refuses", 1)
    assert "transform hadamard would change them" in report.problems[0]


def test_a_recipe_that_loses_says_by_what(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nweights: {codec: trellis}\ntransforms: [{method: smoothquant}]\n", "utf-8")
    report = quern.check(path)
    assert report.label == "degrades"
    assert [(str(cell.first), str(cell.second)) for cell in report.degrading] == [(str(UNEVEN), str(WANTING))]
    ended = CliRunner().invoke(app, ["check", str(path)])
    assert ended.exit_code == 0
    assert "mine: degrades" in ended.stdout
    assert "trellis relies on even columns" in ended.stdout


def test_a_runtime_that_does_not_read_the_format_is_refused_with_what_it_reads() -> None:
    report = quern.check("nf4", runtime="vllm")
    assert report.label == "refuses"
    assert report.problems == ["vllm does not read the format quern: it reads awq, compressed-tensors and gptq"]
    assert "set codec: integer" in " ".join(report.notes)
    assert quern.check("nf4", runtime="llama.cpp").problems == [
        "llama.cpp does not read the format quern: it reads gguf"
    ]


def test_a_recipe_is_checked_for_a_model(tmp_path) -> None:
    odd = write_model(tmp_path / "odd", tiny_config(hidden_size=64, intermediate_size=96))
    recipe = parse_recipe({"name": "x", "weights": {"group_size": 64}, "format": "compressed-tensors"}, "x")
    assert quern.check(recipe).label == "works"
    (problem,) = quern.check(recipe, model=odd).problems
    assert "96 inputs, which is not a multiple of the group size 64" in problem


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check"], "name a recipe"),
        (["check", "balancd"], "balanced"),
        (["check", "balanced", "--for", "vlm"], "vllm"),
        (["check", "balanced", "--cache", "int5"], "int4"),
        (["check", "--matrix", "--for", "vllm"], "RECIPE"),
        (["check", "balanced", "--matrix", "--for", "vlm"], "vllm"),
        (["check", "balanced", "--matrix", "--cache", "int5"], "int4"),
        (["check", "balanced", "--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_cannot_be_asked(arguments, said) -> None:
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 2
    assert said in ended.stderr


def test_refused_ends_with_1_and_json_says_all() -> None:
    ended = CliRunner().invoke(app, ["check", "balanced", "--for", "vllm", "--json"])
    assert ended.exit_code == 1
    found = json.loads(ended.stdout)
    assert (found["label"], found["runtime"]) == ("refuses", "vllm")
    assert found["problems"]


def test_the_matrix_has_every_ordered_pair_or_those_of_a_recipe() -> None:
    whole = matrix()
    assert len(whole.cells) == len(whole.parts) * (len(whole.parts) - 1) == len(list(pairs()))
    assert all(cell.answer.reason for cell in whole.cells)
    ended = CliRunner().invoke(app, ["check", "balanced", "--matrix", "--json"])
    assert len(json.loads(ended.stdout)["parts"]) == len(parts_of(load_recipe("balanced")))
    shown = CliRunner().invoke(app, ["check", "--matrix"])
    assert shown.exit_code == 0
    assert "transform smoothquant, codec trellis" in shown.stdout


def test_a_measured_pair_is_what_it_is_said_to_be() -> None:
    for name, found in trials().get("pairs", {}).items():
        first, second = (Part(*part.split(" ", 1)) for part in name.split(", "))
        label = together(first, second).answer.label
        more = found["kl"] / found["bound"] - 1
        assert label != "refuses", name
        assert more <= NOISE if label == "works" else more > NOISE, (name, more)


def test_verdicts() -> None:
    gptq, awq, kmeans, int4 = (
        Part("rounding", "gptq"),
        Part("transform", "awq"),
        Part("codec", "kmeans"),
        Part("cache", "int4"),
    )
    plain = loss(1.0)
    assert verdict(awq, gptq, loss(0.5), (loss(0.8), loss(0.5)), plain).label == "works"
    assert verdict(awq, gptq, loss(0.7), (loss(0.8), loss(0.5)), plain).label == "degrades"
    assert verdict(awq, kmeans, loss(1.3), (loss(0.8), loss(1.2)), plain).bound == pytest.approx(1.2)
    assert verdict(kmeans, int4, loss(1.5), (loss(1.2), loss(1.3)), plain).label == "works"
    assert verdict(kmeans, int4, loss(1.7), (loss(1.2), loss(1.3)), plain).label == "degrades"
    assert verdict(kmeans, Part("codec", "nf4"), loss(1.3), (loss(1.2), loss(1.3)), plain).label == "works"
    assert verdict(kmeans, Part("runtime", "vllm"), loss(1.3), (loss(1.2), loss(1.0)), plain).label == "degrades"


def test_a_difference_within_chance_is_no_loss() -> None:
    generator = np.random.default_rng(0)
    tokens = np.full(6, 100)
    noisy = Loss(100 * (1 + 0.1 + generator.normal(0, 0.6, 6)), tokens)
    plain = loss(1.0, 6)
    assert noisy.mean > 1 + NOISE
    assert verdict(Part("transform", "awq"), Part("codec", "nf4"), noisy, (plain, plain), plain).label == "works"
