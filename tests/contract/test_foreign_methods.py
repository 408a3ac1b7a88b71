"""What every method of other tools promises: it knows its models, decodes them exactly, and refuses contradictions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign_models import VARIANTS, ForeignModel, change, write_foreign, write_mxfp4

from quern.checkpoint.checkpoint import Checkpoint, open_checkpoint
from quern.checkpoint.foreign.base import FOREIGN
from quern.checkpoint.foreign.decoded import decoded, foreign_weights
from quern.core.errors import BadFileError
from quern.loading.fitting import open_original

EVERY = pytest.mark.parametrize("name", VARIANTS)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, ForeignModel]:
    folder = tmp_path_factory.mktemp("foreign")
    return {name: write_foreign(folder / name.replace(" ", "_"), variant) for name, variant in VARIANTS.items()}


def opened(folder: Path) -> Checkpoint:
    return decoded(open_checkpoint(folder))


def test_there_is_a_model_of_every_method(tmp_path):
    write_mxfp4(tmp_path)
    known = {variant.config["quant_method"] for variant in VARIANTS.values()}
    assert known | {"mxfp4"} == set(FOREIGN.names())
    for name in FOREIGN:
        assert FOREIGN.get(name).tool


def check_values(model: ForeignModel, exact: bool) -> None:
    checkpoint = open_original(model.folder)
    for name, value in model.values.items():
        found = checkpoint.read(name, finite=True)
        assert found.dtype == torch.float32
        assert tuple(found.shape) == checkpoint.info(name).shape == tuple(value.shape)
        assert torch.equal(found, value.float())
        if exact:
            assert torch.equal(found.double(), value)
        assert not torch.equal(found, found.flip(0))


@EVERY
def test_weights_are_decoded_exactly(name, models):
    check_values(models[name], VARIANTS[name].exact)


@pytest.mark.parametrize(
    "name", ["gptq 3 bits", "awq", "fp8 blocks", "bitsandbytes nf4 nested", "compressed-tensors int4"]
)
def test_so_are_those_of_another_family(name, tmp_path):
    """With sizes that fill several words and blocks, and a head of its own."""
    sizes = {"tie_word_embeddings": False, "attention_bias": False, "hidden_size": 128, "head_dim": 32}
    check_values(write_foreign(tmp_path / "model", VARIANTS[name], "llama", 1, **sizes), VARIANTS[name].exact)


@EVERY
def test_the_rest_is_read_as_it_is_and_all_bytes_are_counted(name, models):
    stored, read = open_checkpoint(models[name].folder), opened(models[name].folder)
    weights = foreign_weights(read)
    assert set(weights) == set(models[name].values)
    assert "quantization_config" not in read.config
    for other in set(read.names()) - set(weights):
        assert torch.equal(read.read(other), stored.read(other))
    assert sum(read.info(n).stored_bytes for n in read.names()) == sum(
        stored.info(n).stored_bytes for n in stored.names()
    )
    variant = VARIANTS[name]
    assert {(weight.granularity, weight.bits) for weight in weights.values()} == {(variant.granularity, variant.bits)}
    assert read.bf16_bytes > 2 * read.parameters
    tool = FOREIGN.get(variant.config["quant_method"]).tool
    assert f"by {tool} ({variant.bits} bits by {variant.granularity})" in read.notes[0]
    assert read.notes == read.lasting_notes


@EVERY
def test_a_missing_part_is_refused(name, models, tmp_path):
    """Every part of one linear in turn, but those that may be missing."""
    model = models[name]
    module = "model.layers.1.mlp.up_proj"
    optional = {"weight_format", "input_scale"} | ({"g_idx"} if not VARIANTS[name].config.get("desc_act") else set())
    parts = [
        part.removeprefix(f"{module}.") for part in foreign_weights(opened(model.folder))[f"{module}.weight"].parts
    ]
    for part in sorted(set(parts) - optional):
        folder = change(model, tmp_path / part, lambda tensors, part=part: tensors.pop(f"{module}.{part}"))
        with pytest.raises(BadFileError) as caught:
            open_original(folder)
        assert module in str(caught.value)


@EVERY
def test_a_part_of_another_shape_is_refused(name, models, tmp_path):
    model = models[name]
    module = "model.layers.1.mlp.up_proj"
    parts = [
        part.removeprefix(f"{module}.") for part in foreign_weights(opened(model.folder))[f"{module}.weight"].parts
    ]
    for part in parts:
        if part == "input_scale" or part.startswith("weight.quant_state"):
            continue

        def longer(tensors: dict[str, torch.Tensor], part: str = part) -> None:
            stored = tensors[f"{module}.{part}"]
            wide = stored.reshape(1) if stored.dim() == 0 else stored
            tensors[f"{module}.{part}"] = torch.cat([wide, wide, wide]).contiguous()

        with pytest.raises(BadFileError) as caught:
            open_original(change(model, tmp_path / part, longer))
        assert module in str(caught.value)


@pytest.mark.parametrize("method", sorted({variant.config["quant_method"] for variant in VARIANTS.values()}))
def test_a_configuration_without_packed_weights_is_refused(method, tiny_model, tmp_path):
    config = next(v.config for v in VARIANTS.values() if v.config["quant_method"] == method)
    bare = write_foreign(tmp_path / "packed", next(v for v in VARIANTS.values() if v.config == config))

    def plain(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "_proj." in name and not name.endswith(".bias")]:
            del tensors[name]
        tensors |= {name: value.to(torch.bfloat16) for name, value in bare.values.items()}

    with pytest.raises(BadFileError, match="no weight is packed as"):
        open_original(change(bare, tmp_path / "plain", plain))


def test_numbers_that_are_not_finite_are_refused_with_the_tensors_name(models, tmp_path):
    for name, part in (
        ("gptq 4 bits", "scales"), ("awq", "scales"), ("fp8 blocks", "weight_scale_inv"),
        ("bitsandbytes nf4", "weight.absmax"), ("bitsandbytes nf4 nested", "weight.nested_absmax"),
        ("bitsandbytes nf4", "weight.quant_map"), ("bitsandbytes int8", "SCB"),
        ("compressed-tensors int4", "weight_scale"), ("compressed-tensors nvfp4", "weight_scale"),
        ("compressed-tensors nvfp4", "weight_global_scale"),
    ):  # fmt: skip
        full = f"model.layers.0.mlp.up_proj.{part}"

        def spoil(tensors: dict[str, torch.Tensor], full: str = full) -> None:
            tensors[full].view(-1)[-1:] = torch.tensor(float("nan")).to(tensors[full].dtype)

        model = change(models[name], tmp_path / name / part, spoil)
        with pytest.raises(BadFileError, match="NaN or infinite") as caught:
            open_original(model).read("model.layers.0.mlp.up_proj.weight")
        assert full in str(caught.value)
