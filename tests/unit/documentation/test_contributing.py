"""CONTRIBUTING.md, followed word for word in a copy of the package; a tiny model has the bundled one's name there."""

import contextlib
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import other_copy
import pytest
import torch
from artifacts import stored_tensors
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config, write_model
from warm_workers import Forking

from quern.architectures import base as architectures
from quern.architectures.routed_decoder import RoutedDecoder
from quern.formats.base import ArtifactReader, ArtifactWriter, Format
from quern.formats.sharded import ShardedWriter

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
NAMED_BLOCK = re.compile(r"`([\w/]+\.(?:py|yaml))`:\n\n```\w+\n(.*?)```", re.DOTALL)
FILES = dict(NAMED_BLOCK.findall(PAGE))
CODEC, TEST, RECIPE = "src/quern/codecs/power_of_two.py", "tests/unit/codecs/test_power_of_two.py", "shifts.yaml"
MEASURE = "src/quern/evaluation/measures/entropy.py"  # tests/drop_in/test_drop_in.py follows its steps
FAMILY = "src/quern/architectures/joined.py"
PYTEST = ("-m", "pytest", "--assert=plain")
"""A plug-in of pytest is imported already where these run, and could not be rewritten."""


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository as a contributor has it after the walk-through."""
    folder = tmp_path_factory.mktemp("contributor")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "tests/contract", "requirements"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("pyproject.toml", *(path.name for path in (ROOT / "tests").glob("*.py"))):
        source = ROOT / name if (ROOT / name).is_file() else ROOT / "tests" / name
        shutil.copy(source, folder / source.relative_to(ROOT))
    other_copy.prefer(folder / "src")
    write_model(folder / "models" / "python-7m", tiny_config(max_position_embeddings=1024))
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return folder


@pytest.fixture(scope="module")
def run(copy) -> Iterator[Callable[..., str]]:
    """What Python prints in the copy, with the copy's package, which a process has imported already."""
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "COLUMNS": "200"}
    with contextlib.closing(Forking(environment)) as forking:
        yield functools.partial(forking.python, copy)


@pytest.fixture(scope="module")
def quern(run) -> Callable[..., str]:
    """What the command prints."""
    return functools.partial(run, "-c", "from quern.cli.main import run; run()")


def test_the_page_names_its_files():
    assert set(FILES) == {CODEC, TEST, RECIPE, FAMILY, MEASURE}


def test_step_2_the_codec_is_known(quern):
    assert "power_of_two" in json.loads(quern("recipes", "--json"))["choices"]["codec"]


def test_step_3_the_commands(quern):
    block = re.search(r"```sh\n(quern quantize.*?)```", PAGE, re.DOTALL)[1]
    told = [quern(*shlex.split(line)[1:]) for line in block.splitlines()]
    assert len(told) == 3
    assert "power_of_two" in told[1]


def test_step_4_the_tests(run):
    told = run(*PYTEST, "-q", TEST)
    assert "2 passed" in told


@pytest.mark.skipif(
    not any((ROOT / "tests/contract").glob("test_*codec*.py")), reason="no contract tests of codecs yet"
)
def test_step_4_the_contract(run):
    contracts = [str(path.relative_to(ROOT)) for path in (ROOT / "tests/contract").glob("test_*codec*.py")]
    told = run(*PYTEST, "-v", "-k", "power_of_two", *contracts)
    assert re.search(r"[1-9]\d* passed", told)


def test_the_codecs_parameters_are_what_the_page_says(run):
    """Its narrower keys and its refusal of int8 activations, told by the recipe."""
    script = """
import sys
from quern.core.errors import UserError
from quern.core.recipe import parse_recipe
for choices in ({"symmetric": False}, {"granularity": "tensor"}, {"group_size": 64}, {"bits": 8}):
    try:
        recipe = {"name": "x", "weights": {"codec": "power_of_two", **choices}}
        parse_recipe(recipe if "bits" not in choices else {**recipe, "activations": {"mode": "dynamic"}}, "x")
        print("taken")
    except UserError as error:
        print(str(error).splitlines()[1])
"""
    told = run("-c", script).splitlines()
    assert [line.split(":")[0].strip() for line in told] == [
        "weights.symmetric", "weights.granularity", "weights.group_size", "recipe",
    ]  # fmt: skip
    assert "weights stores powers of two, which are no int8 numbers" in told[3]


def joined(model: Path, folder: Path) -> Path:
    """The checkpoint ``model`` as the page's family stores it."""
    shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    for gate in [name for name in tensors if name.endswith("gate_proj.weight")]:
        halves = tensors.pop(gate), tensors.pop(gate.replace("gate_proj", "up_proj"))
        tensors[gate.replace("gate_proj", "gate_up_proj")] = torch.cat(halves)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**json.loads((model / "config.json").read_text("utf-8")), "model_type": "joined"}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


def test_the_family_is_quantized_like_the_one_that_it_stores_otherwise(copy, run):
    model = write_model(copy / "models" / "llama", tiny_config("llama", num_hidden_layers=1))
    joined(model, copy / "models" / "joined")
    script = "from quern.pipeline.quantize import quantize\n"
    script += (
        "for name in ('llama', 'joined'):\n    quantize(f'models/{name}', f'out-{name}', recipe='rtn4', threads=1)"
    )
    run("-c", script)
    found, wanted = stored_tensors(copy / "out-joined"), stored_tensors(copy / "out-llama")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert "gate_proj.codes" in " ".join(found)


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def test_the_section_on_formats_names_what_a_format_must_have_and_nothing_else():
    text = section("Add a format")
    called = set(re.findall(r"`(\w+)\(", text.replace("\n", " ")))
    classes = (ArtifactWriter, ArtifactReader, ShardedWriter, Format)
    assert {name for found in classes[:3] for name in found.__abstractmethods__} <= called
    assert [name for name in called if not any(hasattr(found, name) for found in classes)] == []
    assert all(f"`{name}`" in text for name in Format.__annotations__ if name not in ("extra",))


def test_the_section_on_families_names_what_there_is():
    text = section("Add a family")
    fields = {
        name
        for found in (architectures.BlockSpec, architectures.LinearSpec, architectures.Source)
        for name in found.__dataclass_fields__
    }
    named = set(re.findall(r"`(\w+)(?:\([^`]*)?`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))
    others = {"awq", "smoothquant", "Architecture", "GatedDecoder", "tokens"}
    known = (architectures.Architecture, RoutedDecoder)
    assert [name for name in named - others - fields if not any(hasattr(kind, name) for kind in known)] == []
    assert {"linears", "rescalings", "experts_per_token", "sources", "input_group", "expert", "fused_with"} <= named
    assert architectures.Architecture.__abstractmethods__ <= named


def test_the_code_is_as_clean_as_the_rest(copy):
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.is_file():
        pytest.skip("ruff is not installed beside this Python")
    for command in (["format", "--check"], ["check"]):
        ended = subprocess.run([ruff, *command, CODEC, TEST, FAMILY, MEASURE], cwd=copy, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout
