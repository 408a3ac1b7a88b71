"""docs/format.md: its examples run, its reader (which never saw this package) reads what the package writes, its tables are whole."""

import json
import re
from pathlib import Path

import pytest
import torch
from artifacts import INT8, make_artifact
from tiny_model import tiny_config, write_model

from quern.checkpoint.safetensors_file import DTYPES, read_header, read_tensor
from quern.codecs.base import CODECS
from quern.core.artifact import VERSION, module_schemes
from quern.core.recipe import WeightScheme, load_recipe

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "format.md").read_text("utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def reader() -> dict:
    names: dict = {}
    exec(compile(BLOCKS[-1], "docs/format.md", "exec"), names)
    return names


def table(heading: str) -> dict[str, list[str]]:
    """Rows of the first table below ``heading``, by the code in their first cell."""
    text = PAGE.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_worked_example_is_right():
    assert len(BLOCKS) == 2
    exec(compile(BLOCKS[0], "docs/format.md", "exec"), {})


def test_the_page_is_about_this_version():
    assert PAGE.startswith(f"# The quern format, version {VERSION}\n")
    example = json.loads(re.search(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)[1])
    assert example["format_version"] == VERSION
    ((module, scheme),) = module_schemes(example).items()
    recipe = load_recipe(example["recipe"]["name"])
    assert example["modules"][module] == recipe.scheme_for(module).model_dump(mode="json")
    assert scheme == recipe.scheme_for("model.layers.0.mlp.down_proj")


def test_the_tables_name_every_key(tiny_model, tiny_text, tmp_path):
    folder = make_artifact(tiny_model, tmp_path / "out", tiny_text, weights=INT8, activations={"mode": "static"})
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    example = json.loads(re.search(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)[1])
    assert set(written) == set(example)
    assert set(table("`quantization_config`")) == set(WeightScheme.model_fields)
    provenance = json.loads((folder / "quern.json").read_text())
    assert set(table("`quern.json`")) == {f"fingerprint.{key}" for key in provenance["fingerprint"]} | {"layers"}
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
    schemes = module_schemes(json.loads((folder / "config.json").read_text())["quantization_config"])
    assert set(weights) == set(schemes)
    tensors = {
        key: read_tensor(path, info) for path in folder.glob("*.safetensors") for key, info in read_header(path).items()
    }
    for module, scheme in schemes.items():
        codec, shape = CODECS.get(scheme.codec)(scheme), weights[module].shape
        parts = {part: tensors[f"{module}.{part}"] for part in codec.part_shapes(shape)}
        assert torch.equal(codec.decode(shape, parts), torch.from_numpy(weights[module])), module
        assert {name: (size, dtype) for name, (size, dtype) in codec.part_shapes(shape).items()} == expected_parts(
            scheme, shape
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
        codec = CODECS.get("trellis")(WeightScheme.model_validate(scheme))
        parts = {part: torch.from_numpy(tensors[f"{module}.{part}"].copy()) for part in codec.part_shapes(found.shape)}
        assert {part: (tuple(t.shape), t.dtype) for part, t in parts.items()} == codec.part_shapes(found.shape)
        assert torch.equal(codec.decode(found.shape, parts), torch.from_numpy(found)), module
        signs = tensors.get(f"{module}.input_signs")
        assert (signs is None) == (module == "lm_head")
        assert signs is None or signs.shape == (-(-found.shape[1] // 8),)


def expected_parts(scheme: WeightScheme, shape: tuple[int, int]) -> dict:
    """The page's table, evaluated: every cell of it is an expression in the words that it defines."""
    rows, columns = shape
    width = min(scheme.group_size or columns, columns)
    words = {
        "rows": rows, "columns": columns, "groups": -(-columns // width),
        "scale_rows": 1 if scheme.granularity == "tensor" else rows, "words": lambda n: -(-n * scheme.bits // 32),
    }  # fmt: skip
    holds = {
        "`bits` is 8 and `symmetric`": scheme.bits == 8 and scheme.symmetric,
        "always": True,
        "not `symmetric`": not scheme.symmetric,
    }
    holds["otherwise"] = not holds["`bits` is 8 and `symmetric`"]
    section = PAGE.split("## Tensors of a module: codec `integer`", 1)[1].split("### Bits", 1)[0]
    found = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `<module>.") and holds.get(cells[3]):
            dtype = (
                {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[scheme.scale_dtype]
                if "F16" in cells[1]
                else cells[1].strip("`")
            )
            found[cells[0].strip("`").removeprefix("<module>.")] = (eval(cells[2].strip("`"), {}, words), DTYPES[dtype])
    return found


def test_the_pages_reader_refuses_what_it_does_not_know(reader, tiny_model, tiny_text, tmp_path):
    folder = make_artifact(tiny_model, tmp_path / "out", tiny_text, weights={"bits": 4, "group_size": 32})
    config = json.loads((folder / "config.json").read_text())
    for change in ({"format_version": 3}, {"quant_method": "zap"}):
        (folder / "config.json").write_text(
            json.dumps({**config, "quantization_config": {**config["quantization_config"], **change}})
        )
        with pytest.raises(ValueError, match="not the quern format, version 1 or 2"):
            reader["read_weights"](folder)
