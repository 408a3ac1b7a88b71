"""Artifacts with ``storage: entropy``: smaller files of the same model, whoever reads them."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from artifacts import INT8, hashes, make_artifact, small_recipe, stored_schemes, stored_tensors
from tiny_model import tiny_config, write_model

from quern.checkpoint.safetensors_file import DTYPES, read_header
from quern.codecs.packing import bits
from quern.core.errors import BadFileError, UserError
from quern.core.recipe import parse_recipe
from quern.engines.base import ENGINES
from quern.formats.base import obstacles_of, runtimes_of
from quern.loading.fitting import open_model
from quern.pipeline.evaluate import evaluate
from quern.pipeline.inspect import inspect
from quern.pipeline.quantize import quantize

pytest.importorskip("zstandard", reason="zstandard is not installed")

IDS = torch.randint(0, 296, (2, 21), generator=torch.Generator().manual_seed(3))
LOSSLESS = {"weights": {"codec": "none"}}
RECIPES = {
    "4 bits": {
        "weights": {"bits": 4, "symmetric": False, "group_size": 32},
        "overrides": [
            {"pattern": "*.down_proj", "bits": 3, "group_size": 32},
            {"pattern": "*.o_proj", "codec": "none"},
        ],
        "embedding": INT8,
    },
    "trellis": {
        "weights": {"codec": "trellis", "bits": 3},
        "embedding": {"bits": 6, "granularity": "channel"},
        "transforms": [{"method": "hadamard"}],
    },
    "lossless": LOSSLESS,
    "int8 inputs": {"weights": INT8, "activations": {"mode": "dynamic"}},
}
DAMAGED = "model-00003-of-00005.safetensors"


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    """Large enough that every matrix is worth coding."""
    config = tiny_config("qwen2", hidden_size=128, intermediate_size=192, head_dim=32)
    return write_model(tmp_path_factory.mktemp("wide") / "model", config)


@pytest.fixture(scope="module", params=RECIPES)
def pair(request, wide_model, tiny_text, tmp_path_factory) -> tuple[Path, Path]:
    """The same recipe stored plainly and entropy-coded."""
    folder = tmp_path_factory.mktemp("stored")
    choices = RECIPES[request.param]
    return tuple(  # type: ignore[return-value]
        make_artifact(wide_model, folder / storage, tiny_text, storage=storage, **choices)
        for storage in ("plain", "entropy")
    )


@pytest.fixture(scope="module")
def coded(wide_model, tiny_text, tmp_path_factory) -> Path:
    return make_artifact(
        wide_model, tmp_path_factory.mktemp("coded") / "out", tiny_text, storage="entropy", **RECIPES["4 bits"]
    )


def described(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text("utf-8"))["quantization_config"]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_the_tensors_are_the_same_and_the_files_smaller(pair):
    plain, coded = pair
    wanted, found = open_model(plain), open_model(coded)
    assert found.names() == wanted.names()
    for name in wanted.names():
        one, other = wanted.read(name), found.read(name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name
        assert found.info(name).stored_bytes <= wanted.info(name).stored_bytes
    assert size(coded) < 0.995 * size(plain)
    assert found.parameters == wanted.parameters


def test_logits_are_the_same_bit_for_bit(pair):
    """Every engine that runs the plain one."""
    plain, coded = pair
    engines = ["reference", *(["cpu"] if ENGINES.get("cpu")().runs(open_model(plain)) is None else [])]
    assert "cpu" in engines
    for name in engines:
        wanted, found = (ENGINES.get(name)().load(folder) for folder in pair)
        assert torch.equal(wanted.logits(IDS), found.logits(IDS)), name
        assert found.bytes_per_token() == wanted.bytes_per_token()
    assert coded != plain


def test_shards_stay_safetensors_files_and_config_says_how_to_decode(pair):
    plain, coded = pair
    stored, said = stored_tensors(coded), described(coded)
    assert said["format_version"] == 5
    tensors = said["storage"]["tensors"]
    assert tensors
    for name, coding in tensors.items():
        assert (stored[name].dtype, stored[name].dim()) == (torch.uint8, 1)
        original = open_model(plain).info(name)
        assert (coding["dtype"], tuple(coding["shape"])) == (original.dtype, original.shape)
    index = json.loads((coded / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert set(index["weight_map"]) == set(stored)


def test_the_pages_reader_decodes_them(pair):
    page = (Path(__file__).resolve().parents[2] / "docs" / "format.md").read_text("utf-8")
    reader: dict = {}
    exec(compile(page.split("```python\n")[-1].split("```")[0], "docs/format.md", "exec"), reader)
    wanted, found = (reader["read_tensors"](folder) for folder in pair)
    assert set(found) == set(wanted)
    assert all((found[name].dtype, found[name].tobytes()) == (t.dtype, t.tobytes()) for name, t in wanted.items())
    if "quantization_config" not in json.loads((pair[0] / "config.json").read_text()):
        assert reader["read_weights"](pair[1]) == {}
        return
    weights, again = (reader["read_weights"](folder) for folder in pair)
    assert set(weights) == set(again)
    assert all((weights[module] == again[module]).all() for module in weights)


def test_inspect_counts_what_is_on_the_disk(pair):
    plain, coded = (inspect(folder) for folder in pair)
    assert plain.loaded_bytes is None
    assert coded.notes == ()
    assert coded.bytes == sum(path.stat().st_size for path in pair[1].iterdir())
    assert sum(row.bytes for row in coded.tensors) == sum(t.nbytes for t in stored_tensors(pair[1]).values())
    assert coded.loaded_bytes == sum(row.bytes for row in plain.tensors)
    assert coded.bits_per_weight < plain.bits_per_weight
    assert coded.parameters == plain.parameters
    named = [[(r.name, r.shape, r.codec, r.granularity, r.bits) for r in found.tensors] for found in (plain, coded)]
    assert named[0] == named[1]
    rows = [row for row in coded.tensors if row.coded_bits is not None]
    assert rows
    for row in rows:
        assert 0 < row.entropy < row.coded_bits < row.bits
        # A frame's header and table of codes, and the entry of the tensor's table, in tensors as small as these.
        assert (
            row.coded_bits
            < 1.05 * row.entropy + 8 * 200 * (2 if row.codec == "bf16" else 1) / torch.tensor(row.shape).prod()
        )


def test_entropy_is_that_of_the_codes(coded):
    checkpoint = open_model(coded)
    module = "model.layers.0.mlp.down_proj"
    (row,) = [row for row in inspect(coded).tensors if row.name == f"{module}.weight"]
    scheme = stored_schemes(coded)[module]
    values = bits.unpack(checkpoint.read(f"{module}.codes"), scheme.params.bits, 192)
    share = torch.bincount(values.reshape(-1).long()).double() / values.numel()
    share = share[share > 0]
    assert row.entropy == pytest.approx(float(-(share * share.log2()).sum()), rel=1e-9)


def test_layers_say_what_they_take_on_the_disk(pair):
    for folder in pair:
        rows = {row.name: row for row in inspect(folder).tensors}
        for layer in json.loads((folder / "quern.json").read_text())["layers"]:
            row = rows[f"{layer['linear']}.weight"]
            signs = rows.get(f"{layer['linear']}.input_signs")
            taken = row.bytes + (signs.bytes if signs else 0)
            assert layer["bits_per_weight"] == pytest.approx(8 * taken / torch.tensor(row.shape).prod().item())


@pytest.mark.usefixtures("warm_workers")
@pytest.mark.parametrize("pair", ["trellis"], indirect=True)
def test_evaluate_runs_them_alike(pair, tiny_text):
    plain, coded = (evaluate(folder, texts=[tiny_text], tokens=256, speed_rounds=0) for folder in pair)
    assert coded.perplexity == plain.perplexity
    assert coded.bytes < plain.bytes
    assert coded.bits_per_weight < plain.bits_per_weight


def test_defaults_write_what_they_wrote(tiny_model, tiny_text, tmp_path):
    """A recipe that names the default is the recipe without the key, in every file."""
    named = parse_recipe({**small_recipe().to_json(), "storage": "plain"}, "x")
    assert named == small_recipe()
    assert "storage" not in named.to_json()
    assert small_recipe(storage="entropy").to_json()["storage"] == "entropy"
    folder = make_artifact(tiny_model, tmp_path / "out", tiny_text, weights={"group_size": 32})
    assert described(folder)["format_version"] == 3
    assert "storage" not in json.dumps([described(folder), json.loads((folder / "quern.json").read_text())])


def test_the_documented_lossless_recipe(wide_model, tmp_path):
    """An example of docs/recipes.md: an unquantized model with fewer bytes and its own logits."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text("utf-8")
    text = page.split("### `storage`")[1].split("```yaml\n")[1].split("```")[0]
    recipe = parse_recipe(yaml.safe_load(text), "the page's")
    report = quantize(wide_model, tmp_path / "out", recipe=recipe, threads=1)
    assert report.compression > 0
    assert described(tmp_path / "out")["modules"] == {}
    for name in ("reference", "cpu"):
        wanted, found = (ENGINES.get(name)().load(folder).logits(IDS) for folder in (wide_model, tmp_path / "out"))
        assert torch.equal(wanted, found)
    matrices = [row for row in inspect(tmp_path / "out").tensors if len(row.shape) == 2]
    assert all(row.coded_bits is not None and row.coded_bits < 12.5 for row in matrices)


def test_bytes_depend_neither_on_threads_nor_on_interruption(coded, wide_model, tiny_text, tmp_path, monkeypatch):
    parallel = make_artifact(wide_model, tmp_path / "two", tiny_text, threads=3, storage="entropy", **RECIPES["4 bits"])
    assert hashes(parallel) == hashes(coded)
    job = importlib.import_module("quern.pipeline.quantize")
    whole = job.quantize_blocks

    def stop_behind_the_first(running):
        from quern.pipeline.blockwise.blocks import quantize_block

        quantize_block(running, 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "quantize_blocks", stop_behind_the_first)
    with pytest.raises(KeyboardInterrupt):
        make_artifact(wide_model, tmp_path / "again", tiny_text, storage="entropy", **RECIPES["4 bits"])
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(job, "quantize_blocks", whole)
    again = make_artifact(wide_model, tmp_path / "again", tiny_text, storage="entropy", **RECIPES["4 bits"])
    assert hashes(again) == hashes(coded)


def test_a_head_of_its_own_is_coded_too(tiny_text, tmp_path):
    model = write_model(tmp_path / "model", tiny_config("llama", num_hidden_layers=1, tie_word_embeddings=False))
    folder = make_artifact(model, tmp_path / "out", tiny_text, storage="entropy", **LOSSLESS)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(described(folder)["storage"]["tensors"])
    assert torch.equal(*(ENGINES.get("cpu")().load(path).logits(IDS) for path in (model, folder)))


def test_formats_and_runtimes_that_cannot_say_so(coded, tiny_model, tmp_path):
    recipe = small_recipe(format="compressed-tensors", weights={"group_size": 32}, storage="entropy")
    with pytest.raises(UserError, match=r"format compressed-tensors .* not entropy-coded\. Leave out storage: entropy"):
        quantize(tiny_model, tmp_path / "out", recipe=recipe)
    assert not (tmp_path / "out").exists()
    own = small_recipe(weights={"group_size": 32}, storage="entropy")
    assert runtimes_of(own) == ("quern",)
    (obstacle,) = obstacles_of(own)
    assert (obstacle.target, "does not decode" in obstacle.reason) == ("transformers", True)
    assert "transformers" in runtimes_of(small_recipe(weights={"group_size": 32}))
    from transformers import AutoModelForCausalLM

    with pytest.raises(UserError, match="does not decode entropy-coded tensors"):
        AutoModelForCausalLM.from_pretrained(coded)


def test_an_artifact_is_not_quantized_again(coded, tmp_path):
    with pytest.raises(UserError, match="already quantized, by quern"):
        quantize(coded, tmp_path / "out", recipe=small_recipe())


def test_without_the_package_the_way_out_is_said(coded, tiny_model, tmp_path):
    script = (
        "import sys; sys.modules['zstandard'] = None\n"
        "from quern.core.errors import UserError\nfrom quern.core.recipe import parse_recipe\n"
        "from quern.engines.base import ENGINES\nfrom quern.pipeline.quantize import quantize\n"
        "recipe = parse_recipe({'name': 'x', 'weights': {'codec': 'none'}, 'rounding': {'method': 'nearest'}, 'storage': 'entropy'}, 'x')\n"
        "for act in (lambda: quantize(sys.argv[1], 'out', recipe=recipe), lambda: ENGINES.get('reference')().load(sys.argv[2])):\n"
        "    try:\n        act()\n    except UserError as error:\n        print(error)\n"
    )
    command = [sys.executable, "-c", script, str(tiny_model), str(coded)]
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, timeout=300, env=os.environ, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("pip install 'quern[entropy]'") == 2


def changed(folder: Path, place: Path, change) -> Path:
    copy = shutil.copytree(folder, place)
    config = json.loads((copy / "config.json").read_text("utf-8"))
    change(config["quantization_config"])
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    return copy


FIRST = "model.layers.0.mlp.gate_proj.codes"
LIES = {
    "a shape that the model has not": (lambda q: q["storage"]["tensors"][FIRST].update(shape=[96, 9]), "has shape"),
    "a dtype that it has not": (lambda q: q["storage"]["tensors"][FIRST].update(dtype="I8"), "dtype|shape"),
    "a coded tensor that is none": (lambda q: q["storage"]["tensors"].pop(FIRST), "has shape|dtype"),
    "a name that is not there": (
        lambda q: q["storage"]["tensors"].update(zap=q["storage"]["tensors"][FIRST]), "'zap' is missing"),
    "no storage": (lambda q: q.pop("storage"), "storage is not described"),
    "storage that is a list": (lambda q: q.update(storage=[]), "storage is not described"),
    "another coder": (lambda q: q["storage"].update(coder="zap"), "coded by 'zap'"),
    "version 3": (lambda q: q.update(format_version=3), "has shape|has dtype"),
    "version 6": (lambda q: q.update(format_version=6), r"reads versions 1, 2, 3, 4 and 5"),
    "another checksum": (lambda q: q["storage"]["tensors"][FIRST].update(checksum=1), "another checksum"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_lies_about_storage_are_refused(lie, coded, tmp_path):
    change, match = LIES[lie]
    folder = changed(coded, tmp_path / "lying", change)
    for name in ("reference", "cpu"):
        with pytest.raises(UserError, match=match):
            ENGINES.get(name)().load(folder)


def test_damage_names_the_tensor(coded, tmp_path):
    folder = shutil.copytree(coded, tmp_path / "damaged")
    info = read_header(folder / DAMAGED)
    name = next(name for name in described(folder)["storage"]["tensors"] if name in info)
    raw = bytearray((folder / DAMAGED).read_bytes())
    raw[info[name].end - 20] ^= 1
    (folder / DAMAGED).write_bytes(raw)
    for act in (ENGINES.get("reference")().load, ENGINES.get("cpu")().load, inspect):
        with pytest.raises(BadFileError, match="coded tensor") as caught:
            act(folder)
        assert name in str(caught.value)
        assert DAMAGED in str(caught.value)


def test_every_coded_dtype_is_one_that_headers_know():
    from quern.formats.entropy.symbols import CODED

    assert set(CODED) < set(DTYPES)
