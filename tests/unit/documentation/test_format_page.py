"""docs/format.md: its examples run, its reader (which never saw this package) reads what the package writes, its tables are whole."""

import json
import re
from pathlib import Path

import pytest
import torch
from artifacts import INT8, make_artifact, stored_tensors
from tiny_model import tiny_config, write_model

from quern.architectures.base import architecture_of
from quern.checkpoint.safetensors_file import DTYPES, read_header, read_tensor
from quern.codecs.base import CODECS, ScaledParameters, codec_of
from quern.core.plan import plan_for
from quern.core.recipe import load_recipe
from quern.core.scheme import parse_scheme
from quern.formats.base import StoredModule
from quern.formats.entropy.coded_source import parse_storage, storage_json
from quern.formats.entropy.entropy import LEAST_BYTES, LEAST_GAIN
from quern.formats.entropy.symbols import CHUNK, CODED
from quern.formats.quern import CODED_VERSION, INPUT_GROUP, READ_VERSIONS, VERSION, WIDER_VERSION, QuernReader
from quern.pipeline.inspect import inspect

OWN_CODECS = [name for name in CODECS.names() if CODECS.get(name).__module__.startswith("quern.codecs.")]

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "format.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
EXAMPLE = json.loads(re.search(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)[1])


@pytest.fixture(scope="module")
def reader() -> dict:
    names: dict = {}
    exec(compile(BLOCKS[-1], "docs/format.md", "exec"), names)
    return names


def table(heading: str) -> dict[str, list[str]]:
    """Rows of the first table below ``heading``, by the code in their first cell."""
    text = re.split(rf"^##+ {re.escape(heading)}\n", PAGE, maxsplit=1, flags=re.MULTILINE)[1]
    text = re.split(r"^##", text, maxsplit=1, flags=re.MULTILINE)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    return {row[0].strip("`"): row[1:] for row in rows}


def written_config(folder: Path) -> dict:
    """The artifact's config.json."""
    return json.loads((folder / "config.json").read_text("utf-8"))


def plan_of(config: dict) -> dict[str, StoredModule]:
    """What the package reads of an artifact with that config.json."""
    return QuernReader(config["quantization_config"], architecture_of(config)).plan()


def test_the_worked_example_is_right():
    assert len(BLOCKS) == 2
    exec(compile(BLOCKS[0], "docs/format.md", "exec"), {})


def test_the_page_is_about_this_version():
    assert PAGE.startswith(f"# The quern format, version {VERSION}\n")
    assert EXAMPLE["format_version"] == VERSION
    recipe = load_recipe(EXAMPLE["recipe"]["name"])
    ((module, entry),) = EXAMPLE["modules"].items()
    assert entry["weights"] == plan_for(recipe, module).scheme.to_json()
    stored = plan_of({**tiny_config("llama"), "quantization_config": EXAMPLE})
    assert stored == {module: StoredModule(plan_for(recipe, module).scheme, recipe.rotated, recipe.activations.mode)}


def test_the_tables_name_every_key(tiny_model, tiny_text, tmp_path):
    folder = make_artifact(tiny_model, tmp_path / "out", tiny_text, weights=INT8, activations={"mode": "static"})
    written = written_config(folder)["quantization_config"]
    assert set(written) == set(EXAMPLE)
    assert all(set(entry) == set(table("A module")) - {INPUT_GROUP} for entry in written["modules"].values())
    scheme = table("A scheme")
    assert set(re.findall(r"`(\w+)`", scheme["codec"][1])) == set(OWN_CODECS)
    assert set(CODECS.get("integer").Parameters.model_fields) == set(ScaledParameters.model_fields)
    own = {
        name: set(CODECS.get(name).Parameters.model_fields) - set(ScaledParameters.model_fields) for name in OWN_CODECS
    }
    assert {"codec", *ScaledParameters.model_fields}.union(*own.values()) == set(scheme)
    for key, (codecs, *_) in scheme.items():
        owners = {name for name, keys in own.items() if key in keys}
        assert codecs == (f"`{owners.pop()}`" if owners else "all"), key
    provenance = json.loads((folder / "quern.json").read_text())
    assert set(table("`quern.json`")) == {f"fingerprint.{key}" for key in provenance["fingerprint"]} | {
        "layers",
        "notes",
        "inputs",
        "files",
        "tuning",
        "padding",
    }
    assert set(provenance) == {"fingerprint", "layers", "notes", "inputs", "files"}
    described = table("`quern.json`")["inputs"][0]
    assert all(f"`{key}`" in described for key in (*provenance["inputs"], *provenance["inputs"]["groups"][0]))
    assert all(f"`{key}`" in table("`quern.json`")["layers"][0] for key in provenance["layers"][0])
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "config.json", "quern.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
        *(f"model-{k:05d}-of-00005.safetensors" for k in range(1, 6)),
    }  # fmt: skip


RECIPES = {
    f"{bits} bits": {
        "weights": {"bits": bits, "symmetric": bits % 2 == 0, "group_size": 40, "scale_dtype": "bfloat16"},
        "overrides": [
            {"pattern": "*.gate_proj", "bits": bits, "symmetric": False, "granularity": "tensor"},
            {
                "pattern": "*.o_proj",
                "bits": bits,
                "symmetric": True,
                "granularity": "channel",
                "scale_dtype": "float32",
            },
            {"pattern": "*.down_proj", "bits": bits, "symmetric": False, "granularity": "channel"},
            {"pattern": "*.0.self_attn.v_proj", "codec": "none"},
        ],
        "embedding": {"bits": bits, "symmetric": False, "group_size": 1000},
        "head": {"bits": bits, "symmetric": True, "granularity": "tensor"},
    }
    for bits in range(1, 9)
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_pages_reader_reads_what_the_package_writes(name, reader, tiny_text, tmp_path):
    """Heads of 24 on a width of 64, so that o_proj reads another number of inputs than everything else."""
    config = tiny_config("qwen3", head_dim=24, num_hidden_layers=2, tie_word_embeddings=False)
    model = write_model(tmp_path / "model", config)
    folder = make_artifact(model, tmp_path / "out", tiny_text, **RECIPES[name])
    weights = reader["read_weights"](folder)
    schemes = {module: stored.scheme for module, stored in plan_of(written_config(folder)).items()}
    assert set(weights) == set(schemes)
    tensors = {
        key: read_tensor(path, info) for path in folder.glob("*.safetensors") for key, info in read_header(path).items()
    }
    for module, scheme in schemes.items():
        codec, shape = codec_of(scheme), weights[module].shape
        parts = {part: tensors[f"{module}.{part}"] for part in codec.part_shapes(shape)}
        assert torch.equal(codec.decode(shape, parts), torch.from_numpy(weights[module])), module
        assert {name: (size, dtype) for name, (size, dtype) in codec.part_shapes(shape).items()} == expected_parts(
            scheme.params, shape
        )


@pytest.mark.parametrize("variant", [(2, 6, 1), (2, 7, 2), (3, 7, 1), (3, 7, 2), (4, 7, 1), (4, 7, 2)], ids=str)
def test_the_pages_reader_reads_trellis_codes(variant, reader, tiny_text, tmp_path):
    """Matrices of 64, 96 and 128 rows and one of 300, so that there are tiles of every kind."""
    scheme = dict(zip(("bits", "window", "tables"), variant, strict=True), codec="trellis")
    model = write_model(tmp_path / "model", tiny_config("llama", num_hidden_layers=1, tie_word_embeddings=False))
    folder = make_artifact(
        model, tmp_path / "out", tiny_text, weights=scheme, head=scheme, transforms=[{"method": "hadamard"}]
    )
    weights = reader["read_weights"](folder)
    tensors = reader["read_tensors"](folder)
    assert len(weights) == 8
    for module, found in weights.items():
        codec = codec_of(parse_scheme(scheme))
        parts = {part: torch.from_numpy(tensors[f"{module}.{part}"].copy()) for part in codec.part_shapes(found.shape)}
        assert {part: (tuple(t.shape), t.dtype) for part, t in parts.items()} == codec.part_shapes(found.shape)
        assert torch.equal(codec.decode(found.shape, parts), torch.from_numpy(found)), module
        signs = tensors.get(f"{module}.input_signs")
        assert (signs is None) == (module == "lm_head")
        assert signs is None or signs.shape == (-(-found.shape[1] // 8),)


CODES_WITH_TABLES = {
    "kmeans": {
        "weights": {"codec": "kmeans", "bits": 3},
        "overrides": [
            {"pattern": "*.gate_proj", "codec": "kmeans", "bits": 2, "granularity": "tensor"},
            {"pattern": "*.o_proj", "codec": "kmeans", "bits": 4, "granularity": "group", "group_size": 40},
            {"pattern": "*.down_proj", "codec": "kmeans", "bits": 3, "granularity": "group", "group_size": 64},
        ],
        "head": {"codec": "kmeans", "bits": 3, "granularity": "tensor"},
    },
    "fixed": {
        "weights": {"codec": "nf4", "group_size": 40},
        "overrides": [
            {"pattern": "*.gate_proj", "codec": "log", "bits": 3},
            {"pattern": "*.q_proj", "codec": "log", "bits": 2},
            {"pattern": "*.up_proj", "codec": "log", "bits": 4, "granularity": "tensor"},
            {"pattern": "*.o_proj", "codec": "log", "bits": 5, "granularity": "channel"},
            {"pattern": "*.down_proj", "codec": "mxfp4"},
            {"pattern": "*.k_proj", "codec": "nf4", "granularity": "block", "group_size": 32},
        ],
        "head": {"codec": "nvfp4"},
    },
    "floats and blocks": {
        "weights": {"codec": "float8"},
        "overrides": [
            {"pattern": "*.gate_proj", "codec": "float8", "variant": "e5m2", "granularity": "tensor"},
            {
                "pattern": "*.o_proj",
                "codec": "float8",
                "granularity": "group",
                "group_size": 40,
                "scale_dtype": "bfloat16",
            },
            {"pattern": "*.down_proj", "codec": "float8", "granularity": "block", "group_size": 32},
            {"pattern": "*.up_proj", "bits": 5, "granularity": "block", "group_size": 32},
        ],
        "head": {"bits": 8, "granularity": "block", "group_size": 128},
    },
}


@pytest.mark.parametrize("name", CODES_WITH_TABLES)
def test_the_pages_reader_reads_codes_with_tables_and_floats(name, reader, tiny_text, tmp_path):
    config = tiny_config("qwen3", head_dim=24, num_hidden_layers=1, tie_word_embeddings=False, hidden_size=320)
    model = write_model(tmp_path / "model", config)
    folder = make_artifact(model, tmp_path / "out", tiny_text, **CODES_WITH_TABLES[name])
    weights, tensors = reader["read_weights"](folder), stored_tensors(folder)
    schemes = {module: stored.scheme for module, stored in plan_of(written_config(folder)).items()}
    assert len(weights) == len(schemes) == 8
    for module, scheme in schemes.items():
        codec, found = codec_of(scheme), torch.from_numpy(weights[module])
        parts = {part: tensors[f"{module}.{part}"] for part in codec.part_shapes(tuple(found.shape))}
        assert torch.equal(codec.decode(tuple(found.shape), parts), found), module


def expected_parts(params: ScaledParameters, shape: tuple[int, int]) -> dict:
    """The page's table, evaluated: every cell of it is an expression in the words that it defines."""
    rows, columns = shape
    width = min(params.group_size or columns, columns)
    words = {
        "rows": rows, "columns": columns, "groups": -(-columns // width),
        "scale_rows": {"tensor": 1, "block": -(-rows // width)}.get(params.granularity, rows), "words": lambda n: -(-n * params.bits // 32),
    }  # fmt: skip
    holds = {
        "`bits` is 8 and `symmetric`": params.bits == 8 and params.symmetric,
        "always": True,
        "not `symmetric`": not params.symmetric,
    }
    holds["otherwise"] = not holds["`bits` is 8 and `symmetric`"]
    section = PAGE.split("## Tensors of a module: codec `integer`", 1)[1].split("### Bits", 1)[0]
    found = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `<module>.") and holds.get(cells[3]):
            dtype = (
                {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[params.scale_dtype]
                if "F16" in cells[1]
                else cells[1].strip("`")
            )
            found[cells[0].strip("`").removeprefix("<module>.")] = (eval(cells[2].strip("`"), {}, words), DTYPES[dtype])
    return found


ROTATED_WITH_INT8 = {
    "weights": {"bits": 3, "group_size": 32},
    "overrides": [
        {"pattern": "*.down_proj", "rotated": False},
        {"pattern": "*.up_proj", **INT8, "activations": {"mode": "static"}},
        {"pattern": "*.q_proj", **INT8, "activations": {"mode": "dynamic"}},
    ],
    "head": {"codec": "trellis", "bits": 3},
    "transforms": [{"method": "hadamard"}],
}


def test_the_pages_reader_knows_what_becomes_of_inputs(reader, tiny_text, tmp_path):
    """Modules that differ in it, so that no choice for all of them would do."""
    model = write_model(tmp_path / "model", tiny_config("llama", num_hidden_layers=1, tie_word_embeddings=False))
    folder = make_artifact(model, tmp_path / "out", tiny_text, **ROTATED_WITH_INT8)
    config = written_config(folder)
    modules = reader["modules_of"](config)
    assert {m: StoredModule(parse_scheme(s), *inputs) for m, (s, *inputs) in modules.items()} == plan_of(config)
    assert {tuple(inputs) for _, *inputs in modules.values()} == {
        (True, "none"), (False, "none"), (True, "static"), (True, "dynamic"),
    }  # fmt: skip
    tensors = reader["read_tensors"](folder)
    for module, (_, rotated, activations) in modules.items():
        assert (f"{module}.input_signs" in tensors) == rotated
        assert (f"{module}.input_scale" in tensors) == (activations == "static")


WIDER = {
    "W4A8": {"weights": {"bits": 4, "group_size": 32}, "activations": {"mode": "dynamic"}},
    "by groups": {"weights": INT8, "activations": {"mode": "dynamic", "granularity": "group", "group_size": 16}},
}


@pytest.mark.parametrize("name", WIDER)
def test_version_4_is_written_only_where_it_is_needed_and_read_by_the_page(name, reader, tiny_text, tmp_path):
    model = write_model(tmp_path / "model", tiny_config("llama", num_hidden_layers=1))
    choices = WIDER[name]
    stored = written_config(make_artifact(model, tmp_path / "out", tiny_text, **choices))
    assert stored["quantization_config"]["format_version"] == WIDER_VERSION
    size = choices["activations"].get("group_size")
    found = plan_of(stored)
    assert {(module.activations, module.input_group) for module in found.values()} == {("dynamic", size)}
    assert {entry.get(INPUT_GROUP) for entry in stored["quantization_config"]["modules"].values()} == {size}
    assert set(reader["read_weights"](tmp_path / "out")) == set(found)
    plain = written_config(make_artifact(model, tmp_path / "plain", tiny_text, weights=choices["weights"]))
    assert plain["quantization_config"]["format_version"] == VERSION


def test_the_page_names_every_key_of_coded_tensors():
    """Its example is one that the package reads, and its table has the same keys."""
    text = PAGE.split("## Coded tensors", 1)[1]
    example = json.loads(re.search(r"```json\n(.*?)```", text, flags=re.DOTALL)[1])
    ((name, coding),) = parse_storage(example).items()
    assert storage_json({name: coding}) == example
    documented = table("Coded tensors")
    assert set(documented) == {"coder", *coding.to_json()}
    assert set(re.findall(r"`(\w+)`", documented["dtype"][0])) == set(CODED)
    assert "2^20 symbols" in text
    assert CHUNK == 2**20
    assert f"{LEAST_BYTES} bytes and more that become smaller by 1/{LEAST_GAIN}" in text.replace("\n", " ")


def as_version(config: dict, version: int) -> dict:
    """A config.json as quern wrote it when ``version`` was the newest."""
    stored = config["quantization_config"]
    unused = {} if version == 1 else {"window": None, "tables": None}
    modules = {module: {**unused, **entry["weights"]} for module, entry in stored["modules"].items()}
    return {**config, "quantization_config": {**stored, "format_version": version, "modules": modules}}


OLDER = {
    1: {"weights": INT8, "activations": {"mode": "static"}, "head": {"bits": 4, "group_size": 32}},
    2: {"weights": {"codec": "trellis", "bits": 3}, "head": INT8, "transforms": [{"method": "hadamard"}]},
}


@pytest.mark.parametrize("version", OLDER)
def test_older_versions_are_read_as_the_page_says(version, reader, tiny_text, tmp_path):
    """By the page's reader and by the package; the head's inputs are as they are, whatever the recipe says."""
    assert {*OLDER, VERSION, WIDER_VERSION, CODED_VERSION} == set(READ_VERSIONS)
    model = write_model(tmp_path / "model", tiny_config("llama", num_hidden_layers=1, tie_word_embeddings=False))
    folder = make_artifact(model, tmp_path / "out", tiny_text, **OLDER[version])
    newest = written_config(folder)
    modules, weights, shown = reader["modules_of"](newest), reader["read_weights"](folder), inspect(folder)
    assert shown.notes == ()
    older = as_version(newest, version)
    assert plan_of(older) == plan_of(newest)
    found = reader["modules_of"](older)
    assert {name: inputs for name, (_, *inputs) in found.items()} == {n: i for n, (_, *i) in modules.items()}
    assert {tuple(inputs) for _, *inputs in found.values()} == {
        (False, "none"), (False, "static") if version == 1 else (True, "none"),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(older))
    assert (inspect(folder).tensors, inspect(folder).notes) == (shown.tensors, ())
    again = reader["read_weights"](folder)
    assert set(again) == set(weights) == set(modules)
    assert all((again[module] == weight).all() for module, weight in weights.items())


def test_the_pages_reader_refuses_what_it_does_not_know(reader, tiny_model, tiny_text, tmp_path):
    folder = make_artifact(tiny_model, tmp_path / "out", tiny_text, weights={"bits": 4, "group_size": 32})
    config = written_config(folder)
    for change in ({"format_version": 6}, {"quant_method": "zap"}):
        (folder / "config.json").write_text(
            json.dumps({**config, "quantization_config": {**config["quantization_config"], **change}})
        )
        with pytest.raises(ValueError, match="not the quern format, version 1 to 5"):
            reader["read_weights"](folder)
