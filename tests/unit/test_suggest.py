"""What was meant by a name that does not exist, wherever there is a fixed set of names."""

import pytest
from sample_results import sample_results
from typer.testing import CliRunner

from quern.advisor.recommend import recommend
from quern.cli.main import app
from quern.codecs.base import CODECS
from quern.core.errors import UserError
from quern.core.recipe import load_recipe, parse_recipe
from quern.core.text.suggest import did_you_mean
from quern.engines.base import ENGINES
from quern.formats.base import FORMATS
from quern.peers.base import peer_variants


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("Apache", ["MIT", "Apache-2.0"], "Apache-2.0"),
        ("apache2", ["MIT", "Apache-2.0"], "Apache-2.0"),
        ("compresed_tensors", ["quern", "compressed-tensors"], "compressed-tensors"),
        ("BALANCED", ["balanced", "fast"], "balanced"),
        ("blanced", ["balanced", "fast"], "balanced"),
        ("llamacpp", ["llama.cpp", "vllm"], "llama.cpp"),
    ],
)
def test_names_that_are_like_one(name, known, meant):
    assert did_you_mean(name, known) == f"; did you mean {meant!r}?"


@pytest.mark.parametrize("name", ["", "zap", "---", "x" * 1000])
def test_names_that_are_like_none(name):
    assert did_you_mean(name, ["balanced", "fast", "compact"]) == ""
    assert did_you_mean(name, []) == ""


KINDS = {
    "recipe": (lambda: load_recipe("balnced"), "balanced"),
    "key of a recipe": (lambda: parse_recipe({"name": "a", "wieghts": {}}, "a.yaml"), "weights"),
    "codec": (lambda: CODECS.get("intger"), "integer"),
    "engine": (lambda: ENGINES.get("refrence"), "reference"),
    "format": (lambda: FORMATS.get("compressed_tensors"), "compressed-tensors"),
    "peer": (lambda: peer_variants(["hq"]), "hqq"),
    "variant": (lambda: peer_variants(["hqq:int4g64"]), "int4-g64"),
    "scenario": (lambda: recommend(sample_results(), "storge"), "storage"),
    "weight": (lambda: recommend(sample_results(), "mix", weights={"sped": 1.0}), "speed"),
    "runtime": (lambda: recommend(sample_results(), "storage", target="llamacpp"), "llama.cpp"),
    "licence": (lambda: recommend(sample_results(), "storage", licences=["Apache"]), "Apache-2.0"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_name(kind):
    ask, meant = KINDS[kind]
    with pytest.raises(UserError, match=f"did you mean '{meant}'\\?"):
        ask()


def test_licences_of_the_spdx_list_are_taken_whether_a_tool_has_them_or_not():
    for licence in ("MIT", "apache-2.0", "MPL-2.0", "LicenseRef-own"):
        recommend(sample_results(), "storage", licences=[licence])


@pytest.mark.parametrize(
    ("option", "given", "meant"),
    [("--scenario", "storge", "storage"), ("--for", "llamacpp", "llama.cpp"), ("--licence", "MIT,BSD", "BSD-3-Clause")],
)
def test_options(option, given, meant, tmp_path):
    (tmp_path / "results.json").write_text(sample_results().model_dump_json())
    arguments = ["recommend", str(tmp_path / "results.json"), "--scenario", "storage", option, given]
    ended = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert ended.exit_code == 2
    assert f"did you mean '{meant}'?" in ended.stderr
